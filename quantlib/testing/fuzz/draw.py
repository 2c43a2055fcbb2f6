"""A call of an op or a public function, made of a seed: one of the contract's cases, and then what is done to it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlib import backends, formats, ops, reference
from quantlib.ops.adamw_step import BLOCKS as STATE_BLOCKS
from quantlib.ops.scaled_matmul import X_FORMATS
from quantlib.reference.activation import ACTIVATIONS
from quantlib.spec import SEARCHES
from quantlib.testing import compare, learned, product, rotated, rows, searched, steps, table
from quantlib.testing.bytes import Array, bits, poisoned
from quantlib.testing.compare import Sum
from quantlib.testing.learned import Learned
from quantlib.testing.product import Product
from quantlib.testing.rotated import Rotated
from quantlib.testing.rows import Rows
from quantlib.testing.searched import Searched
from quantlib.testing.steps import Step
from quantlib.testing.table import CASTS, DTYPES, Case

Rng = np.random.Generator

SIZES = (0, 1, 2, 3, 7, 8, 16, 17, 33, 64, 130)
BLOCKS = (-1, 1, 2, 3, 8, 16, 32, 100)
LAYOUTS = ("contiguous", "offset", "strided", "transposed", "expanded")
HELPERS = ("pack", "unpack", "tile", "untile", "fake_cast")
PER_AXIS = ("fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine")
OPS = (
    *table.OPS,
    *searched.OPS,
    *rotated.OPS,
    *learned.OPS,
    *product.OPS,
    *steps.OPS,
    *rows.OPS,
    "dequant_matmul_backward_scale",
    *HELPERS,
    *PER_AXIS,
)


@dataclass
class Call:
    """One call: of `function` with `arguments` by name, which gives `want`."""

    op: str
    name: str  # as a reader would write the function
    arguments: dict[str, Any]
    want: tuple[Array | Sum, ...]
    outs: tuple[str, ...] = ()  # the arguments that results are written to; one may be a tuple of tensors
    raw: bool = False  # torch.ops.quantlib's, whose schema says what a value may be
    faults: list[str] = field(default_factory=list)
    contexts: list[Callable[[], contextlib.AbstractContextManager[Any]]] = field(default_factory=list)
    around: Callable[[Callable[[], Any]], Any] | None = None  # runs the call, a transform of torch.func for example

    @property
    def function(self) -> Callable[..., Any]:
        if not self.raw:
            public: Callable[..., Any] = getattr(ops, self.op)
            return public
        packet, _, overload = self.name.removeprefix("torch.ops.quantlib.").partition(".")
        raw: Callable[..., Any] = getattr(getattr(torch.ops.quantlib, packet), overload)
        return raw

    def __call__(self) -> tuple[Any, ...]:
        with contextlib.ExitStack() as stack:
            for context in self.contexts:
                stack.enter_context(context())
            result = self.function(**self.arguments) if self.around is None else self.around(self)
        if self.raw and self.outs:
            result = tuple(self.arguments[name] for name in self.outs)
        return result if isinstance(result, tuple) else (result,)

    def __str__(self) -> str:
        given = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        return f"{self.name}({given})" + "".join(f"\n    {fault}" for fault in self.faults)


def shown(value: Any) -> str:
    """A value as it is named in a finding: of a tensor what it is, and not what is in it."""
    if isinstance(value, Tensor):
        try:
            return f"<{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}>"
        except Exception:
            return f"<{type(value).__name__}>"
    if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
        return f"({', '.join(map(shown, value))})"
    text = " ".join(repr(value).split())
    return text if len(text) < 80 else f"{text[:77]}..."


# ---- valid calls ----------------------------------------------------------------------------------------------------


def valid(rng: Rng, op: str | None = None) -> Call:
    """A call that must be served, of a raw overload or of a public function, maybe into tensors that are given."""
    op = op or pick(rng, OPS)
    want: tuple[Array | Sum, ...]
    if op in table.OPS:
        overload, arguments, want = _table(rng, op)
    elif op in searched.OPS:
        overload, arguments, want = _searched(rng, op)
    elif op in learned.OPS:
        overload, arguments, want = _learned(rng, op)
    elif op in steps.OPS:
        overload, arguments, want = _step(rng, op)
    elif op in rotated.OPS:
        overload, arguments, want = _rotated(rng, op)
    elif op in rows.OPS:
        overload, arguments, want = _rows(rng, op)
    elif op in HELPERS:
        return _helper(rng, op)
    elif op in PER_AXIS:
        return _per_axis(rng, op)
    else:
        overload, arguments, want = _product(rng, op)
    public = op in ops.__all__ and rng.random() < 0.5
    call = _public(op, overload, arguments, want) if public else _raw(op, overload, arguments, want)
    if rng.random() < 0.4:
        _with_outs(call, overload)
    return call


def _table(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array, ...]]:
    f = pick(rng, CASTS) if op == "cast" else pick(rng, [f.name for f in formats.TABLE])
    dtype = pick(rng, CASTS if op == "cast" else DTYPES)
    symmetric = op == "cast" or formats.get(f).is_float or rng.random() < 0.5
    shape = tuple(pick(rng, SIZES) for _ in range(rng.integers(4)))
    if op == "dequantize" and not shape and formats.get(f).packed:
        shape = (1,)  # two codes a byte have an axis
    block = pick(rng, BLOCKS), pick(rng, BLOCKS)
    saturate = bool(rng.integers(2)) if op == "cast" else None
    layout = pick(rng, LAYOUTS) if shape else "contiguous"
    case = Case(op, f, dtype, shape, block, layout, symmetric, saturate)
    given: dict[str, Any] = dict(compare.tensors(case))
    given |= {"format": f, "block": list(case.resolved), "saturate": saturate, "dtype": getattr(torch, dtype)}
    given["size"] = case.matrix[1]
    dynamic = op in ("compute_scale", "quantize_dynamic")
    overload = f"{op}.affine" if dynamic and not symmetric else op
    return overload, named(overload, given), compare.expected(case)


def _searched(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array, ...]]:
    f = formats.get(pick(rng, [f.name for f in formats.TABLE]))
    shape = int(rng.integers(1, 20)), pick(rng, SIZES[1:])
    block, method, kept = (pick(rng, BLOCKS), pick(rng, BLOCKS)), pick(rng, SEARCHES), pick(rng, DTYPES)
    symmetric, weighted = f.is_float or rng.random() < 0.5, bool(rng.integers(2))
    case = Searched(op, f.name, pick(rng, DTYPES), shape, block, "contiguous", symmetric, method, kept, weighted)
    given: dict[str, Any] = {"zero_point": None, "energy": None, **searched.tensors(case)}
    given |= {"format": f.name, "block": list(case.resolved), "method": method, "kept": kept}
    return op, named(op, given), searched.expected(case)


def _learned(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array | Sum, ...]]:
    f = formats.get(pick(rng, [f.name for f in formats.TABLE]))
    symmetric = f.is_float or rng.random() < 0.5
    shape = int(rng.integers(1, 20)), pick(rng, SIZES[1:])
    block = pick(rng, BLOCKS), pick(rng, BLOCKS)
    layout = pick(rng, ("contiguous", "offset"))
    case = Learned(op, f.name, pick(rng, DTYPES), shape, block, layout, symmetric, bool(rng.integers(2)))
    given: dict[str, Any] = {"zero_point": None, **learned.tensors(case)}
    given |= {"format": f.name, "block": list(case.resolved), "limits": None, "lsq_mask": case.lsq, "grad_factor": 1.0}
    overload = f"{op}.affine" if op.endswith("backward") and not symmetric else op
    return overload, named(overload, given), learned.expected(case)


def _step(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array, ...]]:
    dtype, shape = pick(rng, DTYPES), (int(rng.integers(1, 20)), pick(rng, SIZES[1:]))
    random = dtype == "bfloat16" and rng.random() < 0.5
    flags = bool(rng.integers(2)), bool(rng.integers(2)), pick(rng, ("contiguous", "offset"))
    case = Step(dtype, shape, pick(rng, STATE_BLOCKS), random, *flags)
    given: dict[str, Any] = dict(steps.tensors(case))
    given |= {"block": case.block, "origin": None if case.origin is None else list(case.origin)}
    return op, named(op, given), steps.expected(case)


def _rotated(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array, ...]]:
    block = 1 << int(rng.integers(11))
    shape = int(rng.integers(1, 20)), block * int(rng.integers(1, 4))
    case = Rotated(pick(rng, DTYPES), shape, block, bool(rng.integers(2)), pick(rng, ("contiguous", "offset")))
    return op, {**rotated.tensors(case), "block": block}, rotated.expected(case)


def _rows(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array, ...]]:
    f = formats.get(pick(rng, [f.name for f in formats.TABLE]))
    symmetric = f.is_float or rng.random() < 0.5
    shape, block = (int(rng.integers(1, 20)), pick(rng, SIZES)), (pick(rng, BLOCKS), pick(rng, BLOCKS))
    indices = tuple(pick(rng, SIZES[:6]) for _ in range(rng.integers(3)))
    of_table = pick(rng, DTYPES), shape, block, pick(rng, LAYOUTS[:-1]), symmetric
    case = Rows(op, f.name, *of_table, indices, pick(rng, ("int64", "int32")), pick(rng, DTYPES))
    given: dict[str, Any] = {"zero_point": None, **rows.tensors(case)}
    given |= {"format": f.name, "block": list(case.resolved), "dtype": getattr(torch, case.dtype), "size": shape[1]}
    return op, named(op, given), rows.expected(case)


def _product(rng: Rng, op: str) -> tuple[str, dict[str, Any], tuple[Array, ...]]:
    integer = op in product.INTEGERS
    f = formats.get(pick(rng, [f.name for f in formats.TABLE if not (integer and f.is_float)]))
    shape = int(rng.integers(1, 20)), int(rng.integers(1, 40)), int(rng.integers(1, 140))
    of_scale = op == "dequant_matmul_backward_scale"
    case = Product(
        "dequant_matmul_backward" if of_scale else op,
        f.name,
        pick(rng, DTYPES),
        shape,
        (pick(rng, BLOCKS), pick(rng, BLOCKS)),
        pick(rng, ("contiguous", "offset")),
        f.is_float or rng.random() < 0.5,
        bias="backward" not in op and rng.random() < 0.5,
        activation=pick(rng, (None, *ACTIVATIONS)),
        tiled=op == "dequant_matmul" and f.bits <= 8 and rng.random() < 0.3,
        batch_invariant=bool(rng.integers(2)),
        x_format=pick(rng, X_FORMATS),
        x_symmetric=bool(rng.integers(2)),
        per_row=bool(rng.integers(2)),
    )
    given: dict[str, Any] = {"bias": None, "zero_point": None, "x_zero_point": None, **product.tensors(case)}
    given |= {"format": f.name, "block": list(case.resolved), "activation": case.activation}
    given |= {"batch_invariant": case.batch_invariant, "dtype": getattr(torch, case.dtype)}
    given |= {"tiles": given["codes"], "size": shape[1] if case.tiled else shape[2]}
    want = product.expected(case)
    if "backward" in op:
        given["dy"] = given["x"]
    if of_scale:
        x = rng.integers(-8, 9, (shape[0], shape[2])).astype(np.float32)
        given["x"] = torch.from_numpy(x).to(getattr(torch, case.dtype))
        arrays = product.inputs(case)
        weight: dict[str, Any] = {n: arrays[n] for n in ("codes", "scale")}
        options: dict[str, Any] = {"block": case.resolved, "zero_point": arrays.get("zero_point")}
        want = reference.dequant_matmul_backward_scale(arrays["x"], x, **weight, format=f.name, **options)
    overload = f"{op}.tiled" if case.tiled else op
    return overload, named(overload, given), (want,)


def _helper(rng: Rng, op: str) -> Call:
    """The functions that no backend serves."""
    if op == "fake_cast":
        f, dtype = pick(rng, CASTS[1:]), pick(rng, DTYPES)
        case = Case("cast", f, dtype, (3, pick(rng, SIZES)), saturate=True)
        x = compare.tensors(case)["x"]
        assert x is not None
        codes = reference.cast(_floats(bits(x), dtype), f, saturate=True)
        want = reference.cast(_floats(codes, f), dtype)
        return Call(op, f"quantlib.ops.{op}", {"x": x, "format": f, "saturate": True}, (want,))
    N, K = int(rng.integers(1, 40)), int(rng.integers(1, 200))
    if op in ("pack", "unpack"):
        f = pick(rng, [f.name for f in formats.TABLE if f.packed])
        low, high = formats.get(f).code_range
        one = rng.integers(low, high + 1, (N, K)).astype(np.int8 if low else np.uint8)
        two = reference.pack(one, formats.get(f))
        if op == "pack":
            return Call(op, f"quantlib.{op}", {"codes": torch.from_numpy(one), "format": f}, (two,))
        return Call(op, f"quantlib.{op}", {"packed": torch.from_numpy(two), "format": f, "size": K}, (one,))
    f = pick(rng, [f.name for f in formats.TABLE if f.bits <= 8])
    case = Case("dequantize", f, "float32", (N, K), (-1, -1))
    given = compare.tensors(case)["codes"]
    assert given is not None
    tiles = ops.tile(given, f, size=K)  # by the code itself: what is held is that one undoes the other, in any layout
    back = ops.untile(tiles, f, (N, K))
    if op == "tile":
        return Call(op, f"quantlib.ops.{op}", {"codes": given, "format": f, "size": K}, (bits(tiles),))
    return Call(op, f"quantlib.ops.{op}", {"tiles": tiles, "format": f, "shape": (N, K)}, (bits(back),))


def _per_axis(rng: Rng, op: str) -> Call:
    """Draw a call of torch's fake quantization by our names: torch gives the expected result."""
    shape = int(rng.integers(1, 20)), int(rng.integers(1, 40))
    x, axis = torch.from_numpy(rng.standard_normal(shape).astype(np.float32)), int(rng.integers(2))
    low, high = pick(rng, ((-128, 127), (0, 255), (-8, 7), (0, 15)))
    if op.endswith("tensor_affine"):
        scale, z = float(np.float32(rng.uniform(0.01, 1))), int(rng.integers(low, high + 1))
        want = torch.fake_quantize_per_tensor_affine(x, scale, z, low, high)
        given: dict[str, Any] = {"input": x, "scale": scale, "zero_point": z}
    else:
        scales = torch.from_numpy(rng.uniform(0.01, 1, shape[axis]).astype(np.float32))
        zs = torch.from_numpy(rng.integers(low, high + 1, shape[axis], np.int32))
        want = torch.fake_quantize_per_channel_affine(x, scales, zs, axis, low, high)
        given = {"input": x, "scale": scales, "zero_point": zs, "axis": axis}
    return Call(op, f"quantlib.ops.{op}", given | {"quant_min": low, "quant_max": high}, (bits(want),))


