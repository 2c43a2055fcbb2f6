"""Bytes first: results against ``quantlib.reference``, at values where rounding is decided and on what is timed."""

from __future__ import annotations

import numpy as np
import torch

from quantlib import testing
from quantlib.testing.bytes import POISON, Array

from .case import Call, Case, Contender, Tensors

END = 128  # rows at either end of the timed tensors, where threads and tails would go wrong

Part = list[tuple[slice, Array]]  # for each result the rows to look at and what the reference says of them


def parts(case: Case, inputs: Tensors) -> list[Part]:
    """Return the reference's results for the first and for the last rows."""
    M = case.shape[0] if case.shape else 0
    slices = [slice(0, END), slice(M - END, M)] if M > 2 * END else [slice(0, M)]
    return [list(case.expected(rows, *inputs)) for rows in slices]


def first_run(contender: Contender, inputs: Tensors, outs: Tensors) -> tuple[Call, Tensors]:
    """The call, and what it makes of poisoned memory."""
    for out in outs:
        out.view(torch.uint8).fill_(POISON)
    call = contender.bind(inputs, outs)
    with contender.within():
        return call, contender.results(call(), outs)


def right_in_table(case: Case, contender: Contender) -> None:
    """Every case of the tests for this op, format and dtype.

    Raises
    ------
    AssertionError
        With the number of mismatches and the first of them.
    """
    with contender.within():
        for tested in testing.cases(case.op, case.format) if case.streams else ():
            if tested.dtype == case.dtype and tested.symmetric == case.symmetric:
                testing.check(tested, case.device)


def right(results: Tensors, part: Part) -> None:
    """Every byte of a part, or AssertionError."""
    for result, (rows, want) in zip(results, part, strict=True):
        testing.assert_same_bytes(testing.bits(result)[rows], want)


def differing(results: Tensors, part: Part) -> tuple[int, int]:
    """Count the elements whose bytes differ, and all elements; a peer may give fewer results, of other shapes."""
    differ = compared = 0
    for result, (rows, want) in zip(results, part, strict=False):
        got, expected = np.atleast_1d(testing.bits(result))[rows].reshape(-1), testing.bits(want).reshape(-1)
        same_form = got.dtype == expected.dtype and got.size == expected.size
        differ += int(np.count_nonzero(got != expected)) if same_form else expected.size
        compared += expected.size
    return differ, compared
