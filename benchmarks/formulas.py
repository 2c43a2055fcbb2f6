"""The formulas that a torch user writes for each op; torch eager and torch.compile are the two ways to run them.

x is seen as blocks [M / br, br, K / bk, bk], so that one formula serves every granularity: Inductor drops axes of size
one. The rounding is the contract's where that costs nothing: the reciprocal of the scale once, no division an element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.packing import pack, unpack
from quantlib.formats import SCALE_MIN, Format


def blocks(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[M, K] -> [M / br, br, K / bk, bk]"""
    (M, K), (br, bk) = x.shape, block
    return x.view(M // br, br, K // bk, bk)


def per_block(scale: Tensor) -> Tensor:
    """[M / br, K / bk] -> [M / br, 1, K / bk, 1], which broadcasts against blocks"""
    return scale[:, None, :, None]


def compute_scale(x: Tensor, f: Format, affine: bool) -> tuple[Tensor, Tensor | None]:
    """Blocks -> scale [M / br, 1, K / bk, 1], and zero point where affine"""
    x = x.float()
    if not affine:
        return (x.abs().amax((1, 3), keepdim=True) / f.max).clamp(min=SCALE_MIN), None
    qmin, qmax = f.range(affine)
    lowest = x.amin((1, 3), keepdim=True).clamp(max=0)
    highest = x.amax((1, 3), keepdim=True).clamp(min=0)
    scale = ((highest - lowest) / (qmax - qmin)).clamp(min=SCALE_MIN)
    return scale, (qmin - lowest * scale.reciprocal()).round().clamp(qmin, qmax).int()


def encode(x: Tensor, scale: Tensor, zero_point: Tensor | None, f: Format) -> Tensor:
    """Blocks and what broadcasts against them -> codes, one a byte"""
    t = x.float() * scale.reciprocal()
    if f.is_float:
        return t.clamp(-f.max, f.max).to(getattr(torch, f.dtype_name))
    q = t.round() if zero_point is None else t.round() + zero_point
    return q.clamp(*f.range(zero_point is not None)).to(getattr(torch, f.dtype_name if f.signed is False else "int8"))


def store(codes: Tensor, out: Tensor, f: Format) -> None:
    """Blocks of codes into [M, K], or [M, ceil(K / P)] bytes that P codes share"""
    if f.packed:
        out.copy_(pack(codes.view(torch.uint8).view(len(out), -1), f))
    else:
        out.copy_(codes.view(out.shape))


def load(codes: Tensor, K: int, f: Format) -> Tensor:
    """[M, K] or packed codes -> [M, K] float32"""
    return (unpack(codes, f, K) if f.packed else codes).float()
