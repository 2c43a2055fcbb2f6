"""Negative scales, and arguments of the wrong kind: every op and public function names the argument."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib import backends, ops, reference
from quantlib.testing import assert_same_bytes

quant = torch.ops.quantlib
X, W, V = torch.ones(4, 8), torch.ones(6, 8, dtype=torch.int8), torch.ones(4, 8, dtype=torch.int8)
S, T, Z = torch.ones(6, 1), torch.ones(4, 1), torch.zeros(6, 1, dtype=torch.int32)
B = (1, 8)
TILES = ops.tile(W, "int8")
ENDS = torch.tensor([4], dtype=torch.int32)
EXPERTS = {"x": X, "codes": W[None], "scale": S[None], "format": "int8", "block": B, "offsets": ENDS}

# what a call is given; each tensor of it is replaced in turn
RAW: dict[Callable[..., Any], dict[str, Any]] = {
    quant.cast: {"x": X, "format": "float16", "saturate": False},
    quant.hadamard: {"x": X, "block": 8},
    quant.compute_scale: {"x": X, "format": "int8", "block": B},
    quant.search_scale: {
        "x": X, "scale": T, "format": "int8", "block": B, "method": "mse", "kept": "float32", "zero_point": Z[:4],
        "energy": torch.ones(8),
    },
    quant.quantize: {"x": X, "scale": T, "format": "int8", "block": B, "zero_point": Z[:4]},
    quant.dequantize: {"codes": V, "scale": T, "format": "int8", "block": B, "zero_point": Z[:4]},
    quant.dequantize_rows: {
        "indices": torch.tensor([2, 0]), "codes": V, "scale": T, "format": "int8", "block": B, "zero_point": Z[:4],
    },
    quant.quantize_dynamic: {"x": X, "format": "int8", "block": B},
    quant.fake_quantize: {"x": X, "scale": T, "format": "int8", "block": B, "zero_point": T},
    quant.fake_quantize_backward: {"dy": X, "x": X, "scale": T, "format": "int8", "block": B},
    quant.dequant_matmul: {"x": X, "codes": W, "scale": S, "format": "int8", "block": B, "bias": X[0, :6]},
    quant.dequant_matmul_backward: {"dy": X[:, :6], "codes": W, "scale": S, "format": "int8", "block": B},
    quant.dequant_matmul_backward_scale: {
        "dy": X[:, :6].contiguous(), "x": X, "codes": W, "scale": S, "format": "int8", "block": B,
    },
    quant.scaled_matmul: {
        "x_codes": V, "x_scale": T, "codes": W, "scale": S, "format": "int8", "block": B, "zero_point": Z,
    },
    quant.dynamic_matmul: {"x": X, "codes": W, "scale": S, "format": "int8", "block": B},
    quant.grouped_dequant_matmul: EXPERTS,
    quant.grouped_dynamic_matmul: EXPERTS,
    quant.grouped_dequant_matmul_backward: {
        "dy": X[:, :6].contiguous(), "codes": W[None], "scale": S[None], "format": "int8", "block": B, "offsets": ENDS,
    },
}  # fmt: skip
PUBLIC: dict[Callable[..., Any], dict[str, Any]] = {
    **{getattr(ops, f.__name__): given for f, given in RAW.items() if f.__name__ in ops.__all__},
    ops.fake_cast: {"x": X, "format": "float16"},
    ops.fake_quantize_per_tensor_affine: {"input": X, "scale": 1.0, "zero_point": 0, "quant_min": -8, "quant_max": 7},
    ops.fake_quantize_per_channel_affine: {
        "input": X, "scale": T[:, 0], "zero_point": Z[:4, 0], "axis": 0, "quant_min": -8, "quant_max": 7,
    },
    ops.pack: {"codes": V, "format": "int4"},
    ops.unpack: {"packed": V.byte(), "format": "int4"},
    ops.tile: {"codes": W, "format": "int8"},
    ops.untile: {"tiles": TILES, "format": "int8", "shape": (6, 8)},
}  # fmt: skip
LAYOUTS: dict[str, Callable[[Tensor], Any]] = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t.to_sparse_csr(),
    "sparse_csc": lambda t: t.to_sparse_csc(),
    "sparse_bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "mkldnn": lambda t: t.to_mkldnn(),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
    "nested jagged": lambda t: torch.nested.nested_tensor([t, t], layout=torch.jagged),
    "qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}
NOT_TENSORS = {
    "ndarray": lambda t: t.numpy(),
    "list": lambda t: t.tolist(),
    "float": lambda t: 1.5,
    "str": lambda t: "x",
}


@pytest.fixture(params=backends.order("cpu"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Python's checks, and C++'s."""
    if why := backends.refuses(request.param, "cpu"):
        pytest.skip(f"{request.param}: {why}")
    with quantlib.use_backend(request.param):
        yield request.param


def each_tensor(calls: dict[Callable[..., Any], dict[str, Any]]) -> Iterator[tuple[Callable[..., Any], str, Tensor]]:
    for function, given in calls.items():
        for name, value in given.items():
            if isinstance(value, Tensor):
                yield function, name, value


def name_of(function: Callable[..., Any]) -> str:
    return str(function.__name__).partition("_per_")[0]  # torch's names of fake_quantize are those of one op


