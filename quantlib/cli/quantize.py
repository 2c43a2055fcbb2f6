"""Quantize the weights of a model on disk: a folder with safetensors files, or one such file."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from quantlib.cli.parser import checked
from quantlib.cli.progress import Progress
from quantlib.spec import GRAMMAR, QuantSpec, checked_per

PER = "tensor, row, group:N or tile:N with N >= 1"
POLICIES = ("raise", "propagate")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", metavar="IN", help="a model folder or a .safetensors file")
    parser.add_argument("output", metavar="OUT", help="the output, of the same kind; it appears complete or not at all")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=f"{GRAMMAR}")
    parser.add_argument("--per", type=checked(PER, checked_per), help=f"the weights that share a scale: {PER}")
    parser.add_argument("--affine", action="store_true", help="give integers a zero point")
    parser.add_argument(
        "--on-nonfinite",
        choices=POLICIES,
        default="raise",
        help="name the first weight that is infinite or NaN and stop (raise), or carry it through (propagate)",
    )
    parser.add_argument(
        "--exclude",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave the tensors whose name matches, such as 'model.layers.0.*'; may be repeated",
    )
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="PATTERN",
        help="quantize matrices whose name matches, though they stay floats by default, such as 'lm_head*'",
    )
    parser.add_argument("--force", action="store_true", help="replace the model at OUT if there is one")
    stopping(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def stopping(parser: argparse.ArgumentParser) -> None:
    """Add the options of work that takes long."""
    parser.add_argument("--no-resume", action="store_true", help="start again instead of continuing an earlier run")
    parser.add_argument(
        "--join",
        action="store_true",
        help="share the work, file by file, with other processes of the same command; torchrun's do so by themselves",
    )


def check_paths(args: argparse.Namespace) -> None:
    """Refuse an IN that does not exist, and an OUT that exists, before anything else is imported."""
    if not os.path.exists(args.input):
        raise FileNotFoundError(f"IN must be a safetensors file or a model folder, got {args.input!r}, not there")
    if os.path.lexists(args.output) and not args.force:
        raise FileExistsError(f"OUT must not be there yet, or --force be given, got {args.output!r}")


def run(args: argparse.Namespace) -> int:
    spec = read_spec(args.to, args.per, args.affine)
    check_paths(args)

    from quantlib import checkpoint

    with Progress() as progress, ranks() as join:
        report = checkpoint.quantize_file(
            args.input,
            args.output,
            spec,
            exclude=args.exclude,
            include=args.include,
            on_nonfinite=args.on_nonfinite,
            overwrite=args.force,
            resume=not args.no_resume,
            join=args.join or join,
            progress=progress,
        )
    before, after = size(args.input), size(args.output)
    if args.json:
        told = {"input": args.input, "output": args.output, "spec": str(spec)}
        print(json.dumps(finite({**told, "bytes_before": before, "bytes_after": after, **report.as_dict()}), indent=2))
    else:
        print(f"{report}\n\n{args.output}: {after:,} bytes, {before / after:.2f} x smaller than {args.input}")
    return 0


@contextlib.contextmanager
def ranks() -> Iterator[bool]:
    """Yield True if torchrun started this process beside others; all of them then begin together."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        yield False
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        yield True
    finally:
        dist.destroy_process_group()


def read_spec(to: str, per: str | None, affine: bool) -> QuantSpec:
    """The spec of --to, --per and --affine."""
    text = ":".join(word for word in (to, per, "affine" if affine else None) if word)
    try:
        return QuantSpec.parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("spec must", "--to must", 1)) from None


def size(path: str) -> int:
    """Bytes of the safetensors files of a model."""
    from quantlib.checkpoint.folder import Model

    with Model.open(Path(path)) as model:
        return sum(reader.path.stat().st_size for reader in model.readers)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None stands for them."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
