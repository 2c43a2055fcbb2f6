"""Experts, which are stacks of matrices in one module: every class of transformers, and what is done to a module."""

from __future__ import annotations

import copy
import importlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.nn.experts import OUTSIDE, QuantExperts, ways_of
from quantlib.testing import assert_same_bytes

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SPECS = ("W8A16", "W8A8", "int8@uint8:row", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "int8:tensor", "bfloat16")
DECORATED = re.compile(r"@use_experts_implementation[^\n]*\nclass (\w+)")
E, HIDDEN, INNER = 4, 32, 48


def classes() -> Iterator[tuple[str, str]]:
    """The module and the name of every class of experts in transformers, by its source."""
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        outside = [name for name in OUTSIDE if re.search(rf"^class {name}\(", source, re.MULTILINE)]
        for name in (*DECORATED.findall(source), *outside):
            yield f"transformers.models.{path.parent.name}.{path.stem}", name


class Config:
    """A configuration of any model: sizes, numbers and functions by what their names say."""

    _experts_implementation = "eager"
    ffn_act_fn = {"name": "silu"}  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        rules = (
            (r".*(act|activation|act_fn|hidden_act)", "silu"),
            (r".*(limit|softcap).*", 7.0),
            (r".*(alpha|scale|scaling|factor).*", 1.7),
            (r".*eps.*", 1e-6),
            (r".*num.*expert.*|n_.*expert.*", E),
            (r".*(inter|ffn|moe_hidden).*", INNER),
            (r".*(hidden|dim|size|latent).*", HIDDEN),
        )
        return next((value for pattern, value in rules if re.fullmatch(pattern, name)), None)


def made(module: str, name: str) -> nn.Module:
    cls = getattr(importlib.import_module(module), name)
    torch.manual_seed(0)
    experts: nn.Module = cls(E, HIDDEN, INNER) if name == "JetMoeParallelExperts" else cls(Config())
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.2)
    return experts.eval()


def inputs(experts: nn.Module, rows: int = 10) -> tuple[Any, ...]:
    """Return the arguments of the forward of ``experts``."""
    generator = torch.Generator().manual_seed(1)
    name = type(experts).__name__.removeprefix("Quant")
    if "_is_expert_parallel" in vars(experts):
        first: Any = experts.gate_up_proj if vars(experts)["has_gate"] else experts.up_proj
        K = first.shape[1 if vars(experts)["is_transposed"] else 2]
        chosen = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(rows)])
        return torch.randn(rows, K, generator=generator), chosen, torch.rand(rows, 2, generator=generator)
    x = torch.randn(rows - rows % E, HIDDEN, generator=generator)
    if name == "JetMoeParallelExperts":
        return x, [0, 3, 1, len(x) - 4]
    if name == "InklingSharedExperts":
        return x, torch.rand(len(x), E, generator=generator)
    if name == "Step3p7Experts":
        chosen = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(len(x))])
        return x, chosen, torch.rand(len(x), 2, generator=generator)
    if name == "DbrxExpertGLU":
        return (x, *(getattr(experts, key).view(E, INNER, HIDDEN)[2] for key in ("w1", "v1", "w2")))
    return (x,)


def assert_close(got: Tensor, want: Tensor, limit: float = 1e-5) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    assert error <= limit, error


@pytest.mark.parametrize(("module", "name"), classes(), ids=lambda word: word.rpartition(".")[2])
@torch.no_grad()
def test_every_class_computes_what_its_codes_stand_for(module: str, name: str) -> None:
    experts = made(module, name)
    codes = QuantExperts.from_float(experts, "int8")
    floats = codes.dequantize()
    quantized = sum(stack.E * stack.N * stack.K for stack in codes.stacks.values())
    assert quantized >= 0.95 * sum(p.numel() for p in experts.parameters())
    assert isinstance(codes, type(experts))
    assert_close(codes(*inputs(codes)), floats(*inputs(floats)))
    for key in codes.stacks:
        assert_close(getattr(codes, key) + 0, getattr(experts, key), 0.01)


