"""The pieces of `make gpu`, in the order in which they are worth running, and the running of one."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ("csrc", "quantlib")
BACKENDS = ("triton", "cuda")
PIECE_SECONDS = 540  # none may take longer
GRACE_SECONDS = 20  # from the interrupt, which lets a piece say what it has, to the end
RESULTS = "{results}"  # in a command: the file that the piece may leave figures in, as JSON

# Kernels are compiled for the device: no interpreter, and a build that fails is an error.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "QUANTLIB_BACKEND")} | {
    "QUANTLIB_BUILD": "1",
    # What else was carried to the machine, peers of the benchmarks among it, lies on the path of this process.
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    ),
    "PYTHONUNBUFFERED": "1",
}


@dataclass(frozen=True)
class Piece:
    """One command and its name in the summary."""

    name: str
    command: tuple[str, ...]
    seconds: int  # about how long; a guess, to see what still fits
    sources: tuple[str, ...] = LIBRARY  # folders that decide what it gives
    alone: bool = False  # nothing may run beside it but what is light
    light: bool = False  # disturbs no other, and runs beside any
    lacks: str = ""  # the reason if it cannot run here
    fine: tuple[int, ...] = (0,)  # exit statuses
    environment: tuple[tuple[str, str], ...] = ()

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9_.]+", "-", self.name.lower())

    @property
    def digest(self) -> str:
        """A hash of all sources that it runs: a result holds for these."""
        return digest(self.sources)


def pieces(cores: int = os.cpu_count() or 1) -> Iterator[Piece]:
    """Yield the pieces in the order in which they are worth running."""
    python = sys.executable
    smoke = (python, "scripts/gpu_smoke.py")
    without = (("QUANTLIB_BUILD", "0"),)  # it needs Triton only, and runs while the libraries are compiled
    yield Piece("smoke", smoke, 60, (*LIBRARY, "scripts"), light=True, environment=without)
    yield Piece("build", (python, "quantlib/_build.py", "cpu", "cuda"), 150, alone=True)
    jobs = ("--device", "cuda", "--jobs", str(min(cores, 14)))
    tables = {  # Triton compiles a kernel for nearly each case
        backend: Piece(f"cases {backend}", (python, "-m", "quantlib.testing", backend, *jobs), seconds)
        for backend, seconds in (("cuda", 60), ("triton", 300))
    }
    first = (python, "-m", "quantlib.testing", "triton", *jobs, "--launches")
    benchmarks = {name: bench(name, families) for name, families in benches()}
    yield Piece("launches triton", first, 120)
    yield from tests("graphs", ["tests/ops/test_graph_capture.py"], 90, 1, "gpu")
    for name in ("products", "projections"):
        if name in benchmarks:
            yield benchmarks.pop(name)
    yield from tables.values()
    yield from tests("device", ["tests"], 240, cores, "gpu and not network")
    yield from benchmarks.values()
    yield from sanitizers()
    for backend in BACKENDS:
        verify = (python, "-m", "quantlib", "verify", "--device", "cuda", "--backend", backend, "--json", RESULTS)
        yield Piece(f"deciding inputs {backend}", (*verify, "--share", "0"), 60)
        yield Piece(f"every input {backend}", (*verify, "--against", "composite"), 240)
    yield from tests("other", ["tests"], 240, cores, "not gpu and not network")


def bench(name: str, families: list[str]) -> Piece:
    """The benchmarks of some families."""
    chosen = [word for family in families for word in ("--family", family)]
    command = (sys.executable, "-m", "benchmarks", "--device", "cuda", "--json", RESULTS, *chosen)
    return Piece(f"bench {name}", command, 150, (*LIBRARY, "benchmarks"), alone=True)


def tests(name: str, paths: list[str], seconds: int, cores: int, marked: str) -> Iterator[Piece]:
    """Tests in one piece where they share the cores; without pytest-xdist a piece a file, for all take too long."""
    lacks = "" if has("pytest") else "pytest is not installed"
    options = ["-q", "--tb=short", "-o", f"cache_dir={ROOT / 'build/gpu/pytest'}", "-m", marked]
    if has("pytest_timeout"):  # a kernel that never ends takes its worker with it, and not the piece
        options += ["--timeout=240", "--timeout-method=thread"]
    sources = (*LIBRARY, "tests", "benchmarks", "scripts")
    if cores > 1 and has("xdist"):
        options += [f"--numprocesses={min(cores, 16)}"]
    elif cores > 1:
        paths = sorted(str(p.relative_to(ROOT)) for path in paths for p in (ROOT / path).rglob("test_*.py"))
    for path in paths:
        command = (sys.executable, "-m", "pytest", *options, path)
        which = f"tests {name}" if len(paths) == 1 else f"tests {name} {Path(path).stem}"
        took = seconds if len(paths) == 1 else 60
        one, fine = (("OMP_NUM_THREADS", "1"),), (0, 5)  # 5: the file has no such test
        yield Piece(which, command, took, sources, lacks=lacks, fine=fine, environment=one)


def sanitizers() -> Iterator[Piece]:
    """compute-sanitizer over every CUDA kernel in every way it is launched. Every tensor is memory of its own.

    Only our kernels are looked at, except by initcheck, which has to see who else wrote what they read.
    """
    tool = compute_sanitizer()
    own = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    driver = (sys.executable, "-m", "quantlib.testing", "cuda", "--device", "cuda", "--launches")
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):
        ours = ("--kernel-regex", "kns=quantlib") if check != "initcheck" else ()
        options = ("--tool", check, "--error-exitcode", "9", "--print-limit", "20", *ours)
        lacks = "" if tool else "there is no compute-sanitizer"
        yield Piece(f"sanitizer {check}", (tool or "", *options, *driver), 150, environment=own, lacks=lacks)


def benches() -> Iterator[tuple[str, list[str]]]:
    """The families of the benchmarks, a few at a time."""
    left = every = families_of_benchmarks()
    groups = {
        "projections": ["cast", "quantize", "quantize_dynamic", "dequantize", "compute_scale"],
        "fake_quantize": ["fake_quantize"],
        "products": ["matmul", "dequant_matmul", "scaled_matmul", "dynamic_matmul"],
        "modules": ["modules", "transformer"],
    }
    for name, families in groups.items():
        if chosen := [family for family in families if family in left]:
            left = [family for family in left if family not in chosen]
            yield name, chosen
    if left or not every:  # it then says why there are none
        yield "rest", left


def families_of_benchmarks() -> list[str]:
    """List the families that `python -m benchmarks` knows; another process is asked, for it imports torch."""
    ask = "from benchmarks.command import FAMILIES; print(*FAMILIES)"
    command = [sys.executable, "-c", ask]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.split() if done.returncode == 0 else []


def has(package: str) -> bool:
    """True if `import package` finds something."""
    return importlib.util.find_spec(package) is not None


def nvcc() -> str | None:
    """The compiler that the build will use."""
    found: str | None = runpy.run_path(str(ROOT / "quantlib/_build.py"))["nvcc"]()
    return found


def compute_sanitizer() -> str | None:
    """Return the path of compute-sanitizer: on PATH, or beside nvcc."""
    compiler = shutil.which(nvcc() or "nvcc")
    beside = shutil.which("compute-sanitizer", path=Path(compiler).resolve().parent) if compiler else None
    return shutil.which("compute-sanitizer") or beside


@cache
def digest(folders: tuple[str, ...]) -> str:
    """Return a hash of the sources in ``folders``."""
    sha = hashlib.sha256()
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.*")):
        if path.suffix in (".py", ".def", ".h", ".cuh", ".cu", ".cpp", ".txt"):
            sha.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return sha.hexdigest()[:16]


# ---- one that runs --------------------------------------------------------------------------------------------------


class Running:
    """A piece as a process of its own, with its children: what breaks in one, a CUDA context too, breaks no other."""

    def __init__(self, piece: Piece, folder: Path, seconds: float) -> None:
        self.piece, self.seconds = piece, seconds
        self.started = time.monotonic()
        self.interrupted: float | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self.results = folder / f"{piece.slug}.log", folder / f"{piece.slug}.json"
        self.results.unlink(missing_ok=True)
        command = [str(self.results) if word == RESULTS else word for word in piece.command]
        with self.log.open("w") as log:
            self.process = self._start(command, log)

    def _start(self, command: list[str], log: IO[str]) -> subprocess.Popen[bytes] | None:
        environment = {**ENVIRONMENT, **dict(self.piece.environment)}
        try:
            return subprocess.Popen(
                command, env=environment, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.write(f"{command[0]} does not start: {error}\n")
            return None

    @property
    def age(self) -> float:
        return time.monotonic() - self.started

    def finished(self) -> bool:
        """True if it is done; a piece whose time is up is interrupted, then killed."""
        if self.process is None or self.process.poll() is not None:
            self._kill()  # processes that it may have left
            return True
        if self.interrupted is None and self.age > self.seconds:
            self.interrupted = time.monotonic()
            self.process.send_signal(signal.SIGINT)
        elif self.interrupted is not None and time.monotonic() > self.interrupted + GRACE_SECONDS:
            self._kill()
            self.process.wait()
            return True
        return False

    def _kill(self) -> None:
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop it now."""
        self._kill()
        if self.process is not None:
            self.process.wait()

    def result(self) -> dict[str, Any]:
        """Return its entry in the summary."""
        status = "failed"
        if self.interrupted is not None:
            status = "out of time"
        elif self.process is not None and self.process.returncode in self.piece.fine:
            status = "passed"
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        why = ""
        if status == "failed" and any("Device not supported" in line for line in lines):
            status, why = "left out", "the tool says: Device not supported"
        found: dict[str, Any] = {
            "status": status,
            "seconds": round(self.age, 1),
            "sources": self.piece.digest,
            "last": why or next((line.strip("= ") for line in reversed(lines) if says(line)), ""),
        }
        if broken := [line for line in lines if line.startswith(("FAILED ", "ERROR "))]:
            found["broken"] = broken[:200]
        if status in ("failed", "out of time"):
            found["output"] = lines[-80:]
        if self.results.exists():
            try:
                found["results"] = json.loads(self.results.read_text())
            except ValueError:
                found["results"] = None  # cut off
        return found


