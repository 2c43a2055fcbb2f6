"""Print the rows: an aligned table, the targets, JSON, CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from quantlib.cli import text
from quantlib.cli.text import style

from . import graphs, roofline
from .case import LIMIT, OURS, Row, described, seconds
from .targets import Verdict, verdicts

VERSION = 3  # of the JSON
READABLE = (1, 2, 3)  # 1 lacks FLOPs, peaks, dtype and device; 2 shares of a plain read and the noise

COLUMNS = (
    "backend", "min", "median", "spread", "GB/s", "of copy", "of r+w", "of read", "TFLOP/s", "of peak",
    "vs best peer", "differ", "note",
)  # fmt: skip
LEFT = {"case", "backend", "note"}


def headline(machine: dict[str, Any]) -> str:
    """Describe the machine and its limits in a line."""
    peaks = ", ".join(
        f"{roofline.PEAKS.get(dtype, dtype)} {figures(rate)}"
        for dtype, rate in machine.get("peak_tflop_per_s", {}).items()
    )
    if gpu := machine.get("gpu"):
        state = (gpu[name] for name in ("clocks.sm", "power.draw", "temperature.gpu") if gpu.get(name))
        parts = [f"{gpu['sms']} SMs", f"{gpu['l2_bytes'] / 2**20:.0f} MiB of L2", *state]
    else:
        parts = [f"{machine['threads']} threads of {machine['cores']} cores"]
    parts += [f"load {machine['load']}"]
    parts += [f"noise {machine['noise']:.0%}"] if machine.get("noise") is not None else []
    parts += [f"plain copy {machine['copy_gb_per_s']:.1f} GB/s"]
    parts += [f"plain read {machine['read_gb_per_s']:.1f} GB/s"] if machine.get("read_gb_per_s") else []
    parts += [f"products {peaks} TFLOP/s"] if peaks else []
    return f"{machine['device']} ({machine['instructions']}), {', '.join(parts)}"


def figures(value: float | None) -> str:
    """Three of them: 1234, 12.3, 0.123, 1.23e-05."""
    if value is None:
        return ""
    if abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def heading(row: Row) -> str:
    """Return what all rows of a case share: "quantize float32 -> int8 row, 4096x4096, 83.9 MB, 0.5 FLOPs a byte"."""
    shape = "x".join(map(str, row.shape))
    moved = f"{row.bytes / 1e6:.1f} MB" if row.bytes else ""
    intensity = f"{figures(row.intensity)} FLOPs a byte" if row.intensity else ""
    return ", ".join(filter(None, (row.case, shape, moved, intensity)))


def cells(row: Row) -> list[str]:
    """A row in the words of COLUMNS."""
    against = "" if row.speedup is None else f"{row.speedup:.2f}x"
    if row.above is not None:
        against = f"{seconds(row.above, sign=True)}"
    return [
        row.backend,
        seconds(row.min),
        seconds(row.median),
        "" if row.spread is None else f"{row.spread:.0%}",
        figures(row.gb_per_s),
        *("" if share is None else f"{share:.2f}" for share in (row.of_copy, row.of_read_write, row.of_read)),
        figures(row.tflop_per_s),
        "" if row.of_peak is None else f"{row.of_peak:.2f}",
        against,
        "" if row.differing is None else str(row.differing),
        "; ".join(filter(None, (row.error, row.note))),
    ]


def own(rows: Sequence[Row]) -> Row:
    """The row that says most of a case's bytes and FLOPs: quantlib's if it has a time."""
    return max(rows, key=lambda row: (row.role == OURS, row.min is not None, row.role != LIMIT))


def table(rows: Sequence[Row]) -> str:
    """Aligned columns, a heading above every case; columns that nobody fills are left out."""
    lines = [
        [style(cell, "bold") if row.role == OURS and k == 0 else cell for k, cell in enumerate(cells(row))]
        for row in rows
    ]
    kept = [k for k, column in enumerate(COLUMNS) if column == "backend" or any(line[k] for line in lines)]
    align = "".join("<" if COLUMNS[k] in LEFT else ">" for k in kept)
    header, *body = text.table(
        [COLUMNS[k] for k in kept], [[line[k] for k in kept] for line in lines], align
    ).splitlines()
    found, take = [header], iter(body)
    for group in roofline.grouped(rows):
        found += ["", style(heading(own(group)), "cyan"), *itertools.islice(take, len(group))]
    return "\n".join(found)


def bars(rows: Sequence[Row], width: int = 30) -> str:
    """A bar for quantlib in each case: the share of what this machine can do, and the fastest peer's."""
    lines = []
    for row in (own(group) for group in roofline.grouped(rows)):
        share = roofline.share(row)
        if row.role == OURS and share is not None:
            length = round(min(share, 1.5) * width)
            behind = f"{row.speedup:.2f}x the best peer" if row.speedup else ""
            lines.append((heading(row).partition(", ")[0], f"{share:.2f}", "\u2588" * length or "\u258f", behind))
    return text.table(("quantlib in", "of the limit", "", ""), lines, "<><<") if lines else ""