def _raw(op: str, overload: str, arguments: dict[str, Any], want: tuple[Any, ...]) -> Call:
    kind = overload.partition(".")[2] or "default"
    return Call(op, f"torch.ops.quantlib.{op}.{kind}", arguments, want, raw=True)


def _public(op: str, overload: str, arguments: dict[str, Any], want: tuple[Any, ...]) -> Call:
    """The same call of the public function."""
    given = dict(arguments)
    if op in ("compute_scale", "quantize_dynamic"):
        given["symmetric"] = not overload.endswith("affine")
    if op == "fake_quantize":
        given["mask"] = "lsq" if given.pop("lsq_mask") else "rounded"
        del given["limits"]
    if overload.endswith("tiled"):
        given["codes"] = given.pop("tiles")
    return Call(op, f"quantlib.{op}", given, want)


def _with_outs(call: Call, overload: str) -> None:
    """Let ``call`` write its results into memory full of other bytes."""
    shapes = [right.exact.shape if isinstance(right, Sum) else right.shape for right in call.want]
    fresh = [poisoned(*result) for result in zip(shapes, _dtypes(call), strict=False)]
    if call.raw:
        op, _, kind = overload.partition(".")
        into = f"{op}.{kind + '_' if kind else ''}out"
        call.name = f"torch.ops.quantlib.{into}"
        schema = call.function._schema  # type: ignore[attr-defined]
        call.outs = tuple(argument.name for argument in schema.arguments if argument.kwarg_only)
        call.arguments |= dict(zip(call.outs, fresh, strict=True))
    else:
        call.outs = ("out",)
        call.arguments["out"] = fresh[0] if len(fresh) == 1 else tuple(fresh)


