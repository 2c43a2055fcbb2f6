"""y[..., j] = decode(weight[i, j]) * weight_scale[i // br, j // bk], i = ids[...]"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quantlib.nn.functional import dequantize_rows
from quantlib.nn.leaf import check_inside
from quantlib.nn.module import QuantModule
from quantlib.spec import QuantSpec


class QuantEmbedding(QuantModule, nn.Embedding):
    """``nn.Embedding`` whose table is codes and their scales: the rows that are looked up are dequantized, no others.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
        N and K.
    padding_idx : int, optional
        Kept for what asks for it. The row is looked up like every other: a table of codes has no gradient to leave out.
    device : torch.device, optional
    dtype : torch.dtype, optional
        The dtype of the result, and of the table that `dequantize` gives.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The spec of the table. An activation is left out of it: indices have no values to project.

    Attributes
    ----------
    weight, weight_codes, weight_scale, weight_zero_point, spec, block, dtype
        As in `QuantModule`.

    Notes
    -----
    There is no ``max_norm``, which would change the table during a lookup, and neither ``sparse`` nor
    ``scale_grad_by_freq``, which are about a gradient that codes do not have.
    """

    FLOAT = nn.Embedding

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        spec: Any,
    ) -> None:
        self._take(nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta"), spec, dtype, device)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self._rows(self.num_embeddings), self.embedding_dim

    def _allocate(self, spec: QuantSpec, dtype: torch.dtype | None, device: Any) -> None:
        super()._allocate(spec.weight_only, dtype, device)

    def _resize(self, N: int) -> bool:
        self.num_embeddings = N
        return True

    @classmethod
    def refuses(cls, layer: nn.Embedding) -> str | None:
        names = ("max_norm", "sparse", "scale_grad_by_freq")
        return next((f"with {name}={value}" for name in names if (value := getattr(layer, name))), None)

    def forward(self, input: Tensor) -> Tensor:
        """ids [...] int32 or int64 -> [..., K] of ``self.dtype``."""
        check_inside(input)
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor of int64 or int32, got {type(input).__name__}")
        return dequantize_rows(self.plain, input, self.spec.format, self.block, self.embedding_dim, self.dtype)
