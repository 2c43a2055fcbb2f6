"""Measure what quantization costs a local model: perplexity, KL and top-1 agreement, or cosines of an encoder."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from quantlib.cli.bench import destination
from quantlib.cli.parser import checked, count
from quantlib.cli.quantize import finite
from quantlib.cli.text import style
from quantlib.spec import GRAMMAR

if TYPE_CHECKING:
    from quantlib.evaluation.contenders import Contender
    from quantlib.evaluation.page import Row
    from quantlib.evaluation.subjects import Subject


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, a GGUF file, a model in transformers' cache, smollm2 or minilm"
    )
    parser.add_argument(
        "--to",
        nargs="+",
        default=[],
        metavar="SPEC",
        help=f"{GRAMMAR}; SPEC+gptq, +awq, +smoothquant, +sinkhorn calibrate, a number of bits assigns a spec a layer",
    )
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="a text to measure on; may be repeated; by default two that come with quantlib",
    )
    size = checked("an integer >= 1", count)
    parser.add_argument("--tokens", type=size, default=4096, metavar="N", help="tokens of all texts together (4096)")
    parser.add_argument("--length", type=size, default=512, metavar="N", help="tokens of a window (512)")
    parser.add_argument("--peers", action="store_true", help="compare with torchao, hqq and bitsandbytes, if installed")
    parser.add_argument("--as-shipped", action="store_true", help="leave the weights of a GGUF file on its grid")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    file = checked("a file in an existing folder", destination)
    parser.add_argument("--png", type=file, metavar="FILE", help="draw loss over bits")
    parser.add_argument("--markdown", type=file, metavar="FILE", help="put the table between its marks in this file")


def run(args: argparse.Namespace) -> int:
    from quantlib.evaluation import contenders, page, subjects

    asked = [contenders.ours(text) for text in args.to]
    if args.length < 2:
        raise ValueError(f"--length must be an integer >= 2, got {args.length}")
    subject = subjects.load(args.model, args.text, args.tokens, args.length, args.as_shipped)
    ways = asked or [contenders.ours(text) for text in contenders.specs(subject.embed is not None)]
    rows = measure(subject, [*ways, *(contenders.peers() if args.peers else [])])
    about = describe(subject)
    if args.json:
        print(
            json.dumps(finite({"model": subject.name, "about": about, "rows": [r.as_dict() for r in rows]}), indent=2)
        )
    else:
        head, *lines = page.table(rows)
        print("\n".join([about, "", style(head, "bold"), *lines]))
    if args.png:
        page.draw(rows, about, args.png)
    if args.markdown:
        page.put(args.markdown, subject.name, [about, "", *page.markdown(rows)])
    return 0


def describe(subject: Subject) -> str:
    """Describe the subject of a measurement in a line."""
    if subject.embed is not None:
        return f"{subject.name}: an encoder, embeddings of the sentences of the texts, 1 - cosine to the float model's"
    sizes = {name: sum(map(len, windows)) for name, windows in subject.texts.items()}
    on = " and ".join(f"{n} of {name}" for name, n in sizes.items())
    note = f", {subject.note}" if subject.note else ""
    return f"{subject.name}{note}: {sum(sizes.values())} tokens, {on}, in windows of {len_of(subject)}"


def len_of(subject: Subject) -> int:
    return max(len(window) for windows in subject.texts.values() for window in windows)


def measure(subject: Subject, ways: list[Contender]) -> list[Row]:
    """A row for the float model and one for each of ``ways``, a bar on a terminal."""
    from tqdm import tqdm

    from quantlib.evaluation.contenders import made
    from quantlib.evaluation.page import Row
    from quantlib.evaluation.scores import EncoderReference, LanguageReference

    encoder = None if subject.embed is None else EncoderReference(subject.model, subject.embed)
    language = LanguageReference(subject.model, subject.texts) if encoder is None else None
    rows = [Row("float32", False, 32.0, language.own())] if language else []
    for way in tqdm(ways, unit="model", file=sys.stderr, disable=None, leave=False):
        peer = bool(way.package)
        if way.missing:
            rows.append(Row(way.name, peer, 0.0, why=f"{way.package} is not installed"))
            continue
        try:
            model, bits = made(way, subject)
            if language is not None:
                rows.append(Row(way.name, peer, bits, language.score(model)))
            elif encoder is not None:
                rows.append(Row(way.name, peer, bits, loss=encoder.score(model)))
        except Exception as error:
            if not peer:
                raise
            rows.append(Row(way.name, peer, 0.0, why=f"{type(error).__name__}: {error}".split("\n")[0]))
    return rows
