"""y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = dequantize(codes)"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.backends.composite.activation import activate
from quantlib.backends.composite.dequantize import dequantize
from quantlib.backends.composite.numerics import encode_float, float_format, store
from quantlib.backends.weight import Epilogue, QuantizedWeight

SLAB = 1 << 18  # weights that are floats at a time: 1 MiB, 2 where they have to be float64


def dequant_matmul(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, batch_invariant: bool, y: Tensor) -> None:
    total = torch.empty(y.shape, dtype=torch.float32, device=x.device)
    rows = x.float()
    for n, w in weight_slabs(weight.plain()):
        if batch_invariant:  # a GEMM may sum in another order for another M
            for m in range(len(x)):
                total[m, n] = product(w, rows[m])
        else:
            total[:, n] = product(rows, w.T)
    total += 0  # a sum starts at +0
    finish(total, epilogue, y)


def weight_slabs(weight: QuantizedWeight) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows n of a plain weight and their values, [len(n), K] float32, never all of them at once."""
    codes, scale, zero_point, (N, K), (br, bk) = (
        weight.codes,
        weight.scale,
        weight.zero_point,
        weight.shape,
        weight.block,
    )
    step = max(SLAB // max(K, 1), 1)
    if len(scale) > 1:
        step = max(step // br, 1) * br
    for start in range(0, N, step):
        n = slice(start, min(start + step, N))
        blocks = slice(None) if len(scale) == 1 else slice(start // br, -(-n.stop // br))
        w = torch.empty(n.stop - start, K, dtype=torch.float32, device=codes.device)
        z = None if zero_point is None else zero_point[blocks]
        block, shape = (min(br, len(w)), bk), (len(w), K)
        dequantize(weight._replace(codes=codes[n], scale=scale[blocks], zero_point=z, block=block, shape=shape), w)
        yield n, w


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype that they have, under autocast too."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def finish(total: Tensor, epilogue: Epilogue, y: Tensor) -> None:
    """y = encode(activation(fl(total + bias[n])))"""
    if epilogue.bias is not None:
        total = total + epilogue.bias
    total = activate(total, epilogue.activation)
    store(y, encode_float(total, float_format(y.dtype), saturate=False))
