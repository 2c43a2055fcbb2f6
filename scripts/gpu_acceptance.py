"""Everything there is to prove on a GPU: `make gpu`, or ``python scripts/gpu_acceptance.py [--limit SECONDS]``.

Builds the C++ and CUDA libraries, launches every kernel, captures every op in a CUDA graph, runs all tests and all 2^32
inputs on the device and NVIDIA's sanitizers over the CUDA kernels, then the benchmarks; compiled Triton and CUDA C++
both. No network: what is not installed shrinks what is run, and is named. The work comes in pieces of at most nine
minutes, each a process of its own; the summary is written after each, and a piece that has passed with these very
sources is not run again. Exit status 0: all passed; 1: something failed; 2: this machine cannot; 3: the limit was
reached, run again to go on. Where the variable OUT names a folder, the summary and the piece's whole output are copied
there after each piece; ``--resume`` goes on from such a summary on a fresh machine of the same kind.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gpu_page
from gpu_pieces import LIBRARY, ROOT, Piece, digest, has, nvcc, pieces, run

OPTIONAL = {
    "xdist": "pytest-xdist: the tests run on one core",
    "pytest_timeout": "pytest-timeout: a kernel that hangs takes its whole piece with it",
    "hypothesis": "hypothesis: the tests that draw their inputs",
    "ml_dtypes": "ml_dtypes: the tests that compare with it",
    "transformers": "transformers: the tests on a real model",
    "bitsandbytes": "bitsandbytes: a peer of the benchmarks",
    "torchao": "torchao: a peer of the benchmarks",
    "gemlite": "gemlite: a peer of the benchmarks",
    "matplotlib": "matplotlib: the charts",
}
SAME = ("gpu", "python", "torch", "triton")  # facts that must be the same for a result to stay


def main(
    argv: Sequence[str] | None = None,
    missing: Callable[[], list[str]] | None = None,
    machine: Callable[[], dict[str, Any]] | None = None,
    wanted: Callable[[], Iterable[Piece]] = pieces,
) -> int:
    """The command; the three functions stand for the machine it runs on."""
    given = parser().parse_args(argv)
    chosen = [piece for piece in wanted() if given.only in piece.name or piece.name == "build"]
    if given.list:
        print(*(f"{piece.seconds:5} s  {piece.name}{lacking(piece)}" for piece in chosen), sep="\n")
        return 0
    if lacks := (missing or missing_here)():
        print("make gpu needs a GPU, a torch with CUDA and nvcc:", *lacks, sep="\n  ", file=sys.stderr)
        return 2
    return accept(chosen, given, (machine or machine_here)())


def accept(chosen: list[Piece], given: argparse.Namespace, here: dict[str, Any]) -> int:
    """Run what has not passed yet, then say how it stands."""
    summary = resumed(given.out if given.out.exists() or given.resume is None else given.resume, here)
    done = summary["pieces"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    folder = given.out.parent / "gpu"
    for why in here.get("missing", []):
        print(f"left out, not installed: {why}", flush=True)
    todo = [piece for piece in chosen if piece.name == "build" or not passed(done, piece)]
    deadline = time.monotonic() + given.limit
    for piece, result in run(todo, folder, deadline, given.jobs):
        if result is None:
            continue  # its time will come in the next run
        done[piece.name] = result
        save(given.out, summary)
        carry(given.out, *folder.glob(f"{piece.slug}.*"))
        print(f"{result['status']:11} {result['seconds']:6} s  {piece.name}: {result['last']}", flush=True)
        if result["status"] == "failed":
            print(*(f"    {line}" for line in result["output"][-12:]), sep="\n", flush=True)
    states = [str(done[piece.name]["status"]) if fresh(done, piece) else "to come" for piece in chosen]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    print(f"{here['gpu']}: {counts}; {given.out}")
    if given.save:
        publish(summary, given.save)
    if any(state in ("failed", "out of time") for state in states):
        return 1
    return 3 if "to come" in states else 0


def resumed(out: Path, here: dict[str, Any]) -> dict[str, Any]:
    """The summary so far, if it is of this machine."""
    before: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    same = all(before.get("machine", {}).get(what) == here.get(what) for what in SAME)
    return {"machine": here, "pieces": before.get("pieces", {}) if same else {}}


def fresh(done: dict[str, Any], piece: Piece) -> bool:
    """True if there is a result for the current sources."""
    return piece.name in done and done[piece.name]["sources"] == piece.digest


def passed(done: dict[str, Any], piece: Piece) -> bool:
    return fresh(done, piece) and done[piece.name]["status"] == "passed"


def save(out: Path, summary: dict[str, Any]) -> None:
    """The whole file or the one before."""
    new = out.with_suffix(".new")
    new.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(new, out)


def publish(summary: dict[str, Any], name: str) -> None:
    """Keep the summary in the repository, and show it in docs/gpu.md."""
    path = gpu_page.RESULTS / f"gpu-{name}.json"
    path.parent.mkdir(exist_ok=True)
    save(path, summary)
    gpu_page.write()
    carry(path, gpu_page.PAGE)
    print(f"{path.relative_to(ROOT)} and {gpu_page.PAGE.relative_to(ROOT)} are written")


def carry(*paths: Path) -> None:
    """Copy files to the folder that OUT names, if it is set: of a machine that is lent, what is there comes back."""
    if folder := os.environ.get("OUT"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copy(path, folder)


def lacking(piece: Piece) -> str:
    return f" (left out: {piece.lacks})" if piece.lacks else ""


def missing_here() -> list[str]:
    """List what this machine lacks."""
    packages = [
        f"{name} is not installed" for name in ("torch", "numpy", "triton", "tqdm", "safetensors") if not has(name)
    ]
    if not has("torch"):
        return packages
    import torch

    no_device = f"torch {torch.__version__} sees no CUDA device" if torch.version.cuda else ""
    return [
        *packages,
        *([] if torch.cuda.is_available() else [no_device or f"torch {torch.__version__} is built without CUDA"]),
        *([] if nvcc() else ["there is no nvcc to compile csrc/cuda with"]),
    ]


def machine_here() -> dict[str, Any]:
    """Describe the machine that the summary is true of."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    compiler = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "gpu": f"{properties.name}, sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size >> 20,
        **nvidia_smi(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: version(name) for name in ("triton", "numpy")},
        "nvcc": release[1] if (release := re.search(r"release ([0-9.]+)", compiler)) else "",
        "sources": digest(LIBRARY),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "missing": [what for name, what in OPTIONAL.items() if not has(name)],
    }


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks and power, read and not set."""
    asked = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "power.draw")
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip((name.replace(".", "_") for name in asked), map(str.strip, told.split(",")), strict=False))


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description="Every proof and every figure on this machine's GPU.")
    top.add_argument("--list", action="store_true", help="the pieces in their order, with a guess of their seconds")
    top.add_argument("--only", default="", metavar="TEXT", help="the build, and the pieces whose name holds this")
    top.add_argument("--limit", type=float, default=float("inf"), metavar="SECONDS", help="stop after so many seconds")
    cores = os.cpu_count() or 1
    top.add_argument("--jobs", type=int, default=max(1, min(2, cores // 8)), help="pieces at a time (%(default)s)")
    out = ROOT / "build/gpu.json"
    top.add_argument("--out", type=Path, default=out, metavar="FILE", help="the summary, which a later run resumes")
    top.add_argument("--resume", type=Path, metavar="FILE", help="a summary to go on from where --out is not there yet")
    top.add_argument("--save", metavar="NAME", help="also write benchmarks/results/gpu-NAME.json and docs/gpu.md")
    return top


if __name__ == "__main__":
    sys.exit(main())
