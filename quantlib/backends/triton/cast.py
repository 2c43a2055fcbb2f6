"""y[n] = encode(decode(x[n]))"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantlib.backends.triton import launch
from quantlib.backends.triton.numerics import decode_float, encode_float
from quantlib.backends.triton.tile import codes_at, load, store
from quantlib.formats import Format


@triton.jit
def cast_kernel(
    x_ptr,  # [n] of row X
    y_ptr,  # [n] of row Y
    n, X: tl.constexpr, Y: tl.constexpr, SATURATE: tl.constexpr, TILE: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * TILE
    i = tl.arange(0, TILE)
    x_ptr = codes_at(x_ptr, X) + first + i
    y_ptr = codes_at(y_ptr, Y) + first + i
    if first + TILE <= n:
        store(y_ptr, encode_float(decode_float(load(x_ptr, None, False), X, ARCH), Y, SATURATE, ARCH), None, False)
    else:
        inside = i < n - first
        store(y_ptr, encode_float(decode_float(load(x_ptr, inside, True), X, ARCH), Y, SATURATE, ARCH), inside, True)


def cast(x: torch.Tensor, x_format: Format, format: Format, saturate: bool, y: torch.Tensor) -> None:
    n = x.numel()
    tile = launch.choose_tile((1, n), (1, n), format)
    launch.launch(
        cast_kernel, launch.cdiv(n, tile.cols), x.device,
        launch.codes_of(x), launch.codes_of(y), n, x_format, format, saturate, tile.cols, launch.arch(x.device),
        warps=tile.warps,
    )  # fmt: skip
