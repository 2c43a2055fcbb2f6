"""The cases that are executed: of every op, in each of the ways that its kernels are started."""

from __future__ import annotations

from typing import Any

from quantlib.testing import every, product
from quantlib.testing.every import AnyCase


def ops_of(arch: int) -> tuple[str, ...]:
    """The ops that are executed as compiled for ``arch``: the tensor cores of sm_100 are not known."""
    return tuple(op for op in every.OPS if arch != 100 or op not in product.OPS)


def chosen(ops: list[str] | None = None, step: int = 1, arch: int = 90) -> list[AnyCase]:
    """Every ``step``-th case of each op."""
    found: list[AnyCase] = []
    for op in ops or ops_of(arch):
        found += every.launches(op)[::step]
    return found


SUMS = ("compute_scale", "fake_quantize_backward")  # of which each shape has reductions of its own
FEW = 4
PRODUCTS = 3


def few(arch: int = 90) -> list[AnyCase]:
    """Choose a case of each shape of the ops that reduce, each of another format and dtype; a few of the others."""
    found: list[AnyCase] = []
    for op in ops_of(arch):
        ways: dict[Any, list[Any]] = {}
        for case in every.launches(op):
            ways.setdefault((case.shape, case.block), []).append(case)
        wanted = PRODUCTS if op in product.OPS else FEW
        some = list(ways.values())[:: 1 if op in SUMS else max(len(ways) // wanted, 1)]
        found += [way[3 * n % len(way)] for n, way in enumerate(some)]
    return found
