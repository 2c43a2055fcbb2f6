"""Memory of threads: the tensors of a launch, and the shared memory of its programs."""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Iterable
from typing import Any

import numpy as np

from ptx.arithmetic import Array

UNIT = 16  # bytes: the widest access


RACE = "threads write different values to one address at once"


class FaultError(Exception):
    """An access that no kernel may make."""


def differ(kept: Array, written: Array) -> bool:
    """True if a thread does not find what it has just written."""
    return bool((kept != written).any())


class Global:
    """Regions of the memory of this process that a kernel may use."""

    def __init__(self, regions: Iterable[tuple[int, int, str]]) -> None:
        """Take (first byte, bytes, name of a parameter); regions may overlap."""
        merged: list[list[Any]] = []
        for start, size, name in sorted(regions):
            if size and merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
                merged[-1][2] += f" and {name}"
            elif size:
                merged.append([start, start + size, name])
        self.regions = merged
        self.starts = [start for start, *_ in merged]
        self.views: list[dict[int, tuple[int, Array]]] = [{} for _ in merged]

    def load(self, address: Array, width: int, count: int) -> list[Array]:
        """Return ``count`` values of ``width`` bytes from each address, as unsigned integers."""
        found = [np.empty(len(address), f"u{width}") for _ in range(count)]
        for where, view, index in self.places(address, width, count):
            for k, result in enumerate(found):
                result[where] = view[index + k]
        return found

    def store(self, address: Array, values: list[Array], width: int) -> None:
        for where, view, index in self.places(address, width, len(values)):
            for k, value in enumerate(values):
                view[index + k] = value[where]
            if any(differ(view[index + k], value[where]) for k, value in enumerate(values)):
                raise FaultError(RACE)

    def places(self, address: Array, width: int, count: int) -> Iterable[tuple[Any, Array, Array]]:
        """(which of the addresses, a region as integers of ``width`` bytes, their indices in it)."""
        if (address & np.uint64(width * count - 1)).any():
            wrong = int(address[(address & np.uint64(width * count - 1)) != 0][0])
            raise FaultError(f"address {wrong:#x} is no multiple of {width * count}")
        low, high = int(address.min()), int(address.max()) + width * count
        number = bisect.bisect_right(self.starts, low) - 1
        if number >= 0 and high <= self.regions[number][1]:
            yield slice(None), *self.at(number, address, width)
            return
        numbers = np.searchsorted(np.array(self.starts, np.uint64), address, "right").astype(np.int64) - 1
        ends = np.array([end for _, end, _ in self.regions] or [0], np.uint64)
        outside = (numbers < 0) | (address + np.uint64(width * count) > ends[np.maximum(numbers, 0)])
        if outside.any():
            raise FaultError(self.outside(int(address[outside][0]), int(outside.sum())))
        for number in np.unique(numbers):
            where = np.flatnonzero(numbers == number)
            yield where, *self.at(int(number), address[where], width)

    def outside(self, address: int, threads: int) -> str:
        near = min(self.regions, key=lambda r: max(r[0] - address, address - r[1]), default=None)
        if near is None:
            return "there is no tensor"
        start, end, name = near
        where = f"{start - address} before" if address < start else f"{address - end} after the last of"
        first = f"the first of them {where} the {end - start} bytes of {name}"
        return f"{threads} threads are outside of every tensor, {first}"

    def at(self, number: int, address: Array, width: int) -> tuple[Array, Array]:
        if width not in self.views[number]:
            start, end, _ = self.regions[number]
            start, end = start // UNIT * UNIT, -(-end // UNIT) * UNIT  # what is aligned lies on the same page
            buffer = (ctypes.c_uint8 * (end - start)).from_address(start)
            self.views[number][width] = start, np.frombuffer(buffer, f"u{width}")
        start, view = self.views[number][width]
        return view, ((address - np.uint64(start)) // np.uint64(width)).astype(np.int64)


class Shared:
    """``size`` bytes for each program, and who has used each since which barrier.

    A thread may use what another has written, and write what another has used, if both have met at a barrier between:
    all of the program, or all of the warp.
    """

    FIRST = 1024  # the address of the first byte

    def __init__(self, programs: int, size: int, threads: int) -> None:
        self.size, self.threads, self.pad = size, threads, -(-max(size, 1) // UNIT) * UNIT
        self.bytes = np.full(programs * self.pad, 0xA5, np.uint8)
        self.views = {width: self.bytes.view(f"u{width}") for width in (1, 2, 4, 8)}
        self.barriers = np.zeros(programs, np.int32)  # met by all of a program
        self.meetings = np.zeros(programs * threads // 32, np.int32)  # of a warp
        self.wrote, self.read = (Uses(len(self.bytes)) for _ in range(2))

    def load(self, thread: Array, address: Array, width: int, count: int) -> list[Array]:
        at = self.places(thread, address, width * count)
        every = at[:, None] + np.arange(width * count)
        self.check(thread, every, self.wrote, "reads what another has written")
        self.use(thread, every, self.read, together=True)
        return [self.views[width][at // width + k] for k in range(count)]

    def store(self, thread: Array, address: Array, values: list[Array], width: int) -> None:
        at = self.places(thread, address, width * len(values))
        every = at[:, None] + np.arange(width * len(values))
        self.check(thread, every, self.wrote, "writes what another has written")
        self.check(thread, every, self.read, "writes what another reads")
        for k, value in enumerate(values):
            self.views[width][at // width + k] = value
        if any(differ(self.views[width][at // width + k], value) for k, value in enumerate(values)):
            raise FaultError(RACE)
        self.use(thread, every, self.wrote)

    def places(self, thread: Array, address: Array, width: int) -> Array:
        offset = address.astype(np.int64) - self.FIRST
        if (offset % width).any():
            raise FaultError(f"byte {int(offset[offset % width != 0][0])} of shared memory is no multiple of {width}")
        wrong = (offset < 0) | (offset + width > self.size)
        if wrong.any():
            raise FaultError(f"byte {int(offset[wrong][0])} is outside of the {self.size} of shared memory")
        return thread // self.threads * self.pad + offset

    def check(self, thread: Array, every: Array, uses: Uses, what: str) -> None:
        user = uses.thread[every]
        if (user == NOBODY).all():
            return
        me = thread[:, None]
        met = self.barriers[me // self.threads] > uses.barrier[every]
        same = (user == me) | ((uses.warp[every] == me // 32) & (self.meetings[me // 32] > uses.meeting[every]))
        wrong = (user != NOBODY) & ~met & ~same
        if wrong.any():
            t, k = (int(n[0]) for n in np.nonzero(wrong))
            at = int(every[t, k]) % self.pad
            raise FaultError(f"no barrier: thread {int(thread[t]) % self.threads} {what}, byte {at} of shared memory")

    def use(self, thread: Array, every: Array, uses: Uses, together: bool = False) -> None:
        """Note the last thread that used each byte; ``together``: several may have, since the barrier."""
        me = np.broadcast_to(thread[:, None], every.shape)
        now = self.barriers[me // self.threads]
        user, warp = me, me // 32
        if together:  # a warp that was there before may not be forgotten
            before = uses.barrier[every] == now
            user = np.where(before & (uses.thread[every] != me) & (uses.thread[every] != NOBODY), SEVERAL, me)
            warp = np.where(before & (uses.warp[every] != me // 32) & (uses.thread[every] != NOBODY), SEVERAL, warp)
        uses.thread[every], uses.warp[every], uses.barrier[every] = user, warp, now
        uses.meeting[every] = self.meetings[me // 32]
        if together:  # in this very access
            several = uses.thread[every] != user
            uses.thread[every[several]] = SEVERAL
            apart = uses.warp[every] != warp
            uses.warp[every[apart]] = SEVERAL


NOBODY, SEVERAL = -1, -2


class Uses:
    """The thread and warp that used each byte last, and how often they had met others by then."""

    def __init__(self, size: int) -> None:
        self.thread, self.warp = (np.full(size, NOBODY, np.int32) for _ in range(2))
        self.barrier, self.meeting = (np.full(size, -1, np.int32) for _ in range(2))
