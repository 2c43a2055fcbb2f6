"""The printed tables: a line a kernel and architecture, and the summary that docs/gpu.md holds."""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable
from pathlib import Path

from gpu_static import targets
from gpu_static.model import bound
from gpu_static.run import Row

PAGE = Path(__file__).resolve().parents[2] / "docs/gpu.md"
MARKS = "<!-- written by `make gpu-static ARGS=--page` -->\n", "<!-- until here -->\n"


def table(rows: list[Row]) -> str:
    cells = [
        (
            "kernel",
            "configuration",
            "arch",
            "warps",
            "regs",
            "spills",
            "shared",
            "a unit",
            "budget",
            "read",
            "written",
            "no less than",
            "verdict",
        )
    ]
    for row in rows:
        m = row.measured
        cells.append(
            (
                *(f"{m.language} {m.kernel}", m.config, f"sm_{m.arch}", str(m.warps or "-"), str(m.registers)),
                *(
                    str(m.spilled),
                    str(m.shared),
                    f"{m.instructions:.2f}",
                    f"{row.budget[0]:.2f}" if row.budget else "-",
                ),
                *(f"{m.read:.2f}", f"{m.written:.2f}", str(bound(m) or "-"), verdict(row)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        " ".join(f"{text:{'<' if n < 2 else '>'}{widths[n]}}" for n, text in enumerate(line[:-1])) + "  " + line[-1]
        for line in cells
    )


def verdict(row: Row) -> str:
    return "; ".join([*row.faults, *(f"known: {fault}" for fault in row.known)]) or "ok"


def summary(rows: list[Row]) -> str:
    """A line a kernel, on each architecture in turn: configurations, the most that one needs, instructions a unit."""
    groups = collections.defaultdict(list)
    for row in rows:
        groups[row.measured.language, row.measured.kernel].append(row)
    archs = sorted({row.measured.arch for row in rows})
    named = " / ".join(f"sm_{arch}" for arch in archs)
    head = "configurations", "registers", "shared memory", "instructions a unit: median, most", "known"
    lines = [f"| kernel, for {named} | {' | '.join(head)} |", "|---|--:|--:|--:|--:|--:|"]
    for (language, kernel), group in sorted(groups.items()):
        parts = [[row for row in group if row.measured.arch == arch] for arch in archs]
        cells = (
            f"{language} `{kernel}`",
            each(parts, len),
            each(parts, lambda part: max(row.measured.registers for row in part)),
            each(parts, lambda part: max(row.measured.shared for row in part)),
            each(parts, middle_and_most),
            each(parts, lambda part: sum(bool(row.known) for row in part)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def products(rows: list[Row]) -> str:
    return targets.table(row.measured for row in rows)


def each(parts: list[list[Row]], say: Callable[[list[Row]], object]) -> str:
    """Say the same once where it holds of all parts, and else of each part."""
    said = [str(say(part)) if part else "-" for part in parts]
    return said[0] if len(set(said)) == 1 else " / ".join(said)


def middle_and_most(part: list[Row]) -> str:
    needed = [row.measured.instructions for row in part if not row.measured.facts.get("ragged")]
    return f"{statistics.median(needed):.1f}, {max(needed):.1f}" if needed else "-"


def write_page(rows: list[Row], path: Path = PAGE) -> None:
    """Put the summary and the products between the marks of docs/gpu.md."""
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(f"{before}{MARKS[0]}{summary(rows)}\n\n{products(rows)}\n{MARKS[1]}{after}")
