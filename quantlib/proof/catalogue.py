"""Every theorem there is."""

from __future__ import annotations

import functools

from quantlib.proof import casts, instructions, products, projections, scales, training
from quantlib.proof.theorem import Theorem

SUBJECTS = (casts, scales, projections, training, products, instructions)


@functools.cache
def theorems() -> tuple[Theorem, ...]:
    """Return the theorems, by clause of the contract."""
    return tuple(theorem for subject in SUBJECTS for theorem in subject.theorems())


def theorem(name: str) -> Theorem:
    return next(t for t in theorems() if t.name == name)
