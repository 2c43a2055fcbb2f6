"""Time every op on this machine, beside its peers and beside what the machine can do."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType

from quantlib.cli.parser import checked, count, one_of, positive

FAMILIES = (
    "cast",
    "quantize",
    "quantize_dynamic",
    "dequantize",
    "compute_scale",
    "fake_quantize",
    "dequant_matmul",
    "scaled_matmul",
    "grouped_matmul",
    "modules",
    "transformer",
    "call",
    "startup",
)  # each a module of benchmarks/
FILES = {
    "json": "write the rows as JSON, which `compare` reads",
    "csv": "write the rows as CSV",
    "png": "draw quantlib and its fastest peer in every case",
    "roofline": "draw FLOPs a second over FLOPs a byte under what the machine can do, as PNG",
    "html": "write one page that needs nothing else: tables, charts, both drawn inline",
}
RULE = """
A case is slower (faster) where both its minimum and its median grew (shrank) by more than the spreads of the two runs
together, and by more than the tolerance; the spread of a run is the distance between its quartiles as a share of its
median. Exit status 1 where something got slower or lost its time, 0 otherwise, 2 for a file that cannot be read.
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a few cases a family and half the elements: two minutes")
    parser.add_argument(
        "--family",
        action="append",
        default=[],
        type=one_of(FAMILIES),
        metavar="FAMILY",
        help=f"only this; may be repeated: {', '.join(FAMILIES)}",
    )
    parser.add_argument("--device", default="cpu", type=one_of(("cpu", "cuda")), help="where everything runs (cpu)")
    parser.add_argument(
        "--backend",
        action="append",
        default=[],
        help="a backend of quantlib; may be repeated; by default the one that serves the device",
    )
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PEER",
        help="leave out peers whose name begins so, e.g. torch.compile; may be repeated",
    )
    size = checked("an integer >= 1", count)
    parser.add_argument("--shape", nargs=2, type=size, metavar=("M", "K"), help="the size of x, 8192 4096 by default")
    parser.add_argument("--threads", type=size, metavar="N", help="the number of threads, torch's by default")
    parser.add_argument(
        "--seconds",
        type=checked("a number > 0", positive),
        metavar="S",
        help="the most time for one contender in one case: it stops earlier if its spread is small",
    )
    for kind, about in FILES.items():
        parser.add_argument(
            f"--{kind}", type=checked("a file in an existing folder", destination), metavar="FILE", help=about
        )
    parser.add_argument(
        "--save",
        action="store_true",
        help="in a checkout: write JSON and PNGs to benchmarks/results and the tables of docs/benchmarks.md",
    )
    actions = parser.add_subparsers(dest="action", metavar="compare A B")
    about = "Say what changed from one saved run to another, beyond the spread of both."
    compare = actions.add_parser("compare", help=about, description=about, epilog=RULE)
    compare.add_argument("before", metavar="A.json", help="a file that `quantlib bench --json A.json` wrote")
    compare.add_argument("after", metavar="B.json", help="the file of a later run, or of another machine")
    compare.add_argument(
        "--tolerance",
        type=checked("a number >= 0", tolerance),
        default=0.02,
        metavar="SHARE",
        help="the least change that counts, however small the spread (0.02)",
    )
    compare.add_argument("--ours", action="store_true", help="leave out peers and limits: only quantlib's rows")


def run(args: argparse.Namespace) -> int:
    if args.action == "compare":
        status: int = suite("compare").main(args.before, args.after, args.tolerance, args.ours)
    else:
        status = suite("command").main(args)
    return status


def suite(module: str) -> ModuleType:
    """A module of the benchmarks: ``quantlib.benchmarks`` in a wheel, in a checkout the folder beside quantlib."""
    try:
        return importlib.import_module(f"quantlib.benchmarks.{module}")
    except ModuleNotFoundError as error:
        if error.name != "quantlib.benchmarks":
            raise
    checkout = str(Path(__file__).resolve().parents[2])
    if checkout not in sys.path:
        sys.path.insert(0, checkout)
    return importlib.import_module(f"benchmarks.{module}")


def destination(text: str) -> Path:
    """A file in a folder that is there, so that no measurement is lost at the end."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ValueError
    return path


def tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value
