"""``quantlib bench``: the choice of cases, their time, and the files of the figures."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tqdm import tqdm

from quantlib import backends
from quantlib.cli import bench

from . import chart, machine, page, report
from .case import OURS, Case, Limits, Row
from .measure import measure
from .targets import verdicts

FAMILIES: dict[str, ModuleType] = {name: importlib.import_module(f".{name}", __package__) for name in bench.FAMILIES}
FULL, QUICK = (8192, 4096), (4096, 4096)  # 32 and 16 Mi elements, several times the last cache
SECONDS = {False: 0.8, True: 0.3}  # for a contender that wavers until the end, by whether the run is quick

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results", HERE.parent / "docs/benchmarks.md"
BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"  # between them PAGE holds the saved run

FAILED, INTERRUPTED = 1, 130  # exit statuses; a missed target is no failure


def main(args: argparse.Namespace) -> int:
    """Measure, save, print; Ctrl-C keeps what was measured.

    Parameters
    ----------
    args : Namespace
        The arguments that ``quantlib.cli.bench.arguments`` describes.

    Returns
    -------
    int
        0, 1 where quantlib failed or got a byte wrong, 130 after Ctrl-C.

    Raises
    ------
    ValueError
        For a device or backend that is not here.
    KeyboardInterrupt
        Only while there is nothing to keep.
    """
    refuse(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    rows: list[Row] = []
    shape = shape_of(args.shape, args.quick)
    about = machine.describe(args.device)
    about["noise"] = machine.noise(args.device)
    large = shape_of(None, args.quick)  # of what no cache holds, however small the cases
    limits = machine.limits(large, args.device, args.quick)
    about["copy_gb_per_s"] = (limits.copy or 0.0) / 1e9
    about["read_gb_per_s"] = (limits.read or 0.0) / 1e9
    about["peak_tflop_per_s"] = {dtype: rate / 1e12 for dtype, rate in limits.products.items()}
    cases = chosen(args.quick, args.family, shape, args.device, args.backend)
    try:
        run(cases, rows, args.seconds or SECONDS[args.quick], args.without, limits)
        complete = True
    except KeyboardInterrupt:
        complete = False
        print("interrupted; this is what was measured", file=sys.stderr)
    about["load_after"] = machine.load()
    if args.device == "cuda":
        about["gpu_after"] = machine.gpu_state()
    publish(args, about, rows, complete)
    if not complete:
        return INTERRUPTED
    return FAILED if any(row.error for row in rows if row.role == OURS) else 0


def refuse(args: argparse.Namespace) -> None:
    """Raise ValueError for options that do not suit this machine."""
    if args.device == "cuda" and not torch.cuda.is_available():
        why = "no GPU is found" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
        raise ValueError(f"--device must be a device of this machine, got 'cuda': {why}")
    for name in args.backend:
        if name not in backends.BACKENDS:
            raise ValueError(f"--backend must be one of {', '.join(backends.BACKENDS)}, got {name!r}")
    if args.save and not PAGE.exists():
        raise ValueError(f"--save must be in a checkout, got {HERE}")


def run(cases: Iterable[Case], rows: list[Row], seconds: float, without: Sequence[str], limits: Limits) -> None:
    """Append the rows of every case, with a progress bar where stderr is a terminal."""
    with tqdm(list(cases), disable=None, unit="case", file=sys.stderr) as bar:
        for case in bar:
            measure(case, rows, seconds, without, bar.set_description_str, limits)


def chosen(
    quick: bool,
    families: Sequence[str] = (),
    shape: tuple[int, int] | None = None,
    device: str = "cpu",
    backends: Sequence[str] = (),
) -> list[Case]:
    """The cases of the chosen families; of all by default."""
    common: dict[str, Any] = {"shape": shape or shape_of(None, quick), "device": device, "backends": tuple(backends)}
    return [case for name in families or FAMILIES for case in FAMILIES[name].cases(quick, **common)]


def shape_of(given: Sequence[int] | None, quick: bool) -> tuple[int, int]:
    M, K = given or (QUICK if quick else FULL)
    return M, K


def publish(args: argparse.Namespace, about: dict[str, Any], rows: list[Row], complete: bool) -> None:
    """The files that were asked for; the table, the bars and the targets on stdout."""
    files: dict[str, Path | None] = {kind: getattr(args, kind) for kind in bench.FILES}
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        device = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        stem = RESULTS / (f"cpu-{device}-{about['threads']}-threads" if args.device == "cpu" else f"gpu-{device}")
        saved = {"json": ".json", "png": ".png", "roofline": "-roofline.png"}
        files |= {kind: files[kind] or stem.with_name(stem.name + end) for kind, end in saved.items()}
        write(PAGE, with_figures(PAGE.read_text(), report.as_markdown(about, rows)))
    texts = {
        "json": lambda: report.as_json(about, rows, complete),
        "csv": lambda: report.as_csv(rows),
        "html": lambda: page.as_html(about, rows, complete),
    }
    for kind, text in texts.items():
        if path := files[kind]:
            write(path, text())
    try:
        if path := files["png"]:
            chart.draw(about, rows, path)
        if path := files["roofline"]:
            chart.draw_roofline(about, rows, path)
    except ImportError as error:
        print(f"no chart: {error}", file=sys.stderr)
    tables = (
        report.table(rows),
        report.line_table(rows),
        report.bars(rows),
        report.target_table(verdicts(rows, about)),
    )
    print("\n\n".join(filter(None, (report.headline(about), *tables))))


def with_figures(page: str, figures: str) -> str:
    """Return ``page`` with ``figures`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{figures}{END}{rest.partition(END)[2]}"


def write(path: Path, text: str) -> None:
    """The whole file or nothing."""
    new = path.with_name(f"{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
