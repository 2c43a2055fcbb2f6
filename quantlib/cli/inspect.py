"""Show what is in a checkpoint of any origin: format, scales, codes and values of every tensor."""

from __future__ import annotations

import argparse
import json

from quantlib.cli import page
from quantlib.cli.progress import Progress
from quantlib.cli.quantize import finite
from quantlib.cli.text import table


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="FOLDER", help="a model folder or a .safetensors file")
    files(parser)


def files(parser: argparse.ArgumentParser) -> None:
    """Add the options of output files."""
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="tensors whose name matches")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, with the histograms")
    for kind in ("csv", "html", "png"):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write the table as {kind.upper()}")


def run(args: argparse.Namespace) -> int:
    from quantlib.checkpoint.look import inspect_checkpoint

    with Progress() as progress:
        found = inspect_checkpoint(args.input, only=args.only, progress=progress)
    rows = [report.as_dict() for report in found]
    if args.csv:
        page.write_csv(args.csv, rows)
    if args.html:
        page.write_html(args.html, args.input, rows)
    if args.png:
        label = "share of codes that are the lowest or the highest"
        page.write_png(args.png, args.input, [r.name for r in found], [r.clipped or 0.0 for r in found], label)
    if args.json:
        print(json.dumps(finite({"input": args.input, "tensors": rows}), indent=2))
        return 0
    header = ("tensor", "shape", "format", "bytes", "scale", "codes used", "clipped", "zeroed", "non-finite")
    lines = [
        (
            r.name,
            " x ".join(map(str, r.shape)),
            r.format,
            f"{r.bytes:,}",
            "-" if r.scale_min is None else f"{r.scale_min:.3g}..{r.scale_max:.3g}",
            "-" if r.codes_used is None else f"{r.codes_used} of {r.codes}",
            "-" if r.clipped is None else f"{r.clipped:.2%}",
            f"{r.zeroed:.2%}",
            f"{r.nonfinite:,}",
        )
        for r in found
    ]
    print(table(header, lines, "<<<>>>>>>"))
    print(f"\n{args.input}: {len(found):,} tensors, {sum(r.bytes for r in found):,} bytes")
    return 0
