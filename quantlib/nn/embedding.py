"""y[..., j] = decode(weight[i, j]) * weight_scale[i // br, j // bk], i = ids[...]"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from quantlib.nn.functional import dequantize_rows
from quantlib.nn.module import QuantModule
from quantlib.spec import QuantSpec

if TYPE_CHECKING:
    from typing_extensions import Self


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
        Of the result, and of the table that `dequantize` gives.
    spec : QuantSpec or what `QuantSpec.parse` takes
        What the table is projected to. An activation is left out of it: indices have no values to project.

    Attributes
    ----------
    weight, weight_scale, weight_zero_point, spec, block, dtype
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
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, padding_idx, device="meta")
        self._allocate(QuantSpec.parse(spec).weight_only, dtype, device)

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @classmethod
    def like(cls, layer: nn.Embedding, spec: QuantSpec) -> Self:
        sizes = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        return cls(*sizes, device="meta", dtype=layer.weight.dtype, spec=spec)

    @classmethod
    def refuses(cls, layer: nn.Embedding) -> str | None:
        names = ("max_norm", "sparse", "scale_grad_by_freq")
        return next((f"with {name}={value}" for name in names if (value := getattr(layer, name))), None)

    def with_weight(self, weight: nn.Parameter) -> nn.Embedding:
        table = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        table.weight = weight
        return table.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """ids [...] int32 or int64 -> [..., K] of ``self.dtype``."""
        size = self.embedding_dim
        y = dequantize_rows(self.plain, input.reshape(-1), self.spec.format, self.block, size, self.dtype)
        return y.view(*input.shape, size)
