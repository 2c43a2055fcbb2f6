"""The rows as pictures: quantlib and its fastest peer in each case, and every op under the roof of this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import roofline
from .case import OURS, PEER, Row

COLOURS = {
    "quantlib": "#1f4e9c",
    "torch.compile": "#e08a1e",
    "torch": "#b9b9b9",
    "F.linear": "#b9b9b9",
    "torchao": "#7a9e7e",
    "bitsandbytes": "#a05a8c",
    "optimum-quanto": "#b5534a",
    "": "#c9a66b",
}
BLANK = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
MARKERS = "oDsPX^v<>p*h"  # of families


def pyplot() -> Any:
    """matplotlib's, which draws into memory.

    Raises
    ------
    ImportError
        Where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def title(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} threads"


def draw(machine: dict[str, Any], rows: Sequence[Row], path: str | Path) -> None:
    """Write a PNG of bars: the share of the nearer limit, bytes of a plain copy or FLOPs of torch's own products."""
    plt = pyplot()
    groups = [bars for group in roofline.grouped(rows) if (bars := contest(group))]
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.2 * sum(map(len, groups))), layout="constrained")
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--", zorder=0)
    y, longest, ticks, labels = 0.0, 1.0, [], []
    for bars in groups:
        for row in bars:
            length = roofline.share(row) or 0.0
            longest = max(longest, length)
            axes.barh(y, length, color=colour(row), height=0.95)
            beside = row.backend if row.role == PEER or not row.speedup else f"{row.backend}: {row.speedup:.1f}x"
            axes.text(length + 0.01, y, beside, va="center", fontsize=7, bbox=BLANK)
            y += 1
        ticks.append(y - (len(bars) + 1) / 2)
        labels.append(bars[0].case)
        y += 0.6
    axes.set_yticks(ticks, labels, fontsize=7)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlim(0, 1.2 * longest)
    axes.set_xlabel(f"share of the limit: a plain copy, {machine['copy_gb_per_s']:.1f} GB/s, or products", fontsize=8)
    axes.set_title(f"quantlib and its fastest peer: {title(machine)}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_roofline(machine: dict[str, Any], rows: Sequence[Row], path: str | Path) -> None:
    """Write a PNG: FLOPs a second over FLOPs a byte, quantlib filled and its fastest peer hollow."""
    plt = pyplot()
    roof, points = roofline.roof(machine), roofline.points(rows)
    frame = roofline.frame(roof, points)
    left, right = frame.x
    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    slope = max(roof.peaks.values(), default=roof.bandwidth * right) / roof.bandwidth
    axes.plot([left, slope], [left * roof.bandwidth, slope * roof.bandwidth], color="black", linewidth=1.2)
    for dtype, peak in roof.peaks.items():
        axes.plot([roof.ridge(dtype), right], [peak, peak], color="black", linewidth=1.2)
        name = f"{roofline.PEAKS[dtype]} {peak / 1e12:.3g} TFLOP/s"
        axes.text(right / 1.05, peak * 1.04, name, fontsize=8, ha="right", va="bottom")
    families = list(dict.fromkeys(point.row.family for point in points))
    for point in points:
        marker = MARKERS[families.index(point.row.family) % len(MARKERS)]
        if point.peer is not None and point.peer_rate:
            axes.plot([point.intensity] * 2, [point.rate, point.peer_rate], color="#d0d0d0", linewidth=0.8, zorder=1)
            axes.plot(
                point.intensity, point.peer_rate, marker, markerfacecolor="white", markeredgecolor=colour(point.peer)
            )
        axes.plot(point.intensity, point.rate, marker, color=COLOURS["quantlib"])
    for name in families:
        marker = MARKERS[families.index(name) % len(MARKERS)]
        axes.plot([], [], marker, linestyle="none", color=COLOURS["quantlib"], label=name)
    axes.plot([], [], "o", linestyle="none", markerfacecolor="white", markeredgecolor="gray", label="the fastest peer")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=frame.y)
    axes.set_xlabel("FLOPs a byte", fontsize=8)
    axes.set_ylabel("FLOPs a second", fontsize=8)
    axes.set_title(f"under what memory and products allow: {title(machine)}", fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(color="#eeeeee", linewidth=0.6)
    figure.draw_without_rendering()  # from here on the slope has an angle
    start = max(left, frame.y[0] / roof.bandwidth)
    (x0, y0), (x1, y1) = axes.transData.transform([(v, v * roof.bandwidth) for v in (start, slope)])
    beside = {"rotation": math.degrees(math.atan2(y1 - y0, x1 - x0)), "rotation_mode": "anchor", "fontsize": 8}
    name = f"plain copy {roof.bandwidth / 1e9:.1f} GB/s"
    axes.annotate(name, (start, start * roof.bandwidth), (4, 10), textcoords="offset points", **beside)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def contest(group: Sequence[Row]) -> list[Row]:
    """Return quantlib's rows of a case and the fastest peer's, where there is a limit to show them against."""
    timed = [row for row in group if roofline.share(row) is not None]
    rival = roofline.fastest(timed, PEER)
    return [row for row in timed if row.role == OURS] + ([rival] if rival else [])


def colour(row: Row) -> str:
    """Return the colour of the longest name in COLOURS that the backend begins with."""
    return COLOURS[max((name for name in COLOURS if row.backend.startswith(name)), key=len)]
