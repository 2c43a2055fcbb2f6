"""Show values as sign, exponent and fraction in every format, with what is stored and the error.

code = encode(x / s), stored = decode(code) * s, error = stored - value as it was written
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from quantlib import formats
from quantlib.cli.parser import checked, number, positive
from quantlib.cli.text import style, table
from quantlib.formats import FLOAT32, FloatFormat, Format
from quantlib.reference import numerics

VALUE = "a number, inf, nan, pi, tau, e or the 0x and 8 digits of an FP32 code"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("values", nargs="+", metavar="VALUE", type=checked(VALUE, read), help=VALUE)
    parser.add_argument(
        "--scale",
        type=checked("a finite number > 0", positive),
        metavar="S",
        help="project x / S on every format; without it floats are cast and integers have S = 1",
    )
    parser.add_argument(
        "--saturate",
        action=argparse.BooleanOptionalAction,
        help="saturate: a value that is too large becomes the largest finite one; the default up to 8 bits",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    if args.scale is not None and args.saturate is False:
        raise ValueError("--no-saturate must be without --scale, which always saturates, got both")
    rows = [[store(v.number, f, args.scale, args.saturate) for f in formats.FORMATS.values()] for v in args.values]
    shown = list(zip(args.values, rows, strict=True))
    if args.json:
        print(json.dumps([{"input": v.text, "formats": [s.as_json(v) for s in row]} for v, row in shown], indent=2))
    else:
        print("\n\n".join(show(v, row) for v, row in shown))
    return 0


@dataclass(frozen=True)
class Value:
    """A value to show: its text, and its FP64 value, which rounds to FP32 as the text does."""

    text: str
    number: float


@dataclass(frozen=True)
class Stored:
    """One value in one format."""

    format: Format
    scale: float
    code: int
    value: float

    @property
    def fields(self) -> tuple[str, str, str]:
        """The binary digits of sign, exponent and fraction; an integer has no exponent, an unsigned one no sign.

        The code of a code book is all of it.
        """
        f, digits = self.format, f"{self.code:0{self.format.bits}b}"
        if isinstance(f, FloatFormat) and f.is_book:
            return "", "", digits
        sign = 1 if f.signed else 0
        return digits[:sign], digits[sign : sign + f.exponent_bits], digits[sign + f.exponent_bits :]

    @property
    def hexadecimal(self) -> str:
        return f"0x{self.code:0{(self.format.bits + 3) // 4}X}"

    def error(self, value: float) -> float:
        return 0.0 if self.value == value else self.value - value

    def relative_error(self, value: float) -> float:
        error = abs(self.error(value))
        return error / abs(value) if value and error else error

    def as_json(self, v: Value) -> dict[str, Any]:
        sign, exponent, fraction = self.fields
        return {
            "format": self.format.name,
            "scale": self.scale,
            "sign": sign,
            "exponent": exponent,
            "fraction": fraction,
            "code": self.hexadecimal,
            "value": str(Decimal(self.value)) if math.isfinite(self.value) else f"{self.value}",
            "error": finite(self.error(v.number)),
            "relative_error": finite(self.relative_error(v.number)),
            "bytes": self.format.bytes_per_element,
        }


def read(text: str) -> Value:
    """The value of an argument; 0x and eight digits are the bits of an FP32 value."""
    if re.fullmatch("0x[0-9a-f]{8}", text, re.IGNORECASE):
        return Value(text, float(np.array(int(text, 16), np.uint32).view(np.float32)))
    if re.fullmatch("[+-]?0x[0-9a-f]*", text, re.IGNORECASE):
        raise ValueError  # other than eight digits: a code of which format?
    return Value(text, number(text))


def store(value: float, f: Format, scale: float | None, saturate: bool | None) -> Stored:
    """``value`` rounded to FP32, and from there to ``f``."""
    with np.errstate(all="ignore"):
        x = np.array(value).astype(np.float32)
        if f is FLOAT32:
            code = numerics.encode_float(x, f)
            return Stored(f, 1.0, int(code), float(numerics.decode_float(code, f)))
        s = numerics.effective_scale(np.array(1 if scale is None else scale, np.float32), f)
        t = numerics.project(x, s)
        if isinstance(f, FloatFormat):
            code = numerics.encode_float(t, f, saturate if scale is None else True)
            stored = numerics.canonical(numerics.decode_float(code, f) * s)
        else:
            code = numerics.encode_int(t, np.int32(0), f, affine=False)
            stored = numerics.decode_int(code, s, np.int32(0), f, affine=False)
    return Stored(f, float(s), int(code) & ((1 << f.bits) - 1), float(stored))


def show(v: Value, row: list[Stored]) -> str:
    header = ("format", "sign exponent fraction", "code", "stored value", "error", "relative", "bytes")
    return style(v.text, "bold") + "\n" + table(header, [cells(s, v.number) for s in row], "<<<<>>>")


def cells(s: Stored, value: float) -> list[str]:
    f = s.format
    scaled = not f.is_float or s.scale != 1
    colours = zip(s.fields, ("red", "green", "cyan"), strict=True)
    return [
        f"{f.name} (s={s.scale:.9g})" if scaled else f.name,
        " ".join(style(digits, colour) for digits, colour in colours if digits),
        s.hexadecimal,
        decimal(s.value, whole=not f.is_float and s.value.is_integer()),
        short(s.error(value)),
        short(s.relative_error(value)),
        f"{f.bytes_per_element:g}",
    ]


def decimal(value: float, whole: bool = False) -> str:
    """All the digits of ``value`` up to 17, a longer one to 21; ``whole`` leaves out the ".0" of an integer."""
    if not math.isfinite(value):
        return f"{value}"
    exact = Decimal(value)
    digits, exponent = len(exact.normalize().as_tuple().digits), exact.adjusted()
    digits = digits if digits <= 17 else 21
    if not -6 <= exponent < 21:
        return f"{exact:.{digits - 1}e}"
    return f"{exact:.{max(digits - 1 - exponent, 0 if whole else 1)}f}"


def short(error: float) -> str:
    return "-" if math.isnan(error) else "0" if error == 0 else f"{error:.2e}"


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