def said_by(function: Callable[..., Any], given: dict[str, Any]) -> str:
    with pytest.raises(RuntimeError) as error:
        function(**given)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_that_is_not_dense_is_named(layout: str, backend: str) -> None:
    for calls in (RAW, PUBLIC):
        for function, name, value in each_tensor(calls):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about kinds of tensors that are in beta
                try:
                    other = LAYOUTS[layout](value)
                except (RuntimeError, TypeError, IndexError):
                    continue  # torch has none of this dtype or of so many axes
            said = said_by(function, {**calls[function], name: other})
            assert said.startswith(f"quantlib::{name_of(function)}"), said
            assert f"{name} must be " in said, said
            assert "\n" not in said
            assert layout.partition(" ")[0] in said or "float32" in said, said


@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_what_is_no_tensor_is_named(kind: str, backend: str) -> None:
    for function, name, value in each_tensor(PUBLIC):
        said = said_by(function, {**PUBLIC[function], name: NOT_TENSORS[kind](value)})
        assert said.startswith(f"quantlib::{name_of(function)}: {name} must be a tensor"), said
        assert said.endswith(f"got {kind}"), said


def test_none_for_a_tensor_is_named(backend: str) -> None:
    for function, name, _ in each_tensor(RAW):
        if name not in ("zero_point", "bias", "energy"):
            said = said_by(function, {**RAW[function], name: None})
            assert said.startswith(f"quantlib::{name_of(function)}: {name} must be "), said
            assert "None" in said


@pytest.mark.parametrize(
    ("said", "call"),
    [
        ("quantize: block must be two sizes >= 1, got {}", lambda: ops.quantize(X, T, "int8", block={})),
        ("quantize: block must be two sizes >= 1, got list", lambda: ops.quantize(X, T, "int8", block=[1.5, 8])),
        ("cast: saturate must be True or False or None, got Tensor", lambda: ops.cast(X, "float16", saturate=X)),
        ("dequantize: dtype must be a torch.dtype, got str", lambda: ops.dequantize(V, T, "int8", block=B, dtype="x")),
        ("dequantize: size must be an integer or None, got float",
         lambda: ops.dequantize(V, T, "int8", block=B, size=8.0)),
        ("dynamic_matmul: activation must be a string or None, got int",
         lambda: ops.dynamic_matmul(X, W, S, activation=3)),
        ("compute_scale: out must be a tuple of scale, zero_point, got Tensor",
         lambda: ops.compute_scale(X, "int8", B, symmetric=False, out=S)),
        ("quantize_dynamic: out must be a tuple of codes, scale, got 1 of them",
         lambda: ops.quantize_dynamic(X, "int8", block=B, out=(S,))),
        ("fake_quantize: axis must be at least 0 and below 2, got 7",
         lambda: ops.fake_quantize_per_channel_affine(X, T[:, 0], Z[:4, 0], 7, 0, 255)),
        ("fake_quantize_per_tensor_affine: quant_min must be an integer, got bytes",
         lambda: ops.fake_quantize_per_tensor_affine(X, 1.0, 0, b"x", 255)),
    ],
)  # fmt: skip
def test_other_arguments_of_the_wrong_kind(said: str, call: Callable[[], Any], backend: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    assert str(error.value) == f"quantlib::{said}"


def test_what_does_not_fit_in_memory_is_named(backend: str) -> None:
    huge = torch.zeros(()).expand(2**50, 4)
    said = said_by(quant.cast, {"x": huge, "format": "float16", "saturate": False})
    assert said.startswith("quantlib::cast: ")
    assert "x" in said.split()
    assert "float32 [1125899906842624, 4] on cpu" in said


# ---- scales ---------------------------------------------------------------------------------------------------------


def test_every_scale_has_a_meaning(backend: str) -> None:
    for value in (0.0, -0.0, torch.nan, -1.0, -1e-40, -float("inf")):
        scale = torch.full((4, 1), value)
        want = reference.dequantize(V.numpy(), scale.numpy(), "int8", block=B)
        assert_same_bytes(ops.dequantize(V, scale, "int8", block=B), want)


@pytest.mark.parametrize("name", ["weight_scale", "input_scale"])
def test_a_negative_scale_is_loaded(name: str) -> None:
    layer = quantlib.nn.QuantLinear(8, 6, spec="int8@int8:tensor:static")
    state = layer.state_dict()
    state[name] = state[name].clone().fill_(-0.5)
    torch.nn.Sequential(layer).load_state_dict({f"0.{k}": v for k, v in state.items()})
    assert torch.equal(layer.state_dict()[name], state[name])


def test_nothing_is_looked_at_on_meta() -> None:
    assert quant.dequantize(V.to("meta"), -T.to("meta"), "int8", B).shape == V.shape


# ---- transforms -----------------------------------------------------------------------------------------------------


def test_out_under_vmap_is_refused(backend: str) -> None:
    with pytest.raises(RuntimeError, match="quantlib::cast: out must be left out under vmap"):
        torch.func.vmap(lambda x: quant.cast.out(x, "float16", False, out=torch.empty(8).half()))(X)


def test_out_that_is_kept_as_its_negative(backend: str) -> None:
    out = torch._neg_view(torch.zeros(4, 1))
    quant.compute_scale.out(X, "int8", B, out=out)
    assert torch.equal(out, quant.compute_scale(X, "int8", B))


def test_packing_without_values_and_under_vmap() -> None:
    for function, codes in ((ops.pack, V), (ops.unpack, V.byte())):
        assert function(codes.to("meta"), "int4").shape == function(codes, "int4").shape
        each = torch.func.vmap(lambda c, function=function: function(c, "int4"))(codes)
        assert torch.equal(each, function(codes, "int4"))
    with pytest.raises(RuntimeError, match=r"pack: codes must be in -8..7, got 99"):
        torch.func.vmap(lambda c: ops.pack(c, "int4"))(V * 99)
