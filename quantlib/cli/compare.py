"""Measure how far the weights of two checkpoints of any origin are apart, tensor by tensor."""

from __future__ import annotations

import argparse
import json
import math

from quantlib.cli import page
from quantlib.cli.inspect import files
from quantlib.cli.parser import checked
from quantlib.cli.progress import Progress
from quantlib.cli.quantize import finite
from quantlib.cli.text import table


def tolerance(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="a model folder or a .safetensors file: the reference")
    parser.add_argument("b", metavar="B", help="another one, of any format")
    parser.add_argument(
        "--inputs",
        metavar="FILE",
        help="a .safetensors file with inputs [..., K] under names of layers, or input_ids [B, T] for the KL of tokens",
    )
    parser.add_argument(
        "--tolerance",
        type=checked("a number >= 0", tolerance),
        metavar="R",
        help="exit with 1 if the norm of A - B is more than R times that of A, or only one of them has a tensor",
    )
    files(parser)


def run(args: argparse.Namespace) -> int:
    from quantlib.checkpoint.look import compare_checkpoints

    with Progress() as progress:
        found = compare_checkpoints(args.a, args.b, inputs=args.inputs, only=args.only, progress=progress)
    rows = [difference.as_dict() for difference in found.tensors]
    beyond = [] if args.tolerance is None else found.exceeds(args.tolerance)
    lone = [f"only in A: {name}" for name in found.only_a] + [f"only in B: {name}" for name in found.only_b]
    title = f"{args.a} and {args.b}"
    if args.csv:
        page.write_csv(args.csv, rows)
    if args.html:
        page.write_html(args.html, title, rows, [*lone, *found.misfits])
    if args.png:
        ratios = [d.sqnr_db for d in found.tensors]
        page.write_png(args.png, title, [d.name for d in found.tensors], ratios, "SQNR dB; none where equal")
    if args.json:
        print(json.dumps(finite({"a": args.a, "b": args.b, "exceeds": beyond, **found.as_dict()}), indent=2))
        return 1 if beyond else 0
    header = ("tensor", "shape", "A", "B", "SQNR dB", "cosine", "relative", "largest", "ulp", "output dB")
    lines = [
        (
            d.name,
            " x ".join(map(str, d.shape)),
            *d.formats,
            f"{d.sqnr_db:.1f}",
            f"{d.cosine:.6f}",
            f"{d.relative:.2e}",
            f"{d.largest:.2e}",
            f"{d.ulp:,}",
            "-" if d.output_db is None else f"{d.output_db:.1f}",
        )
        for d in found.tensors
    ]
    print(table(header, lines, "<<<<>>>>>>"))
    for line in (*lone, *found.misfits):
        print(line)
    if found.tokens is not None:
        t = found.tokens
        print(f"\nnext tokens: KL {t.kl:.3g} (at most {t.kl_max:.3g}), the same {t.top1:.1%} of {t.tokens:,}")
    equal = sum(d.differ == 0 for d in found.tensors)
    print(f"\n{len(found.tensors):,} tensors in both, {equal:,} of them equal")
    for line in beyond:
        print(f"beyond {args.tolerance:g}: {line}")
    return 1 if beyond else 0
