"""Everything there is to prove on a GPU: `make gpu`, or ``python scripts/gpu_acceptance.py [--limit SECONDS]``.

Builds the C++ and CUDA libraries, then runs every test, the case table and all 2^32 sweeps on the device, compiled
Triton and CUDA C++ both. The work comes in pieces of at most nine minutes; the summary is written after each, and a
piece that has passed with these very sources is not run again. Exit status 0: all passed; 1: something failed; 2: this
machine cannot; 3: the limit was reached, run again to go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIECE_SECONDS = 540
BACKENDS = ("triton", "cuda")
# What is compiled is compiled for the device: no interpreter, and a build that fails is an error.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QUANTLIB_BACKEND")} | {
    "QUANTLIB_BUILD": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Piece:
    """One command and its name in the summary."""

    name: str
    command: tuple[str, ...]

    def run(self, seconds: float) -> dict[str, object]:
        """What the summary says of it."""
        started = time.perf_counter()
        process = [sys.executable, *self.command]
        try:
            done = subprocess.run(
                process, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
            )
            status, said = ("passed" if done.returncode == 0 else "failed"), done.stdout + done.stderr
        except subprocess.TimeoutExpired as late:
            status, said = "out of time", (late.stdout or b"").decode(errors="replace")
        lines = [line for line in said.splitlines() if line.strip()]
        return {
            "status": status,
            "seconds": round(time.perf_counter() - started, 1),
            "last": next((line.strip("= ") for line in reversed(lines) if "Warning" not in line), ""),
            **({} if status == "passed" else {"output": lines[-60:]}),
        }


def pieces() -> Iterator[Piece]:
    """In the order in which they are worth running."""
    table = runpy.run_path(str(ROOT / "quantlib/formats.py"))["TABLE"]
    yield Piece("build", ("quantlib/_build.py", "cpu", "cuda"))
    for backend in BACKENDS:
        yield Piece(f"cases {backend}", ("-m", "quantlib.testing", backend, "--device", "cuda"))
    for path in sorted(ROOT.glob("tests/**/test_*.py")):
        name = str(path.relative_to(ROOT))
        yield Piece(f"tests {name}", ("-m", "pytest", "-q", "-p", "no:cacheprovider", name))
    for backend in BACKENDS:
        for op in ("cast", "quantize", "dequantize"):
            for f in table:
                if op != "cast" or (f.is_float and not f.packed):
                    what = ("--op", op, "--format", f.name)
                    command = ("-m", "quantlib", "verify", "--device", "cuda", "--backend", backend, *what)
                    yield Piece(f"sweep {backend} {op} {f.name}", command)


def missing() -> list[str]:
    """Why this machine cannot."""
    import torch

    nvcc = runpy.run_path(str(ROOT / "quantlib/_build.py"))["nvcc"]()
    no_device = f"torch {torch.__version__} sees no CUDA device" if torch.version.cuda else ""
    return [
        *([] if torch.cuda.is_available() else [no_device or f"torch {torch.__version__} is built without CUDA"]),
        *([] if nvcc else ["there is no nvcc to compile csrc/cuda with"]),
    ]


def machine() -> dict[str, str]:
    """What the summary is true of."""
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    return {
        "device": f"{torch.cuda.get_device_name()}, sm_{major}{minor}",
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sources": sources(),
    }


def sources() -> str:
    """A digest of all that the pieces run."""
    sha = hashlib.sha256()
    for path in sorted(p for folder in ("csrc", "quantlib", "tests") for p in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".def", ".h", ".cuh", ".cu", ".cpp", ".txt"):
            sha.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description="Every test and every sweep on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu.json", help="the summary, also what to resume")
    parser.add_argument("--limit", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--only", default="", help="only the pieces whose name holds this")
    given = parser.parse_args()
    if lacks := missing():
        print("make gpu needs a GPU, a torch with CUDA and nvcc:", *lacks, sep="\n  ", file=sys.stderr)
        return 2
    deadline = time.monotonic() + given.limit
    here = machine()
    summary = json.loads(given.out.read_text()) if given.out.exists() else {}
    if summary.get("machine") != here:
        summary = {"machine": here, "pieces": {}}
    done = summary["pieces"]
    wanted = [piece for piece in pieces() if given.only in piece.name or piece.name == "build"]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for piece in wanted:
        if done.get(piece.name, {}).get("status") == "passed" and piece.name != "build":
            continue
        left = deadline - time.monotonic()
        if left < 5:
            break
        result = piece.run(min(left, PIECE_SECONDS))
        if result["status"] == "out of time" and left < PIECE_SECONDS:
            break  # its time will come in the next run
        done[piece.name] = result
        given.out.write_text(json.dumps(summary, indent=2) + "\n")
        print(f"{result['status']:11} {result['seconds']:6} s  {piece.name}: {result['last']}", flush=True)
        if result["status"] != "passed" and piece.name == "build":
            break
    states = [done.get(piece.name, {}).get("status", "to come") for piece in wanted]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))
    print(f"{here['device']}: {counts}; {given.out}")
    if any(state in ("failed", "out of time") for state in states):
        return 1
    return 3 if "to come" in states else 0


if __name__ == "__main__":
    sys.exit(main())
