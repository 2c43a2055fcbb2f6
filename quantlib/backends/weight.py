"""The weight w and the epilogue of a product: y = encode(activation(x w^T + bias)).

w[n, k] = decode(codes[n, k]) * scale[n // br, k // bk]. An op binds both from the arguments of its schema
(``quantlib/ops/declare.py``), and kernels take them as they are.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from quantlib.backends.tiles import TileLayout
from quantlib.formats import Format
from quantlib.spec import matrix_shape

# The layout of codes in memory: a matrix [N, K], two a byte where the format is packed, or as `TileLayout` orders them.
Layout = Literal["plain", "tiles"]


class QuantizedWeight(NamedTuple):
    """Codes, and everything that defines their values.

    A kernel is given contiguous tensors, a block that is clamped to the shape, and codes that are viewed as [N, K].
    That of a grouped product is given E such weights in one: each tensor has an axis [E, ...] more.
    """

    codes: Tensor  # [N, K] of the format's dtype, [N, ceil(K / 2)] uint8 where it is packed, or tiles
    scale: Tensor  # [ceil(N / br), ceil(K / bk)] float32
    format: Format
    block: tuple[int, int]  # br, bk: rows and columns that share a scale
    zero_point: Tensor | None  # int32 of scale's shape
    shape: tuple[int, int]  # N, K
    layout: Layout = "plain"

    @property
    def tiled(self) -> bool:
        return self.layout == "tiles"

    @property
    def arguments(self) -> tuple[Any, ...]:
        """codes, scale, format, block and zero_point, as the ops of ``torch.ops.quantlib`` take them."""
        return self.codes, self.scale, self.format.name, self.block, self.zero_point

    def plain(self) -> QuantizedWeight:
        """Return the same weight with its codes as a matrix."""
        if not self.tiled:
            return self
        return self._replace(codes=TileLayout(self.format).unpack(self.codes, *self.shape), layout="plain")

    def expert(self, e: int) -> QuantizedWeight:
        """Return the weight of expert ``e`` of E of them."""
        zero_point = None if self.zero_point is None else self.zero_point[e]
        return self._replace(codes=self.codes[e], scale=self.scale[e], zero_point=zero_point)

    def for_kernel(self) -> QuantizedWeight:
        """Return the same weight, of at least one element, as kernels take it."""
        codes, scale, format, (br, bk), zero_point, (N, K), layout = self
        codes, zero_point = codes.contiguous(), None if zero_point is None else zero_point.contiguous()
        if layout == "plain" and codes.dim() != 2 and scale.dim() == 2:
            codes = codes.view(matrix_shape(codes.shape))
        block = min(br, max(N, 1)), min(bk, max(K, 1))
        return QuantizedWeight(codes, scale.contiguous(), format, block, zero_point, (N, K), layout)


class Epilogue(NamedTuple):
    """An epilogue follows the sums of a product: y[m, n] = encode(activation(fl(total[m, n] + bias[n])))."""

    bias: Tensor | None = None  # [N], or [E, N], float32, float16 or bfloat16; contiguous float32 for a kernel
    activation: str | None = None
    dtype: torch.dtype | None = None  # of y; None where it is that of x

    def expert(self, e: int) -> Epilogue:
        """Return what follows the sums of expert ``e``."""
        return self if self.bias is None else self._replace(bias=self.bias[e])

    def for_kernel(self) -> Epilogue:
        """Return the same with a float32 bias, as kernels add it: float32 holds every bias exactly."""
        return self if self.bias is None else self._replace(bias=self.bias.to(torch.float32).contiguous())
