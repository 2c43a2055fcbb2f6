"""The ops with a `QuantSpec` in place of format, block and symmetry."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantlib import ops
from quantlib.spec import QuantSpec


class Weight(NamedTuple):
    """A weight as it is kept: codes, and what turns them back into values."""

    codes: Tensor  # [..., K] of the format's dtype; [..., ceil(K / 2)] uint8 where it is packed
    scale: Tensor | None = None  # [ceil(M / br), ceil(K / bk)] float32
    zero_point: Tensor | None = None  # int32 of scale's shape


def quantize_weight(x: Tensor, spec: QuantSpec) -> Weight:
    """codes[i, j] = encode(x[i, j] / scale[i // br, j // bk]); the cast of x where ``spec`` has no scale.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16.
    """
    x = x.detach()
    if not spec.scaled:
        return Weight(ops.cast(x, spec.format))
    return Weight(*ops.quantize_dynamic(x, spec.format, block=spec.block(x.shape), symmetric=spec.symmetric is True))


def dequantize_weight(weight: Weight, spec: QuantSpec, size: int, dtype: torch.dtype) -> Tensor:
    """y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk], of ``dtype``; ``size`` is K."""
    codes, scale, zero_point = weight
    if scale is None:
        return codes.to(dtype)
    narrow = torch.float32 if dtype == torch.float64 else dtype  # float64 holds what C7 gives, in float32, exactly
    block = spec.block((*codes.shape[:-1], size))
    y = ops.dequantize(codes, scale, spec.format, block=block, zero_point=zero_point, dtype=narrow, size=size)
    return y.to(dtype)


def project(x: Tensor, spec: QuantSpec) -> Tensor:
    """The values that codes of ``x`` stand for, scales taken from ``x``: y = dequantize(quantize_dynamic(x)).

    x may be of any float dtype, and y is of the same; float64 is rounded to float32 first. The gradient passes
    straight through: the scale follows x, so nothing is clipped.
    """
    y: Tensor = _Project.apply(x, spec)  # type: ignore[no-untyped-call]
    return y


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, spec: QuantSpec) -> Tensor:
        narrow = x.float() if x.dtype == torch.float64 else x
        return dequantize_weight(quantize_weight(narrow, spec), spec, x.shape[-1], x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None