@pytest.mark.parametrize("spec", ["W8A16", "W8A8", "W4A16"])
@torch.no_grad()
def test_one_graph_whatever_the_routing(spec: str) -> None:
    """All experts are one call of an op: the graph has no break, and holds for other tokens too."""
    codes = QuantExperts.from_float(mixtral(), spec)
    graph = torch.compile(codes, fullgraph=True, backend="aot_eager")
    for rows in (10, 3):
        x, _, weights = inputs(codes, rows)
        for chosen in (torch.full((rows, 2), 3), torch.arange(2 * rows).view(rows, 2) % E):
            assert_same_bytes(graph(x, chosen, weights), codes(x, chosen, weights))


def mixtral() -> nn.Module:
    return made("transformers.models.mixtral.modeling_mixtral", "MixtralExperts")


def gpt_oss() -> nn.Module:
    return made("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts")


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_each_spec(spec: str, make: Any) -> None:
    experts = make()
    codes = QuantExperts.from_float(experts, spec)
    y = codes(*inputs(experts))
    assert_close(y, codes.dequantize()(*inputs(experts)), 0.05 if "@" in str(quantlib.QuantSpec.parse(spec)) else 1e-5)
    again = pickled(codes)
    assert_same_bytes(again(*inputs(experts)), y)
    assert_same_bytes(copy.deepcopy(codes)(*inputs(experts)), y)


def pickled(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def test_rows_of_one_expert_are_those_of_a_linear_layer() -> None:
    experts = mixtral()
    codes = QuantExperts.from_float(experts, "int4:group:16")
    x = torch.randn(5, HIDDEN)
    for e in range(E):
        layer = nn.Linear(HIDDEN, 2 * INNER, bias=False)
        layer.weight.copy_(experts.gate_up_proj[e])  # type: ignore[index]
        want = quantlib.nn.QuantLinear.from_float(layer, "int4:group:16")(x)
        assert_same_bytes(torch.nn.functional.linear(x, codes.gate_up_proj[e]), want)
        assert_same_bytes(x @ codes.gate_up_proj[e].T, want)


@torch.no_grad()
def test_tokens_without_an_expert_and_experts_without_tokens() -> None:
    codes, floats = QuantExperts.from_float(mixtral(), "int8"), mixtral()
    x, chosen, weights = inputs(floats)
    assert_close(codes(x, torch.zeros_like(chosen), weights), floats(x, torch.zeros_like(chosen), weights), 0.02)
    chosen[:, 1] = E  # a mark of expert parallelism: no expert
    assert_close(codes(x, chosen, weights), floats(x, chosen, weights), 0.02)
    nobody = torch.full_like(chosen, E)
    assert_same_bytes(codes(x, nobody, weights), torch.zeros_like(x))
    none = codes(x[:0], chosen[:0], weights[:0])
    assert none.shape == (0, HIDDEN)


@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_gradients_reach_the_input_and_the_weights_of_the_router(make: Any) -> None:
    codes = QuantExperts.from_float(make(), "int8")
    floats = codes.dequantize()
    x, chosen, weights = inputs(floats)
    found = []
    for module in (codes, floats):
        leaves = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        module(leaves[0], chosen, leaves[1]).square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for got, want in zip(*found, strict=True):
        assert got is not None
        assert_close(got, want)


def test_state_dtype_and_device() -> None:
    codes = QuantExperts.from_float(mixtral(), "int8")
    state = codes.state_dict()
    assert set(state) == {f"{name}_proj_{part}" for name in ("gate_up", "down") for part in ("codes", "scale")}
    other = QuantExperts.from_float(mixtral(), "int8")
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(state)
    half = copy.deepcopy(codes).bfloat16()
    assert half.gate_up_proj.dtype == torch.bfloat16
    assert half.gate_up_proj_codes.dtype == torch.int8
    assert half.gate_up_proj_scale.dtype == torch.float32
    x, chosen, weights = inputs(mixtral())
    with torch.no_grad():
        assert_same_bytes(other(x, chosen, weights), codes(x, chosen, weights))
        y = half(x.bfloat16(), chosen, weights.bfloat16())
    assert y.dtype == torch.bfloat16


def test_states_that_do_not_fit_are_refused_strict_or_not() -> None:
    floats, codes = mixtral(), QuantExperts.from_float(mixtral(), "int8")
    other = QuantExperts.from_float(mixtral(), "uint8")
    cases: list[tuple[nn.Module, dict[str, Any], str]] = [
        (floats, codes.state_dict(), "gate_up_proj must be a float weight, got codes"),
        (codes, floats.state_dict(), r"gate_up_proj must be codes of int8:row, got float32 \[4, 96, 32\]"),
        (codes, other.state_dict(), "gate_up_proj_codes must be int8 for int8:row, got uint8"),
    ]
    for module, state, message in cases:
        before = {name: value.clone() for name, value in module.state_dict().items()}
        for strict in (True, False):
            with pytest.raises(RuntimeError, match=message):
                module.load_state_dict(state, strict=strict)
        for name, value in module.state_dict().items():
            assert_same_bytes(value, before[name], name)


def test_a_state_of_another_format_is_refused_by_its_metadata() -> None:
    module, name = next(iter(classes()))
    state = QuantExperts.from_float(made(module, name), "int4:group:16").state_dict()
    other = QuantExperts.from_float(made(module, name), "float4_e2m1fn:group:16")
    before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
    with pytest.raises(RuntimeError, match="must be codes of float4_e2m1fn:group:16, got int4:group:16"):
        other.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in other.state_dict().items())
    with pytest.warns(UserWarning, match="no metadata .* taken for float4_e2m1fn:group:16"):
        other.load_state_dict(dict(state))


