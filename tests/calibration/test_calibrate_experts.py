"""`calibrate` of experts: each matrix is rounded for its own tokens, and experts without one are named."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.calibration import experts as experts_module
from quantlib.calibration import model as model_module
from quantlib.calibration.gptq import gptq
from quantlib.calibration.stages import Gram, calls_of, run
from quantlib.nn.experts import QuantExperts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

E, K, INNER, SPEC = 4, 32, 48, "int4:group:16"


def experts(model: str, name: str) -> nn.Module:
    """Four experts of a class of transformers."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    words = {"num_local_experts": E, "num_experts": E, "hidden_size": K, "intermediate_size": INNER}
    config = transformers.PreTrainedConfig(**words, hidden_act="silu", swiglu_limit=7.0, swiglu_alpha=1.7)
    config._experts_implementation = "eager"
    found: nn.Module = getattr(module, name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in found.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return found.eval()


KINDS = {"mixtral": "MixtralExperts", "gpt_oss": "GptOssExperts"}  # [E, N, K], and [E, K, N] with biases


class Block(nn.Module):
    """Tokens go to two experts; none goes to expert 2."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first = nn.Linear(K, K)
        self.experts = experts(kind, KINDS[kind])

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.3 * self.first(x)
        score = x[:, :E].clone()
        score[:, 2] = -torch.inf
        top = score.softmax(-1).topk(2)
        y: Tensor = x + 0.1 * self.experts(nn.functional.rms_norm(x, (K,)), top.indices, top.values)
        return y


def made(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(kind), Block(kind)).eval()


def inputs(n: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(9)) ** 3 / 4  # a few directions have the energy
    return [0.5 + torch.randn(96, K, generator=generator) @ mix for _ in range(n)]


def error(model: nn.Module, float_model: nn.Module) -> float:
    x = torch.cat(inputs(2, seed=1))
    with torch.no_grad():
        return float((model(x) - float_model(x)).square().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_told_the_rows_of_its_expert(kind: str) -> None:
    model, found = made(kind)[:1], {}
    run(model, calls_of(inputs(), model), ["0.experts"], found.update)
    block = model[0]
    x, seen = torch.cat(inputs()), {}
    block.experts.register_forward_pre_hook(lambda module, args: seen.update(args=args))
    with torch.no_grad():
        block(x)
        hidden, chosen, _ = seen["args"]
        for e in (0, 1, 3):
            rows = hidden[(chosen == e).any(1)]
            gram: Gram = found[f"0.experts.gate_up_proj.{e}"]
            torch.testing.assert_close(gram.H, rows.T @ rows, rtol=1e-4, atol=1e-2)
            torch.testing.assert_close(gram.total, rows.sum(0), rtol=1e-4, atol=1e-3)
            w = block.experts.gate_up_proj[e]
            h = rows @ w + block.experts.gate_up_proj_bias[e] if kind == "gpt_oss" else rows @ w.T
            h = block.experts._apply_gate(h)
            gram = found[f"0.experts.down_proj.{e}"]
            torch.testing.assert_close(gram.H, h.T @ h, rtol=1e-4, atol=1e-2)
            assert gram.tokens == len(rows)
    assert not [name for name in found if name.endswith(".2")]


@pytest.mark.parametrize("kind", KINDS)
def test_less_error_than_quantize_and_idle_experts_are_named(kind: str) -> None:
    model, plain = made(kind), made(kind)
    float_model = copy.deepcopy(model)
    report = quantlib.calibrate(model, inputs(), SPEC)
    quantlib.quantize_(plain, SPEC)
    assert error(model, float_model) < 0.7 * error(plain, float_model)
    names = [f"{b}.experts.{key}" for b in (0, 1) for key in ("gate_up_proj", "down_proj")]
    assert report.data_free == dict.fromkeys(names, "no token reached expert 2")
    layers = {layer.name: layer for layer in report.layers}
    assert all(layers[n].loss < layers[n].rounding and layers[n].tokens == 2 * 3 * 96 for n in names)
    for name in names:
        owner, key = name.rsplit(".", 1)
        got, want = (m.get_submodule(owner).parts(key) for m in (model, plain))
        assert torch.equal(got.codes[2], want.codes[2])
        assert not torch.equal(got.codes[0], want.codes[0])
    assert {n: (t.shape, t.dtype) for n, t in model.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in plain.state_dict().items()
    }
    biases = {f"{name}_bias" for name in names} if kind == "gpt_oss" else set()
    assert {f"{name}_bias" for name in report.biased} >= biases
    for name in biases:
        assert not torch.equal(model.get_parameter(name)[0], float_model.get_parameter(name)[0])
        assert torch.equal(model.get_parameter(name)[2], float_model.get_parameter(name)[2])


@pytest.mark.parametrize("spec", ["W4A16", "float8_e4m3fn:row", "uint8:row:affine", "int8:row@int8:row"])
def test_each_kind_of_code(spec: str) -> None:
    model = made("mixtral")
    float_model = copy.deepcopy(model)
    report = quantlib.calibrate(model, inputs(1), spec)
    assert len(report.layers) == 6
    with torch.no_grad():
        energy = float(float_model(torch.cat(inputs(2, seed=1))).square().mean())
    assert error(model, float_model) < 0.01 * energy


class InterruptError(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made("gpt_oss")
    expected = quantlib.calibrate(whole, inputs(1), SPEC)
    calls: list[int] = []

    def stops(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 11:  # of 7 a block: three experts, two matrices each, and a layer
            raise InterruptError
        return gptq(*args)

    monkeypatch.setattr(model_module, "gptq", stops)
    with pytest.raises(InterruptError):
        quantlib.calibrate(made("gpt_oss"), inputs(1), SPEC, folder=tmp_path)
    calls.clear()
    calls += [1] * 11  # so that nothing stops
    model = made("gpt_oss")
    report = quantlib.calibrate(model, inputs(1), SPEC, folder=tmp_path)
    assert len(calls) == 11 + 7
    assert (report.layers, report.data_free, report.biased) == (expected.layers, expected.data_free, expected.biased)
    state = whole.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_experts_that_are_not_calibrated_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, method, why in (
        ("bfloat16", "gptq", "bfloat16 has no scale"),
        (SPEC, "gptq", "experts of its kind are not calibrated"),
    ):
        model = made("mixtral")
        if spec == SPEC:
            monkeypatch.setattr(model_module, "is_told", lambda module: False)
        report = quantlib.calibrate(model, inputs(1), spec, method)
        assert report.data_free["0.experts"] == why
        assert isinstance(model[0].experts, QuantExperts)
    assert experts_module.is_told(made("mixtral")[0].experts)


def test_sums_that_overflow_are_named() -> None:
    model = made("mixtral")
    with torch.no_grad():
        model[0].experts.gate_up_proj.mul_(1e15)
    with pytest.raises(ValueError, match=r"layer 0.experts.down_proj: inputs must leave sums of squares"):
        quantlib.calibrate(model, inputs(1), SPEC)
