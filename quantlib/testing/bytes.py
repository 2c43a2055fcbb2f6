"""Compare bytes: the bits of a NaN, the sign of zero and the code of infinity are part of a result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from quantlib import formats, reference
from quantlib.formats import FloatFormat, Format

Array = NDArray[Any]
POISON = 0xA5  # in fresh memory: what a kernel forgets to write is seen


def bits(values: torch.Tensor | Array) -> Array:
    """[...] of any dtype -> [...] unsigned integers of the same size, on the host."""
    if isinstance(values, torch.Tensor):
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
        values = values.detach().resolve_neg().contiguous().view(integer).cpu().numpy()
    array = np.ascontiguousarray(values).reshape(np.shape(values))
    return array.view(f"uint{8 * array.itemsize}")


def tensor(codes: Array, format: str, device: str = "cpu") -> torch.Tensor:
    """[...] bits -> [...] tensor of the dtype that holds codes of ``format``; packed codes stay bytes."""
    dtype: torch.dtype = getattr(torch, formats.get(format).dtype_name)
    signed = np.array(codes).view(f"int{8 * codes.itemsize}")  # a copy, which torch may write to
    return torch.from_numpy(signed.reshape(codes.shape)).view(dtype).to(device)


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A tensor full of bytes that a kernel hardly writes by chance."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    word = int.from_bytes(bytes([POISON] * dtype.itemsize), "little", signed=True)
    return torch.full(tuple(shape), word, dtype=integer, device=device).view(dtype)


def assert_same_bytes(
    got: torch.Tensor | Array, want: torch.Tensor | Array, where: str = "", x: torch.Tensor | Array | None = None
) -> None:
    """Check that ``got`` and ``want`` have one shape, one size of element and the same bytes.

    Parameters
    ----------
    got, want : Tensor or array [...]
        Codes may come in the format's dtype on one side and as unsigned integers on the other.
    where : str
        Names the call in the message.
    x : Tensor or array [...], optional
        The inputs that the values were made of: the message shows the one behind the first mismatch.

    Raises
    ------
    AssertionError
        With the number of mismatches and, of the first one, the index, the bits and the values.
    """
    a, b = bits(got), bits(want)
    prefix = f"{where}: " if where else ""
    if a.shape != b.shape or a.itemsize != b.itemsize:
        described = (f"{_dtype(v)} {list(v.shape)}" for v in (got, want))
        raise AssertionError("{}got {}, expected {}".format(prefix, *described))
    wrong = a != b
    if not wrong.any():
        return
    index = tuple(int(i) for i in np.unravel_index(int(np.argmax(wrong)), a.shape))
    f = _format(got) or _format(want)
    digits = 2 * a.itemsize
    sides = [f"0x{int(v[index]):0{digits}x} ({_value(v[index], f)})" for v in (a, b)]
    source = ""
    if x is not None and tuple(x.shape) == a.shape:
        u = bits(x)[index]
        source = f", x = 0x{int(u):0{2 * u.itemsize}x} ({_value(u, _format(x))})"
    raise AssertionError(
        f"{prefix}{int(wrong.sum())} of {a.size} differ, first at {list(index)}: "
        f"got {sides[0]}, expected {sides[1]}{source}"
    )


def _dtype(values: torch.Tensor | Array) -> str:
    return str(values.dtype).removeprefix("torch.")


def _format(values: torch.Tensor | Array) -> Format | None:
    """Return the format of the bits of ``values``, if its dtype says so."""
    f = formats.FORMATS.get(_dtype(values))
    return f if isinstance(values, torch.Tensor) or _dtype(values) != "uint8" else None


def _value(code: Any, f: Format | None) -> str:
    if isinstance(f, FloatFormat):
        value = np.uint32(code).view(np.float32) if f.bits == 32 else reference.decode_float(np.array(code), f)
        return repr(float(value))
    signed = f.signed if f is not None else code.itemsize > 1  # int32 zero points, and bytes that nobody named
    return str(int(code.view(f"int{8 * code.itemsize}") if signed else code))