def says(line: str) -> bool:
    """True if ``line`` can be the last word of a piece."""
    return "Warning" not in line and not line.startswith(("FAILED ", "ERROR ", "SKIPPED "))


def run(
    wanted: Iterable[Piece], folder: Path, deadline: float, jobs: int
) -> Iterator[tuple[Piece, dict[str, Any] | None]]:
    """Each piece with what the summary says of it, as they end; None for one that the deadline cut off."""
    waiting = list(wanted)
    running: list[Running] = []
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            for piece in list(waiting):
                if piece.lacks:
                    waiting.remove(piece)
                    yield piece, {"status": "left out", "seconds": 0.0, "sources": piece.digest, "last": piece.lacks}
                    continue
                heavy = [r for r in running if not r.piece.light]
                alone = piece.alone or any(r.piece.alone for r in heavy)
                if len(heavy) >= (1 if alone else jobs) and not piece.light:
                    break
                if piece.seconds > left:
                    waiting.remove(piece)
                    yield piece, None
                    continue
                waiting.remove(piece)
                running.append(Running(piece, folder, min(left - GRACE_SECONDS, PIECE_SECONDS)))
            for one in [r for r in running if r.finished()]:
                running.remove(one)
                result = one.result()
                cut = result["status"] == "out of time" and one.seconds < PIECE_SECONDS
                yield one.piece, None if cut else result
                if one.piece.name == "build" and result["status"] != "passed":
                    return
            time.sleep(0.05)
    finally:
        for one in running:
            one.stop()
