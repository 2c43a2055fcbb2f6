"""The roofline of this machine: FLOPs a second over FLOPs a byte, below the limits of memory and products.

attainable(intensity) = min(peak, bandwidth * intensity)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .case import OURS, PEER, Row

PEAKS = {"float32": "FP32", "bfloat16": "BF16", "int8": "INT8"}  # dtype -> as charts call it


@dataclass(frozen=True)
class Roof:
    """The limits of an op: bytes a second of a plain copy, FLOPs a second of products by dtype."""

    bandwidth: float
    peaks: Mapping[str, float]

    def ridge(self, dtype: str) -> float:
        """FLOPs a byte from which products are the limit, and no longer the memory."""
        return self.peaks[dtype] / self.bandwidth


@dataclass(frozen=True)
class Point:
    """An op on the chart: FLOPs a byte, FLOPs a second of quantlib and of its fastest peer."""

    row: Row
    intensity: float
    rate: float
    peer: Row | None = None
    peer_rate: float | None = None


@dataclass(frozen=True)
class Frame:
    """The first and the last value on the axes of a chart."""

    x: tuple[float, float]
    y: tuple[float, float]


def roof(machine: Mapping[str, Any]) -> Roof:
    """Return the limits that a run measured first."""
    peaks = machine.get("peak_tflop_per_s", {})
    return Roof(machine["copy_gb_per_s"] * 1e9, {dtype: rate * 1e12 for dtype, rate in peaks.items()})


def points(rows: Iterable[Row]) -> list[Point]:
    """Every op that has bytes, FLOPs and a time of quantlib's."""
    return [
        Point(row, row.intensity, row.flops / row.min, best, row.flops / best.min if best and best.min else None)
        for group in grouped(rows)
        for best in [fastest(group, PEER)]
        for row in group
        if row.role == OURS and row.min and row.flops and row.intensity
    ]


def frame(roof: Roof, points: Iterable[Point]) -> Frame:
    """Around every point, ridge and peak."""
    points = list(points)
    intensities = [*(p.intensity for p in points), *(roof.ridge(dtype) for dtype in roof.peaks)] or [1.0]
    rates = [r for p in points for r in (p.rate, p.peer_rate) if r] + [*roof.peaks.values()] or [roof.bandwidth]
    return Frame((min(intensities) / 2, 3 * max(intensities)), (min(rates) / 3, 2 * max(rates)))


def decades(first: float, last: float) -> list[float]:
    """The powers of ten from ``first`` to ``last``."""
    return [10.0**power for power in range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)]


def share(row: Row) -> float | None:
    """Return the share of the nearer limit: the least time that bytes and FLOPs need, over the measured time."""
    return max((s for s in (row.of_copy, row.of_peak) if s is not None), default=None)


def grouped(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each case."""
    return [list(group) for _, group in groupby(rows, key=lambda row: (row.case, row.shape, row.device))]


def fastest(group: Iterable[Row], role: str) -> Row | None:
    timed = (row for row in group if row.role == role and row.min)
    return min(timed, key=lambda row: row.min or 0.0, default=None)
