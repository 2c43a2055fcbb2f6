"""The arguments of a matmul that describe a weight, and those that describe the steps after the sum."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.tiles import TileLayout
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.check import (
    INPUTS,
    Block,
    check_block,
    check_dtype,
    check_scale,
    check_tensor,
    described,
    dtype_of,
    fail,
    may_be_followed,
    no_gradient,
    visible,
)
from quantlib.reference.activation import ACTIVATIONS


def check_weight(op: str, weight: QuantizedWeight, like: Tensor, used: Tensor | None = None) -> None:
    """Check the codes' shape and dtype for format and layout, the device of ``like``, and that their scales fit.

    Only the values of ``used`` rows of scales are looked at, where they are given.
    """
    codes, f, (N, K) = weight.codes, weight.format, weight.shape
    if weight.tiled:
        check_tensor(op, "tiles", codes, (TileLayout(f).shape(N, K), torch.uint8), like.device)
    else:
        columns = f.columns(K)
        if codes.dim() != 2 or codes.shape[1] != columns or codes.dtype != dtype_of(f) or codes.device != like.device:
            expected = described([0, columns], dtype_of(f), like.device).replace("[0", "[N")
            fail(op, "codes", expected, described(codes.shape, codes.dtype, codes.device))
    check_scale(op, weight.scale, weight.zero_point, f, check_block(op, [N, K], weight.block), like, used)


def check_experts(op: str, weight: QuantizedWeight, offsets: Tensor, x: Tensor, name: str = "x") -> None:
    """E weights in one fit the rows of x [T, ...], those of expert e from offsets[e - 1] to offsets[e]."""
    codes, f, (N, K) = weight.codes, weight.format, weight.shape
    if x.dim() != 2:
        fail(
            op,
            name,
            "[T, N], the rows of all experts" if name == "dy" else "[T, K], the rows of all experts",
            list(x.shape),
        )
    columns, E = f.columns(K), codes.shape[0]
    if codes.shape[2] != columns or codes.dtype != dtype_of(f) or codes.device != x.device:
        expected = described([0, 0, columns], dtype_of(f), x.device).replace("[0, 0", "[E, N")
        fail(op, "codes", expected, described(codes.shape, codes.dtype, codes.device))
    check_tensor(op, "offsets", offsets, ([E], torch.int32), x.device)
    used = check_ascending(op, offsets, x.shape[0])
    shape, dtype = check_block(op, [N, K], weight.block)
    check_scale(op, weight.scale, weight.zero_point, f, ([E, *shape], dtype), x, used)


def check_ascending(op: str, offsets: Tensor, rows: int) -> list[int] | None:
    """The experts that have rows, where looking does not make a device wait; ends ascend from 0 to at most ``rows``."""
    values = visible(offsets)
    if values is None:
        return None
    used, start = [], 0
    for e, end in enumerate(values.tolist()):
        if not start <= end <= rows:
            expected = f"ascending ends of groups in 0..{rows}"
            fail(op, "offsets", expected, f"{end} for expert {e}, which begins at {start}")
        if start < end:
            used.append(e)
        start = end
    return used


def check_followed(op: str, codes: Tensor, scale: Tensor, zero_point: Tensor | None, out: Tensor | None) -> None:
    """Check that nothing without a gradient requires one: of a weight, the scale alone may."""
    followed = torch.is_grad_enabled() or may_be_followed()
    for argument, value in (("codes", codes), ("zero_point", zero_point), ("out", out)):
        if value is not None and (followed or not isinstance(value, Tensor)):
            no_gradient(op, argument, value)
    if not isinstance(scale, Tensor):
        fail(op, "scale", "a tensor", type(scale).__name__)


def check_epilogue(op: str, epilogue: Epilogue, N: int, like: Tensor, experts: tuple[int, ...] = ()) -> None:
    """Check that bias is a float vector of N, or one for each of E ``experts``, and that the activation exists."""
    bias, activation, _ = epilogue
    if bias is not None:
        check_dtype(op, "bias", bias.dtype, INPUTS)
        check_tensor(op, "bias", bias, ([*experts, N], bias.dtype), like.device)
    if activation is not None and activation not in ACTIVATIONS:
        fail(op, "activation", f"None, {', '.join(ACTIVATIONS[:-1])} or {ACTIVATIONS[-1]}", activation)


def block_of_weight(op: str, codes: Tensor | int, block: Block, K: int) -> Block:
    """``block`` with -1 replaced by N, the rows of ``codes`` or the number itself, or by K."""
    if not isinstance(block, (tuple, list)):
        fail(op, "block", "two sizes >= 1", repr(block))
    if len(block) != 2 or -1 not in block:
        return block
    N = codes if isinstance(codes, int) else 1
    if isinstance(codes, Tensor) and codes.dim():
        N = codes.shape[1 if codes.dim() == 3 else 0]
    br, bk = (max(size, 1) if b == -1 else b for b, size in zip(block, (N, K), strict=True))
    return br, bk
