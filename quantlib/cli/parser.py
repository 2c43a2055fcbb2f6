"""argparse in the grammar of the library's errors: one line, ``<argument> must be <expected>, got <what came>``."""

from __future__ import annotations

import argparse
import math
import re
import struct
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

CONSTANTS = {"pi": math.pi, "tau": math.tau, "e": math.e}


class Parser(argparse.ArgumentParser):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)
        # Negative numbers for argparse, and not options: -inf, -nan, -pi, -1e-40 and -0x1p-3 too.
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf|nan|(pi|tau|e)$)", re.IGNORECASE)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        found, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:  # said here, by the verb that does not know them, and not by the parser above it
            self.error(f"no such argument: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        line = message.removeprefix("argument ").replace(": must be", " must be", 1)
        choice = re.fullmatch(r"(.+): invalid choice: (.+) \(choose from (.+)\)", line)
        if choice:
            line = f"{choice[1]} must be one of {choice[3].replace(chr(39), '')}, got {choice[2]}"
        self.exit(2, f"{self.prog}: {line} (see {self.prog} --help)\n")


def checked(expected: str, read: Callable[[str], T]) -> Callable[[str], T]:
    """An argparse type: ``read(text)``, whose ValueError becomes "must be <expected>, got <text>"."""

    def convert(text: str) -> T:
        try:
            return read(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r}") from None

    return convert


def one_of(names: Iterable[str]) -> Callable[[str], str]:
    """An argparse type: one of ``names``."""
    names = tuple(names)

    def read(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return checked(" or ".join(filter(None, (", ".join(names[:-1]), names[-1]))), read)


def number(text: str) -> float:
    """The FP64 value of a decimal, a hexadecimal float (0x1.8p1), inf, nan, pi, tau or e.

    Rounded to odd where it is not exact, so that rounding once more, to FP32, rounds the text once.

    Raises
    ------
    ValueError
        For any other text.
    """
    sign, magnitude = (-1.0, text[1:]) if text.startswith("-") else (1.0, text)
    if magnitude in CONSTANTS:
        return sign * CONSTANTS[magnitude]
    if magnitude[:2].lower() == "0x":
        return _hexadecimal(text)
    value = float(text)
    if not math.isfinite(value) or value == 0 or Decimal(value) == (exact := Decimal(text)):
        return value
    last_bit = struct.unpack("<q", struct.pack("<d", value))[0] & 1
    return value if last_bit else math.nextafter(value, math.inf if exact > Decimal(value) else -math.inf)


def positive(text: str) -> float:
    """A finite number above zero."""
    value = number(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def count(text: str) -> int:
    """An integer of at least one."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _hexadecimal(text: str) -> float:
    try:
        return float.fromhex(text)
    except OverflowError:
        return math.inf if not text.startswith("-") else -math.inf
