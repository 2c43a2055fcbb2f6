"""The rows as a picture: in each case quantlib and its fastest peer, in bytes a second, a plain copy being 1."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from .case import OURS, PEER, Row

COLOURS = {
    "quantlib": "#1f4e9c",
    "torch.compile": "#e08a1e",
    "torch": "#b9b9b9",
    "torchao": "#7a9e7e",
    "bitsandbytes": "#a05a8c",
}


BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


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

    shown = [row for _, group in groupby(rows, key=lambda row: row.case) for row in contest(list(group))]
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * len(shown)), layout="constrained")
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--", zorder=0)
    y, ticks, labels = 0.0, [], []
    for _, group in groupby(shown, key=lambda row: row.case):
        bars = list(group)
        for row in bars:
            axes.barh(y, row.of_copy, color=colour(row), height=0.95)
            beside = row.backend if row.role == PEER or not row.speedup else f"{row.backend}: {row.speedup:.1f}x"
            axes.text(row.of_copy + 0.01, y, beside, va="center", fontsize=7, bbox=BLANK)
            y += 1
        ticks.append(y - (len(bars) + 1) / 2)
        labels.append(f"{bars[0].op}  {bars[0].conversion} {bars[0].per}".rstrip())
        y += 0.6
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.2 * max((row.of_copy or 0 for row in shown), default=1))
    axes.set_xlabel(f"bytes a second; a plain copy, {machine['copy_gb_per_s']:.1f} GB/s, is 1", fontsize=8)
    axes.set_title(f"quantlib and its fastest peer: {machine['device']}, {machine['threads']} threads", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def contest(rows: list[Row]) -> list[Row]:
    """Of a case: quantlib's rows and the fastest peer's."""
    timed = [row for row in rows if row.of_copy is not None]
    rivals = sorted((row for row in timed if row.role == PEER), key=lambda row: row.min or 0.0)
    return [row for row in timed if row.role == OURS] + rivals[:1]


def colour(row: Row) -> str:
    """Of the longest name in COLOURS that the backend begins with."""
    return COLOURS[max((name for name in COLOURS if row.backend.startswith(name)), key=len)]
