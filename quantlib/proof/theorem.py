"""The parts of a theorem: the functions it is about, its claim in each case, and the faults it must find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantlib.proof import symbolic, terms
from quantlib.proof.cxx import Value
from quantlib.proof.sources import Edit, Sources
from quantlib.proof.terms import Sort, Term
from quantlib.proof.words import TYPES

REFERENCE, HEADER = "reference", "C++"
LANGUAGES = (REFERENCE, HEADER)
NUMERICS_PY, NUMERICS_H = "quantlib/reference/numerics.py", "csrc/numerics.h"
FAKE_PY, FAKE_H = "quantlib/reference/fake_quantize.py", "csrc/fake_quantize.h"
Array = terms.Array


@dataclass(frozen=True)
class Function:
    """One function of the library, as it stands in each language and as the public op runs it."""

    name: str
    inputs: Mapping[str, str]  # name -> type
    outputs: Mapping[str, str]
    reference: Callable[..., Any]  # (modules, **inputs): NumPy's or `symbolic`'s arrays alike; one value or a tuple
    header: Callable[..., Any] | None  # (program, **inputs) on Values
    op: Callable[..., Any] | None = None  # (**inputs) as arrays of one element: what the public op gives
    sums: bool = False  # the op adds its results up from +0, so that it has no -0
    code_bits: int = 32  # the number of bits of an integer that the op writes
    accepts: Callable[..., Term] = lambda **inputs: terms.TRUE  # the inputs that the op does not refuse

    def terms(self, sources: Sources, language: str, inputs: Mapping[str, Term]) -> dict[str, Term]:
        """The outputs for any inputs, each of the sort of its type."""
        if language == REFERENCE:
            given = {name: symbolic.Array(inputs[name], TYPES[type]) for name, type in self.inputs.items()}
            results = self.reference(sources.reference, **given)
            listed = results if isinstance(results, tuple) else (results,)
            types = [r.dtype.name for r in listed]
        else:
            assert self.header is not None, f"{self.name} has no C++"
            values = {name: Value(TYPES[type], inputs[name]) for name, type in self.inputs.items()}
            results = self.header(sources.header, **values)
            listed = results if isinstance(results, tuple) else (results,)
            types = [r.type.name for r in listed]
        if types != list(self.outputs.values()):
            raise TypeError(f"{self.name} must give {', '.join(self.outputs.values())}, got {', '.join(types)}")
        return {name: result.term for name, result in zip(self.outputs, listed, strict=True)}


@dataclass
class Call:
    """One function applied in a claim."""

    function: Function
    language: str
    inputs: dict[str, Term]
    outputs: dict[str, Term]


@dataclass
class Run:
    """Build a claim from ``sources``, and record the functions that it applied and their arguments."""

    sources: Sources
    calls: list[Call] = field(default_factory=list)

    def __call__(self, function: Function, language: str, **inputs: Term) -> Any:
        """The output of ``function``, or a tuple of them."""
        outputs = function.terms(self.sources, language, inputs)
        self.calls.append(Call(function, language, inputs, outputs))
        listed = tuple(outputs.values())
        return listed if len(listed) > 1 else listed[0]


@dataclass(frozen=True)
class Claim:
    """assume => goal, for all values of the variables."""

    assume: Term
    goal: Term
    # Products, quotients, sums and differences of two unknown float32 are left open: the claim holds whatever they are,
    # as long as those of the same two are the same.
    open_products: bool = False

    def negated(self, calls: Iterable[Call] = ()) -> list[Term]:
        """Return the terms that a solver is asked to satisfy, for inputs of ``calls`` that the ops accept."""
        accepted = [call.function.accepts(**call.inputs) for call in calls]
        return [self.assume, *accepted, terms.not_(self.goal)]


@dataclass(frozen=True)
class Case:
    """A claim about one format and language. ``build`` makes it from sources, which may have a fault in them."""

    label: str
    build: Callable[[Run], Claim]
    format: str | None = None
    long: bool = False


@dataclass(frozen=True)
class Fault:
    """A mistake that makes the claim of a case false, and what is edited for it; no edits: the claim itself is."""

    name: str
    case: Case
    edits: tuple[Edit, ...] = ()
    confirm: Callable[[Mapping[str, int]], None] | None = None  # a further check of the ops, which raises


@dataclass(frozen=True)
class Theorem:
    """A statement, its domain, and its cases."""

    name: str
    clause: str
    says: str
    domain: str
    cases: tuple[Case, ...]
    faults: tuple[Fault, ...]

    def case(self, label: str) -> Case:
        return next(case for case in self.cases if case.label == label)


def float_variable(name: str) -> Term:
    """Any float32: every bit pattern."""
    return terms.float_of(terms.variable(name, terms.bits_sort(32)), terms.F32)


def edit(file: str, right: str, wrong: str) -> tuple[Edit, ...]:
    return (Edit(file, right, wrong),)


def int_variable(name: str, width: int = 32) -> Term:
    """Any bit-vector of ``width``."""
    return terms.variable(name, terms.bits_sort(width))


__all__ = [
    "FAKE_H",
    "FAKE_PY",
    "HEADER",
    "LANGUAGES",
    "NUMERICS_H",
    "NUMERICS_PY",
    "REFERENCE",
    "Call",
    "Case",
    "Claim",
    "Fault",
    "Function",
    "Run",
    "Sort",
    "Theorem",
    "edit",
    "float_variable",
    "int_variable",
]
