"""Small models of transformers, quantized: equal to their dequantized selves, or refused by name; docs/models.md."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the architectures are those of transformers: not installed")

import architectures  # noqa: E402

import quantlib  # noqa: E402

DOCUMENT = Path(__file__).parents[2] / "docs/models.md"
BY_NAME = {a.name: a for a in architectures.ARCHITECTURES}
pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES, ids=str)
def test_equals_the_dequantized_model(architecture: architectures.Architecture) -> None:
    outcomes = {
        (spec, every): architectures.check(architecture, spec, architectures.EVERY if every else architectures.LINEAR)
        for spec, every in architectures.quick(architecture)
    }
    version, rows = architectures.recorded(DOCUMENT.read_text())
    if version == transformers.__version__:
        assert_current(rows.get(architecture.name, []), architectures.row(architecture, outcomes))


def assert_current(recorded: list[str], found: list[str]) -> None:
    how = "PYTHONPATH=tests python -m architectures docs/models.md writes it anew"
    assert len(recorded) == len(found), how
    for was, now in zip(recorded, found, strict=True):
        decided = (
            was if "/" not in now else "/".join(w for w, n in zip(was.split("/"), now.split("/"), strict=True) if n)
        )
        assert now.strip("/") in ("", decided), how


def test_the_table_has_every_architecture() -> None:
    version, rows = architectures.recorded(DOCUMENT.read_text())
    assert version
    assert list(rows) == list(BY_NAME)


def test_a_model_without_a_layer_to_quantize_is_refused_by_name() -> None:
    class Rotated(nn.Linear):
        """A layer of nobody whom quantlib knows."""

    model = nn.Sequential(Rotated(4, 4), nn.LSTM(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0: Rotated, a subclass of nn.Linear, may compute something else"):
        quantlib.quantize_(model, "W8A16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_wrong_weight_is_seen() -> None:
    """Half a percent of one layer's scale is more than the sweep lets pass."""
    model = copy.deepcopy(BY_NAME["Llama"].base)
    given = BY_NAME["Llama"].given
    quantlib.quantize_(model, "W8A16")
    plain = copy.deepcopy(model)
    quantlib.dequantize_(plain)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight_scale.mul_(1.005)
        error = architectures.difference(architectures.outputs(model, given), architectures.outputs(plain, given))
    assert error > 1e-4