def test_a_weight_reads_as_floats_and_takes_no_writes() -> None:
    codes = QuantExperts.from_float(mixtral(), "int8")
    weight = codes.gate_up_proj
    assert (weight.shape, weight.dtype) == ((E, 2 * INNER, HIDDEN), torch.float32)
    assert_same_bytes(weight[torch.tensor([2, 0])], torch.stack([weight[2] + 0, weight[0] + 0]))
    for write in (weight.zero_, lambda: weight[0].mul_(2), lambda: setattr(codes, "gate_up_proj", weight)):
        with pytest.raises(RuntimeError, match="decoded from codes"):
            write()
    codes.gate_up_proj.data += 1.0
    assert_close(codes.gate_up_proj + 0, weight_of_mixtral() + 1, 0.01)
    with pytest.raises(ValueError, match=r"gate_up_proj must be \[4, 96, 32\], got \[4, 32, 96\]"):
        codes.gate_up_proj.data = torch.zeros(E, HIDDEN, 2 * INNER)
    with pytest.raises(ValueError, match="gate_up_proj must be finite, got nan"):
        codes.gate_up_proj.data = torch.full((E, 2 * INNER, HIDDEN), float("nan"))


def weight_of_mixtral() -> Tensor:
    weight = mixtral().gate_up_proj
    assert isinstance(weight, Tensor)
    return weight.detach()


class Holder(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


def test_quantize_and_dequantize_a_model() -> None:
    model = Holder(gpt_oss())
    want = {name: parameter.numel() for name, parameter in model.named_parameters()}
    report = quantlib.quantize_(model, "int8")
    assert {layer.name for layer in report.layers} == {"experts.gate_up_proj", "experts.down_proj"}
    assert report.quantized + report.floats == sum(want.values())
    assert min(layer.snr_db for layer in report.layers) > 30
    quantlib.dequantize_(model)
    assert {name: parameter.numel() for name, parameter in model.named_parameters()} == want
    assert not isinstance(model.experts, QuantExperts)


def test_what_keeps_experts_floats_is_said_and_nothing_changes() -> None:
    model = Holder(mixtral())
    report = quantlib.quantize_(model, "int8", lambda module, name: False)
    assert report.skipped["experts"] == "filter_fn said no"
    model.experts.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(ValueError, match="experts: its forward has been replaced"):
        quantlib.quantize_(model, "int8")
    model = Holder(mixtral())
    with torch.no_grad():
        model.experts.down_proj[1, 2, 3] = float("inf")  # type: ignore[operator]
    with pytest.raises(ValueError, match=rf"down_proj of experts must be finite.*got inf in row {HIDDEN + 2}"):
        quantlib.quantize_(model, "int8")
    assert not isinstance(model.experts, QuantExperts)
    with pytest.raises(TypeError, match="experts must be a module of experts that quantlib knows, got Linear"):
        QuantExperts.from_float(nn.Linear(3, 3), "int8")
    assert ways_of(QuantExperts.from_float(mixtral(), "int8")) == {}
    assert ways_of(SimpleNamespace()) == {}  # type: ignore[arg-type]
