"""``quantlib bench compare A B``: the changes from one run to another, beyond the spread of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantlib.cli import text
from quantlib.cli.text import style

from . import report
from .case import OURS, Row, seconds

SAME, SLOWER, FASTER, LOST, ONLY_BEFORE, ONLY_AFTER, NEVER = (
    "", "SLOWER", "faster", "LOST", "only in A", "only in B", "no time",
)  # fmt: skip
CIRCUMSTANCES = ("device", "instructions", "cores", "threads", "backend", "system")  # ratios across them say nothing
COLOURS = {SLOWER: "red", LOST: "red", FASTER: "green"}
HEADER = ("case", "shape", "backend", "A", "B", "B / A", "spread A", "spread B", "")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """One row of both runs, or of one."""

    before: Row | None
    after: Row | None
    verdict: str

    @property
    def row(self) -> Row:
        row = self.after or self.before
        assert row is not None
        return row

    @property
    def ratio(self) -> float | None:
        """Time after / time before."""
        a, b = self.before, self.after
        return b.min / a.min if a and b and a.min and b.min else None


def main(before: str, after: str, tolerance: float, ours: bool) -> int:
    """Print the changes.

    Returns
    -------
    int
        1 where something got slower or lost its time, 0 otherwise.

    Raises
    ------
    ValueError, OSError
        For a file that is not the JSON of a run, or cannot be read.
    """
    (machine_a, a), (machine_b, b) = report.read_json(before), report.read_json(after)
    changes = list(compared(a, b, tolerance, ours))
    other = differences(machine_a, machine_b)
    parts = [warning(other), table(changes), summary(changes), warning(other) if len(changes) > 20 else ""]
    print("\n\n".join(filter(None, parts)))
    return 1 if any(change.verdict in (SLOWER, LOST) for change in changes) else 0


def compared(before: Iterable[Row], after: Iterable[Row], tolerance: float, ours: bool = False) -> Iterable[Change]:
    """Yield the rows of both runs, in the order of the first, then the rows that only one run has."""
    a, b = ({key(row): row for row in rows if row.role == OURS or not ours} for rows in (before, after))
    for k in sorted(dict.fromkeys((*a, *b)), key=lambda k: (k not in a, k not in b)):
        yield Change(a.get(k), b.get(k), verdict(a.get(k), b.get(k), tolerance))


def key(row: Row) -> Key:
    """Return the key that two rows of the same measurement share."""
    return row.family, row.op, row.conversion, row.per, row.shape, row.device, row.backend


def verdict(before: Row | None, after: Row | None, tolerance: float) -> str:
    """A row changed if its minimum and its median moved by more than both spreads together and ``tolerance``.

    Either alone can be luck: one undisturbed run in fifty, or a second run on a busier machine.
    """
    if before is None or after is None:
        return ONLY_AFTER if before is None else ONLY_BEFORE
    if before.min is None or after.min is None:
        return LOST if before.min is not None else NEVER
    assert before.median is not None
    assert after.median is not None
    beyond = 1 + max(tolerance, (before.spread or 0.0) + (after.spread or 0.0))
    low, high = sorted((after.min / before.min, after.median / before.median))
    return SLOWER if low > beyond else FASTER if high < 1 / beyond else SAME


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List the differences of two machines: "threads: 2 in A, 4 in B"."""
    found = [(name, a.get(name), b.get(name)) for name in CIRCUMSTANCES]
    versions = a.get("versions") or {}, b.get("versions") or {}
    found.append(("torch", *(v.get("torch") for v in versions)))
    return [f"{name}: {x} in A, {y} in B" for name, x, y in found if x != y]


def warning(other: Sequence[str]) -> str:
    if not other:
        return ""
    first = style("NOT THE SAME MACHINE OR SETTINGS: the ratios say nothing about the code.", "red")
    return "\n".join((first, *(f"  {line}" for line in other)))


def table(changes: Sequence[Change]) -> str:
    """Aligned, a line a row."""
    lines = [
        (
            change.row.case,
            "x".join(map(str, change.row.shape)),
            change.row.backend,
            time(change.before),
            time(change.after),
            "" if change.ratio is None else f"{change.ratio:.2f}",
            spread(change.before),
            spread(change.after),
            style(change.verdict, COLOURS.get(change.verdict, "dim")),
        )
        for change in changes
    ]
    return text.table(HEADER, lines, "<><>>>>><")


def time(row: Row | None) -> str:
    return "" if row is None else seconds(row.min) or "-"


def spread(row: Row | None) -> str:
    return "" if row is None or row.spread is None else f"{row.spread:.0%}"


def summary(changes: Sequence[Change]) -> str:
    """Count each verdict, and name the worst change."""
    kinds = [change.verdict or "the same" for change in changes]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds, key=kinds.count)))
    worst = max((c for c in changes if c.verdict == SLOWER), key=lambda c: c.ratio or 0.0, default=None)
    if worst is None:
        return counts
    return f"{counts}; the slowest: {worst.row.case}, {worst.row.backend}, {worst.ratio:.2f} of its time"
