"""Sweep all inputs of every unary op, one implementation against another: ``quantlib verify`` (contract C12).

A `Case` is an op with everything but x fixed, so that its inputs are the codes of one format: 2^32 of float32, 65,536
of a 16-bit float. An `Implementation` gives the result of a case for a batch of those codes, as unsigned integers;
`sweep` compares two of them, byte for byte.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from quantlib import formats, reference
from quantlib.formats import FLOAT32, FloatFormat, Format, IntFormat
from quantlib.reference import numerics
from quantlib.reference.activation import ACTIVATIONS
from quantlib.testing.values import edges, midpoints, neighbours, zero_points

Array = NDArray[Any]

BATCH = 1 << 20  # inputs compared at a time
SCALES = (1.0, 0.1, 2.0**-7, math.pi / 127, 2.0**-100, 2.0**120)
FLOATS = tuple(f.name for f in (FLOAT32, *formats.TABLE) if f.is_float and f.whole)


@dataclass(frozen=True)
class Case:
    """An op with everything but its first argument fixed; None where the op has no such argument."""

    op: str  # cast, quantize, dequantize or activation
    source: str  # the format whose codes are the inputs
    format: str  # the format of the result
    saturate: bool | None = None
    scale: float | None = None
    zero_point: int | None = None
    activation: str | None = None

    @property
    def inputs(self) -> int:
        """The number of inputs; codes of fewer than eight bits come as bytes, every one."""
        return 1 << max(formats.get(self.source).bits, 8)

    @property
    def projection(self) -> Format:
        """The format that is not merely read or written: it owns the scale and the zero point."""
        return formats.get(self.source if self.op == "dequantize" else self.format)

    def scale_and_zero_point(self) -> tuple[Array, Array | None]:
        """[1, 1] float32 and [1, 1] int32, or None."""
        z = None if self.zero_point is None else np.full((1, 1), self.zero_point, np.int32)
        return np.full((1, 1), self.scale, np.float32), z

    def __str__(self) -> str:
        if self.activation is not None:
            return self.activation
        options = {"saturate": self.saturate, "scale": self.scale, "zero_point": self.zero_point}
        given = "".join(f", {name}={value}" for name, value in options.items() if value is not None)
        return f"{self.op} {self.source} to {self.format}{given}"


@dataclass(frozen=True)
class Suite:
    """Cases that are reported together."""

    name: str
    cases: tuple[Case, ...]


def suites() -> Iterator[Suite]:
    """Return every suite of the contract."""
    for name in FLOATS[1:]:
        for saturate in (False, True):
            yield Suite(f"cast {name}, saturate={saturate}", (Case("cast", "float32", name, saturate),))
    yield Suite(
        "cast from 16 and 8 bits",
        tuple(Case("cast", x, y, saturate) for x in FLOATS[1:] for y in FLOATS for saturate in (False, True)),
    )
    names = [f.name for f in formats.TABLE]
    for name in names:
        yield Suite(f"quantize {name}", tuple(_scaled("quantize", "float32", name)))
    for name in names:
        narrow = (case for x in ("float16", "bfloat16") for case in _scaled("quantize", x, name))
        yield Suite(f"quantize {name} from 16 bits", tuple(narrow))
    for name in names:
        widths = (case for y in ("float32", "float16", "bfloat16") for case in _scaled("dequantize", name, y))
        yield Suite(f"dequantize {name}", tuple(widths))
    for name in ACTIVATIONS:
        yield Suite(f"activation {name}", (Case("activation", "float32", "float32", activation=name),))


def _scaled(op: str, source: str, target: str) -> Iterator[Case]:
    """The scales and zero points of contract C12."""
    f = Case(op, source, target).projection
    for scale in SCALES:
        for z in (None, *(zero_points(f.name) if isinstance(f, IntFormat) else ())):
            yield Case(op, source, target, None, float(np.float32(scale)), z)


# ---- inputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The inputs of ``case`` in batches of at most `BATCH`: all of them, or where they are 2^32 a share.

    A share is the same on every run: the values at which ``case`` decides, which include every exponent, boundary
    fractions and all midpoints between neighbouring codes, and one input of every 1 / share.
    """

    case: Case
    share: Fraction = Fraction(1)

    @cached_property
    def decisive(self) -> Array:
        """[n] codes that are in every share; none where all inputs are looked at."""
        dtype = f"uint{self.case.inputs.bit_length() - 1}"
        return np.empty(0, dtype) if self.step == 1 else deciding(self.case).view(dtype)

    @property
    def step(self) -> int:
        """One input of so many; 0 for the decisive ones alone."""
        return 1 if self.case.inputs <= 1 << 16 else round(1 / self.share) if self.share else 0

    @property
    def spread(self) -> int:
        return self.case.inputs // self.step if self.step else 0

    @property
    def size(self) -> int:
        return self.decisive.size + self.spread

    def __iter__(self) -> Iterator[Callable[[], Array]]:
        """Each batch as a function that makes it, in the thread that needs it."""
        for start in range(0, self.decisive.size, BATCH):
            yield partial(self.decisive.__getitem__, slice(start, start + BATCH))
        for start in range(0, self.spread, BATCH):
            yield partial(self._spread, start, min(start + BATCH, self.spread))

    def _spread(self, start: int, stop: int) -> Array:
        dtype = self.decisive.dtype
        if self.step == 1:
            return np.arange(start, stop, dtype=dtype)
        i, step = np.arange(start, stop, dtype=np.uint64), np.uint64(self.step)
        # Where in its step an input lies changes from one to the next, so that all low bits are met.
        codes: Array = (i * step + i * np.uint64(0x9E3779B1) % step).astype(dtype)
        return codes


