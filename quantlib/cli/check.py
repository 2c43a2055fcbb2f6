"""Verify a checkpoint: its files against their checksums, its tensors against what it says of them."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from quantlib.cli.progress import Progress


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="FOLDER", help="a model folder or a .safetensors file")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    from quantlib.checkpoint.manifest import check_checkpoint

    with Progress() as progress:
        check = check_checkpoint(args.input, progress=progress)
    if args.json:
        print(json.dumps({"input": args.input, "whole": not check.problems, **asdict(check)}, indent=2))
    else:
        for line in check.problems:
            print(f"wrong: {line}")
        for line in check.notes:
            print(f"note: {line}")
        state = f"{len(check.problems)} problems" if check.problems else "whole"
        print(
            f"{args.input}: {state}; {check.files} files by their checksums, {check.tensors} tensors, "
            f"{check.weights} of them quantized by quantlib"
        )
    return 1 if check.problems else 0
