"""What the rows look like: an aligned table, the targets, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .case import Row, seconds
from .targets import Verdict, verdicts

VERSION = 1  # of the JSON

COLUMNS = (
    "op", "from -> to", "scale per", "shape", "backend", "min", "median", "spread", "runs", "MB", "GB/s", "of copy",
    "vs best peer", "differ", "note",
)  # fmt: skip
OUTCOME = {True: "met", False: "MISSED", None: "not measured"}
LEFT = {"op", "from -> to", "scale per", "backend", "note"}


def headline(machine: dict[str, Any]) -> str:
    """What was measured on, in a line."""
    return (
        f"{machine['device']} ({machine['instructions']}), {machine['threads']} threads of {machine['cores']} cores, "
        f"load {machine['load']}, plain copy {machine['copy_gb_per_s']:.1f} GB/s"
    )


def cells(row: Row) -> list[str]:
    """A row in the words of COLUMNS."""
    against = "" if row.speedup is None else f"{row.speedup:.2f}x"
    if row.above is not None:
        against = f"{seconds(row.above, sign=True)}"
    return [
        row.op if row.family == row.op else f"{row.family} {row.op}",
        row.conversion,
        row.per,
        "x".join(map(str, row.shape)),
        row.backend,
        seconds(row.min),
        seconds(row.median),
        "" if row.spread is None else f"{row.spread:.0%}",
        str(row.runs or ""),
        "" if row.bytes is None else f"{row.bytes / 1e6:.1f}",
        "" if row.gb_per_s is None else f"{row.gb_per_s:.2f}",
        "" if row.of_copy is None else f"{row.of_copy:.2f}",
        against,
        "" if row.differing is None else str(row.differing),
        "; ".join(filter(None, (row.error, row.note))),
    ]


def table(rows: Sequence[Row]) -> str:
    """Aligned columns, a blank line between cases."""
    lines = [list(COLUMNS), *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    keys = [None, *(row.case for row in rows)]
    text = []
    for key, group in groupby(zip(keys, lines, strict=True), key=lambda pair: pair[0]):
        text += [] if key is None else [""]
        for _, line in group:
            padded = (
                cell.ljust(width) if column in LEFT else cell.rjust(width)
                for cell, width, column in zip(line, widths, COLUMNS, strict=True)
            )
            text.append("  ".join(padded).rstrip())
    return "\n".join(text)


def target_table(found: Iterable[Verdict]) -> str:
    """Every target with what was measured: met or missed."""
    lines = []
    for v in found:
        lines.append((OUTCOME[v.met], v.target.case, figure(v), str(v.target), peer(v)))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def figure(v: Verdict) -> str:
    if v.measured is None:
        return "-"
    if v.target.measure == "above":
        return seconds(v.measured, sign=True)
    return f"{v.measured:.2f}{'x' if v.target.measure == 'speedup' else ''}"


def peer(v: Verdict) -> str:
    """How near to the memory's limit the other side already is."""
    if v.peer_of_copy is None or v.target.measure != "speedup":
        return ""
    return f"(at {v.peer_of_copy:.2f} of a plain copy)"


def as_json(machine: dict[str, Any], rows: Sequence[Row], complete: bool) -> str:
    """One object: version, machine, complete, rows, targets."""
    targets = [
        {
            **dataclasses.asdict(v.target),
            "text": str(v.target),
            "measured": v.measured,
            "met": v.met,
            "peer_of_copy": v.peer_of_copy,
        }
        for v in verdicts(rows)
    ]
    content = {
        "version": VERSION,
        "machine": machine,
        "complete": complete,
        "rows": [dataclasses.asdict(row) for row in rows],
        "targets": targets,
    }
    return json.dumps(content, indent=1) + "\n"


def read_json(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a saved run.

    Raises
    ------
    ValueError
        For a file of another version.
    """
    content = json.loads(Path(path).read_text())
    if content.get("version") != VERSION:
        raise ValueError(f"{path}: version must be {VERSION}, got {content.get('version')}")
    return content["machine"], [Row(**{**row, "shape": tuple(row["shape"])}) for row in content["rows"]]


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row, the fields of Row; the shape as 8192x4096."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**dataclasses.asdict(row), "shape": "x".join(map(str, row.shape))})
    return text.getvalue()


def as_markdown(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table and the targets for a page of documentation."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    about = f"{headline(machine)}; {machine['date']}, Python {machine['python']}, {versions}."
    shown = [i for i, column in enumerate(COLUMNS) if column not in ("runs", "MB")]
    head = [COLUMNS[i] for i in shown]
    rule = [":--" if column in LEFT else "--:" for column in head]
    body = [[cells(row)[i] for i in shown] for row in rows]
    kept = [
        (v.target.case, " ".join(filter(None, (str(v.target), peer(v)))), figure(v), OUTCOME[v.met])
        for v in verdicts(rows)
    ]
    goals = [("case", "target", "measured", ""), (":--", ":--", "--:", ":--"), *kept]
    return "\n\n".join((about, _markdown(goals), _markdown([head, rule, *body]))) + "\n"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
