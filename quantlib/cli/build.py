"""Compile the C++ kernels, and the CUDA kernels with --cuda, where they are not there yet, and say where they lie."""

from __future__ import annotations

import argparse
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda", action="store_true", help="compile the CUDA kernels too; needs nvcc, no GPU")


def run(args: argparse.Namespace) -> int:
    from quantlib import _build

    for name in ("cpu", "cuda") if args.cuda else ("cpu",):
        try:
            print(f"{name}: {_build.find_or_build(name)}", flush=True)
        except _build.BuildError as error:
            print(error.log, end="", file=sys.stderr)
            raise
    return 0
