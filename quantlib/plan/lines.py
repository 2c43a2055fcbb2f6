"""The lines of a plan: a quantity and its formula each, in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Line:
    """One quantity.

    Attributes
    ----------
    name : str
    value : float
        In ``unit``; whole numbers are int.
    unit : str
        "bytes", "parameters", "tokens", "FLOP", "FLOP/s", "petaflop/s-days", "days", "tokens/s" or "" for a ratio.
    formula : str
        How the value follows from the model, with the assumptions in it.
    parts : mapping of str to float
        The terms of the value, in its unit; empty if it is not a sum.
    """

    name: str
    value: float
    unit: str
    formula: str
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """Lines about one subject."""

    title: str
    lines: Sequence[Line]

    def __getitem__(self, name: str) -> Line:
        """The line of this name.

        Raises
        ------
        KeyError
            Where there is none, with the names that there are.
        """
        for line in self.lines:
            if line.name == name:
                return line
        raise KeyError(f"{name!r}: {self.title} has {', '.join(line.name for line in self.lines)}")


@dataclass(frozen=True)
class Plan:
    """The needs of a model, as `quantlib.plan.plan` found them; prints as a table.

    Attributes
    ----------
    title : str
    options : dict
        The options of the plan.
    sections : list of Section
    fits : list of str
        The verdict, one sentence a line; empty where no device was named.
    missing : list of str
        The parts that could not be planned, with the reason.
    """

    title: str
    options: dict[str, Any]
    sections: Sequence[Section]
    fits: Sequence[str] = ()
    missing: Sequence[str] = ()

    def __getitem__(self, title: str) -> Section:
        """The section of this title.

        Raises
        ------
        KeyError
            Where there is none, with the titles that there are.
        """
        for section in self.sections:
            if section.title == title:
                return section
        raise KeyError(f"{title!r}: the plan has {', '.join(section.title for section in self.sections)}")

    def __contains__(self, title: object) -> bool:
        return any(section.title == title for section in self.sections)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return {
            "title": self.title,
            "options": self.options,
            "sections": [
                {"title": s.title, "lines": [vars(line) | {"parts": dict(line.parts)} for line in s.lines]}
                for s in self.sections
            ],
            "fits": list(self.fits),
            "missing": list(self.missing),
        }

    def text(self, explain: bool = False) -> str:
        """The table; with ``explain`` the formula of every line below it."""
        width = max((len(line.name) for s in self.sections for line in s.lines), default=0)
        values = max((len(amount(line.value, line.unit)) for s in self.sections for line in s.lines), default=0)
        out = [self.title]
        for section in self.sections:
            out += ["", section.title]
            for line in section.lines:
                parts = ", ".join(f"{name} {amount(v, line.unit)}" for name, v in line.parts.items() if v)
                out.append(f"  {line.name:<{width}}  {amount(line.value, line.unit):>{values}}  {parts}".rstrip())
                if explain:
                    out.append(f"  {'':<{width}}    = {line.formula}")
        if self.fits:
            out += ["", *self.fits]
        if self.missing:
            out += ["", *(f"not planned: {why}" for why in self.missing)]
        return "\n".join(out)

    def __str__(self) -> str:
        return self.text()


SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SYMBOLS = {"bytes": "B", "parameters": "", "tokens": "tokens", "FLOP": "FLOP", "FLOP/s": "FLOP/s"}


def amount(value: float, unit: str) -> str:
    """A value for a reader: 4.000 GB, 8.03 G, 64; ``G`` is 10^9."""
    if unit == "":
        return f"{value:.3g}"
    if unit not in SYMBOLS:
        return f"{value:,.4g} {unit}" if value < 1e6 else f"{value:.3e} {unit}"
    if unit == "FLOP" and value >= 1e18:
        return f"{value:.3e} FLOP"
    size, prefix = next(((size, prefix) for size, prefix in SCALES if abs(value) >= size), (1.0, ""))
    digits = f"{value / size:.3f}" if size > 1 else f"{value:g}"
    space = " " if unit == "tokens" and prefix else ""
    return f"{digits} {prefix}{space}{SYMBOLS[unit]}".rstrip()
