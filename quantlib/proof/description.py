"""The formats in the words of docs/contract.md, apart from any code that converts to them.

A float's code is worth (-1)^s * 2^(e - bias) * 1.f, or 2^(1 - bias) * 0.f at e = 0: as a float64, in which each value
and each midpoint between two neighbours is exact. A code is right for x when x lies between the midpoints to its
neighbours, or on one of them where the code is even. Nothing here rounds.
"""

from __future__ import annotations

from quantlib import formats
from quantlib.formats import FloatFormat, IntFormat
from quantlib.proof import terms
from quantlib.proof.terms import F64, Term, and_, bits, float_const, fp, ite, not_, or_, same

WIDTH = 64  # of every code in here


def float_row(name: str) -> FloatFormat:
    """The row of a float format."""
    f = formats.get(name)
    assert isinstance(f, FloatFormat)
    return f


def int_row(name: str) -> IntFormat:
    """The row of an integer format."""
    f = formats.get(name)
    assert isinstance(f, IntFormat)
    return f


def widened(x: Term) -> Term:
    """A float32 as a float64: exact."""
    return terms.to_float(x, F64)


class FloatDescription:
    """A float format by its row: the widths, the bias, and which codes are no numbers."""

    def __init__(self, f: FloatFormat) -> None:
        self.f = f
        self.size = f.exponent_bits + f.fraction_bits  # of a code without its sign
        all_ones = (1 << self.size) - 1
        # NaN is in the highest codes of either sign, or where -0 would be, or nowhere.
        self.nan_codes = getattr(f, "nan", "high" if f.has_nan else "none")
        if self.nan_codes == "high":  # the last exponent is infinity's and NaN's, or its last code is NaN's
            self.largest = all_ones - (1 << f.fraction_bits) if f.has_inf else all_ones - 1
            self.nan = all_ones
        else:
            self.largest = all_ones - f.has_inf
            self.nan = 1 << self.size if self.nan_codes == "negative zero" else self.largest
        self.negative_zero = self.nan_codes != "negative zero"
        self.beyond = self.largest + 1 if f.has_inf else self.nan  # the code if too large and not saturating

    def magnitude(self, code: Term) -> Term:
        """A code's bits without the sign."""
        return terms.band(code, bits((1 << self.size) - 1, WIDTH))

    def sign(self, code: Term) -> Term:
        return not_(same(terms.band(code, bits(1 << self.size, WIDTH)), bits(0, WIDTH)))

    def value(self, magnitude: Term, finer: int = 0) -> Term:
        """The value of a magnitude, as a float64, with ``finer`` fraction bits more than the format has."""
        fraction_bits = self.f.fraction_bits + finer
        exponent = terms.lshr(magnitude, fraction_bits)
        fraction = terms.shl(terms.band(magnitude, bits((1 << fraction_bits) - 1, WIDTH)), 52 - fraction_bits)
        return ite(
            same(exponent, bits(0, WIDTH)),
            # 2^(1 - bias) * 0.f = 2^(1 - bias) * 1.f - 2^(1 - bias)
            fp("sub", self._one_point(bits(1, WIDTH), fraction), self._one_point(bits(1, WIDTH), bits(0, WIDTH))),
            self._one_point(exponent, fraction),
        )

    def _one_point(self, exponent: Term, fraction: Term) -> Term:
        """2^(exponent - bias) * 1.fraction"""
        placed = terms.shl(terms.add(exponent, bits(1023 - self.f.bias, WIDTH)), 52)
        return terms.float_of(terms.bor(placed, fraction), F64)

    def midpoint(self, magnitude: Term) -> Term:
        """Between a magnitude and the next: the odd code of the same format with one more fraction bit."""
        return self.value(terms.bor(terms.shl(magnitude, 1), bits(1, WIDTH)), finer=1)

    def is_nan(self, code: Term) -> Term:
        if self.nan_codes == "high":
            return terms.ult(bits(self.largest + self.f.has_inf, WIDTH), self.magnitude(code))
        return same(code, bits(self.nan, WIDTH)) if self.nan_codes == "negative zero" else terms.FALSE

    def is_infinite(self, code: Term) -> Term:
        return same(self.magnitude(code), bits(self.beyond, WIDTH)) if self.f.has_inf else terms.FALSE

    def is_finite(self, code: Term) -> Term:
        number = terms.ule(self.magnitude(code), bits(self.largest, WIDTH))
        return number if self.negative_zero else and_(number, not_(self.is_nan(code)))

    def signed_value(self, code: Term) -> Term:
        """The value of a finite code, as a float64."""
        value = self.value(self.magnitude(code))
        return ite(self.sign(code), fp("neg", value), value)

    def is_code_of(self, code: Term, x: Term, saturate: bool) -> Term:
        """C1 to C3: whether ``code`` is what the float32 ``x`` becomes."""
        x_sign = same(terms.extract(31, 31, terms.bits_of(x)), bits(1, 1))
        size, m = widened(fp("abs", x)), self.magnitude(code)
        largest, odd = bits(self.largest, WIDTH), same(terms.extract(0, 0, m), bits(1, 1))
        below, above = self.midpoint(terms.sub(m, bits(1, WIDTH))), self.midpoint(m)
        from_below = or_(same(m, bits(0, WIDTH)), fp("lt", below, size), and_(fp("eq", below, size), not_(odd)))
        to_above = or_(fp("lt", size, above), and_(fp("eq", size, above), not_(odd)))
        has_beyond = self.beyond != self.largest and not saturate
        if not has_beyond:  # the largest value takes all that is larger
            to_above = or_(same(m, largest), to_above)
        finite = and_(terms.ule(m, largest), from_below, to_above)
        right, too_large = finite, terms.FALSE
        if has_beyond:
            end = self.midpoint(largest)
            too_large = or_(fp("lt", end, size), fp("eq", end, size) if self.largest % 2 else terms.FALSE)
            right = or_(finite, and_(same(m, bits(self.beyond, WIDTH)), too_large))
        if not self.negative_zero:  # a number that rounds to zero becomes +0, one that is too large the one NaN
            x_sign = and_(x_sign, not_(same(m, bits(0, WIDTH))))
        kept_sign = same(terms.lshr(code, self.size), ite(x_sign, bits(1, WIDTH), bits(0, WIDTH)))
        number = and_(kept_sign, right)
        if not self.negative_zero and has_beyond and not self.f.has_inf:
            number = or_(and_(kept_sign, finite), and_(too_large, same(code, bits(self.nan, WIDTH))))
        return ite(fp("isNaN", x), same(code, bits(self.nan, WIDTH)), number)

    def is_value_of(self, y: Term, code: Term) -> Term:
        """True if the float32 ``y`` is the value of ``code``: widening is exact, except that every NaN becomes C1's."""
        sign = ite(self.sign(code), bits(1 << 31, 32), bits(0, 32))
        return ite(
            self.is_nan(code),
            same(terms.bits_of(y), bits(0x7FFFFFFF, 32)),
            ite(
                self.is_infinite(code),
                same(terms.bits_of(y), terms.bor(sign, bits(0x7F800000, 32))),
                and_(
                    fp("eq", widened(fp("abs", y)), self.value(self.magnitude(code))),
                    same(terms.band(terms.bits_of(y), bits(1 << 31, 32)), sign),
                ),
            ),
        )


