"""Terms over booleans, bit-vectors and IEEE 754 floats: written as SMT-LIB, and evaluated in NumPy.

A term is a node of a graph; two terms of the same parts are the same node. Operators of constants are evaluated when
they are built. The same terms are what a solver proves and what NumPy computes: a counter-example of the solver is
evaluated here, by code that shares nothing with the solver.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Sort:
    """Bool, a bit-vector of ``bits``, or a float of ``bits`` of which ``exponent`` are its exponent."""

    kind: str
    bits: int = 1
    exponent: int = 0

    @property
    def smt(self) -> str:
        if self.kind == "bool":
            return "Bool"
        if self.kind == "bits":
            return f"(_ BitVec {self.bits})"
        return f"(_ FloatingPoint {self.exponent} {self.bits - self.exponent})"

    @property
    def to_fp(self) -> str:
        return f"(_ to_fp {self.exponent} {self.bits - self.exponent})"


BOOL = Sort("bool")
F32 = Sort("float", 32, 8)
F64 = Sort("float", 64, 11)


def bits_sort(width: int) -> Sort:
    return Sort("bits", width)


def float_sort(exponent_bits: int, fraction_bits: int) -> Sort:
    return Sort("float", 1 + exponent_bits + fraction_bits, exponent_bits)


class Term:
    """One node: an operator, its arguments, and the integers that are part of the operator."""

    __slots__ = ("args", "op", "parameters", "sort")
    op: str
    args: tuple[Term, ...]
    parameters: tuple[Any, ...]
    sort: Sort

    def __repr__(self) -> str:
        if self.op in ("const", "var"):
            return f"{self.parameters[0]}"
        return f"({self.op} {' '.join(map(repr, (*self.parameters, *self.args)))})"

    def __bool__(self) -> bool:
        raise TypeError("a term is no Python bool: a term that depends on an unknown value cannot decide a branch")


_nodes: dict[tuple[Any, ...], Term] = {}
_numbers = itertools.count()


def node(op: str, sort: Sort, *args: Term, parameters: tuple[Any, ...] = ()) -> Term:
    """The term; that of constants is a constant."""
    key = (op, sort, parameters, *map(id, args))
    found = _nodes.get(key)
    if found is None:
        found = _made(op, sort, args, parameters)
        if args and op in EVALUATE and all(constant(a) for a in args):
            found = _folded(found)
        _nodes[key] = found
    return found


def _made(op: str, sort: Sort, args: tuple[Term, ...], parameters: tuple[Any, ...]) -> Term:
    term = Term()
    term.op, term.sort, term.args, term.parameters = op, sort, args, parameters
    return term


def _folded(term: Term) -> Term:
    if term.op == "float_of":  # which is how a float constant is written
        return term
    with np.errstate(all="ignore"):
        value = evaluate(term, {})
    if term.sort.kind == "bool":
        return const(bool(value), BOOL)
    if term.sort.kind == "bits":
        return const(int(value), term.sort)
    if value != value or term.sort not in (F32, F64):  # a NaN has no bits of its own
        return term
    return float_const(float(value), term.sort)


def constant(term: Term) -> bool:
    return term.op == "const" or (term.op == "float_of" and term.args[0].op == "const")


# ---- building -------------------------------------------------------------------------------------------------------


def const(value: int | bool, sort: Sort) -> Term:
    value = bool(value) if sort.kind == "bool" else int(value) & ((1 << sort.bits) - 1)
    return node("const", sort, parameters=(value,))


TRUE, FALSE = const(True, BOOL), const(False, BOOL)


def variable(name: str, sort: Sort) -> Term:
    return node("var", sort, parameters=(name,))


def fresh(prefix: str, sort: Sort) -> Term:
    """A value that nothing is known about."""
    return variable(f"{prefix}!{next(_numbers)}", sort)


def bits(value: int, width: int) -> Term:
    return const(value, bits_sort(width))


def float_const(value: float, sort: Sort = F32) -> Term:
    """``value``, which must be a value of ``sort``."""
    form, word = ("<f", "<I") if sort == F32 else ("<d", "<Q")
    packed = struct.pack(form, value)
    if value == value and struct.unpack(form, packed)[0] != value:
        raise ValueError(f"value must be one of {sort.smt}, got {value!r}")
    return float_of(bits(struct.unpack(word, packed)[0], sort.bits), sort)


def not_(a: Term) -> Term:
    return a.args[0] if a.op == "not" else node("not", BOOL, a)


def and_(*terms: Term) -> Term:
    return _junction("and", TRUE, FALSE, terms)


def or_(*terms: Term) -> Term:
    return _junction("or", FALSE, TRUE, terms)


def _junction(op: str, neutral: Term, ruling: Term, terms: Iterable[Term]) -> Term:
    kept = [t for t in dict.fromkeys(terms) if t is not neutral]
    if ruling in kept:
        return ruling
    if len(kept) < 2:
        return kept[0] if kept else neutral
    return node(op, BOOL, *kept)


def implies(a: Term, b: Term) -> Term:
    return or_(not_(a), b)


def ite(condition: Term, a: Term, b: Term) -> Term:
    if condition is TRUE or a is b:
        return a
    if condition is FALSE:
        return b
    if a.sort != b.sort:
        raise TypeError(f"both sides must be of one sort, got {a.sort.smt} and {b.sort.smt}")
    return node("ite", a.sort, condition, a, b)


def same(a: Term, b: Term) -> Term:
    """Identical: of floats, one NaN is another and +0 is not -0."""
    if a.sort != b.sort:
        raise TypeError(f"both sides must be of one sort, got {a.sort.smt} and {b.sort.smt}")
    return TRUE if a is b else node("=", BOOL, a, b)


def binary(op: str, a: Term, b: Term) -> Term:
    """A bit-vector operator of SMT-LIB that keeps the width, or compares."""
    if a.sort != b.sort or a.sort.kind != "bits":
        raise TypeError(f"{op} must have two bit-vectors of one width, got {a.sort.smt} and {b.sort.smt}")
    return node(op, BOOL if op in COMPARISONS else a.sort, a, b)


COMPARISONS = {"bvult", "bvule", "bvslt", "bvsle"}


def add(a: Term, b: Term) -> Term:
    return binary("bvadd", a, b)


def sub(a: Term, b: Term) -> Term:
    return binary("bvsub", a, b)


def mul(a: Term, b: Term) -> Term:
    return binary("bvmul", a, b)


def band(a: Term, b: Term) -> Term:
    return binary("bvand", a, b)


def bor(a: Term, b: Term) -> Term:
    return binary("bvor", a, b)


def xor(a: Term, b: Term) -> Term:
    return binary("bvxor", a, b)


def shl(a: Term, n: int) -> Term:
    return binary("bvshl", a, bits(n, a.sort.bits))


def lshr(a: Term, n: int) -> Term:
    return binary("bvlshr", a, bits(n, a.sort.bits))


def ult(a: Term, b: Term) -> Term:
    return binary("bvult", a, b)


def ule(a: Term, b: Term) -> Term:
    return binary("bvule", a, b)


def slt(a: Term, b: Term) -> Term:
    return binary("bvslt", a, b)


def sle(a: Term, b: Term) -> Term:
    return binary("bvsle", a, b)


def neg(a: Term) -> Term:
    return node("bvneg", a.sort, a)


def extract(high: int, low: int, a: Term) -> Term:
    if low == 0 and high == a.sort.bits - 1:
        return a
    return node("extract", bits_sort(high - low + 1), a, parameters=(high, low))


def resize(a: Term, width: int, signed: bool = False) -> Term:
    """``a`` cut, or extended by zeros or by its sign."""
    more = width - a.sort.bits
    if more <= 0:
        return extract(width - 1, 0, a)
    return node("sign_extend" if signed else "zero_extend", bits_sort(width), a, parameters=(more,))


def float_of(a: Term, sort: Sort) -> Term:
    """The float that has these bits."""
    if a.op == "bits_of" and a.args[0].sort == sort:
        return a.args[0]
    return node("float_of", sort, a)


def bits_of(a: Term) -> Term:
    """The bits of a float. A NaN's are not known: whatever is claimed has to hold for all that it could have."""
    if a.op == "float_of":
        return a.args[0]  # moving a float, or selecting it, keeps its bits
    if a.op == "ite":
        return ite(a.args[0], bits_of(a.args[1]), bits_of(a.args[2]))
    return node("bits_of", bits_sort(a.sort.bits), a)


