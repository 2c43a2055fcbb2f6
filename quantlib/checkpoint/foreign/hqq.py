"""HQQ: w = (q - z) * s with a float zero point, in groups of the weight as [N * K / group, group] (axis 1).

``W_q`` packs the groups: of 4 bits the first half of them is in the high nibbles, the second in the low ones. ``scale``
and ``zero`` [N * K / group, 1]; ``nbits``, ``group_size``, ``axis`` and ``shape`` are tensors of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.checkpoint.foreign.found import FLOATS, Found, Once, Tensors

META = (
    *("nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale"),
    *("quant_zero", "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise"),
    *("optimize", "round_zero"),
)


def find(tensors: Tensors) -> Iterator[Found]:
    for prefix in tensors.named("W_q"):
        parts = ["W_q", "scale", "zero", *(part for part in META if f"{prefix}{part}" in tensors)]
        absent = [part for part in ("nbits", "shape", "axis", "scale", "zero") if f"{prefix}{part}" not in tensors]
        if absent:
            raise ValueError(f"{prefix}W_q must have {', '.join(absent)} beside it, got none (zero points in codes?)")
        told = {part: tensors.read(f"{prefix}{part}").flatten().tolist() for part in ("nbits", "shape", "axis")}
        try:
            bits, axis = int(told["nbits"][0]), int(told["axis"][0])
            shape = tuple(int(size) for size in told["shape"])
        except (IndexError, OverflowError, TypeError):
            raise ValueError(f"{prefix}W_q must have nbits, axis and shape as numbers, got {told}") from None
        if bits not in (8, 4, 2) or axis != 1 or len(shape) != 2:
            raise ValueError(f"{prefix}W_q must be of 8, 4 or 2 bits along axis 1, got {bits} bits, axis {axis}")
        yield weight_of(tensors, prefix, tuple(f"{prefix}{part}" for part in parts), bits, (shape[0], shape[1]))


def weight_of(tensors: Tensors, prefix: str, parts: tuple[str, ...], bits: int, shape: tuple[int, int]) -> Found:
    (N, K), (packed, scale, zero), share = shape, parts[:3], 8 // bits
    groups = math.prod(tensors.slot(scale).shape)
    step, size = tensors.get(packed, (torch.uint8,), (None, None)).shape
    for name in (scale, zero):
        if tensors.slot(name).dtype not in FLOATS or math.prod(tensors.slot(name).shape) != groups:
            raise ValueError(
                f"{name} must have a float for each of {groups} groups, got {list(tensors.slot(name).shape)}"
            )
    if groups * size != N * K or step * share != groups or K % size:
        raise ValueError(f"{packed} must hold {N} x {K} codes in {groups} groups, got [{step}, {size}] of {bits} bits")
    whole = Once(lambda: (tensors.read(packed), tensors.read(scale).flatten(), tensors.read(zero).flatten()))
    dtype = tensors.slot(scale).dtype

    def values(rows: slice) -> Tensor:
        q, s, z = whole()
        group = torch.arange(rows.start * K // size, rows.stop * K // size, device="cpu")
        shift = (bits * (share - 1 - group // step)).to(torch.uint8)
        codes = (q[group % step] >> shift[:, None]) & ((1 << bits) - 1)
        return ((codes.to(dtype) - z[group, None]) * s[group, None]).view(-1, K)

    why = "zero points that are no whole numbers"
    return Found(
        f"{prefix}weight", f"HQQ, {bits} bits", shape, dtype, parts, values=values, why=why, forget=whole.forget
    )