class IntDescription:
    """The codes from qmin to qmax: every one in use with a zero point, symmetric ones without."""

    def __init__(self, f: IntFormat, affine: bool) -> None:
        top = 2 ** (f.bits - 1) - 1 if f.signed else 2**f.bits - 1
        self.qmin, self.qmax = (-top - affine if f.signed else 0), top

    def holds(self, code: Term) -> Term:
        return and_(terms.sle(integer(self.qmin), code), terms.sle(code, integer(self.qmax)))

    def is_code_of(self, code: Term, t: Term, z: Term) -> Term:
        """C5: whether the int32 ``code`` is clamp(RNE(t) + z, qmin, qmax); a NaN t is 0."""
        size = widened(t)
        k = terms.to_float(terms.sub(code, z), F64)  # exact
        below, above = fp("sub", k, float_const(0.5, F64)), fp("add", k, float_const(0.5, F64))  # exact
        even = same(terms.extract(0, 0, terms.sub(code, z)), bits(0, 1))
        from_below = or_(fp("lt", below, size), and_(fp("eq", below, size), even))
        to_above = or_(fp("lt", size, above), and_(fp("eq", size, above), even))
        lowest, highest = same(code, integer(self.qmin)), same(code, integer(self.qmax))
        nearest = and_(self.holds(code), or_(lowest, from_below), or_(highest, to_above))
        return ite(fp("isNaN", t), same(code, z), nearest)


def integer(value: int) -> Term:
    """An int32."""
    return bits(value, 32)


def is_between(x: Term, low: float, high: float) -> Term:
    return and_(fp("leq", float_const(low), x), fp("leq", x, float_const(high)))
