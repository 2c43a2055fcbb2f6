"""A real model in every format: how small and how fast it gets, how far its answers move, and that bytes survive disks.

``python -m quantlib.examples.demo`` prints a table, draws it, and writes both with the int8 model to ``demo-output``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import quantlib
from quantlib import formats, reference
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.examples import encoders, language
from quantlib.report import Report, aligned, unwarned

# spec -> the mean cosine to FP32 that its embeddings must keep
SPECS: dict[str, float] = {
    "float16": 0.99999,
    "bfloat16": 0.9999,
    "float8_e4m3fn:row": 0.998,
    "float8_e5m2:row": 0.99,
    "int8:row": 0.9995,
    "uint8:row:affine": 0.9995,
    "int8:row@int8:row": 0.995,
    "int4:group:32": 0.95,
    "int4:group:128": 0.93,
    "int4:row": 0.9,
    "float4_e2m1fn:group:32": 0.95,
    "nf4_bf16:group:128:bfloat16": 0.96,  # W4A16 without its search
}
KEPT = "int8:row"  # whose file stays in the output folder
BASELINES = {"float32": torch.float32, "bfloat16 model": torch.bfloat16}  # the model as it is, and cast as a whole
ROUNDS, SECONDS = (3, 7), 8.0  # timed runs of each model, in turn: at least and at most, and the time for them


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    format: str
    weight_bytes: int  # codes, scales and zero points of the layers that were quantized
    ratio: float  # of their FP32 bytes to these
    file_bytes: int
    smallest_cosine: float
    mean_cosine: float
    worst_snr_db: float
    worst_layer: str
    same_bytes: bool  # codes and embeddings after saving and loading
    sentences_per_second: float = math.nan  # in FP32, through the products with codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every format met its cosine and came back from disk with the same bytes, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m quantlib.examples.demo", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write to (%(default)s)")
    parser.add_argument("--model", choices=("auto", "minilm", "small"), default="auto", help="which encoder")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    print("\n".join(seed_table(3.141592)), end="\n\n", flush=True)
    try:
        encoder, origin = encoders.load(options.model)
        options.output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    print(f"{encoder.name}: {origin}", flush=True)

    expected = encoder.embed(encoder.model)
    rows, reports, models = [], {}, {name: copy.deepcopy(encoder.model).to(dtype) for name, dtype in BASELINES.items()}
    with unwarned():  # the share that is quantized is the same in every format
        for spec in tqdm(SPECS, unit="format", file=sys.stderr, disable=None, leave=False):
            row, reports[spec], models[spec] = measure(encoder, spec, expected, options.output)
            rows.append(row)
    speeds = sentences_per_second(encoder, models)
    rows = [replace(row, sentences_per_second=speeds[row.format]) for row in rows]
    kept = reports[KEPT]
    print(f"{len(kept.layers)} layers quantized, {len(encoders.SENTENCES)} sentences embedded")
    print(kept.warning or f"{kept.coverage:.1%} of the parameters are quantized", end="\n\n")
    print("\n".join(table(rows, kept.bytes_before, {name: speeds[name] for name in BASELINES})), end="\n\n")

    with (options.output / "formats.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Row)])
        writer.writerows(map(astuple, rows))
    written = ["formats.csv", f"{file_name(KEPT)}"]
    if draw(rows, reports, encoder.name, options.output / "formats.png"):
        written.append("formats.png")
    print(f"written to {options.output}: {', '.join(written)}, in {time.perf_counter() - began:.0f} s")
    failures = [] if options.model == "small" else write_sentences()
    failures += [f"{r.format}: other bytes after loading" for r in rows if not r.same_bytes]
    failures += [
        f"{r.format}: mean cosine {r.mean_cosine:.6f}, expected at least {SPECS[r.format]}"
        for r in rows
        if not r.mean_cosine >= SPECS[r.format]
    ]
    print("\n".join(failures) or "every format met its expectation, and came back from disk with the same bytes")
    return 1 if failures else 0


def measure(encoder: encoders.Encoder, spec: str, expected: Tensor, folder: Path) -> tuple[Row, Report, nn.Module]:
    """Quantize a copy, embed, save, load into another copy, and compare."""
    model = copy.deepcopy(encoder.model, {id(p): p for p in encoder.model.parameters()})  # float parts are shared
    report = quantlib.quantize_(model, spec)
    embeddings = encoder.embed(model)
    path = folder / file_name(spec)
    save_quantized(model, path, overwrite=True)
    loaded = load_quantized(copy.deepcopy(encoder.model), path)
    same = same_state(model, loaded) and torch.equal(encoder.embed(loaded), embeddings)
    size = path.stat().st_size
    if spec != KEPT:
        path.unlink()
    cosine = (embeddings.double() * expected.double()).sum(-1)
    worst = report.worst
    assert worst is not None
    row = Row(
        spec,
        report.bytes_after,
        report.bytes_before / report.bytes_after,
        size,
        float(cosine.min()),
        float(cosine.mean()),
        worst.snr_db,
        worst.name,
        same,
    )
    return row, report, model


def write_sentences() -> list[str]:
    """Have a language model write a sentence in each format, and print them; return the failures."""
    try:
        first, *others = language.lines()
    except ImportError as error:
        print(f"no language model: {error}")
        return []
    head = ("format", "sentence", "MB", "tokens/s")
    rows = [(x.format, x.sentence, f"{x.megabytes:.0f}", f"{x.tokens_per_second:.1f}") for x in (first, *others)]
    print(f"SmolLM2-135M goes on with {language.PROMPT!r}:", "", *aligned([head, *rows], left=2), "", sep="\n")
    return [
        f"{x.format}: wrote {x.sentence!r}, expected {first.sentence!r}"
        for x in others
        if language.SPECS[x.format] and x.sentence != first.sentence
    ]


def sentences_per_second(encoder: encoders.Encoder, models: Mapping[str, nn.Module]) -> dict[str, float]:
    """The median of a few runs of each model, all of them in turn: what else the machine does falls on all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    began = time.perf_counter()
    for done in range(ROUNDS[1]):
        if done >= ROUNDS[0] and (time.perf_counter() - began) * (done + 1) / done > SECONDS:
            break
        for name, model in models.items():
            start = time.perf_counter()
            encoder.embed(model)
            seconds[name].append(time.perf_counter() - start)
    return {name: len(encoders.SENTENCES) / statistics.median(runs) for name, runs in seconds.items()}


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """True if two models hold the same bytes under the same names."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(left[n].view(torch.uint8), right[n].view(torch.uint8))
        for n in left
    )


def file_name(spec: str) -> str:
    return f"{spec.replace(':', '-').replace('@', '-')}.safetensors"


def seed_table(value: float) -> list[str]:
    """``value`` in every format: the bits, sign | exponent | fraction, and what they stand for."""
    x = np.float32(value)
    rows = [("format", "sign exponent fraction", "stored value", "error", "bytes")]
    for f in formats.FORMATS.values():
        if isinstance(f, formats.FloatFormat):
            code = int(reference.encode_float(x, f))
            bits = f"{code:0{f.bits}b}"
            text = f"{bits[0]} {bits[1 : 1 + f.exponent_bits]} {bits[1 + f.exponent_bits :]}"
            stored = float(reference.decode_float(np.array(code), f))
        elif f.packed:
            continue
        else:
            stored = float(np.rint(x))
            text = f"{int(stored):0{f.bits}b}"
            text = f"{text[0]} {text[1:]}" if f.signed else text
        rows.append((f.name, text, f"{stored:.10g}", f"{stored - value:+.2e}", f"{f.bytes_per_element:g}"))
    return [f"{value} in every format (integers at scale 1)", "", *aligned(rows, left=2)]


def table(rows: Sequence[Row], float_bytes: int, speeds: Mapping[str, float]) -> list[str]:
    """The rows as text, below the speeds of the models that are not quantized."""
    sizes = ("weights MB", "x smaller", "file MB")
    head = ("format", *sizes, "smallest cos", "mean cos", "worst layer dB", "sentences/s", "from disk")
    lines = [
        (
            name,
            f"{float_bytes / 1e6 * BASELINES[name].itemsize / 4:.2f}",
            f"{4 / BASELINES[name].itemsize:.2f}",
            *("", "", "", ""),
            f"{speed:.0f}",
            "",
        )
        for name, speed in speeds.items()
    ]
    lines += [
        (
            row.format,
            f"{row.weight_bytes / 1e6:.2f}",
            f"{row.ratio:.2f}",
            f"{row.file_bytes / 1e6:.2f}",
            f"{row.smallest_cosine:.6f}",
            f"{row.mean_cosine:.6f}",
            f"{row.worst_snr_db:.1f}",
            f"{row.sentences_per_second:.0f}",
            "same bytes" if row.same_bytes else "DIFFERENT",
        )
        for row in rows
    ]
    return aligned([head, *lines], left=1)


def draw(rows: Sequence[Row], reports: dict[str, Report], name: str, path: Path) -> bool:
    """The table as a picture: size, distance of the answers, noise of every layer. False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return False
    ink, quiet, blue, red = "#1f2933", "#9aa5b1", "#2f6fab", "#c2452d"
    figure = Figure(figsize=(12.5, 0.44 * len(rows) + 2.0), dpi=140, layout="constrained")
    size, distance, noise = figure.subplots(1, 3, sharey=True, width_ratios=(1.0, 1.15, 1.15))
    figure.suptitle(f"{name} in {len(rows)} formats", x=0.012, ha="left", fontsize=14, color=ink)
    places = range(len(rows))

    megabytes = [row.weight_bytes / 1e6 for row in rows]
    size.barh(places, megabytes, height=0.62, color=blue)
    for y, (row, width) in enumerate(zip(rows, megabytes, strict=True)):
        size.annotate(f"{row.ratio:.2f} x", (width, y), (5, 0), textcoords="offset points", va="center", color=ink)
    size.set(xlim=(0, 1.28 * max(megabytes)), xlabel="MB", title="weights, and how much smaller than FP32")
    size.set_yticks(places, [row.format for row in rows])
    size.invert_yaxis()

    mean = [max(1 - row.mean_cosine, 1e-9) for row in rows]
    worst = [max(1 - row.smallest_cosine, 1e-9) for row in rows]
    distance.hlines(places, mean, worst, color=quiet, linewidth=2, zorder=1)
    distance.scatter(mean, places, s=42, color=blue, label="mean", zorder=2)
    distance.scatter(worst, places, s=42, color=red, label="worst sentence", zorder=2)
    distance.set(
        xscale="log",
        xlim=(min(mean) / 3, 3 * max(worst)),
        xlabel="1 - cosine to FP32, less is better",
        title="how far the embeddings move",
    )

    for y, row in enumerate(rows):
        layers = [layer.snr_db for layer in reports[row.format].layers if math.isfinite(layer.snr_db)]
        noise.scatter(layers, [y] * len(layers), s=16, color=blue, alpha=0.35, linewidths=0, zorder=2)
    noise.scatter([], [], s=16, color=blue, alpha=0.6, linewidths=0, label="a layer")
    noise.scatter([row.worst_snr_db for row in rows], places, s=42, color=red, label="worst layer", zorder=3)
    noise.set(xlabel="signal to noise in dB, more is better", title="how exact the weights stay")

    for axes in (size, distance, noise):
        axes.title.set(fontsize=10.5, color=ink, ha="left", x=0.0)
        axes.grid(axis="x", color="#e4e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=ink, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(quiet)
    distance.legend(loc="lower left", edgecolor="none", fontsize=9)
    noise.legend(loc="lower right", edgecolor="none", fontsize=9)
    figure.savefig(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