def line_table(rows: Sequence[Row]) -> str:
    """Return a table of the overhead of a call and the rate beyond it, for cases of several sizes."""
    lines = [
        (line.case, line.backend, figures(line.gb_per_s), f"{line.microseconds:.2f}") for line in graphs.lines(rows)
    ]
    return text.table(("over all sizes", "backend", "GB/s", "us a call"), lines, "<<>>") if lines else ""


def target_table(found: Iterable[Verdict]) -> str:
    """Every target with what was measured: met or missed."""
    lines = []
    for v in found:
        lines.append((v.outcome, v.target.case, figure(v), str(v.target), peer(v)))
    widths = [max((len(line[i]) for line in lines), default=0) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def figure(v: Verdict) -> str:
    if v.measured is None:
        return "-"
    if v.target.measure == "above":
        return seconds(v.measured, sign=True)
    return f"{v.measured:.2f}{'x' if v.target.measure in ('speedup', 'time') else ''}"


def peer(v: Verdict) -> str:
    """Return the peer's share of a plain copy's speed, in words."""
    if v.peer_of_copy is None or v.target.measure != "speedup":
        return ""
    return f"(at {v.peer_of_copy:.2f} of a plain copy)"


def as_json(machine: dict[str, Any], rows: Sequence[Row], complete: bool) -> str:
    """One object: version, machine, complete, rows, lines (slope and intercept over sizes), targets."""
    targets = [
        {
            **dataclasses.asdict(v.target),
            "text": str(v.target),
            "measured": v.measured,
            "outcome": v.outcome,
            "met": v.met,
            "low": v.low,
            "high": v.high,
            "peer_of_copy": v.peer_of_copy,
        }
        for v in verdicts(rows, machine)
    ]
    content = {
        "version": VERSION,
        "machine": machine,
        "complete": complete,
        "rows": [dataclasses.asdict(row) for row in rows],
        "lines": [line._asdict() for line in graphs.lines(rows)],
        "targets": targets,
    }
    return json.dumps(content, indent=1) + "\n"


def read_json(path: str | Path) -> tuple[dict[str, Any], list[Row]]:
    """The machine and the rows of a saved run.

    Raises
    ------
    ValueError
        For a file of another kind or version.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        raise ValueError(f"{path} must be the JSON of a run, got {described(error)}") from None
    parts = {"version": int, "machine": dict, "rows": list}
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{path} must be the JSON of a run, got other JSON")
    if content["version"] not in READABLE:
        raise ValueError(f"{path} must be of version {' or '.join(map(str, READABLE))}, got {content['version']!r}")
    try:
        return content["machine"], [Row(**{**row, "shape": tuple(row["shape"])}) for row in content["rows"]]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{path} must hold rows as `quantlib bench --json` writes them, got {described(error)}"
        ) from None


def as_csv(rows: Sequence[Row]) -> str:
    """A line a row, the fields of Row; the shape as 8192x4096."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**dataclasses.asdict(row), "shape": "x".join(map(str, row.shape))})
    return file.getvalue()


def as_markdown(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """The table and the targets for a page of documentation."""
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    about = f"{headline(machine)}; {machine['date']}, Python {machine['python']}, {versions}."
    head = ["case", *COLUMNS]
    rule = [":--" if column in LEFT else "--:" for column in head]
    body = [[" ".join(filter(None, (row.case, "x".join(map(str, row.shape))))), *cells(row)] for row in rows]
    kept = [
        (v.target.case, " ".join(filter(None, (str(v.target), peer(v)))), figure(v), v.outcome)
        for v in verdicts(rows, machine)
    ]
    goals = [("case", "target", "measured", ""), (":--", ":--", "--:", ":--"), *kept]
    return "\n\n".join((about, _markdown(goals), _markdown([head, rule, *body]))) + "\n"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
