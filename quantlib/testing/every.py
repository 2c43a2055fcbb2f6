"""All tables together, and the calls among them that start every kernel in every way it is launched."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from quantlib import backends, formats
from quantlib.testing import compare, learned, product, rotated, rows, searched, steps, table
from quantlib.testing.call import Block
from quantlib.testing.learned import Learned
from quantlib.testing.product import Product
from quantlib.testing.rotated import Rotated
from quantlib.testing.rows import Rows
from quantlib.testing.searched import Searched
from quantlib.testing.steps import Step
from quantlib.testing.table import CASTS, DTYPES, Case

AnyCase = Case | Product | Learned | Searched | Step | Rotated | Rows
OPS = (*table.OPS, *product.OPS, *learned.OPS, *searched.OPS, *steps.OPS, *rotated.OPS, *rows.OPS)
Way = tuple[tuple[int, int], Block, str]

# Three ways of a projection on a GPU: blocks that some lanes of a warp share, blocks that a thread block holds in its
# registers, and blocks that are larger, or share a byte with their neighbours: the scale first, in slices.
SHARED: tuple[Way, ...] = (
    ((7, 30), (-1, 1), "contiguous"),
    ((9, 33), (1, 5), "contiguous"),
    ((4, 40), (2, 5), "strided"),
    ((5, 1), (1, 1), "offset"),
    ((70, 64), (1, 32), "contiguous"),
)
HELD: tuple[Way, ...] = (
    ((6, 515), (1, -1), "contiguous"),
    ((2, 16384), (1, -1), "contiguous"),  # the longest float32 row that is held
    ((3, 4099), (1, -1), "offset"),
    ((130, 96), (64, 64), "contiguous"),
    ((259, 5), (-1, 1), "contiguous"),  # several columns a program, whose rows lie apart in a warp
)
LARGE: tuple[Way, ...] = (
    ((3, 20011), (1, -1), "contiguous"),
    ((300, 260), (128, 128), "contiguous"),
    ((1, 50001), (-1, -1), "offset"),
    ((9, 33), (3, -1), "contiguous"),
)


def every(op: str | None = None, format: str | None = None, *, large: bool = False) -> tuple[AnyCase, ...]:
    """The tables; ``large`` adds the products for which a GPU has ways of its own."""
    return (
        *table.cases(op, format),
        *product.products(op, format, large),
        *learned.learned(op, format),
        *searched.searched(op, format),
        *steps.steps(op, format),
        *rotated.rotated(op, format),
        *rows.rows(op, format),
    )


def launches(op: str | None = None, format: str | None = None) -> tuple[AnyCase, ...]:
    """Every op with every format, dtype and kind of zero point, in each of the ways that its kernels are started."""
    return tuple(c for c in _launches() if op in (None, c.op) and format in (None, c.format))


def _launches() -> Iterator[AnyCase]:
    for n, (x, y) in enumerate(itertools.product(CASTS, CASTS)):
        for layout in ("contiguous", "offset"):
            yield Case("cast", y, x, (2, 4099), layout=layout, saturate=n % 2 == 0)
    for op in table.OPS[1:]:
        n = 0
        for f, dtype, symmetric in itertools.product(formats.TABLE, DTYPES, (True, False)):
            if f.is_float and not symmetric:
                continue
            for ways in (SHARED, HELD, LARGE):
                shape, block, layout = ways[n % len(ways)]
                yield Case(op, f.name, dtype, shape, block, layout, symmetric)
            n += 1
    yield from learned.learned()
    yield from searched.searched()
    yield from steps.steps()
    yield from rotated.rotated()
    yield from rows.rows()
    for op in product.OPS:  # of each weight, tiled or not, and dtype: few rows, and more
        kinds: dict[object, list[Product]] = {}
        for p in product.products(op):
            kinds.setdefault((p.format, p.symmetric, p.dtype, p.tiled, p.x_format, p.x_symmetric), []).append(p)
        for found in kinds.values():
            yield from {p.sizes[0] > 16: p for p in found}.values()


def overload(case: AnyCase) -> str:
    """The one that serves ``case``, as backends name it."""
    return f"{case.op}.tiled" if isinstance(case, Product) and case.tiled else case.op


def refuses(case: AnyCase, backend: str, device: str) -> str | None:
    """Return why ``backend`` cannot run ``case``, or None; "auto" can."""
    return None if backend == "auto" else backends.refuses(backend, device, overload(case))


def check(case: AnyCase, device: str = "cpu") -> None:
    """Check a case of any kind: AssertionError if a byte is wrong."""
    if isinstance(case, Product):
        product.check(case, device)
    elif isinstance(case, Learned):
        learned.check(case, device)
    elif isinstance(case, Searched):
        searched.check(case, device)
    elif isinstance(case, Step):
        steps.check(case, device)
    elif isinstance(case, Rotated):
        rotated.check(case, device)
    elif isinstance(case, Rows):
        rows.check(case, device)
    else:
        compare.check(case, device)
