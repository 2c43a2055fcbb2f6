"""Aligned columns, and colour where the reader is a terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import TextIO

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


def coloured(stream: TextIO | None = None) -> bool:
    """True if ``stream`` (stdout by default) is a terminal that wants colour: see https://no-color.org."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def style(text: str, name: str) -> str:
    """``text`` in a style of ``STYLES`` on a terminal, as it is elsewhere."""
    return f"\x1b[{STYLES[name]}m{text}\x1b[0m" if text and coloured() else text


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns two spaces apart; ``align`` has an ``<`` or ``>`` for each."""
    lines = [[style(title, "dim") for title in header], *rows]
    widths = [max(_width(line[k]) for line in lines) for k in range(len(header))]
    return "\n".join(
        "  ".join(_pad(cell, width, side) for cell, width, side in zip(line, widths, align, strict=True)).rstrip()
        for line in lines
    )


def _width(cell: str) -> int:
    return len(ESCAPES.sub("", cell))


def _pad(cell: str, width: int, side: str) -> str:
    blank = " " * (width - _width(cell))
    return blank + cell if side == ">" else cell + blank
