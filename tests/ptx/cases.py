"""The cases that are executed: of the ops that stream, in each of the ways that their kernels are started."""

from __future__ import annotations

from typing import Any

from quantlib.testing import every, product
from quantlib.testing.every import AnyCase

OPS = tuple(op for op in every.OPS if op not in product.OPS)


def chosen(ops: list[str] | None = None, step: int = 1) -> list[AnyCase]:
    """Every ``step``-th case of each op."""
    found: list[AnyCase] = []
    for op in ops or OPS:
        found += every.launches(op)[::step]
    return found


SUMS = ("compute_scale", "fake_quantize_backward")  # of which each shape has reductions of its own
FEW = 4


def few() -> list[AnyCase]:
    """Choose a case of each shape of the ops that reduce, each of another format and dtype; four of the others."""
    found: list[AnyCase] = []
    for op in OPS:
        ways: dict[Any, list[Any]] = {}
        for case in every.launches(op):
            ways.setdefault((case.shape, case.block), []).append(case)
        some = list(ways.values())[:: 1 if op in SUMS else max(len(ways) // FEW, 1)]
        found += [way[3 * n % len(way)] for n, way in enumerate(some)]
    return found