def fp(op: str, *args: Term) -> Term:
    """fp.add, sub, mul, div and roundToIntegral to nearest, ties to even; fp.abs and neg; comparisons; classes."""
    if any(a.sort != args[0].sort or a.sort.kind != "float" for a in args):
        raise TypeError(f"fp.{op} must have floats of one sort, got {', '.join(a.sort.smt for a in args)}")
    return node(f"fp.{op}", BOOL if op in FLOAT_TESTS else args[0].sort, *args)


FLOAT_TESTS = {"lt", "leq", "eq", "isNaN", "isInfinite", "isZero", "isNormal", "isSubnormal"}
ROUNDED = {"fp.add", "fp.sub", "fp.mul", "fp.div", "fp.roundToIntegral"}


def to_float(a: Term, sort: Sort, signed: bool = True) -> Term:
    """A float or an integer as a float of ``sort``: to nearest, ties to even."""
    if a.sort == sort:
        return a
    op = "to_fp" if a.sort.kind == "float" else "to_fp_signed" if signed else "to_fp_unsigned"
    return node(op, sort, a)


def to_int(a: Term, width: int) -> Term:
    """A float cut to a signed integer; outside its range what SMT-LIB leaves open is open."""
    limit = float_const(2.0 ** (width - 1), a.sort)
    inside = and_(fp("leq", fp("neg", limit), a), fp("lt", a, limit))
    return ite(inside, node("to_sbv", bits_sort(width), a), fresh("outside", bits_sort(width)))


# ---- evaluating -----------------------------------------------------------------------------------------------------

FLOAT_TYPES: dict[Sort, Any] = {F32: np.float32, F64: np.float64, float_sort(5, 10): np.float16}
WORDS: dict[int, Any] = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def _mask(a: Array, width: int) -> Array:
    return np.asarray(a & np.uint64((1 << width) - 1)) if width < 64 else a


def _signed(a: Array, width: int) -> Array:
    up = np.uint64(64 - width)
    return np.asarray((a << up).view(np.int64) >> up.astype(np.int64))


def _type(sort: Sort) -> Any:
    """The type that holds the values of a sort: a float that NumPy has not is a float64, rounded by `_rounded`."""
    return FLOAT_TYPES.get(sort, np.float64)


def _rounded(value: Array, sort: Sort) -> Array:
    """Round to nearest, ties to even, in any float sort. A float64 holds sums and products of its values."""
    if sort in FLOAT_TYPES:
        return np.asarray(value).astype(FLOAT_TYPES[sort])
    fraction_bits, bias = sort.bits - 1 - sort.exponent, (1 << (sort.exponent - 1)) - 1
    value = np.asarray(value, np.float64)
    exponent = np.maximum(np.frexp(value)[1] - 1, 1 - bias)
    place = np.ldexp(1.0, exponent - fraction_bits)
    rounded = np.where(np.isfinite(value), np.rint(value / place) * place, value)
    return np.asarray(np.where(np.abs(rounded) >= 2.0 ** (bias + 1), np.copysign(np.inf, rounded), rounded))