def _dtypes(call: Call) -> tuple[torch.dtype, ...]:
    """The dtypes of the results that ``call`` may have."""
    given = call.arguments
    if call.op in ("cast", "quantize", "quantize_dynamic"):
        return getattr(torch, formats.get(given["format"]).dtype_name), torch.float32, torch.int32
    if call.op in ("compute_scale", "search_scale"):
        return torch.float32, torch.int32
    if call.op == "adamw_step":
        return tuple(given[name].dtype for name in ("parameter", *steps.STATES))
    if call.op in ("dequantize", "dequantize_rows", "scaled_matmul"):
        return (given["dtype"],)
    if call.op == "dequant_matmul_backward_scale":
        return (torch.float32,)
    return given["dy" if "dy" in given else "x"].dtype, torch.float32, torch.float32


def named(overload: str, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``given`` that the schema of ``overload`` names, in its order."""
    op, _, kind = overload.partition(".")
    schema = getattr(getattr(torch.ops.quantlib, op), kind or "default")._schema
    return {argument.name: given[argument.name] for argument in schema.arguments}


def pick(rng: Rng, options: Iterable[Any]) -> Any:
    options = list(options)
    return options[int(rng.integers(len(options)))]


def served() -> tuple[str, ...]:
    """The backends that the CPU prefers: they are fast enough to be tried thousands of times."""
    return tuple(b for b in reversed(backends.order("cpu")) if backends.refuses(b, "cpu") is None)


def _floats(codes: Array, format: str) -> Array:
    f = formats.get(format)
    assert isinstance(f, formats.FloatFormat)
    return codes.view(np.float32) if f.bits == 32 else reference.decode_float(codes, f)
