"""What the matmuls ask of a weight, a bias and an activation: codes [N, K], what turns them into values, and what
follows the sum."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quantlib import formats
from quantlib.formats import Format
from quantlib.ops.check import (
    INPUTS,
    TARGETS,
    Block,
    check_block,
    check_dtype,
    check_format,
    check_scale,
    check_tensor,
    described,
    dtype_of,
    fail,
    no_gradient,
)
from quantlib.reference.activation import ACTIVATIONS


def check_weight(
    op: str,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None,
    K: int,
    like: Tensor,
    accepted: tuple[str, ...] = TARGETS,
) -> tuple[Format, int]:
    """codes are [N, K] of the format, on the device of ``like``, and scale and zero_point theirs: the row, and N."""
    f = check_format(op, format, accepted)
    N = codes.shape[0] if codes.dim() else 0
    shape = [N, f.columns(K)]
    if codes.dim() != 2 or codes.shape[1] != shape[1] or codes.dtype != dtype_of(f) or codes.device != like.device:
        expected = described(shape, dtype_of(f), like.device).replace(f"[{N}", "[N")
        fail(op, "codes", expected, described(codes.shape, codes.dtype, codes.device))
    check_scale(op, scale, zero_point, f, check_block(op, [N, K], block), like)
    return f, N


def check_followed(op: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor | None) -> None:
    """Check that nothing without a gradient requires one: of a weight, the scale alone may."""
    for argument, value in (("codes", codes), ("zero_point", zero_point), ("out", out)):
        if value is not None:
            no_gradient(op, argument, value)
    if not isinstance(scale, Tensor):
        fail(op, "scale", "a tensor", type(scale).__name__)


def check_epilogue(op: str, bias: Tensor | None, activation: str | None, N: int, like: Tensor) -> None:
    """bias is a float vector of N on the device of ``like``; activation is one there is."""
    if bias is not None:
        check_dtype(op, "bias", bias.dtype, INPUTS)
        check_tensor(op, "bias", bias, ([N], bias.dtype), like.device)
    if activation is not None and activation not in ACTIVATIONS:
        fail(op, "activation", f"None, {', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}", activation)


def last_size(op: str, argument: str, x: Tensor) -> int:
    """K of x [..., K]."""
    if not isinstance(x, Tensor):
        fail(op, argument, "a tensor", type(x).__name__)
    if not x.dim():
        fail(op, argument, "[..., K]", described(x.shape, x.dtype, x.device))
    return x.shape[-1]


class Launched(NamedTuple):
    """A weight as kernels take it: contiguous, its block clamped to it."""

    codes: Tensor
    scale: Tensor
    format: Format
    block: tuple[int, int]
    zero_point: Tensor | None


def launched(
    codes: Tensor, scale: Tensor, format: str, block: Block, zero_point: Tensor | None, shape: tuple[int, int]
) -> Launched:
    N, K = shape
    clamped = (min(block[0], max(N, 1)), min(block[1], max(K, 1)))
    zero_point = None if zero_point is None else zero_point.contiguous()
    return Launched(codes.contiguous(), scale.contiguous(), formats.get(format), clamped, zero_point)


def float_bias(bias: Tensor | None) -> Tensor | None:
    """The bias as kernels add it: float32, which every float is exactly."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def block_of_weight(op: str, codes: Tensor | int, block: Block, K: int) -> Block:
    """``block`` with -1 replaced by N, the rows of ``codes`` or the number itself, or by K."""
    if not isinstance(block, (tuple, list)):
        fail(op, "block", "two sizes >= 1", repr(block))
    if len(block) != 2 or -1 not in block:
        return block
    N = codes.shape[0] if isinstance(codes, Tensor) and codes.dim() else codes if isinstance(codes, int) else 1
    br, bk = (max(size, 1) if b == -1 else b for b, size in zip(block, (N, K), strict=True))
    return br, bk
