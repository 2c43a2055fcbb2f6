"""The report of quantizing a model, layer by layer: a value that prints as a table."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

ENOUGH = 0.9  # of the parameters: below, a report warns


@dataclass(frozen=True)
class LayerReport:
    """One weight.

    Parameters
    ----------
    name : str
        The name of the module, or of the tensor in a file.
    shape : tuple of int
        [N, K]
    spec : str
        The spec of its codes.
    bytes_before, bytes_after : int
        The size of the weight; after, with scales and zero points.
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

    @classmethod
    def of(cls, name: str, x: Tensor, spec: str, parts: Iterable[Tensor | None], snr_db: float) -> LayerReport:
        """The report of x, which became ``parts``: codes, scales, zero points."""
        after = sum(t.nbytes for t in parts if t is not None)
        return cls(name, tuple(x.shape), spec, x.nbytes, after, snr_db)


@dataclass
class Report:
    """Every weight that was quantized, and everything that stays a float, with the reason.

    Attributes
    ----------
    layers : list of LayerReport
        The layers that were quantized.
    skipped : dict
        Name of a layer, or of a parameter of two or more axes, that was not -> why.
    sizes : dict
        The same names -> how many float parameters they hold.
    quantized, floats : int
        Parameters of the whole model that are quantized now, whenever that was, and those that are not: with biases,
        norms and whatever else has one axis. Shared parameters count once.
    float_bytes : int
        Bytes of the parameters that are not quantized.
    notes : list of str
        Further remarks, such as parts of another library's model that could not be held exactly.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    quantized: int = 0
    floats: int = 0
    float_bytes: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    @property
    def coverage(self) -> float:
        """The share of all parameters that are quantized, 0 to 1; NaN for a model without parameters."""
        total = self.quantized + self.floats
        return self.quantized / total if total else math.nan

    @property
    def worst(self) -> LayerReport | None:
        """The layer with the smallest signal-to-noise ratio; NaN, where a value is not finite, is the smallest."""
        return min(self.layers, key=lambda layer: -math.inf if math.isnan(layer.snr_db) else layer.snr_db, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self) | {"coverage": self.coverage}

    @property
    def warning(self) -> str | None:
        """Return a warning if less than `ENOUGH` of the parameters are quantized, so that the sizes are not misread."""
        if not self.coverage < ENOUGH:
            return None
        largest = sorted(self.sizes, key=lambda name: self.sizes[name], reverse=True)[:3]
        named = "; ".join(f"{name} ({self.sizes[name]:,}): {self.skipped[name]}" for name in largest)
        return f"only {self.coverage:.1%} of the parameters are quantized, the rest stay floats: {named or 'vectors'}"

    def warn(self) -> None:
        """Log `warning`, if there is one."""
        if self.warning:
            log.warning("%s", self.warning)

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
        rows.append(total_row(f"{len(self.layers)} layers", self.bytes_before, self.bytes_after))
        if self.floats:
            rest = self.float_bytes
            rows.append(total_row("with the floats", self.bytes_before + rest, self.bytes_after + rest))
        lines = aligned(rows, left=3)
        if self.skipped:
            sizes = {name: f"{self.sizes[name]:,}" if name in self.sizes else "-" for name in self.skipped}
            skipped = [(name, sizes[name], why) for name, why in self.skipped.items()]
            lines += ["", *aligned([("not quantized", "parameters", "because"), *skipped], left=3)]
        if self.quantized + self.floats:
            total = self.quantized + self.floats
            lines += ["", f"{self.coverage:.1%} of {total:,} parameters are quantized"]
        lines += [f"note: {note}" for note in self.notes]
        if self.warning:
            lines += [f"warning: {self.warning}"]
        return "\n".join(lines)


def total_row(what: str, before: int, after: int) -> tuple[str, str, str, str, str, str]:
    """The last rows of the table: bytes, and how much smaller they became."""
    ratio = f"{before / after:.2f} x smaller" if after else ""
    return what, "", "", f"{before:,}", f"{after:,}", ratio


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table: the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (f"{c:<{w}}" if i < left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines


@contextlib.contextmanager
def unwarned() -> Iterator[None]:
    """Keep every report that is made inside the block from logging its warning."""
    log.addFilter(_silent)
    try:
        yield
    finally:
        log.removeFilter(_silent)


def _silent(record: logging.LogRecord) -> bool:
    return False
