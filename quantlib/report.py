"""What quantizing a model did, layer by layer: a value that prints as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One weight.

    Parameters
    ----------
    name : str
        Of the module, or of the tensor in a file.
    shape : tuple of int
        [N, K]
    spec : str
        What it was projected to.
    bytes_before, bytes_after : int
        Of the weight; after, with scales and zero points.
    snr_db : float
        10 log10 of the sum of squares of the weight over that of its error; infinite when there is no error, NaN
        when there are no values (a meta tensor) or one of them is not finite.
    """

    name: str
    shape: tuple[int, ...]
    spec: str
    bytes_before: int
    bytes_after: int
    snr_db: float


@dataclass(frozen=True)
class Report:
    """Every weight that was quantized, and every candidate that was not, with the reason."""

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # name -> why

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def worst(self) -> LayerReport | None:
        """The layer with the smallest signal-to-noise ratio; NaN, where a value is not finite, is the smallest."""
        return min(self.layers, key=lambda layer: -math.inf if math.isnan(layer.snr_db) else layer.snr_db, default=None)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        rows = [("layer", "shape", "format", "bytes", "to bytes", "SNR dB")]
        rows += [
            (
                layer.name,
                " x ".join(map(str, layer.shape)),
                layer.spec,
                f"{layer.bytes_before:,}",
                f"{layer.bytes_after:,}",
                "-" if math.isnan(layer.snr_db) else f"{layer.snr_db:.1f}",
            )
            for layer in self.layers
        ]
        ratio = f"{self.bytes_before / self.bytes_after:.2f} x smaller" if self.bytes_after else ""
        rows.append((f"{len(self.layers)} layers", "", "", f"{self.bytes_before:,}", f"{self.bytes_after:,}", ratio))
        lines = aligned(rows, left=3)
        if self.skipped:
            lines += ["", *aligned([("skipped", "because"), *self.skipped.items()], left=2)]
        return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines
