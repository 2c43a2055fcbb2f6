"""The rows as a picture: for each case quantlib and its peers in bytes a second, a plain copy being 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.case import LIMIT, OURS, Row

COLOURS = {
    "quantlib": "#1f4e9c",
    "torch.compile": "#e08a1e",
    "torch": "#b9b9b9",
    "torchao": "#7a9e7e",
    "bitsandbytes": "#a05a8c",
}


def draw(machine: dict[str, Any], rows: Sequence[Row], path: str | Path) -> None:
    """Write a PNG.

    Raises
    ------
    ImportError
        Where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.of_copy is not None and row.role != LIMIT]
    cases = [(case, list(group)) for case, group in groupby(shown, key=lambda row: row.case)]
    bars = sum(len(group) + 1 for _, group in cases)
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.19 * bars), layout="constrained")
    y, ticks, labels = 0.0, [], []
    for _, group in cases:
        for row in group:
            axes.barh(y, row.of_copy, color=colour(row), height=0.9)
            beside = (
                row.backend if row.role != OURS or not row.speedup else f"{row.backend}: {row.speedup:.1f}x best peer"
            )
            axes.text(row.of_copy + 0.01, y, beside, va="center", fontsize=7)
            y += 1
        ticks.append(y - (len(group) + 1) / 2)
        labels.append(f"{group[0].op}\n{group[0].conversion} {group[0].per}".rstrip())
        y += 1
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.25 * max((row.of_copy or 0 for row in shown), default=1))
    axes.set_xlabel(f"bytes a second, plain copy = 1 ({machine['copy_gb_per_s']:.1f} GB/s)")
    axes.set_title(f"{machine['device']}, {machine['threads']} threads", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def colour(row: Row) -> str:
    """Of the longest name in COLOURS that the backend begins with."""
    return max(((name, c) for name, c in COLOURS.items() if row.backend.startswith(name)), key=lambda p: len(p[0]))[1]
