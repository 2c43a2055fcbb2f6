"""NumPy for terms: with it as ``np``, a file of quantlib/reference runs once for every value that there is.

Only what those files use, and strictly: two dtypes meet nowhere but in a comparison with a Python number, and a value
that is not known decides no ``if``. Whatever else the reference calls is an AttributeError, never a guess.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

from quantlib.proof import terms, words
from quantlib.proof.terms import BOOL, Term
from quantlib.proof.words import TYPES, Type


class Array:
    """An element of an array of one element: what holds for it holds for each of many."""

    shape = (1, 1)
    ndim = 2
    size = 1

    def __init__(self, term: Term, dtype: Type) -> None:
        self.term, self.dtype = term, dtype

    def view(self, dtype: Any) -> Array:
        to = _type(dtype)
        return Array(words.reinterpret(self.term, self.dtype, to), to)

    def astype(self, dtype: Any) -> Array:
        to = _type(dtype)
        return Array(words.convert(self.term, self.dtype, to), to)

    def reshape(self, *shape: Any) -> Array:
        return self

    def __getitem__(self, index: Any) -> Array:
        return self

    def _with(self, op: str, other: Any, swapped: bool = False) -> Array:
        if not isinstance(other, Array):
            other = Array(words.literal(other, self.dtype), self.dtype)
        if other.dtype != self.dtype:
            raise TypeError(f"{op} must have two values of one dtype, got {self.dtype.name} and {other.dtype.name}")
        a, b = (other, self) if swapped else (self, other)
        result = words.arithmetic(op, a.term, b.term, self.dtype)
        return Array(result, TYPES["bool"] if result.sort == BOOL else self.dtype)

    def __add__(self, other: Any) -> Array:
        return self._with("+", other)

    def __radd__(self, other: Any) -> Array:
        return self._with("+", other, swapped=True)

    def __sub__(self, other: Any) -> Array:
        return self._with("-", other)

    def __rsub__(self, other: Any) -> Array:
        return self._with("-", other, swapped=True)

    def __mul__(self, other: Any) -> Array:
        return self._with("*", other)

    def __rmul__(self, other: Any) -> Array:
        return self._with("*", other, swapped=True)

    def __truediv__(self, other: Any) -> Array:
        return self._with("/", other)

    def __rtruediv__(self, other: Any) -> Array:
        return self._with("/", other, swapped=True)

    def __and__(self, other: Any) -> Array:
        return self._with("&", other)

    def __or__(self, other: Any) -> Array:
        return self._with("|", other)

    def __xor__(self, other: Any) -> Array:
        return self._with("^", other)

    def __lshift__(self, other: Any) -> Array:
        return self._with("<<", other)

    def __rshift__(self, other: Any) -> Array:
        return self._with(">>", other)

    def __lt__(self, other: Any) -> Array:
        return self._with("<", other)

    def __le__(self, other: Any) -> Array:
        return self._with("<=", other)

    def __gt__(self, other: Any) -> Array:
        return self._with(">", other)

    def __ge__(self, other: Any) -> Array:
        return self._with(">=", other)

    def __eq__(self, other: Any) -> Array:  # type: ignore[override]
        return self._with("==", other)

    def __ne__(self, other: Any) -> Array:  # type: ignore[override]
        return self._with("!=", other)

    __hash__ = None  # type: ignore[assignment]

    def __neg__(self) -> Array:
        return Array(words.negative(self.term, self.dtype), self.dtype)

    def __invert__(self) -> Array:
        if self.dtype.kind == "bool":
            return Array(terms.not_(self.term), self.dtype)
        return self._with("^", Array(terms.const(-1, self.dtype.sort), self.dtype))

    def __bool__(self) -> bool:
        if self.term.op != "const":
            raise TypeError("a value that is not known decides no branch")
        return bool(self.term.parameters[0])


class DType:
    """np.float32 and the like: a dtype, and what makes a value of it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, value: Any) -> Array:
        return asarray(value, self)


def _type(dtype: Any) -> Type:
    return dtype if isinstance(dtype, Type) else TYPES[dtype if isinstance(dtype, str) else dtype.name]


int8, int16, int32, int64 = (DType(f"int{n}") for n in (8, 16, 32, 64))
uint8, uint16, uint32, uint64 = (DType(f"uint{n}") for n in (8, 16, 32, 64))
float32, float64 = DType("float32"), DType("float64")


def asarray(value: Any, dtype: Any = None) -> Array:
    if isinstance(value, Array):
        return value if dtype is None else value.astype(dtype)
    if dtype is None:
        dtype = int64 if isinstance(value, int) else float64
    return Array(words.literal(value, _type(dtype)), _type(dtype))


def array(value: Any, dtype: Any = None) -> Array:
    return asarray(value, dtype)


def zeros(shape: Any, dtype: Any) -> Array:
    return asarray(0, dtype)


def prod(sizes: tuple[int, ...], dtype: Any = None) -> int:
    return math.prod(sizes)


def shape(value: Array) -> tuple[int, int]:
    return value.shape


@contextlib.contextmanager
def errstate(**_: str) -> Iterator[None]:
    yield


def _pair(a: Any, b: Any) -> tuple[Array, Array]:
    if not isinstance(a, Array):
        if not isinstance(b, Array):
            raise TypeError("one of the two must be an array")
        a = asarray(a, b.dtype)
    b = b if isinstance(b, Array) else asarray(b, a.dtype)
    if a.dtype != b.dtype:
        raise TypeError(f"both must have one dtype, got {a.dtype.name} and {b.dtype.name}")
    return a, b


def where(condition: Array, a: Any, b: Any) -> Array:
    a, b = _pair(a, b)
    return Array(terms.ite(condition.term, a.term, b.term), a.dtype)


def _least(a: Any, b: Any, op: str) -> Array:
    """A NaN wins. Which of +0 and -0 it is NumPy does not say: either."""
    a, b = _pair(a, b)
    first = words.arithmetic(op, a.term, b.term, a.dtype)
    if a.dtype.kind != "float":
        return Array(terms.ite(first, a.term, b.term), a.dtype)
    second = words.arithmetic(op, b.term, a.term, a.dtype)
    no_zero = any(terms.constant(v.term) and terms.fp("isZero", v.term) is terms.FALSE for v in (a, b))
    either = a.term if no_zero else terms.ite(terms.fresh("either", BOOL), a.term, b.term)
    ordered = terms.ite(first, a.term, terms.ite(second, b.term, either))
    result = terms.ite(terms.fp("isNaN", a.term), a.term, terms.ite(terms.fp("isNaN", b.term), b.term, ordered))
    return Array(result, a.dtype)


def minimum(a: Any, b: Any) -> Array:
    return _least(a, b, "<")


def maximum(a: Any, b: Any) -> Array:
    return _least(a, b, ">")


def clip(a: Array, lowest: Any, highest: Any) -> Array:
    return minimum(maximum(a, lowest), highest)


def rint(a: Array) -> Array:
    return Array(terms.fp("roundToIntegral", a.term), a.dtype)
