"""Plan what a model takes before it is loaded: bytes in each format, cache, activations, training, compute."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from quantlib.cli.parser import checked, count, one_of, positive
from quantlib.spec import GRAMMAR, QuantSpec

TRAINS, OPTIMIZERS = ("full", "lora", "qat"), ("adamw", "adamw8bit", "sgd")
PRECISIONS = ("float32", "bfloat16", "autocast")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="a model folder, a .safetensors file, or a config.json"
    )
    parser.add_argument(
        "--params",
        type=checked("a number above 0", positive),
        metavar="N",
        help="in place of MODEL: so many parameters, such as 1e9",
    )
    parser.add_argument("--to", action="append", metavar="SPEC", help=f"{GRAMMAR}; may be repeated (W8A16 and W4A16)")
    parser.add_argument(
        "--context", type=checked("a whole number >= 1", count), default=2048, help="tokens of a sequence"
    )
    parser.add_argument("--batch", type=checked("a whole number >= 1", count), default=1, help="sequences at a time")
    parser.add_argument("--train", type=one_of(TRAINS), help="plan training: all parameters, adapters, or QAT")
    parser.add_argument("--optimizer", type=one_of(OPTIMIZERS), default="adamw", help="optimizer of --train")
    parser.add_argument("--precision", type=one_of(PRECISIONS), help="dtype that is trained; as stored by default")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    parser.add_argument("--rank", type=checked("a whole number >= 1", count), default=8, help="rank of --train lora")
    parser.add_argument("--gpus", type=checked("a whole number >= 1", count), default=1, metavar="N", help="devices")
    parser.add_argument("--parallel", metavar="HOW", help="ddp, zero1, zero2 or zero3; tp:N and pp:N beside it")
    parser.add_argument("--device", metavar="NAME|BYTES", help="the device that it must fit: H100, RTX4090, 24GB ...")
    parser.add_argument(
        "--tokens",
        type=checked("a number above 0", positive),
        metavar="D",
        help="tokens to train on; 20 a parameter by default",
    )
    parser.add_argument(
        "--utilization",
        type=checked("a number above 0", positive),
        default=0.4,
        metavar="SHARE",
        help="share of a device's peak that training reaches (0.4)",
    )
    parser.add_argument("--no-activations", action="store_true", help="do not run the model on tensors without memory")
    parser.add_argument("--explain", action="store_true", help="the formula of every line")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--png", type=Path, metavar="FILE", help="a chart of stacked bars; needs matplotlib")
    parser.add_argument("--html", type=Path, metavar="FILE", help="a page with the tables, formulas and bars")


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.params is None):
        raise ValueError(f"MODEL or --params must be given, and not both, got {args.model!r} and {args.params!r}")
    to = [read_spec(text) for text in args.to or ("W8A16", "W4A16")]

    from quantlib.plan import plan

    found = plan(
        args.model,
        params=args.params,
        to=to,
        context=args.context,
        batch=args.batch,
        train=args.train,
        optimizer=args.optimizer,
        precision=args.precision,
        checkpointing=args.checkpointing,
        rank=args.rank,
        gpus=args.gpus,
        parallel=args.parallel,
        device=args.device,
        tokens=args.tokens,
        utilization=args.utilization,
        activations=not args.no_activations,
    )
    if args.png is not None or args.html is not None:
        from quantlib.plan import picture

        if args.png is not None:
            picture.draw(found, args.png)
        if args.html is not None:
            args.html.write_text(picture.as_html(found), encoding="utf-8")
    print(json.dumps(found.as_dict(), indent=2) if args.json else found.text(args.explain))
    return 0


def read_spec(text: str) -> QuantSpec:
    """The spec of --to."""
    try:
        return QuantSpec.parse(text)
    except ValueError as error:
        raise ValueError(str(error).replace("spec must", "--to must", 1)) from None