def _float_of(t: Term, a: Array) -> Array:
    if t.sort in FLOAT_TYPES:
        return np.asarray(a.astype(WORDS[t.sort.bits]).view(_type(t.sort)))
    fraction_bits, bias = t.sort.bits - 1 - t.sort.exponent, (1 << (t.sort.exponent - 1)) - 1
    magnitude = a & np.uint64((1 << (t.sort.bits - 1)) - 1)
    exponent, fraction = (
        (magnitude >> np.uint64(fraction_bits)).astype(int),
        magnitude & np.uint64((1 << fraction_bits) - 1),
    )
    significand = np.where(exponent > 0, 1.0, 0.0) + fraction / 2.0**fraction_bits
    value = np.ldexp(significand, np.maximum(exponent, 1) - bias)
    value = np.where(exponent == 2 * bias + 1, np.where(fraction == 0, np.inf, np.nan), value)
    return np.asarray(np.where(a >> np.uint64(t.sort.bits - 1) == 1, -value, value))


def _bits_of(t: Term, a: Array) -> Array:
    sort = t.args[0].sort
    if sort in FLOAT_TYPES:
        return np.asarray(np.asarray(a, _type(sort)).view(WORDS[sort.bits]).astype(np.uint64))
    fraction_bits, bias = sort.bits - 1 - sort.exponent, (1 << (sort.exponent - 1)) - 1
    a = np.asarray(a, np.float64)
    finite = np.where(np.isfinite(a), np.abs(a), 0.0)
    exponent = np.maximum(np.frexp(finite)[1] - 1, 1 - bias)
    count = np.ldexp(finite, fraction_bits - exponent).astype(
        np.uint64
    )  # of last places; subnormal below 2^fraction_bits
    magnitude = count + ((exponent + bias - 1).astype(np.uint64) << np.uint64(fraction_bits))
    special = np.uint64((2 * bias + 1) << fraction_bits) + np.isnan(a).astype(np.uint64)
    magnitude = np.where(np.isfinite(a), magnitude, special)
    return np.asarray(magnitude | (np.signbit(a).astype(np.uint64) << np.uint64(sort.bits - 1)))


def _same(t: Term, a: Array, b: Array) -> Array:
    if t.args[0].sort.kind != "float":
        return np.asarray(a == b)
    return np.asarray(((a == b) & (np.signbit(a) == np.signbit(b))) | ((a != a) & (b != b)))


def _shifted(t: Term, a: Array, n: Array, left: bool) -> Array:
    width = t.sort.bits
    kept = np.minimum(n, np.uint64(63))
    moved = a << kept if left else a >> kept
    return np.where(n < width, _mask(moved, width), np.uint64(0))


def _ashr(t: Term, a: Array, n: Array) -> Array:
    moved = _signed(a, t.sort.bits) >> np.minimum(n, np.uint64(63)).astype(np.int64)
    return _mask(moved.view(np.uint64), t.sort.bits)


def _to_sbv(t: Term, a: Array) -> Array:
    return _mask(np.trunc(a).astype(np.int64).view(np.uint64), t.sort.bits)


def _compared(signed: bool, strict: bool) -> Callable[..., Array]:
    def compare(t: Term, a: Array, b: Array) -> Array:
        if signed:
            width = t.args[0].sort.bits
            a, b = _signed(a, width), _signed(b, width)
        return np.asarray(a < b if strict else a <= b)

    return compare


