"""out[r, j] = decode(codes[i, j]) * scale[i // br, j // bk], i = indices[r]"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.dequantize import dequantize
from quantlib.backends.weight import QuantizedWeight


def dequantize_rows(indices: Tensor, weight: QuantizedWeight, out: Tensor) -> None:
    codes, scale, _, (br, bk), zero_point, (N, K), _ = weight
    rows = indices.clamp(0, N - 1)
    blocks = rows // br
    z = None if zero_point is None else looked_up(zero_point, blocks)
    found = weight._replace(
        codes=looked_up(codes, rows), scale=looked_up(scale, blocks), zero_point=z, block=(1, bk), shape=(len(rows), K)
    )
    dequantize(found, out)


def looked_up(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], of bytes too that torch does not look up: FP8 and E8M0."""
    if x.dtype.itemsize == 1:
        return x.view(torch.uint8).index_select(0, rows).view(x.dtype)
    return x.index_select(0, rows)
