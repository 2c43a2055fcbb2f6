"""The charts of the page, drawn as SVG by hand: they take the page's colours, light or dark, and need no library."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import roofline
from .case import OURS, Row, case_name, seconds
from .chart import contest

WIDTH, LABEL, BAR = 960, 330, 15  # pixels: a chart, the names beside its bars, a bar
HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 70, 20, 20, 50  # of the roofline and of its margins


def svg(height: float, label: str, parts: Iterable[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
    )


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def tip(shape: str, words: str) -> str:
    """``shape`` with what a pointer over it is told."""
    return f"<g><title>{html.escape(words)}</title>{shape}</g>"


def said(row: Row) -> str:
    """A row in a line."""
    share = roofline.share(row)
    limit = "" if share is None else f", {share:.2f} of the limit"
    return f"{row.case} {'x'.join(map(str, row.shape))}: {row.backend} {seconds(row.min)}{limit}"


def within(row: Row) -> str:
    """The name of a case below that of its family."""
    return case_name("", row.op if row.op != row.family else "", row.conversion, row.per)


def bars(rows: Sequence[Row]) -> str:
    """quantlib and its fastest peer in each case: the share of the nearer limit."""
    groups = [found for group in roofline.grouped(rows) if (found := contest(group))]
    longest = max((roofline.share(row) or 0.0 for group in groups for row in group), default=1.0)
    scale = (WIDTH - LABEL - 210) / max(1.0, longest)
    y, parts, family = 22.0, [], ""
    for group in groups:
        if group[0].family != family:
            family = group[0].family
            parts.append(text(0, y + BAR, family, kind="strong"))
            y += BAR if within(group[0]) else 0
        parts.append(text(LABEL - 8, y + BAR * len(group) / 2 + 3, within(group[0]), "end"))
        for row in group:
            length, mine = (roofline.share(row) or 0.0) * scale, row.role == OURS
            shape = f'<rect x="{LABEL}" y="{y:.1f}" width="{length:.1f}" height="{BAR - 3}" rx="2"/>'
            beside = f"{row.backend} {row.speedup:.2f}x" if mine and row.speedup else row.backend
            parts.append(f'<g class="{"ours" if mine else "peer"}">{tip(shape, said(row))}</g>')
            parts.append(text(LABEL + length + 6, y + BAR - 5, beside, kind="strong" if mine else "faint"))
            y += BAR
        y += 9
    limit = [
        line(LABEL + scale, 16, LABEL + scale, y, "limit"),
        text(LABEL + scale, 11, "the limit", "middle", "faint"),
    ]
    return svg(y + 4, "Share of the limit by case", [*limit, *parts])


def roof(machine: dict[str, Any], rows: Sequence[Row]) -> str:
    """FLOPs a second over FLOPs a byte, quantlib filled, its fastest peer hollow."""
    limits, points = roofline.roof(machine), roofline.points(rows)
    frame = roofline.frame(limits, points)
    x, y = axis(frame.x, LEFT, WIDTH - RIGHT), axis(frame.y, HEIGHT - BOTTOM, TOP)
    right = frame.x[1]
    parts = [*grid(frame, x, y)]
    start = max(frame.x[0], frame.y[0] / limits.bandwidth)
    end = max(limits.peaks.values(), default=right * limits.bandwidth) / limits.bandwidth
    ends = x(start), y(start * limits.bandwidth), x(end), y(end * limits.bandwidth)
    parts.append(line(*ends, "roof"))
    angle = math.degrees(math.atan2(ends[3] - ends[1], ends[2] - ends[0]))
    name = text(12, -7, f"plain copy {limits.bandwidth / 1e9:.1f} GB/s", kind="strong")
    parts.append(f'<g transform="translate({ends[0]:.1f} {ends[1]:.1f}) rotate({angle:.1f})">{name}</g>')
    for dtype, peak in limits.peaks.items():
        parts.append(line(x(limits.ridge(dtype)), y(peak), x(right), y(peak), "roof"))
        name = f"{roofline.PEAKS.get(dtype, dtype)} {peak / 1e12:.3g} TFLOP/s"
        parts.append(text(x(right) - 4, y(peak) - 5, name, "end", "strong"))
    for p in points:
        at, own = x(p.intensity), y(p.rate)
        if p.peer is not None and p.peer_rate:
            other = y(p.peer_rate)
            ring = f'<circle cx="{at:.1f}" cy="{other:.1f}" r="4.5" class="ring"/>'
            parts += [line(at, own, at, other, "between"), tip(ring, said(p.peer))]
        parts.append(tip(f'<circle cx="{at:.1f}" cy="{own:.1f}" r="5" class="dot"/>', said(p.row)))
    return svg(HEIGHT, "Roofline: FLOPs a second over FLOPs a byte", parts)


def axis(ends: tuple[float, float], start: float, end: float) -> Callable[[float], float]:
    """Return a function from a value to its pixel, on a logarithmic axis from ``start`` to ``end``."""
    low, high = map(math.log10, ends)
    return lambda value: start + (math.log10(value) - low) / (high - low) * (end - start)


def grid(frame: roofline.Frame, x: Callable[[float], float], y: Callable[[float], float]) -> Iterable[str]:
    """A line a decade, and the names of the axes."""
    for value in roofline.decades(*frame.x):
        yield line(x(value), TOP, x(value), HEIGHT - BOTTOM, "grid")
        yield text(x(value), HEIGHT - BOTTOM + 16, f"{value:g}", "middle", "faint")
    for value in roofline.decades(*frame.y):
        yield line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid")
        yield text(LEFT - 6, y(value) + 4, short(value), "end", "faint")
    yield text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "FLOPs a byte", "middle")
    yield text(4, 12, "FLOPs a second")


def short(value: float) -> str:
    """1e11 as 100 G."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