def _masked(compute: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    return lambda t, a, b: _mask(compute(a, b), t.sort.bits)


TINY: dict[Any, float] = {np.float32: 2.0**-126, np.float64: 2.0**-1022}
EVALUATE: dict[str, Callable[..., Array]] = {
    "not": lambda t, a: ~a,
    "and": lambda t, *a: np.logical_and.reduce(np.broadcast_arrays(*a)),
    "or": lambda t, *a: np.logical_or.reduce(np.broadcast_arrays(*a)),
    "ite": lambda t, c, a, b: np.where(c, a, b),
    "=": _same,
    "bvadd": _masked(lambda a, b: a + b),
    "bvsub": _masked(lambda a, b: a - b),
    "bvmul": _masked(lambda a, b: a * b),
    "bvand": lambda t, a, b: a & b,
    "bvor": lambda t, a, b: a | b,
    "bvxor": lambda t, a, b: a ^ b,
    "bvshl": lambda t, a, n: _shifted(t, a, n, left=True),
    "bvlshr": lambda t, a, n: _shifted(t, a, n, left=False),
    "bvashr": _ashr,
    "bvult": _compared(signed=False, strict=True),
    "bvule": _compared(signed=False, strict=False),
    "bvslt": _compared(signed=True, strict=True),
    "bvsle": _compared(signed=True, strict=False),
    "bvneg": lambda t, a: _mask(~a + np.uint64(1), t.sort.bits),
    "bvnot": lambda t, a: _mask(~a, t.sort.bits),
    "extract": lambda t, a: _mask(a >> np.uint64(t.parameters[1]), t.sort.bits),
    "zero_extend": lambda t, a: a,
    "sign_extend": lambda t, a: _mask(_signed(a, t.args[0].sort.bits).view(np.uint64), t.sort.bits),
    "float_of": _float_of,
    "bits_of": _bits_of,
    "fp.add": lambda t, a, b: _rounded(a + b, t.sort),
    "fp.sub": lambda t, a, b: _rounded(a - b, t.sort),
    "fp.mul": lambda t, a, b: _rounded(a * b, t.sort),
    "fp.div": lambda t, a, b: _rounded(a / b, t.sort),
    "fp.roundToIntegral": lambda t, a: np.rint(a),
    "fp.neg": lambda t, a: -a,
    "fp.abs": lambda t, a: np.abs(a),
    "fp.lt": lambda t, a, b: a < b,
    "fp.leq": lambda t, a, b: a <= b,
    "fp.eq": lambda t, a, b: a == b,
    "fp.isNaN": lambda t, a: a != a,
    "fp.isInfinite": lambda t, a: np.isinf(a),
    "fp.isZero": lambda t, a: a == 0,
    "fp.isNormal": lambda t, a: np.isfinite(a) & (np.abs(a) >= TINY[_type(t.args[0].sort)]),
    "fp.isSubnormal": lambda t, a: (a != 0) & (np.abs(a) < TINY[_type(t.args[0].sort)]),
    "to_fp": lambda t, a: _rounded(a, t.sort),
    "to_fp_signed": lambda t, a: _signed(a, t.args[0].sort.bits).astype(_type(t.sort)),
    "to_fp_unsigned": lambda t, a: a.astype(_type(t.sort)),
    "to_sbv": _to_sbv,
}


def evaluate(term: Term, values: Mapping[str, Any]) -> Array:
    """The term where its variables have ``values``: arrays of one shape, or numbers. What is fresh is 0.

    A boolean gives bool, a bit-vector uint64, a float its own type.
    """
    done: dict[int, Array] = {}
    with np.errstate(all="ignore"):
        for t in ordered([term]):
            if t.op == "const":
                value = t.parameters[0]
                done[id(t)] = np.asarray(value, np.bool_ if t.sort.kind == "bool" else np.uint64)
            elif t.op == "var":
                value = np.asarray(values.get(t.parameters[0], 0))
                if t.sort.kind == "bits":
                    signed = value.dtype.kind == "i"
                    value = _mask(
                        value.astype(np.int64).view(np.uint64) if signed else value.astype(np.uint64), t.sort.bits
                    )
                done[id(t)] = value.astype(np.bool_) if t.sort.kind == "bool" else value
            else:
                done[id(t)] = np.asarray(EVALUATE[t.op](t, *(done[id(a)] for a in t.args)))
    return done[id(term)]


def ordered(roots: Iterable[Term]) -> list[Term]:
    """Every term below ``roots``, arguments before what uses them."""
    order: list[Term] = []
    seen: set[int] = set()
    stack = [(root, False) for root in roots]
    while stack:
        term, expanded = stack.pop()
        if expanded:
            order.append(term)
        elif id(term) not in seen:
            seen.add(id(term))
            stack.append((term, True))
            stack.extend((a, False) for a in term.args if id(a) not in seen)
    return order


# ---- writing --------------------------------------------------------------------------------------------------------


def smt_lib(asserted: Iterable[Term], comment: str = "", open_products: bool = False) -> str:
    """A script of SMT-LIB 2.6 that asks whether all of ``asserted`` can hold.

    The bits of a float are a constant that is asserted to have its value, as SMT-LIB has no function for them. With
    ``open_products`` a product, sum or difference of two unknown floats, or a quotient, is a function that nothing is
    known of: what cannot be satisfied then cannot be satisfied at all.
    """
    roots = list(asserted)
    order = ordered(roots)
    uses: dict[int, int] = {}
    for t in order:
        for a in t.args:
            uses[id(a)] = uses.get(id(a), 0) + 1
    lines = [f"; {line}" for line in comment.splitlines()]
    lines += [f"(set-logic {'QF_UFBVFP' if open_products else 'QF_BVFP'})"]
    opened = {id(t) for t in order if open_products and _opens(t)}
    functions = {t.op: t.sort.smt for t in order if id(t) in opened}
    lines += [f"(declare-fun open_{op[3:]} ({sort} {sort}) {sort})" for op, sort in functions.items()]
    text: dict[int, str] = {}
    for number, t in enumerate(order):
        if t.op == "var":
            text[id(t)] = f"|{t.parameters[0]}|"
            lines.append(f"(declare-const {text[id(t)]} {t.sort.smt})")
            continue
        if t.op == "bits_of":
            text[id(t)] = f"bits_{number}"
            float_sort = t.args[0].sort
            lines.append(f"(declare-const bits_{number} {t.sort.smt})")
            lines.append(f"(assert (= ({float_sort.to_fp} bits_{number}) {text[id(t.args[0])]}))")
            continue
        arguments = [text[id(a)] for a in t.args]
        written = f"(open_{t.op[3:]} {' '.join(arguments)})" if id(t) in opened else _smt(t, arguments)
        if uses.get(id(t), 0) > 1 and t.args and not constant(t):
            lines.append(f"(define-fun t_{number} () {t.sort.smt} {written})")
            written = f"t_{number}"
        text[id(t)] = written
    lines += [f"(assert {text[id(root)]})" for root in roots]
    return "\n".join([*lines, "(check-sat)", ""])


def _opens(t: Term) -> bool:
    unknown = not any(constant(a) for a in t.args)
    return t.sort == F32 and (t.op == "fp.div" or (unknown and t.op in ("fp.mul", "fp.add", "fp.sub")))


def _smt(t: Term, args: list[str]) -> str:
    joined = " ".join(args)
    if t.op == "const":
        value = t.parameters[0]
        if t.sort.kind == "bool":
            return "true" if value else "false"
        return f"#x{value:0{t.sort.bits // 4}x}" if t.sort.bits % 4 == 0 else f"#b{value:0{t.sort.bits}b}"
    if t.op in ("extract", "zero_extend", "sign_extend"):
        return f"((_ {t.op} {' '.join(map(str, t.parameters))}) {joined})"
    if t.op == "float_of":
        return f"({t.sort.to_fp} {joined})"
    if t.op in ("to_fp", "to_fp_signed"):
        return f"({t.sort.to_fp} RNE {joined})"
    if t.op == "to_fp_unsigned":
        return f"({t.sort.to_fp.replace('to_fp', 'to_fp_unsigned')} RNE {joined})"
    if t.op == "to_sbv":
        return f"((_ fp.to_sbv {t.sort.bits}) RTZ {joined})"
    if t.op in ROUNDED:
        return f"({t.op} RNE {joined})"
    return f"({t.op} {joined})"
