"""y[..., n] = base(x)[..., n] + alpha / rank * sum over r of b[n, r] * sum over k of a[r, k] * x[..., k]"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.nn.linear import QuantLinear


class MergeError(NamedTuple):
    """The error of projecting the sum of a base and its adapter."""

    snr_db: float  # 10 log10 of the sum of squares of base + adapter over that of the error
    adapter_snr_db: float  # the same of the adapter alone: below about 0 the codes are too coarse to hold it
    max_error: float  # the largest error of a weight


class LoRALinear(nn.Module):
    """A frozen `QuantLinear`, and an adapter of low rank that is trained beside it.

    Parameters
    ----------
    base : QuantLinear
        Frozen from now on, its bias too.
    rank : int
    alpha : float, optional
        The adapter is multiplied by alpha / rank; by default alpha is the rank.
    dtype : torch.dtype, optional
        The dtype of the adapter; by default that of ``base``.

    Attributes
    ----------
    a : nn.Parameter [rank, K]
        At random at first, as the weight of ``nn.Linear``.
    b : nn.Parameter [N, rank]
        0 at first: the layer starts as ``base``.

    Raises
    ------
    TypeError
        For a base that is not a QuantLinear.
    ValueError
        For a rank that is not in 1..min(N, K).

    Notes
    -----
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021. Gradients reach the adapter and the input.
    """

    def __init__(
        self, base: QuantLinear, rank: int = 8, alpha: float | None = None, *, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(base, QuantLinear):
            raise TypeError(f"base must be a QuantLinear, got {type(base).__name__}")
        N, K = base.weight_shape
        if not 1 <= rank <= min(N, K):
            raise ValueError(f"rank must be in 1..{min(N, K)}, got {rank}")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        like: dict[str, Any] = {"dtype": dtype or base.dtype, "device": base.weight_codes.device}
        self.a, self.b = nn.Parameter(torch.empty(rank, K, **like)), nn.Parameter(torch.empty(N, rank, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The adapter as at first."""
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        nn.init.zeros_(self.b)

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] -> [..., N] of the same dtype."""
        y: Tensor = self.base(input)
        update = F.linear(F.linear(input.to(self.a.dtype), self.a), self.b)
        return y + (update * (self.alpha / self.rank)).to(y.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight of the base, for code that asks a linear layer for its dtype, device or shape."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """K"""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """N"""
        return self.base.out_features

    def update(self) -> Tensor:
        """[N, K] float32: what the adapter adds to the weight."""
        return (self.b.float() @ self.a.float()) * (self.alpha / self.rank)

    @torch.no_grad()
    def merge(self) -> tuple[QuantLinear, MergeError]:
        """The codes of base + adapter, by the base's spec, and how far their values are from that sum.

        The layer itself is left as it is; the bias is the same parameter in both.

        Raises
        ------
        ValueError
            For an adapter that is not finite.
        """
        update = self.update()
        if not update.isfinite().all():
            raise ValueError(f"adapter must be finite, got {update[~update.isfinite()][0]:g}")
        whole = self.base.with_weight(weight := nn.Parameter(self.base.values() + update))
        merged = QuantLinear.from_float(whole, self.base.spec)
        merged.dtype, merged.batch_invariant = self.base.dtype, self.base.batch_invariant
        error = merged.values() - weight
        size = float(error.abs().max())
        return merged.train(self.training), MergeError(_snr_db(weight, error), _snr_db(update, error), size)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha:g}"


def _snr_db(signal: Any, error: Tensor) -> float:
    s, e = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (signal, error))
    return math.inf if e == 0 else 20 * math.log10(s / e) if s else -math.inf
