"""Which rows of x a program of a grouped product takes: only the device knows how many each expert has."""

from __future__ import annotations

import triton
import triton.language as tl

from quantlib.backends.triton import launch


@triton.jit
def part_of(slot, offsets_ptr, E, R, GROUPS: tl.constexpr, TILE_M: tl.constexpr):
    """Return the expert of a slot, where its rows of x start, how many it has, and the first that the slot takes.

    Each expert has as many slots as it needs. Rows of no expert are one more, the last. Ends outside of x count as
    x's own: nothing outside of it is touched.
    """
    group = tl.arange(0, GROUPS)
    ends = tl.minimum(tl.maximum(tl.load(offsets_ptr + group, group < E, R), 0), R)
    before = tl.load(offsets_ptr + group - 1, (group > 0) & (group <= E), 0)
    starts = tl.minimum(tl.maximum(before, 0), R)
    past = tl.cumsum(tl.where(group <= E, tl.cdiv(tl.maximum(ends - starts, 0), TILE_M), 0), 0)
    e = tl.sum((past <= slot).to(tl.int32), 0)
    is_e = group == e
    start, end = tl.sum(tl.where(is_e, starts, 0), 0), tl.sum(tl.where(is_e, ends, 0), 0)
    first_slot = tl.max(tl.where(past <= slot, past, 0), 0)
    return e, start.to(tl.int64), end - start, (slot - first_slot).to(tl.int64) * TILE_M


def slots_of(R: int, E: int, tile_m: int) -> int:
    """Slots of ``tile_m`` rows that R rows of E experts, and those of none, may need: each wastes less than one."""
    return min(R, (R + (tile_m - 1) * min(E + 1, R)) // tile_m)


def groups_of(E: int) -> int:
    """The experts and the rows of none, as a size of a vector."""
    return launch.power_of_2(E + 1)
