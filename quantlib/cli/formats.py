"""List the formats: bits of sign, exponent and fraction, bytes, range, smallest values, infinity and NaN."""

from __future__ import annotations

import argparse
import json
from typing import Any

from quantlib import formats
from quantlib.cli.text import table
from quantlib.formats import FloatFormat, Format

HEADER = ("format", "bits", "sign", "exponent", "fraction", "bytes", "range", "normal from", "subnormal from")
SPECIAL = ("infinity", "NaN", "too large")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    rows = [describe(f) for f in formats.FORMATS.values()]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        print(table(HEADER + SPECIAL, [cells(row) for row in rows], "<>>>>>>>><<<"))
    return 0


def describe(f: Format) -> dict[str, Any]:
    """A row of the table with what follows from it; None where the format has no such thing."""
    row: dict[str, Any] = {
        "format": f.name,
        "bits": f.bits,
        "sign": int(f.signed),
        "exponent": f.exponent_bits,
        "fraction": f.bits - f.signed - f.exponent_bits,
        "bytes": f.bytes_per_element,
    }
    if isinstance(f, FloatFormat):
        if f.is_book:
            row |= {"sign": None, "exponent": None, "fraction": None, "values": list(f.values)}
        return row | {
            "range": [-f.max, f.max],
            "smallest_normal": None if f.is_book else 2.0 ** (1 - f.bias),
            "smallest_subnormal": None if f.is_book else f.smallest,
            "infinity": f.has_inf,
            "nan": f.has_nan,
            "saturates": f.saturates,
        }
    return row | {
        "range": list(f.range(affine=False)),
        "affine_range": list(f.range(affine=True)),
        "smallest_normal": None,
        "smallest_subnormal": None,
        "infinity": False,
        "nan": False,
        "saturates": True,
    }


def cells(row: dict[str, Any]) -> list[str]:
    if "affine_range" in row:
        span, affine = (f"{low}..{high}" for low, high in (row["range"], row["affine_range"]))
        span += "" if span == affine else f" (affine {affine})"
    else:
        span = f"+-{row['range'][1]:.8g}"
    return [
        row["format"],
        str(row["bits"]),
        "-" if row["sign"] is None else str(row["sign"]),
        str(row["exponent"] or "-"),
        "-" if row["fraction"] is None else str(row["fraction"]),
        f"{row['bytes']:g}",
        span,
        *(f"{v:.8g}" if v else "-" for v in (row["smallest_normal"], row["smallest_subnormal"])),
        *("yes" if row[special] else "no" for special in ("infinity", "nan")),
        "saturates" if row["saturates"] else "infinity",
    ]
