"""The command line: which cases, for how long, and where the figures go."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from quantlib import backends

from . import (
    call,
    cast,
    chart,
    compute_scale,
    dequant_matmul,
    dequantize,
    fake_quantize,
    machine,
    modules,
    quantize,
    quantize_dynamic,
    report,
    scaled_matmul,
    startup,
)
from .case import OURS, Case, Limits, Row
from .measure import measure
from .targets import verdicts

FAMILIES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module
    for module in (
        *(cast, quantize, quantize_dynamic, dequantize, compute_scale, fake_quantize),
        *(dequant_matmul, scaled_matmul, modules, call, startup),
    )
}
FULL, QUICK = (8192, 4096), (4096, 4096)  # 32 and 16 Mi elements, several times the last cache
SECONDS = {False: 0.4, True: 0.3}  # of timed runs for a contender, by whether the run is quick

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs/benchmarks.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"  # between them PAGE holds the saved run

FAILED, INTERRUPTED = 1, 130  # exit statuses; a missed target is no failure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, save; Ctrl-C keeps what was measured.

    Returns
    -------
    int
        0, 1 where quantlib failed or got a byte wrong, 130 after Ctrl-C.
    """
    args = parser().parse_args(argv)
    try:
        return bench(args)
    except KeyboardInterrupt:
        return INTERRUPTED


def bench(args: argparse.Namespace) -> int:
    """What `main` does with its arguments; a KeyboardInterrupt leaves it only while there is nothing to keep."""
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    about = machine.describe("cpu")
    limits = machine.limits(shape_of(args), "cpu")
    about["copy_gb_per_s"] = (limits.copy or 0.0) / 1e9
    about["peak_tflop_per_s"] = {dtype: rate / 1e12 for dtype, rate in limits.products.items()}
    try:
        run(chosen(args), rows, args.seconds or SECONDS[args.quick], args.without, limits)
        complete = True
    except KeyboardInterrupt:
        complete = False
        print("interrupted; this is what was measured", file=sys.stderr)
    about["load_after"] = machine.load()
    publish(args, about, rows, complete)
    if not complete:
        return INTERRUPTED
    return FAILED if any(row.error for row in rows if row.role == OURS) else 0


def run(cases: Iterable[Case], rows: list[Row], seconds: float, without: Sequence[str], limits: Limits) -> None:
    """Append the rows of every case, with a progress bar where stderr is a terminal."""
    with tqdm(list(cases), disable=None, unit="case", file=sys.stderr) as bar:
        for case in bar:
            measure(case, rows, seconds, without, bar.set_description_str, limits)


def chosen(args: argparse.Namespace) -> list[Case]:
    """The cases of the chosen families."""
    common: dict[str, Any] = {"shape": shape_of(args), "backends": tuple(args.backend)}
    return [case for name in args.family or FAMILIES for case in FAMILIES[name].cases(args.quick, **common)]


def shape_of(args: argparse.Namespace) -> tuple[int, int]:
    return tuple(args.shape) if args.shape else QUICK if args.quick else FULL


def publish(args: argparse.Namespace, about: dict[str, Any], rows: list[Row], complete: bool) -> None:
    """The table and the targets on stdout, and the files that were asked for."""
    print(report.headline(about), report.table(rows), report.target_table(verdicts(rows)), sep="\n\n")
    files = {"json": args.json, "csv": args.csv, "png": args.png}
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        stem = RESULTS / f"cpu-{device}-{about['threads']}-threads"
        files |= {kind: files[kind] or stem.with_suffix(f".{kind}") for kind in ("json", "png")}
        write(PAGE, with_figures(PAGE.read_text(), report.as_markdown(about, rows)))
    if files["json"]:
        write(files["json"], report.as_json(about, rows, complete))
    if files["csv"]:
        write(files["csv"], report.as_csv(rows))
    if files["png"]:
        try:
            chart.draw(about, rows, files["png"])
        except ImportError as error:
            print(f"no chart: {error}", file=sys.stderr)


def with_figures(page: str, figures: str) -> str:
    """``page`` with ``figures`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{figures}{END}{rest.partition(END)[2]}"


def write(path: Path, text: str) -> None:
    """The whole file or nothing."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    top.add_argument("--quick", action="store_true", help="one case a family and half the elements, under two minutes")
    top.add_argument("--family", action="append", choices=FAMILIES, help="only these; may be repeated")
    top.add_argument(
        "--backend",
        action="append",
        default=[],
        choices=backends.BACKENDS,
        help="of quantlib's; may be repeated; by default the one that serves the CPU",
    )
    top.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="PEER",
        help="leave out peers whose name begins so, e.g. torch.compile; may be repeated",
    )
    top.add_argument("--shape", nargs=2, type=size, metavar=("M", "K"), help="of x, 8192 4096 by default")
    top.add_argument("--threads", type=size, metavar="N", help="torch's by default")
    top.add_argument("--seconds", type=float, metavar="S", help="of timed runs for one contender in one case")
    for kind in ("json", "csv", "png"):
        top.add_argument(f"--{kind}", type=destination, metavar="FILE", help=f"write the rows as {kind.upper()}")
    top.add_argument(
        "--save",
        action="store_true",
        help="write JSON and PNG to benchmarks/results and the tables of docs/benchmarks.md",
    )
    return top


def size(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def destination(text: str) -> Path:
    """A file in a folder that is there, so that no measurement is lost at the end."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a file in an existing folder, got {text!r}")
    return path
