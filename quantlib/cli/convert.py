"""Convert a quantized model on disk: from other libraries' formats, to quantlib's, compressed-tensors or floats."""

from __future__ import annotations

import argparse
import json

from quantlib.cli.progress import Progress
from quantlib.cli.quantize import check_paths, finite, ranks, size, stopping


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="a model folder or a .safetensors file that is quantized")
    parser.add_argument("output", metavar="OUT", help="the output, of the same kind; it appears complete or not at all")
    parser.add_argument(
        "--to",
        default="quantlib",
        metavar="FORMAT",
        help="quantlib (default) or compressed-tensors, which keep codes and scales where they can; float32, "
        "float16 or bfloat16; or a spec such as W8A16, which quantizes the values anew",
    )
    parser.add_argument("--force", action="store_true", help="replace the model at OUT if there is one")
    stopping(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    check_paths(args)

    from quantlib import checkpoint

    with Progress() as progress, ranks() as join:
        report = checkpoint.convert_file(
            args.input,
            args.output,
            args.to,
            overwrite=args.force,
            resume=not args.no_resume,
            join=args.join or join,
            progress=progress,
        )
    before, after = size(args.input), size(args.output)
    if args.json:
        told = {"input": args.input, "output": args.output, "to": args.to}
        print(json.dumps(finite({**told, "bytes_before": before, "bytes_after": after, **report.as_dict()}), indent=2))
    else:
        print(f"{report}\n\n{args.output}: {after:,} bytes, {args.input}: {before:,}")
    return 0
