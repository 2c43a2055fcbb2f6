"""Checks of the arguments of ops. An error says what was expected and what came, in the words of ``csrc/check.h``.

A result is (shape, dtype): what an op checks and returns is its shape function too.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quantlib import formats
from quantlib.formats import FloatFormat, Format, IntFormat
from quantlib.spec import matrix_shape

Block = Sequence[int]
Result = tuple[Sequence[int], torch.dtype]

INPUTS = ("float32", "float16", "bfloat16")
E8M0 = "float8_e8m0fnu"  # of scales alone: powers of two
CASTS = tuple(f.name for f in formats.FORMATS.values() if f.is_float and f.whole)
TARGETS = tuple(f.name for f in formats.TABLE)
INTEGERS = tuple(f.name for f in formats.TABLE if not f.is_float)


def fail(op: str, argument: str, expected: object, got: object) -> NoReturn:
    raise RuntimeError(f"quantlib::{op}: {argument} must be {expected}, got {got}")


def one_of(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(f: Format) -> torch.dtype:
    """The dtype that holds codes of ``f``."""
    dtype = getattr(torch, f.dtype_name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def described(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    return f"{dtype_name(dtype)} [{', '.join(map(str, shape))}] on {device}"


def is_sharded(t: Any) -> bool:
    """True if ``t`` is a DTensor: this process may hold only a part of its values."""
    return type(t) is not Tensor and hasattr(t, "device_mesh")


def check_tensor(op: str, argument: str, got: Tensor, expected: Result, device: torch.device) -> None:
    """Check that ``got`` has the expected shape and dtype, on ``device``."""
    shape, dtype = expected
    if got.dtype != dtype or got.device != device or list(got.shape) != list(shape):
        fail(op, argument, described(shape, dtype, device), described(got.shape, got.dtype, got.device))


def check_dense(op: str, argument: str, got: Any) -> None:
    """Check that ``got`` is a tensor whose elements lie in memory by strides."""
    if not isinstance(got, Tensor):
        fail(op, argument, "a tensor", type(got).__name__)
    if got.is_nested:
        fail(op, argument, "a dense tensor", "nested")
    if got.layout is not torch.strided or got.is_quantized:
        kind = dtype_name(got.dtype) if got.is_quantized else str(got.layout).removeprefix("torch.").strip("_")
        fail(op, argument, "a dense tensor", kind)


def check_outs(op: str, outs: dict[str, Tensor]) -> None:
    """Check that no two elements of the results share memory."""
    for name, out in outs.items():
        span = 0  # the extent of the axes of smaller strides
        for stride, size in sorted(zip(out.stride(), out.shape, strict=True)):
            if size > 1 and stride <= span and out.numel():
                fail(op, name, "a tensor whose elements do not share memory", f"strides {list(out.stride())}")
            span += stride * (size - 1)
        for other, earlier in outs.items():
            if other == name:
                break
            if overlap(out, earlier):
                fail(op, name, "in memory of its own", f"that of {other}")


def overlap(a: Tensor, b: Tensor) -> bool:
    """True if the memory of two tensors may have a byte in common."""
    (first, end), (other, other_end) = _memory(a), _memory(b)
    return first < other_end and other < end


def _memory(x: Tensor) -> tuple[int, int]:
    """The first byte of ``x`` and the one after its last; nothing of what has no memory."""
    if not x.numel() or x.is_meta or not (first := x.data_ptr()):
        return 0, 0
    last = sum(stride * (size - 1) for stride, size in zip(x.stride(), x.shape, strict=True))
    return first, first + (last + 1) * x.element_size()


def check_dtype(op: str, argument: str, got: torch.dtype, accepted: Sequence[str]) -> None:
    if dtype_name(got) not in accepted:
        fail(op, argument, one_of(accepted), dtype_name(got))


def check_format(op: str, name: str, accepted: Sequence[str] = TARGETS) -> Format:
    if name not in accepted:
        fail(op, "format", one_of(accepted), name)
    return formats.FORMATS[name]


def last_size(op: str, argument: str, x: Tensor) -> int:
    """K of x [..., K]."""
    if not isinstance(x, Tensor):
        fail(op, argument, "a tensor", type(x).__name__)
    if not x.dim():
        fail(op, argument, "[..., K]", described(x.shape, x.dtype, x.device))
    return x.shape[-1]


def check_block(op: str, shape: Sequence[int], block: Block) -> Result:
    """The scale of x of ``shape``: float32 [ceil(M / br), ceil(K / bk)]."""
    if len(block) != 2 or block[0] < 1 or block[1] < 1:
        fail(op, "block", "two sizes >= 1", f"[{', '.join(map(str, block))}]")
    M, K = matrix_shape(shape)
    return [-(-M // block[0]), -(-K // block[1])], torch.float32  # so a whole axis is 1 when its size is a symbol


def check_scale(
    op: str,
    scale: Tensor,
    zero_point: Tensor | None,
    f: Format,
    expected: Result,
    like: Tensor,
    used: list[int] | Tensor | None = None,
) -> None:
    """Check that scale is as expected or narrower, and that zero_point has its shape and is int32 in the range.

    Zero points may be kept as codes of ``f`` are, too: all of these are in the range.

    Of several weights in one, or of rows, only the values of those that are ``used`` are checked.
    """
    dtype = scale.dtype if dtype_name(scale.dtype) in (*INPUTS, E8M0) else torch.float32
    check_tensor(op, "scale", scale, (expected[0], dtype), like.device)
    if zero_point is None:
        return
    if isinstance(f, FloatFormat):
        fail(op, "zero_point", f"None for {f.name}", "a tensor")
    if isinstance(zero_point, Tensor) and zero_point.dtype == dtype_of(f):
        check_tensor(op, "zero_point", zero_point, codes_of(expected[0], f), like.device)
        return
    check_tensor(op, "zero_point", zero_point, (expected[0], torch.int32), like.device)
    z = zero_point if used is None else zero_point[used]
    check_zero_point(op, "zero_point", z, f, (z.shape, torch.int32), like)


def check_zero_point(op: str, argument: str, zero_point: Tensor, f: Format, expected: Result, like: Tensor) -> None:
    """Check zero_point, and that it is inside an integer format's range, unless looking makes a device wait."""
    check_tensor(op, argument, zero_point, expected, like.device)
    values = host_values(zero_point)
    if values is not None:
        assert isinstance(f, IntFormat)
        qmin, qmax = f.range(affine=True)
        lowest, highest = map(int, values)
        if lowest < qmin or highest > qmax:
            fail(op, argument, f"in {qmin}..{qmax}", lowest if lowest < qmin else highest)


