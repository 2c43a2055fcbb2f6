"""Tables of tensors as CSV, PNG and one self-contained HTML page with a histogram of each."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

STYLE = """body{font:14px system-ui,sans-serif;margin:2em;color:#222;background:#fff}
table{border-collapse:collapse}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:first-child,th:first-child{text-align:left}svg{vertical-align:middle}rect{fill:#36c}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#111}td,th{border-color:#333}rect{fill:#8af}}"""
BARS = 64  # of a histogram, at most


def number(value: Any) -> str:
    """A figure for people."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if math.isnan(value) or math.isinf(value):
            return str(value)
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_csv(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line a row, with all columns but histograms."""
    names = [name for name in rows[0] if name != "histogram"] if rows else []
    text = io.StringIO()
    writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    Path(path).write_text(text.getvalue())


def write_html(path: str, title: str, rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> None:
    """One file that needs no other."""
    names = [name for name in rows[0] if name != "histogram"] if rows else []
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in [*names, "histogram"])
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell(row[name]))}</td>" for name in names) + f"<td>{bars(row)}</td></tr>"
        for row in rows
    )
    told = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    title = html.escape(title)
    Path(path).write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style></head>"
        f"<body><h1>{title}</h1>{told}<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></body></html>\n"
    )


def cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value)) if all(isinstance(v, int) for v in value) else " / ".join(map(str, value))
    return number(value)


def merged(counts: Sequence[int]) -> list[int]:
    """Merge into at most `BARS` bars, from the first that is not empty to the last."""
    used = [k for k, count in enumerate(counts) if count]
    if not used:
        return []
    part = list(counts[used[0] : used[-1] + 1])
    step = -(-len(part) // BARS)
    return [sum(part[k : k + step]) for k in range(0, len(part), step)]


def bars(row: Mapping[str, Any]) -> str:
    """A histogram as SVG."""
    counts = merged(row.get("histogram") or [])
    if not counts:
        return ""
    most = max(counts)
    shapes = "".join(
        f'<rect x="{2 * k}" y="{24 - h:.1f}" width="2" height="{h:.1f}"/>'
        for k, count in enumerate(counts)
        if (h := 24 * count / most) > 0
    )
    return f'<svg width="{2 * len(counts)}" height="24" role="img">{shapes}</svg>'


def write_png(path: str, title: str, names: Sequence[str], values: Sequence[float], label: str) -> None:
    """A bar for each tensor.

    Raises
    ------
    ImportError
        Without matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, max(2.0, 0.22 * len(names) + 1)))
    shown = [value if math.isfinite(value) else 0.0 for value in values]
    axes.barh(range(len(names)), shown)
    axes.set_yticks(range(len(names)), [name[-60:] for name in names], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
