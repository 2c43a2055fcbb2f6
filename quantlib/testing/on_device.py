"""Sweep all inputs of a case over two backends on a device; only differences are copied to the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from quantlib import formats
from quantlib.testing.bytes import bits
from quantlib.testing.implementations import Backend
from quantlib.testing.sweep import Case, Mismatch, Result, compare_codes

MOST, WORKSPACE = 1 << 27, 256  # inputs at a time; bytes of memory that pure torch may take for each


def sweep_on_device(
    case: Case, candidate: Backend, authority: Backend, tick: Callable[[int], object] = lambda inputs: None
) -> Result:
    """Run :func:`quantlib.testing.sweep.sweep` over all inputs, with two backends on one device."""
    started, mismatches, first = time.perf_counter(), 0, None
    batch = min(case.inputs, batch_of(candidate.device))
    for start in range(0, case.inputs, batch):
        x = inputs(case, start, batch, candidate.device)
        with authority.forced():
            expected = integers(authority.run(case, x))
        with candidate.forced():
            got = integers(candidate.run(case, x))
        if not torch.equal(expected, got):
            wrong, found = differing(case, start, batch, expected, got)
            mismatches, first = mismatches + wrong, first or found
        tick(batch)
    return Result(case.inputs, mismatches, first, time.perf_counter() - started)


def batch_of(device: str) -> int:
    """A power of two, so that the last of 2^32 inputs ends a batch."""
    if not device.startswith("cuda"):
        return 1 << 20
    memory = torch.cuda.get_device_properties(device).total_memory // WORKSPACE
    return min(MOST, 1 << (memory.bit_length() - 1))


def inputs(case: Case, start: int, count: int, device: str) -> torch.Tensor:
    """[count] codes of the case's source from ``start`` on."""
    source, size = formats.get(case.source), case.inputs.bit_length() - 1
    first = start - (case.inputs if start >= case.inputs // 2 else 0)  # as a signed integer; no batch has both signs
    integer = {8: torch.int8, 16: torch.int16, 32: torch.int32}[size]
    dtype = getattr(torch, source.dtype_name)
    if count == case.inputs:  # both signs, in the order of the codes
        codes = torch.arange(count, device=device) - (torch.arange(count, device=device) >= count // 2) * count
        return codes.to(integer).view(dtype)
    return torch.arange(first, first + count, dtype=integer, device=device).view(dtype)


def integers(y: torch.Tensor) -> torch.Tensor:
    return y.contiguous().view(-1).view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[y.element_size()])


def differing(
    case: Case, start: int, batch: int, expected: torch.Tensor, got: torch.Tensor
) -> tuple[int, Mismatch | None]:
    """Count the differing results of a batch, and return the first; only the part from it on is copied to the host."""
    at, of, results = int((expected != got).to(torch.uint8).argmax()), batch, got.numel()
    first, last = at * of // results, min(at * of // results + (1 << 20), of)  # codes, of which a byte may hold two
    codes = np.arange(start + first, start + last, dtype=np.uint64).astype(f"uint{case.inputs.bit_length() - 1}")
    part = slice(first * results // of, last * results // of)
    _, found = compare_codes(case, codes, bits(expected[part]), bits(got[part]))
    return int((expected != got).sum()), found
