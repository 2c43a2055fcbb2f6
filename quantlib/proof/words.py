"""Typed values of a program as terms: a float32, an int32, a uint8, as C++ and NumPy have them.

The conversions are those that both languages agree on; what promotes to what is said where each language is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantlib.proof import terms
from quantlib.proof.terms import BOOL, F32, F64, Sort, Term


@dataclass(frozen=True)
class Type:
    """A type of both languages."""

    name: str
    kind: str  # bool, unsigned, signed, float
    bits: int

    @property
    def sort(self) -> Sort:
        if self.kind == "bool":
            return BOOL
        if self.kind == "float":
            return F32 if self.bits == 32 else F64
        return terms.bits_sort(self.bits)

    @property
    def signed(self) -> bool:
        return self.kind == "signed"


TYPES = {
    t.name: t
    for t in (
        Type("bool", "bool", 1),
        *(Type(f"uint{n}", "unsigned", n) for n in (8, 16, 32, 64)),
        *(Type(f"int{n}", "signed", n) for n in (8, 16, 32, 64)),
        *(Type(f"float{n}", "float", n) for n in (32, 64)),
    )
}


def literal(value: float, type: Type) -> Term:
    """A number of ``type``; one that the type cannot hold is an error."""
    if type.kind == "float":
        return terms.float_const(float(value), type.sort)
    if type.kind == "bool":
        return terms.const(bool(value), BOOL)
    lowest = -(1 << (type.bits - 1)) if type.signed else 0
    if value != int(value) or not lowest <= value < lowest + (1 << type.bits):
        raise OverflowError(f"value must be one of {type.name}, got {value}")
    return terms.const(int(value), type.sort)


def convert(term: Term, of: Type, to: Type) -> Term:
    """A value of ``of`` as one of ``to``: integers modulo 2^n, to floats to nearest, from floats towards zero."""
    if of == to:
        return term
    if to.kind == "float":
        if of.kind == "bool":
            return terms.ite(term, literal(1, to), literal(0, to))
        return terms.to_float(term, to.sort, of.signed)
    if to.kind == "bool":
        zero = literal(0, of)
        return terms.not_(terms.fp("eq", term, zero) if of.kind == "float" else terms.same(term, zero))
    if of.kind == "float":
        return terms.resize(terms.to_int(term, max(to.bits, 32)), to.bits)
    if of.kind == "bool":
        return terms.ite(term, literal(1, to), literal(0, to))
    return terms.resize(term, to.bits, of.signed)


def reinterpret(term: Term, of: Type, to: Type) -> Term:
    """The same bits as another type."""
    if of.bits != to.bits or "bool" in (of.kind, to.kind):
        raise TypeError(f"the bits of {of.name} are no {to.name}")
    if of.kind == "float":
        term = terms.bits_of(term)
    return terms.float_of(term, to.sort) if to.kind == "float" else term


def arithmetic(op: str, a: Term, b: Term, type: Type) -> Term:
    """``a op b`` of two values of one type: + - * /, & | ^, << >> and comparisons."""
    if type.kind == "float":
        if op in ("+", "-", "*", "/"):
            return terms.fp({"+": "add", "-": "sub", "*": "mul", "/": "div"}[op], a, b)
        compared = {"<": ("lt", a, b), "<=": ("leq", a, b), ">": ("lt", b, a), ">=": ("leq", b, a)}
        if op in compared:
            name, left, right = compared[op]
            return terms.fp(name, left, right)
        if op in ("==", "!="):
            equal = terms.fp("eq", a, b)
            return equal if op == "==" else terms.not_(equal)
        raise TypeError(f"{op} has no meaning for {type.name}")
    if type.kind == "bool":
        if op in ("&", "|"):
            return terms.and_(a, b) if op == "&" else terms.or_(a, b)
        if op in ("==", "!="):
            return terms.same(a, b) if op == "==" else terms.not_(terms.same(a, b))
        raise TypeError(f"{op} has no meaning for bool")
    if op in ("==", "!="):
        return terms.same(a, b) if op == "==" else terms.not_(terms.same(a, b))
    if op in ("<", ">", "<=", ">="):
        left, right = (a, b) if op in ("<", "<=") else (b, a)
        less = {True: ("bvslt", "bvsle"), False: ("bvult", "bvule")}[type.signed][op in ("<=", ">=")]
        return terms.binary(less, left, right)
    words = {"+": "bvadd", "-": "bvsub", "*": "bvmul", "&": "bvand", "|": "bvor", "^": "bvxor", "<<": "bvshl"}
    words[">>"] = "bvashr" if type.signed else "bvlshr"
    if op not in words:
        raise TypeError(f"{op} has no meaning for {type.name}")
    return terms.binary(words[op], a, b)


def negative(a: Term, type: Type) -> Term:
    return terms.fp("neg", a) if type.kind == "float" else terms.neg(a)
