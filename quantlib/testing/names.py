"""The meaning of the name of a format, without the table of formats: an independent description of every row.

The names are those of ml_dtypes, ``float<bits>_e<exponent bits>m<fraction bits>[b<bias>][f][n][uz]``. Without more a
format is as IEEE 754 has it: the top exponent is infinity at a fraction of 0 and NaN otherwise, the bias is
2^(exponent bits - 1) - 1. ``f``: finite, there is no infinity. ``n``: NaN is not written as in IEEE 754, but as the
highest code of either sign, and in formats of fewer than eight bits not at all. ``uz``: there is no negative zero, its
code is the only NaN, and the bias is one more. ``int<bits>`` is two's complement, ``uint<bits>`` has no sign.

``nf4`` is a code book: quantiles of a normal distribution, seven below 0 and eight above, from a probability of
0.9677083 on, divided by the largest (Dettmers et al., "QLoRA", 2023). ``<book>_bf16`` has the values of that book
rounded to bfloat16.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from quantlib import formats, reference
from quantlib.formats import FloatFormat, Format, IntFormat
from quantlib.testing.bytes import Array, assert_same_bytes
from quantlib.testing.values import edges, neighbours

USUAL = {"float32": "float32_e8m23", "float16": "float16_e5m10", "bfloat16": "float16_e8m7"}
FLOAT = re.compile(r"float(\d+)_e(\d+)m(\d+)(?:b(\d+))?(f?)(n?)(uz)?")
NAN = 0x7FFFFFFF  # of float32 (C1)


@dataclass(frozen=True)
class FloatName:
    """The values of the codes of a float format, and the codes of values."""

    bits: int
    fraction_bits: int
    bias: int
    finite: bool
    nan: str  # "ieee", "highest", "negative zero" or "none"

    @functools.cached_property
    def values(self) -> Array:
        """[2^bits] float64, exact: the value of every code."""
        return np.array([self.value(code) for code in range(1 << self.bits)])

    def value(self, code: int) -> float:
        sign = -1.0 if code >> (self.bits - 1) else 1.0
        magnitude = code & ((1 << (self.bits - 1)) - 1)
        highest = (1 << (self.bits - 1)) - 1
        exponent, fraction = magnitude >> self.fraction_bits, magnitude & ((1 << self.fraction_bits) - 1)
        if self.nan == "negative zero" and code == 1 << (self.bits - 1):
            return np.nan
        if self.nan == "highest" and magnitude == highest:
            return np.nan
        if self.nan == "ieee" and exponent == highest >> self.fraction_bits:
            return np.nan if fraction else sign * np.inf
        if exponent == 0:
            return sign * fraction * 2.0 ** (1 - self.bias - self.fraction_bits)
        return sign * (fraction + (1 << self.fraction_bits)) * 2.0 ** (exponent - self.bias - self.fraction_bits)

    def codes(self, x: Array, saturate: bool) -> Array:
        """[n] float32 -> [n] the code of the nearest value, of an even code where two are as near (C1, C2, C3)."""
        magnitudes = self.values[: 1 << (self.bits - 1)]
        finite = magnitudes[np.isfinite(magnitudes)]  # in ascending order, code by code
        largest = len(finite) - 1
        beyond = 2 * finite[-1] - finite[-2]  # the value that would be next
        ends = np.append(finite, beyond)
        halves = (ends[:-1] + ends[1:]) / 2
        a = np.abs(x.astype(np.float64))
        below = np.searchsorted(halves, a, "left")  # a tie is below its half
        tie = (below < len(halves)) & (a == halves[np.minimum(below, len(halves) - 1)])
        code = below + (tie & (below % 2 == 1))
        outside = largest + 1 if not self.finite else largest  # infinity
        negative = np.signbit(x)
        code = np.where(code > largest, largest if saturate else outside, code)
        code = code | np.where(negative, 1 << (self.bits - 1), 0)
        is_nan = np.isnan(x)
        if self.nan == "negative zero":
            code = np.where(code == 1 << (self.bits - 1), 0, code)  # there is one zero
        if self.finite and not saturate and self.nan != "none":  # a number that is too large becomes NaN with its sign
            too_large = below + (tie & (below % 2 == 1)) > largest
            code = np.where(too_large, self.nan_code | np.where(negative, 1 << (self.bits - 1), 0), code)
        return np.where(is_nan, self.nan_code, code)

    @property
    def nan_code(self) -> int:
        """The NaN that is written, without NaN the largest value (C1)."""
        return 1 << (self.bits - 1) if self.nan == "negative zero" else (1 << (self.bits - 1)) - 1


def float_name(name: str) -> FloatName:
    """Parse the name of a float format.

    Raises
    ------
    ValueError
        For a name that says nothing.
    """
    found = FLOAT.fullmatch(USUAL.get(name, name))
    if found is None:
        raise ValueError(f"name of a float format must be float8_e4m3fn or the like, got {name!r}")
    bits, exponent, fraction = (int(group) for group in found.groups()[:3])
    finite, special, unsigned_zero = (bool(group) for group in found.groups()[4:])
    if bits != 1 + exponent + fraction:
        raise ValueError(f"bits of {name} must be {1 + exponent + fraction}, got {bits}")
    bias = int(found[4]) if found[4] else (1 << (exponent - 1)) - (not unsigned_zero)
    nan = "negative zero" if unsigned_zero else "ieee" if not special else "highest" if bits >= 8 else "none"
    return FloatName(bits, fraction, bias, finite, nan)


def check(f: Format) -> None:
    """The row, and what the reference makes of it, are what its name says.

    Raises
    ------
    AssertionError
        Where they are not.
    """
    with np.errstate(all="ignore"):
        if isinstance(f, IntFormat):
            _check_int(f)
        elif f.is_book:
            _check_book(f)
        else:
            _check_float(f)
    _check_place(f)


def _check_int(f: IntFormat) -> None:
    found = re.fullmatch(r"(u?)int(\d+)", f.name)
    assert found, f"name of an integer format must be int4, uint8 or the like, got {f.name!r}"
    bits, lowest = int(found[2]), 0 if found[1] else -(1 << (int(found[2]) - 1))
    highest = lowest + (1 << bits) - 1
    said = f"{f.name}: range is {f.range(affine=True)}, its name says {(lowest, highest)}"
    assert f.range(affine=True) == (lowest, highest), said
    assert f.range(affine=False) == (-highest if lowest else 0, highest), said


def _check_float(f: FloatFormat) -> None:
    named = float_name(f.name)
    assert f.bits == named.bits, f"{f.name}: {f.bits} bits, its name says {named.bits}"
    x = np.concatenate([edges(), neighbours(_halves(named))])
    for saturate in (False, True):
        if f.bits < 32:
            got = reference.encode_float(x, f, saturate)
            want = named.codes(x, saturate).astype(f.storage)
            assert_same_bytes(got, want, f"{f.name}, saturate={saturate}, by its name", x)
    if f.bits < 32:
        codes = np.arange(1 << f.bits, dtype=np.uint32)
        want = np.where(np.isnan(named.values), np.uint32(NAN), named.values.astype(np.float32).view(np.uint32))
        assert_same_bytes(
            reference.decode_float(codes, f).view(np.uint32), want, f"{f.name}, values by its name", codes
        )
        assert f.max == named.values[np.isfinite(named.values)].max(), f"{f.name}: its largest value is {f.max}"


PROBABILITY = 0.9677083  # of the largest value of nf4


def _check_book(f: FloatFormat) -> None:
    values = np.array(f.values)
    book, _, rounded = f.name.partition("_")
    if rounded:
        said = f"{f.name}: its values are {f.values}, its name says those of {book} in {rounded}"
        exact = np.array(formats.FORMATS[book].values).astype(np.float32)  # type: ignore[union-attr]
        assert rounded == "bf16", said
        assert_same_bytes(values.astype(np.float32), _to_bfloat16(exact), said)
    else:
        assert book == "nf4", f"name of a code book must be nf4, got {f.name!r}"
        quantile = NormalDist().inv_cdf
        above = [quantile(p) for p in np.linspace(PROBABILITY, 0.5, 9)[:-1]]
        below = [-quantile(p) for p in np.linspace(PROBABILITY, 0.5, 8)[:-1]]
        want = np.sort([*below, 0.0, *above]) / quantile(PROBABILITY)
        # they were published as float32 numbers that were computed in float32
        assert np.abs(values - want).max() < 2.0**-22, (
            f"{f.name}: its values are {values.tolist()}, its name says {want.tolist()}"
        )
    # the nearest value, at a midpoint the lower one; NaN is the highest code (C1, C6)
    narrow = values.astype(np.float32)
    halves = (narrow[1:] + narrow[:-1]) / np.float32(2)
    x = np.concatenate([edges(), neighbours(halves), narrow])
    code = np.where(np.isnan(x), len(values) - 1, (x[:, None] > halves).sum(1))
    said = f"{f.name}, by its name"
    assert_same_bytes(reference.encode_float(x, f), code.astype(f.storage), said, x)
    assert_same_bytes(reference.decode_float(np.arange(len(values)), f), narrow, f"{said}, values")
    assert f.max == np.abs(values).max(), f"{f.name}: its largest magnitude is {f.max}"


def _to_bfloat16(x: Array) -> Array:
    """The nearest bfloat16, ties to even: of the two around x, by their distance in float64."""
    lower = (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    upper = (lower.view(np.uint32) + np.uint32(0x10000)).view(np.float32)
    below, above = (np.abs(x.astype(np.float64) - end) for end in (lower, upper))
    even = lower.view(np.uint32) >> np.uint32(16) & np.uint32(1) == 0
    return np.where((below < above) | ((below == above) & even), lower, upper)


def _halves(named: FloatName) -> Array:
    """[n] float32: half way between neighbours, both signs."""
    if named.bits > 16:
        return np.zeros(0, np.float32)
    finite = np.sort(named.values[np.isfinite(named.values)])
    step = finite[-1] - finite[-2]
    ends = np.concatenate([[finite[0] - step], finite, [finite[-1] + step]])
    halves: Array = (ends[:-1] + ends[1:]) / 2
    return halves.astype(np.float32)


def _check_place(f: Format) -> None:
    """Check that the first of several codes in a byte is in its lowest bits."""
    if not f.packed:
        return
    lowest, highest = f.code_range
    codes = np.resize(np.arange(lowest, highest + 1), 3 * f.per_byte - 1)
    bits = sum((int(code) % (1 << f.bits)) << (n * f.bits) for n, code in enumerate(codes))
    want = list(bits.to_bytes(3, "little"))
    got = reference.pack(codes, f).tolist()
    assert got == want, f"{f.name}: packed as {got}, as one number they are {want}"
    assert reference.unpack(np.array(want, np.uint8), f, len(codes)).tolist() == codes.tolist(), f.name
