"""The cases that are executed: of the ops that stream, in each of the ways that their kernels are started."""

from __future__ import annotations

from quantlib.testing import every, product
from quantlib.testing.every import AnyCase

OPS = tuple(op for op in every.OPS if op not in product.OPS)


def chosen(ops: list[str] | None = None, step: int = 1) -> list[AnyCase]:
    """Every ``step``-th case of each op."""
    found = []
    for op in ops or OPS:
        found += every.launches(op)[::step]
    return found