def host_values(x: Tensor, wait: bool = False) -> tuple[float, float] | None:
    """The least and the largest of ``x`` where looking does not make a device wait, or ``wait``; NaN where one is."""
    values = visible(x, wait)
    if values is None:
        return None
    least, largest = values.aminmax()
    return least.item(), largest.item()


def visible(x: Tensor, wait: bool = False) -> Tensor | None:
    """The values of ``x``, those of every example under vmap, where they lie on the CPU, or on any device."""
    if wait or x.device.type == "cpu":
        _looks.number += 1
    if torch.compiler.is_compiling() or torch._C._is_tracing():  # x stands for others
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    if x.is_meta or (x.device.type != "cpu" and not wait) or not x.numel():
        return None
    values = x.detach()
    return values if type(values) is Tensor else None  # of a tracer, or of a subclass, there may be none


class _Looks(threading.local):
    number = 0


_looks = _Looks()


def looks() -> int:
    """The number of times that checks of this thread have looked, or would have, at the values of a tensor."""
    return _looks.number


def codes_of(shape: Sequence[int], f: Format) -> Result:
    """x's codes: of x's shape, or [..., ceil(K / P)] bytes where P of them share one."""
    return ([*shape[:-1], f.columns(matrix_shape(shape)[1])] if f.packed else list(shape)), dtype_of(f)


def check_size(op: str, columns: int, f: Format, size: int | None) -> int:
    """Return K of codes that are ``columns`` wide: ``size``, which packed bytes cannot tell, or the largest one."""
    sizes = f.sizes(columns)
    if size is not None and (size not in sizes or size < 0):
        fail(op, "size", one_of([str(K) for K in sizes if K >= 0]), repr(size))
    return sizes[-1] if size is None else size


def wants_gradient(op: str, argument: str, x: Any) -> bool:
    """True if autograd follows operations on ``x``, in reverse or in forward mode; ``x`` must be a tensor."""
    if not isinstance(x, Tensor):
        fail(op, argument, "a tensor", type(x).__name__)
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return may_be_followed() and _is_followed(x)


def may_be_followed() -> bool:
    """True if autograd may follow a tensor that does not require a gradient, or not of this level."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def _is_followed(x: Tensor) -> bool:
    """True if autograd follows x at any level of torch.func, or if x has a tangent."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if _has_derivative(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return _has_derivative(x)


def _has_derivative(x: Tensor) -> bool:
    if torch._C._functorch.is_batchedtensor(x):  # which only the level below it knows
        return False
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def no_gradient(op: str, argument: str, x: Any) -> None:
    """A projection has no gradient: raise where one would vanish."""
    if wants_gradient(op, argument, x):
        way_out = "call it under torch.no_grad() or on a detached tensor"
        raise RuntimeError(f"quantlib::{op}: {argument} must not require a gradient, the op has none: {way_out}")
