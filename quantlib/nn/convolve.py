"""y[b, n] = bias[n] + x[b] convolved with w[n], by one pass over the codes in C++ where that is faster than torch"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quantlib import backends, formats
from quantlib.backends import compiled
from quantlib.backends.packing import wide_zero_points
from quantlib.nn.functional import SOURCES, Weight
from quantlib.nn.weight import QuantParameter
from quantlib.ops.check import dtype_name, may_be_followed

TYPES = list(formats.FORMATS)  # as `enum class Type` of csrc/formats.h numbers them
PLAIN = (Tensor, nn.Parameter, QuantParameter)
LEAST = 16  # output channels: with fewer, most lanes of the kernel would multiply for nothing


def convolve(
    x: Tensor,
    bias: Tensor | None,
    weight: Weight,
    format: str,
    block: tuple[int, int],
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor | None:
    """The convolution of x [B, channels, H, W] with a weight [N, channels * kernel]; None where torch has to do it.

    Sums are taken in float32, of the codes' values times the scale: neither is rounded to the dtype of x.
    """
    codes, scale, zero_point = weight
    if x.device.type != "cpu" or x.dtype not in SOURCES or scale is None or not _is_plain(x, bias, *weight):
        return None
    if backends.current() not in ("auto", "cpp") or x.layout is not torch.strided:
        return None
    if x.shape[1] != channels or not x.is_contiguous() or not codes.is_contiguous():
        return None
    sizes = (*x.shape, *kernel, *stride, *padding, *dilation)
    call = _call(sizes, len(codes), x.dtype, format, block, zero_point is not None)
    if call is None:
        return None
    scale = scale.float().contiguous()
    if zero_point is not None:
        zero_point = wide_zero_points(zero_point, formats.get(format), scale.shape[1]).contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty(call.shape, dtype=x.dtype)
    failed = call(x, codes, scale, zero_point, bias, y)
    return None if failed else y


def _is_plain(*tensors: Tensor | None) -> bool:
    """True if nothing but this call sees the tensors: no graph, no mode, no transform."""
    if torch.compiler.is_compiling() or torch._C._is_tracing() or may_be_followed():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    return all(t is None or type(t) in PLAIN for t in tensors)


class _Call(NamedTuple):
    """``quantlib_convolve`` but for its tensors; ``sizes`` are those of ``struct Convolve``, in its order."""

    function: Any
    shape: tuple[int, ...]  # of y
    sizes: Any
    x_type: int
    format: int
    weight: tuple[int, ...]  # N, br, bk

    def __call__(self, *tensors: Tensor | None) -> int:
        x, codes, scale, zero_point, bias, y = (None if t is None else t.data_ptr() for t in tensors)
        args = (x, self.x_type, codes, self.format, scale, zero_point, *self.weight, bias, y)
        failed: int = self.function(self.sizes, *args)
        return failed


@functools.lru_cache(1024)
def _call(
    sizes: tuple[int, ...], N: int, dtype: torch.dtype, format: str, block: tuple[int, int], affine: bool
) -> _Call | None:
    """The call for these sizes; None where there is no kernel, or where torch is faster."""
    function = _kernel()
    (B, C), rest = sizes[:2], sizes[2:]
    rows = zip(*(rest[i : i + 2] for i in range(0, len(rest), 2)), strict=True)
    outs = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, k, s, p, d in rows]
    if function is None or N < LEAST or min(B, C, *outs) < 1:
        return None
    all_sizes = (ctypes.c_int64 * (len(sizes) + 2))(*sizes, *outs)
    call = _Call(function, (B, N, *outs), all_sizes, TYPES.index(dtype_name(dtype)), TYPES.index(format), (N, *block))
    some = torch.zeros(1, dtype=torch.int32)  # stands for zero points, which are not read
    return None if call(None, None, None, some if affine else None, None, None) else call


@functools.cache
def _kernel() -> Any:
    """``quantlib_convolve`` of csrc/cpu/backend.cpp; None without the library. It lets other threads run."""
    path = compiled.path_of("cpu")
    if path is None:
        return None
    function = ctypes.CDLL(str(path)).quantlib_convolve
    pointer, number, type = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function.argtypes = [pointer, pointer, type, pointer, type, pointer, pointer, *[number] * 3, pointer, pointer]
    return function
