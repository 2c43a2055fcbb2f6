"""y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = dequantize(codes)"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.backends.composite.activation import activate
from quantlib.backends.composite.dequantize import dequantize
from quantlib.backends.composite.numerics import Block, encode_float, float_format, store
from quantlib.backends.tiles import TileLayout
from quantlib.formats import Format

SLAB = 1 << 18  # weights that are floats at a time: 1 MiB, 2 where they have to be float64


def dequant_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: Format,
    block: Block,
    zero_point: Tensor | None,
    bias: Tensor | None,
    activation: str | None,
    batch_invariant: bool,
    tiled: bool,
    y: Tensor,
) -> None:
    M, K = x.shape
    if tiled:
        codes = TileLayout(format).unpack(codes, y.shape[1], K)
    total = torch.empty(y.shape, dtype=torch.float32, device=x.device)
    rows = x.float()
    for n, w in weight_slabs(codes, scale, format, block, zero_point, K):
        if batch_invariant:  # a GEMM may sum in another order for another M
            for m in range(M):
                total[m, n] = product(w, rows[m])
        else:
            total[:, n] = product(rows, w.T)
    total += 0  # a sum starts at +0
    epilogue(total, bias, activation, y)


def weight_slabs(
    codes: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, K: int
) -> Iterator[tuple[slice, Tensor]]:
    """Rows n of the weight and their values, [len(n), K] float32: never all of them at once."""
    N, (br, bk) = len(codes), block
    step = max(SLAB // max(K, 1), 1)
    if len(scale) > 1:
        step = max(step // br, 1) * br
    for start in range(0, N, step):
        n = slice(start, min(start + step, N))
        blocks = slice(None) if len(scale) == 1 else slice(start // br, -(-n.stop // br))
        w = torch.empty(n.stop - start, K, dtype=torch.float32, device=codes.device)
        z = None if zero_point is None else zero_point[blocks]
        dequantize(codes[n], scale[blocks], format, (min(br, len(w)), bk), z, w)
        yield n, w


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype that they have, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def epilogue(total: Tensor, bias: Tensor | None, activation: str | None, y: Tensor) -> None:
    """y = encode(activation(fl(total + bias[n])))"""
    if bias is not None:
        total = total + bias
    store(y, encode_float(activate(total, activation), float_format(y.dtype), saturate=False))
