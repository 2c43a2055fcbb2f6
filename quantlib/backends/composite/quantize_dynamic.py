"""scale = compute_scale(x), codes = quantize(x, scale)"""

from __future__ import annotations

from torch import Tensor

from quantlib.backends.composite.compute_scale import compute_scale
from quantlib.backends.composite.numerics import Block
from quantlib.backends.composite.quantize import quantize
from quantlib.formats import Format


def quantize_dynamic(
    x: Tensor, format: Format, block: Block, codes: Tensor, scale: Tensor, zero_point: Tensor | None = None
) -> None:
    compute_scale(x, format, block, scale, zero_point)
    quantize(x, scale, format, block, zero_point, codes)
