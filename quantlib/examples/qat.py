"""Measure how much of the loss of INT8 and INT4 training with fake quantization regains, on two real tasks.

``python -m quantlib.examples.qat`` trains, prints a table, and fails unless INT4 wins back half of its loss or more.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from statistics import fmean

import torch
from tqdm import tqdm

from quantlib.examples import tasks
from quantlib.examples.tasks import Score
from quantlib.examples.training import (
    FROZEN_AFTER,
    FULL,
    QUICK,
    SPECS,
    MismatchError,
    Run,
    experiment,
    grouped,
    share_of,
)
from quantlib.report import aligned

LEAST = 0.5  # of what int4 loses in nats, mean over the seeds, that training has to win back


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if int4 regained `LEAST` of its loss in every task and all codes were those trained, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m quantlib.examples.qat", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="train for seconds, with one seed, and expect nothing")
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS), help="which")
    parser.add_argument("--save", type=Path, nargs="?", const=Path("docs/qat.png"), help="draw to PATH (%(const)s)")
    options = parser.parse_args(arguments)
    began, schedule = time.perf_counter(), QUICK if options.quick else FULL
    chosen = []
    for name in options.tasks:
        try:
            chosen.append(tasks.TASKS[name]())
        except ImportError as error:
            print(f"{name}: left out, {error}")
    if not chosen:
        parser.error("there is nothing to train on")
    for task in chosen:
        size = sum(p.numel() for p in task.build().parameters())
        print(f"{task.name}: {size:,} parameters, {task.origin}", flush=True)

    total = len(chosen) * schedule.seeds * (schedule.steps + (1 + len(SPECS)) * schedule.tuning)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are too small to share out
    try:
        with tqdm(total=total, unit="step", file=sys.stderr, disable=None, leave=False) as bar:
            runs = [
                run
                for task in chosen
                for seed in range(schedule.seeds)
                for run in experiment(task, seed, schedule, bar.update)
            ]
    except MismatchError as error:
        print(error)
        return 1
    finally:
        torch.set_num_threads(threads)

    print("", *table(runs), "", sep="\n")
    if options.save and save(runs, options.save):
        print(f"written: {options.save}, {options.save.with_suffix('.csv')}")
    print(f"in {time.perf_counter() - began:.0f} s; every deployed code is the one that was trained")
    failures = [
        f"{task}, {spec}: {share:.0%} regained, expected at least {LEAST:.0%}"
        for (task, spec), group in grouped(runs).items()
        if not options.quick and spec.startswith("int4") and not (share := share_of(group)) >= LEAST
    ]
    print("\n".join(failures), end="\n" if failures else "")
    return 1 if failures else 0


def table(runs: Sequence[Run]) -> list[str]:
    """Means over the seeds: loss in nats and accuracy."""
    head = ("task", "format", "FP32 loss", "post-training", "QAT", "regained", "FP32 right", "post-training", "QAT")
    rows: list[Sequence[str]] = [head]
    for (task, spec), group in grouped(runs).items():
        ways = [[getattr(run, way) for run in group] for way in ("fp32", "post_training", "qat")]
        share = share_of(group)
        rows.append(
            (
                task,
                spec,
                *(f"{fmean(s.loss for s in scores):.4f}" for scores in ways),
                "-" if math.isnan(share) else f"{share:.0%}",
                *(f"{fmean(s.accuracy for s in scores):.2%}" for scores in ways),
            )
        )
    return aligned(rows, left=2)


def save(runs: Sequence[Run], path: Path) -> bool:
    """The runs as numbers beside ``path``, and as a picture there. False without matplotlib."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ways = ("fp32", "post_training", "qat")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "spec", "seed", *(f"{way}_{f.name}" for way in ways for f in fields(Score))])
        for run in runs:
            writer.writerow([run.task, run.spec, run.seed, *(v for way in ways for v in astuple(getattr(run, way)))])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return False
    ink, quiet, colours = "#1f2933", "#9aa5b1", ("#c2452d", "#2f6fab")
    groups = grouped(runs)
    names = list(dict.fromkeys(task for task, _ in groups))
    figure = Figure(figsize=(12.5, 3.6 * len(names)), dpi=140, layout="constrained")
    figure.suptitle("Quantized after training, and trained to be quantized", x=0.012, ha="left", fontsize=14, color=ink)
    for name, (bars, lines) in zip(names, figure.subplots(len(names), 2, squeeze=False), strict=True):
        specs = [spec for task, spec in groups if task == name]
        for i, (way, label) in enumerate((("post_training", "post-training"), ("qat", "QAT"))):
            more = [[getattr(run, way).loss - run.fp32.loss for run in groups[name, spec]] for spec in specs]
            places = [place + 0.32 * (i - 0.5) for place in range(len(specs))]
            bars.bar(places, [fmean(group) for group in more], width=0.3, color=colours[i], label=label)
            for place, group in zip(places, more, strict=True):
                bars.plot([place] * len(group), group, ".", color=ink, markersize=4)
        bars.axhline(0, color=quiet, linewidth=1)
        bars.set_ylabel("nats of loss above FP32's")
        bars.set_xticks(range(len(specs)), specs)
        bars.set_title(f"{name}: what int8 and int4 cost; bars are means, dots are seeds")
        bars.legend(edgecolor="none", fontsize=9, loc="upper left")

        shown = groups[name, specs[-1]][0]
        for layer, means in shown.scales.items():
            lines.plot(means, linewidth=1.4, label=layer)
        frozen = int(FROZEN_AFTER * len(means))
        lines.axvline(frozen, color=quiet, linestyle=":")
        lines.annotate(
            "scales frozen", (frozen, 1), (-4, -10), ("data", "axes fraction"), "offset points", ha="right", color=ink
        )
        lines.set(xlabel="step of fine-tuning", ylabel="scale / the one of quantize_")
        lines.set_title(f"{name}, {shown.spec}: the learned scale of each layer")
        lines.legend(edgecolor="none", fontsize=7, ncols=2, loc="lower left")
        for axes in (bars, lines):
            axes.title.set(fontsize=10.5, color=ink, ha="left", x=0.0)
            axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(colors=ink, length=0)
            axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(path)
    return True


if __name__ == "__main__":
    sys.exit(main())
