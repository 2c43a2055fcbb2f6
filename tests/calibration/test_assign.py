"""`assign`: the least loss of a budget of bits, against every other choice; and losses that are what they say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantlib
from quantlib.calibration import stages
from quantlib.calibration.assignment import Choice, choose, error_of, hull
from quantlib.calibration.sensitivity import curvatures
from quantlib.spec import QuantSpec

CANDIDATES = ["int4:group:64", "int4:group:16", "int8:row"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 16))
    with torch.no_grad():
        found[2].weight[:, ::7] *= 20  # outliers: a layer that is hard to quantize
    return found


def inputs() -> list[torch.Tensor]:
    return list(torch.randn(4, 32, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("batches", [None, inputs()], ids=["data-free", "inputs"])
@pytest.mark.parametrize("bits", [5.0, 5.7, 7.0, 9.0])
def test_a_choice_of_the_budget_that_no_cheaper_one_beats(bits: float, batches: list[torch.Tensor] | None) -> None:
    chosen = quantlib.assign(model(), bits, CANDIDATES, batches)
    assert list(chosen) == ["0", "2", "4"]
    assert chosen.bits <= bits
    total = sum(chosen.weights.values())
    for each in itertools.product(*chosen.choices.values()):
        if sum(c.bits for c in each) <= chosen.bits * total:
            assert chosen.loss <= sum(c.loss for c in each) * (1 + 1e-9)


def test_bits_are_those_of_the_report() -> None:
    chosen, quantized = quantlib.assign(model(), 5.7, CANDIDATES), model()
    reports = chosen.apply_(quantized)
    layers = [layer for report in reports for layer in report.layers]
    assert {layer.name: layer.spec for layer in layers} == dict(chosen)
    assert 8 * sum(layer.bytes_after for layer in layers) == pytest.approx(chosen.bits * sum(chosen.weights.values()))
    assert {name: str(quantized.get_submodule(name).spec) for name in chosen} == dict(chosen)


def test_what_is_assigned_can_be_calibrated() -> None:
    m, chosen = model(), quantlib.assign(model(), 5.7, CANDIDATES, inputs())
    report = quantlib.calibrate(m, inputs(), chosen)
    assert {layer.name: layer.spec for layer in report.layers} == dict(chosen)


def test_the_model_stays_as_it_was() -> None:
    m = model()
    m[0].weight.requires_grad_(False)
    before = {name: p.clone() for name, p in m.named_parameters()}
    quantlib.assign(m.train(), 5.7, CANDIDATES, inputs())
    assert m.training
    assert [p.requires_grad for p in m.parameters()] == [False, *[True] * 5]
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in m.named_parameters())
    assert not any(module._forward_hooks for module in m.modules())


def test_a_loss_is_half_the_squared_error_of_the_outputs() -> None:
    """The curvature of the last layer of a model without logits is exact: G is the unit matrix in the mean."""
    m, x = model(), torch.cat(inputs())
    found = curvatures(m, stages.calls_of(inputs() * 50, m), {"4": m[4]}, lambda: None)["4"]
    error = error_of(m[4].weight.detach(), QuantSpec.parse("int4:group:16"))
    with torch.no_grad():
        hidden = m[:4](x)
    exact = 0.5 * float((hidden @ error.T).square().sum(-1).mean())
    assert found.loss(error) == pytest.approx(exact, rel=0.2)


def test_a_loss_is_the_kl_of_the_next_token() -> None:
    """The model has no attention, so that the mean over tokens is not touched by what tokens do to one another."""
    torch.manual_seed(0)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.layer = nn.Embedding(32, 64), nn.Linear(64, 32)

        def forward(self, ids: torch.Tensor) -> object:
            return type("Output", (), {"logits": self.layer(self.embedding(ids))})()

    m, ids = Logits(), torch.randint(32, (8, 64))
    chosen = quantlib.assign(m, 9.0, CANDIDATES, [row[None] for row in ids] * 8)
    for choice in chosen.choices["layer"][:2]:
        other = Logits()
        other.load_state_dict(m.state_dict())
        quantlib.quantize_(other, choice.spec)
        assert choice.loss == pytest.approx(quantlib.evaluate(other, m, ids).kl.mean, rel=0.3)


def test_the_hull_leaves_out_what_another_beats() -> None:
    a, b, c, d = Choice("a", 4, 10.0), Choice("b", 5, 9.0), Choice("c", 6, 1.0), Choice("d", 8, 2.0)
    assert hull([d, c, b, a]) == [a, c]
    assert choose({"x": [a, b, c, d]}, 5.9) == {"x": "a"}
    assert choose({"x": [a, b, c, d]}, 6) == {"x": "c"}


def test_a_table_and_a_picture(tmp_path: Path) -> None:
    chosen = quantlib.assign(model(), 5.7, CANDIDATES)
    text = str(chosen)
    assert "3 layers" in text
    assert all(spec in text for spec in CANDIDATES)
    assert [spec for spec, _, _ in chosen.uniform()] == CANDIDATES
    pytest.importorskip("matplotlib", reason="draws")
    chosen.draw(tmp_path / "bits.png")
    assert (tmp_path / "bits.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bits must be at least 4\.\d+ for these candidates, got 4"):
        quantlib.assign(model(), 4, CANDIDATES)
    with pytest.raises(ValueError, match="candidates must hold at least one spec, got none"):
        quantlib.assign(model(), 4, [])
    with pytest.raises(ValueError, match=r"model must have an nn\.Linear to quantize, got none"):
        quantlib.assign(nn.Sequential(nn.ReLU()), 4, CANDIDATES)
    with pytest.raises(ValueError, match="inputs must hold at least one batch"):
        quantlib.assign(model(), 9, CANDIDATES, [])


@pytest.mark.parametrize("mode", [torch.device("meta"), torch.inference_mode()], ids=["meta", "inference"])
def test_the_mode_of_a_caller_changes_nothing(mode: Any) -> None:
    want = quantlib.assign(model(), 5.7, CANDIDATES, inputs())
    of, batches = model(), inputs()
    with mode:
        got = quantlib.assign(of, 5.7, CANDIDATES, batches)
    assert dict(got) == dict(want)
    assert got.loss == want.loss
