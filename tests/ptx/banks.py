"""Bank conflicts: how often the banks of shared memory are asked for an access of a warp, and how often they had to be.

Shared memory has 32 banks of four bytes, each of which gives one word at a time; lanes that ask for one word share it.
A warp asks at once for 128 bytes at most: 32 lanes of four, 16 of eight, 8 of sixteen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import Array
from ptx.parse import Instruction

BANKS, WORD = 32, 4
WARPS = 16  # of the first program; the others do the same elsewhere


@dataclass
class Asked:
    """Wavefronts of an instruction, over its warps and trips."""

    times: int = 0  # by a warp
    wavefronts: int = 0
    least: int = 0  # without a conflict

    @property
    def ways(self) -> float:
        return self.wavefronts / self.least


Book = dict[Instruction, Asked]
book: Book | None = None  # of what runs now


@contextlib.contextmanager
def counted() -> Iterator[Book]:
    """The accesses of what runs meanwhile."""
    global book  # noqa: PLW0603
    book, before = {}, book
    try:
        yield book
    finally:
        book = before


def note(i: Instruction, thread: Array, address: Array, size: int) -> None:
    """Count what threads ask for: ``size`` bytes from each address."""
    if book is None:
        return
    asked = book.setdefault(i, Asked())
    warp = thread // 32
    for w in range(WARPS):
        if len(of_warp := address[warp == w]):
            asked.times += 1
            asked.wavefronts += wavefronts(of_warp, size)
            asked.least += -(-len(np.unique(words(of_warp, size))) // BANKS)


def wavefronts(address: Array, size: int) -> int:
    """Wavefronts of a warp: the times that the banks are asked, for ``size`` bytes from the address of each lane."""
    together = BANKS * WORD // max(size, WORD)
    return sum(in_turn(words(address[n : n + together], size)) for n in range(0, len(address), together))


def words(address: Array, size: int) -> Array:
    return (address[:, None] // WORD + np.arange(-(-size // WORD))).ravel()


def in_turn(asked: Array) -> int:
    """The most words that lie in one bank."""
    return int(np.bincount(np.unique(asked) % BANKS).max())
