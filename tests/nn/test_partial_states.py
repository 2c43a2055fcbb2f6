"""A state that brings codes without their scales: load_state_dict(strict=False) takes it, the layer does not use it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib import dequantize_, quantize_
from quantlib.testing import assert_same_bytes

SPECS = ["int8", "W8A8", "W4A16", "uint8", "int4:group:32:affine", "float8_e4m3fn", "int8:row@int8:tensor"]
X = torch.randn(3, 64)


def model(spec: str, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    quantize_(layers, spec)
    return layers


@pytest.mark.parametrize("spec", SPECS)
def test_codes_without_what_belongs_to_them_are_not_used(spec: str) -> None:
    state = model(spec).state_dict()
    parts = [name for name in state if name.startswith("0.weight_") and not name.endswith("_codes")]
    assert parts
    for part in parts:
        other = model(spec, seed=1)
        missing = other.load_state_dict({n: t for n, t in state.items() if n != part}, strict=False).missing_keys
        assert missing == [part]
        words = f"{part[2:]} must be loaded with weight_codes, got a state without it"
        reads: list[Any] = [lambda m: m(X), lambda m: m[0].values(), lambda m: m[0].weight.sum(), dequantize_]
        for read in reads:
            with pytest.raises(RuntimeError, match=words):
                read(copy.deepcopy(other))
        other.load_state_dict({part: state[part]}, strict=False)  # as the next file of a checkpoint has it
        assert_same_bytes(other(X), model(spec)(X), part)


@pytest.mark.parametrize("spec", SPECS)
def test_states_in_several_parts_scales_alone_and_other_weights_are_used(spec: str) -> None:
    state, other = model(spec).state_dict(), model(spec, seed=1)
    for name in reversed(state):  # scales before codes
        other.load_state_dict({name: state[name]}, strict=False)
    assert_same_bytes(other(X), model(spec)(X), "by parts")
    scales = {name: t for name, t in model(spec, seed=2).state_dict().items() if name.endswith("_scale")}
    other.load_state_dict(scales, strict=False)  # what was trained over frozen codes
    other(X)
    codes = {name: t for name, t in state.items() if name.endswith("_codes")}
    other = model(spec, seed=1)
    other.load_state_dict(codes, strict=False)
    weight: Tensor = torch.randn(32, 64)
    other[0].set_weight_(weight)
    assert torch.isfinite(other[0](X)).all()


def test_experts_do_not_use_codes_without_their_scales() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    mixture = transformers.MixtralForCausalLM(config).eval()
    quantize_(mixture, "int8")
    ids, state = torch.arange(6)[None], mixture.state_dict()
    y = mixture(ids).logits
    scale = next(name for name in state if name.endswith("gate_up_proj_scale"))
    mixture.load_state_dict({n: t for n, t in state.items() if n != scale}, strict=False)
    with pytest.raises(RuntimeError, match="gate_up_proj_scale must be loaded with gate_up_proj_codes"):
        mixture(ids)
    mixture.load_state_dict({scale: state[scale]}, strict=False)
    assert_same_bytes(mixture(ids).logits, y, "experts")


def test_tied_layers_can_be_copied_and_wait_for_scales_together() -> None:
    tied = nn.ModuleDict({"table": nn.Embedding(64, 64), "head": nn.Linear(64, 64, bias=False)})
    tied["head"].weight = tied["table"].weight
    quantize_(tied, "int8", types=[nn.Linear, nn.Embedding])
    again: Any = pickle.loads(pickle.dumps(copy.deepcopy(tied)))
    assert_same_bytes(again["head"](X), tied["head"](X), "tied")
    codes = {name: t for name, t in tied.state_dict().items() if name.endswith("_codes")}
    again.load_state_dict(codes, strict=False)
    for read in (lambda: again["head"](X), lambda: again["table"](torch.tensor([1]))):
        with pytest.raises(RuntimeError, match="weight_scale must be loaded with weight_codes"):
            read()
