"""Products of matrices, and what runs beside the threads that start it: ``mma``, ``wgmma`` and copies to shared memory.

What is asynchronous happens as late as it may: at the wait for its group. Operands of a ``wgmma`` are read then, from
registers and shared memory, so that what overwrites them before is seen in the bytes of the product. Sums are exact
before they are rounded once to float32; where a GPU adds in another order, operands must be such that no order rounds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import arithmetic as by
from ptx.arithmetic import Array
from ptx.memory import FaultError

if TYPE_CHECKING:
    from ptx.machine import Machine

WARPGROUP = 128
POISON = 0xA5A5A5A5  # of shared memory that a copy is to fill


@dataclass
class Group:
    """Copies or products that are waited for together; ``by``: threads, or warpgroups, that have not done so yet."""

    started: list[tuple[Callable[[Machine, Array], None], Array]]
    by: Array


class Queue:
    """Groups that ``units`` threads, or warpgroups, have started and not waited for."""

    def __init__(self, units: int) -> None:
        self.groups, self.open = [], Group([], np.zeros(units, bool))

    groups: list[Group]

    def add(self, run: Callable[[Machine, Array], None], by: Array) -> None:
        self.open.started.append((run, by))

    def commit(self, by: Array) -> None:
        """Close a group of those ``by``; what others have started stays open."""
        closed = [(run, who & by) for run, who in self.open.started]
        self.open.started = [(run, who & ~by) for run, who in self.open.started if (who & ~by).any()]
        self.groups.append(Group(closed, by.copy()))

    def wait(self, m: Machine, pending: int, by: Array) -> None:
        """Finish all groups of those ``by`` but the last ``pending``, each in its turn."""
        later, finished = np.zeros(len(by), np.int64), []
        for group in reversed(self.groups):
            here = group.by & by
            finished.append((group, here & (later >= pending)))
            later += here
        for group, who in reversed(finished):
            if who.any():
                for run, started in group.started:
                    if (started & who).any():
                        run(m, started & who)
                group.by &= ~who
        self.groups = [group for group in self.groups if group.by.any()]


# ---- the shapes of operands ------------------------------------------------------------------------------------------

TO_FLOAT: dict[str, Callable[[Array], Array]] = {"f16": by.from_float16, "bf16": by.from_bfloat16}


def elements(words: Array, type: str) -> Array:
    """[..., n] words -> [..., n * elements of a word], in float64 or int64."""
    if type in TO_FLOAT:
        return TO_FLOAT[type](words.view(np.uint16)).astype(np.float64)
    return words.view({"s8": np.int8, "u8": np.uint8}[type]).astype(np.int64)


def left(words: Array, type: str) -> Array:
    """[..., 32, 4] words of the lanes of a warp -> [..., 16, columns]: lane 4 g + t has of the rows g and g + 8."""
    a = elements(np.ascontiguousarray(words), type)
    a = a.reshape(*words.shape[:-2], 8, 4, 2, 2, -1)  # g, t, half of the columns, half of the rows, element
    a = np.moveaxis(
        a, (-2, -5, -3, -4, -1), (-5, -4, -3, -2, -1)
    )  # half of the rows, g, half of the columns, t, element
    return a.reshape(*words.shape[:-2], 16, -1)


def right(words: Array, type: str) -> Array:
    """[..., 32, 2] words -> [..., 8, columns]: lane 4 n + t has two runs of the column n."""
    b = elements(np.ascontiguousarray(words), type)
    b = b.reshape(*words.shape[:-2], 8, 4, 2, -1)
    return np.swapaxes(b, -2, -3).reshape(*words.shape[:-2], 8, -1)


def sums(words: Array, type: str) -> Array:
    """[..., 32, 4 n] words -> [..., 16, 8 n]"""
    c = words.view(np.float32 if type == "f32" else np.int32)
    c = c.reshape(*words.shape[:-2], 8, 4, -1, 2, 2)  # g, t, eight columns, half of the rows, element
    c = np.moveaxis(c, (-2, -5, -3, -4, -1), (-5, -4, -3, -2, -1))
    return c.reshape(*words.shape[:-2], 16, -1)


def dealt(total: Array) -> Array:
    """The inverse of `sums`: [..., 16, 8 n] -> [..., 32, 4 n] words."""
    c = total.reshape(*total.shape[:-2], 2, 8, total.shape[-1] // 8, 4, 2)
    c = np.moveaxis(c, (-5, -4, -3, -2, -1), (-2, -5, -3, -4, -1))
    return np.ascontiguousarray(c).reshape(*total.shape[:-2], 32, -1).view(np.uint32)


def multiplied(a: Array, b: Array, c: Array, clamped: bool = False) -> Array:
    """A b^T + c in the type of c, of floats rounded once."""
    total = np.matmul(a, np.swapaxes(b, -1, -2)) + c
    if clamped:
        total = np.clip(total, -(2**31), 2**31 - 1)
    return by.canonical(total.astype(np.float32)) if c.dtype == np.float32 else total.astype(np.int32)


# ---- operands in shared memory ---------------------------------------------------------------------------------------

SWIZZLED = {1: 128, 2: 64, 3: 32}  # bytes of a row


def places(descriptor: Array, rows: int, columns: int, size: int, across: bool) -> Array:
    """[warpgroups] descriptors -> the addresses of their elements, [warpgroups, rows, columns]; ``across``: rows, not
    columns, lie side by side."""
    field = [(descriptor >> np.uint64(at)).astype(np.int64) & 0x3FFF for at in (0, 16, 32)]
    start, leading, stride = (f[:, None, None] << 4 for f in field)
    modes = {int(mode) for mode in descriptor >> np.uint64(62)}
    if len(modes) > 1 or modes <= {0} or ((descriptor >> np.uint64(46)) & np.uint64(0xFFFF)).any():
        raise FaultError(f"a descriptor that is not known: {int(descriptor[0]):#x}")
    width = SWIZZLED[modes.pop()]
    each = width // size
    r, k = np.arange(rows)[None, :, None], np.arange(columns)[None, None, :]
    if across:
        address = start + r // each * leading + k // 8 * stride + k % 8 * width + r % each * size
    else:
        if columns > each:
            raise FaultError("a matrix of more columns than a row of the swizzle has")
        address = start + r // 8 * stride + r % 8 * width + k * size
    return address ^ ((address >> 7) & (width // 16 - 1)) << 4


def loaded(m: Machine, descriptor: Array, by: Array, rows: int, columns: int, type: str, across: bool) -> Array:
    """The elements that a descriptor of each warpgroup names, [those of ``by``, rows, columns]."""
    size = 2 if type in TO_FLOAT else 1
    groups = np.flatnonzero(by)
    address = places(descriptor[groups], rows, columns, size, across)
    thread = np.broadcast_to((groups * WARPGROUP)[:, None, None], address.shape)
    (found,) = m.shared.load(thread.ravel(), address.ravel(), size, 1)
    return elements(np.ascontiguousarray(found), type).reshape(address.shape)


SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)\.(f32|s32)\.(f16|bf16|s8|u8)\.(f16|bf16|s8|u8)")


def shape(text: str) -> tuple[int, int, int, str, str, str]:
    """(rows, columns, steps, type of the sums, of a, of b)"""
    found = SHAPE.fullmatch(text)
    assert found, text
    m, n, k, *types = found.groups()
    return int(m), int(n), int(k), *types  # type: ignore[return-value]


def words_of(m: Machine, reads: list[Any]) -> Array:
    """The words of registers, [threads, registers]."""
    return np.stack([m.full(read(m)) for read in reads], -1)