def deciding(case: Case) -> Array:
    """[n] float32: the adversarial inputs of a case (contract C12), each with the floats around it."""
    f = case.projection
    if case.op == "activation":
        return np.concatenate([edges(), np.linspace(-110, 110, 1 << 16, dtype=np.float32)])
    if isinstance(f, FloatFormat):
        t = midpoints(f.name)
    else:
        qmin, qmax = f.range(affine=True)
        t = np.arange(qmin - qmax - 1, qmax - qmin + 1, dtype=np.float32) + np.float32(0.5)  # of every zero point
    with np.errstate(all="ignore"):
        s = numerics.effective_scale(np.array(1 if case.scale is None else case.scale, np.float32), f)
        x = neighbours(neighbours((t * s).astype(np.float32)))
    return np.concatenate([edges(), x])


# ---- the comparison -------------------------------------------------------------------------------------------------


class Implementation(Protocol):
    """Something that can run a case."""

    @property
    def name(self) -> str: ...

    @property
    def missing(self) -> str | None:
        """The reason why it cannot be used here, or None."""
        ...

    def refuses(self, case: Case) -> str | None:
        """Return why it cannot run ``case``, or None."""
        ...

    def __call__(self, case: Case, codes: Array) -> Array:
        """[n] codes of the case's source -> codes of its format; unsigned integers both."""
        ...


@dataclass(frozen=True)
class Mismatch:
    """The first input for which two implementations differ."""

    case: Case
    code: int
    expected: int
    got: int

    def __str__(self) -> str:
        source, result = formats.get(self.case.source), formats.get(self.case.format)
        sides = (_hex(code, result) for code in (self.expected, self.got))
        return "{}: x = {}, expected {}, got {}".format(self.case, _hex(self.code, source), *sides)


@dataclass(frozen=True)
class Result:
    """The result of a sweep."""

    inputs: int
    mismatches: int
    first: Mismatch | None
    seconds: float


def sweep(
    case: Case,
    candidate: Implementation,
    authority: Implementation,
    share: Fraction = Fraction(1),
    jobs: int = 1,
    tick: Callable[[int], object] = lambda inputs: None,
) -> Result:
    """Run ``case`` by both implementations and compare.

    Parameters
    ----------
    case : Case
    candidate, authority : Implementation
        The implementation to check, and the one that it should equal.
    share : Fraction, optional
        The part of 2^32 inputs that is looked at, see `Inputs`; 0 is only those at which the case decides.
    jobs : int, optional
        Threads, each with a batch of its own: NumPy, torch and ctypes let go of the interpreter while they compute.
    tick : callable, optional
        Called with the number of inputs of each batch that is done.

    Returns
    -------
    Result
    """

    def compare(batch: Callable[[], Array]) -> tuple[int, int, Mismatch | None]:
        codes = batch()
        return codes.size, *compare_codes(case, codes, authority(case, codes), candidate(case, codes))

    started, inputs, mismatches, first = time.perf_counter(), 0, 0, None
    pool = ThreadPoolExecutor(jobs)
    try:
        for size, wrong, found in pool.map(compare, Inputs(case, share)):
            inputs, mismatches, first = inputs + size, mismatches + wrong, first or found
            tick(size)
    finally:
        pool.shutdown(cancel_futures=True)
    return Result(inputs, mismatches, first, time.perf_counter() - started)


def compare_codes(case: Case, codes: Array, expected: Array, got: Array) -> tuple[int, Mismatch | None]:
    """Count the results that differ, and return the first; packed results are compared one by one."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        sides = (f"{a.dtype} {list(a.shape)}" for a in (expected, got))
        raise RuntimeError("{}: result must be {}, got {}".format(case, *sides))
    if np.array_equal(expected, got):
        return 0, None
    f = formats.get(case.format)
    if f.packed:
        expected, got = (reference.unpack(packed, f, codes.size) for packed in (expected, got))
    wrong = np.flatnonzero(expected != got)
    i = int(wrong[0])
    code = int(codes[i * codes.size // expected.size])
    return wrong.size, Mismatch(case, code, int(expected[i]), int(got[i]))


def _hex(code: int, f: Format) -> str:
    """A code and, where it has one, its value."""
    if f.packed:
        return f"0x{code & 0xFF:02x}"
    text = f"0x{code:0{f.bits // 4}x}"
    return f"{text} ({reference.decode_float(np.array(code), f):.9g})" if isinstance(f, FloatFormat) else text
