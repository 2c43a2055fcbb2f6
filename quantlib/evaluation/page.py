"""The rows of `quantlib eval` as text, as Markdown, as JSON and as a picture of loss over bits."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quantlib.evaluation.scores import Estimate, Scores
from quantlib.report import aligned

BEGIN, END = "<!-- quantlib eval {}: written by `make accuracy` -->", "<!-- end of {} -->"


@dataclass(frozen=True)
class Row:
    """A model and how far it is from the float model: ``scores`` of a language model, ``loss`` of an encoder."""

    name: str
    peer: bool
    bits: float  # a weight of the layers that are quantized; 32 of the float model
    scores: Scores | None = None
    loss: Estimate | None = None  # 1 - cosine of embeddings
    why: str = ""  # there are no numbers

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """A header and a line a row."""
    texts = next((list(row.scores.parts) for row in rows if row.scores), [])
    language = any(row.scores for row in rows)
    header = ["", "bits"]
    header += ["perplexity", "KL", *(f"KL, {text}" for text in texts), "top-1"] if language else ["1 - cosine"]
    lines = [header]
    for row in rows:
        if row.scores is not None:
            s = row.scores
            parts = [number(s.parts[text].kl) if text in s.parts else "" for text in texts]
            found = [told(s.perplexity, ".2f"), number(s.kl), *parts, told(s.top1, ".1%")]
        elif row.loss is not None:
            found = [number(row.loss)]
        else:
            found = ["-"] * (len(header) - 2)
        lines.append([row.name, f"{row.bits:.2f}" if row.bits else "-", *found])
    return lines


def number(value: Estimate) -> str:
    return told(value, ".4f")


def told(value: Estimate, form: str) -> str:
    """The mean, and the standard error where there is one."""
    return f"{value.mean:{form}}" + (f" ± {value.error:{form}}" if math.isfinite(value.error) else "")


def table(rows: Sequence[Row]) -> list[str]:
    """Return lines of text; rows without numbers follow with the reason."""
    return [*aligned(cells(rows), left=1), *(f"{row.name}: {row.why}" for row in rows if row.why)]


def markdown(rows: Sequence[Row]) -> list[str]:
    header, *lines = cells([row for row in rows if not row.why])
    ruler = ["---", *("--:" for _ in header[1:])]
    return ["| " + " | ".join(line) + " |" for line in (header, ruler, *lines)]


def put(path: Path, key: str, lines: Sequence[str]) -> None:
    """Replace the lines between the two marks of ``key`` in a file by ``lines``.

    Raises
    ------
    ValueError
        For a file without the marks.
    """
    begin, end, text = BEGIN.format(key), END.format(key), path.read_text(encoding="utf-8")
    found = re.search(re.escape(begin) + r"\n.*?" + re.escape(end), text, re.DOTALL)
    if found is None:
        raise ValueError(f"--markdown must be a file with the lines {begin!r} and {end!r}, got {str(path)!r}")
    new = "\n".join([begin, "", *lines, "", end])
    path.write_text(text[: found.start()] + new + text[found.end() :], encoding="utf-8")


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Loss over bits a weight, on a logarithmic axis: KL, or 1 - cosine.

    Raises
    ------
    ImportError
        Where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("--png needs matplotlib, which is not installed") from None
    found = [(row, row.scores.kl if row.scores else row.loss) for row in rows]
    points = [(row, loss) for row, loss in found if loss is not None and loss.mean > 0]
    ink, colours = "#1f2933", {False: "#2458b8", True: "#c07a1a"}
    figure = Figure(figsize=(11, 0.24 * len(points) + 1.6), dpi=140, layout="constrained")
    axes = figure.subplots()
    ordered = sorted(points, key=lambda point: -point[1].mean)
    for y, (row, loss) in enumerate(ordered):
        axes.plot([loss.mean], [y], "D" if row.peer else "o", color=colours[row.peer], markersize=5)
        if math.isfinite(loss.error):
            low = max(loss.mean - loss.error, loss.mean / 10)
            axes.plot([low, loss.mean + loss.error], [y, y], color=colours[row.peer], linewidth=1.4)
    axes.set_yticks(range(len(ordered)), [f"{row.name}   {row.bits:.2f} bits" for row, _ in ordered], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("KL(float || quantized) of the next token, nats" if rows[-1].loss is None else "1 - cosine")
    figure.suptitle(title, x=0.01, ha="left", fontsize=10.5, color=ink)  # wider than the axes
    axes.grid(axis="x", which="both", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    for label, (row, _) in zip(axes.get_yticklabels(), ordered, strict=True):
        label.set_color(colours[row.peer])
    figure.savefig(path)
