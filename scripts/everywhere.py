"""Run the tests as they would run on other machines: ``make test-everywhere``, or this file with options.

Each environment is a process of pytest with what another machine, user or system may have: another BLAS kernel or
instruction set, other threads, no home, another umask, locale or time zone, a shuffled order, a busy machine, another
Python. Ends with a table, and names what cannot be had here, and why. All options but ``--only`` and ``--list`` go to
pytest. Exit status 1 where a test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environment import OLDEST_PYTHON, OLDEST_TORCH, ask, number

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ("-q", "--tb=short", "-m", "not slow and not network")
AVX2 = {
    "OPENBLAS_CORETYPE": "Haswell",  # NumPy's sums
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's loops
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # torch's matmuls
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "QUANTLIB_ISA": "avx2",
}
PLAIN = {"OPENBLAS_CORETYPE": "Prescott", "ATEN_CPU_CAPABILITY": "default", "QUANTLIB_ISA": "plain"}


@dataclass(frozen=True)
class Environment:
    """The differences of an environment from this one, and the reason if it cannot be had."""

    name: str
    variables: dict[str, str | None] = field(default_factory=dict)  # None takes one away
    options: tuple[str, ...] = ()  # of pytest
    umask: int = -1
    busy: int = 0  # processes beside it that do nothing but run
    python: str = sys.executable
    lacks: str = ""


def environments() -> Iterator[Environment]:
    """All there are, as far as this machine can have them."""
    yield Environment("as it is")
    yield Environment("a CPU with AVX2 only", AVX2, lacks=lacks("avx2", "f16c"))
    yield Environment("a CPU without AVX", PLAIN, lacks=lacks("sse2"))
    yield Environment("OPENBLAS_CORETYPE=Zen", {"OPENBLAS_CORETYPE": "Zen"}, lacks=lacks("avx2"))
    yield Environment("OPENBLAS_CORETYPE=SkylakeX", {"OPENBLAS_CORETYPE": "SkylakeX"}, lacks=lacks("avx512f"))
    yield Environment("OMP_NUM_THREADS=8", {"OMP_NUM_THREADS": "8"})
    yield Environment("no HOME", {**kernels(), "HOME": None, "XDG_CACHE_HOME": None})
    yield Environment("a HOME that is no folder", {**kernels(), "HOME": "/dev/null", "XDG_CACHE_HOME": None})
    yield Environment("umask 077", umask=0o077)
    yield Environment("umask 000", umask=0o000)
    yield Environment("a locale without Unicode", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    for locale in ("tr_TR.UTF-8", "de_DE.UTF-8"):
        yield Environment(f"LC_ALL={locale}", {"LC_ALL": locale}, lacks="" if has_locale(locale) else "not installed")
    yield Environment("TZ=Asia/Kathmandu", {"TZ": "Asia/Kathmandu"})
    yield Environment("PYTHONHASHSEED=1", {"PYTHONHASHSEED": "1"})
    for seed in ("1", "2"):
        yield Environment(f"shuffled, order {seed}", {"QUANTLIB_SHUFFLE": seed}, options=("-p", "shuffled"))
    yield Environment("a busy machine", busy=3 * (os.cpu_count() or 1))
    here = sys.version_info[:2]
    for minor in range(OLDEST_PYTHON[1], max(15, here[1] + 1)):
        if (3, minor) != here:
            python = f"python3.{minor}"
            yield Environment(python, python=shutil.which(python) or python, lacks=lacks_torch(python))


def lacks(*flags: str) -> str:
    """Return why this CPU does not stand for one with ``flags``; empty if it does."""
    try:
        has = set(re.findall(r"\S+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return "/proc/cpuinfo does not say what this CPU can do"
    missing = [flag for flag in flags if flag not in has]
    return f"this CPU has no {', '.join(missing)}" if missing else ""


def lacks_torch(python: str) -> str:
    """Return why the tests do not run on another interpreter; empty if they do."""
    if shutil.which(python) is None:
        return "not installed"
    answer = ask(python)
    if answer is None:
        return "does not run"
    if number(answer[1]) < OLDEST_TORCH:
        return "has no torch" if answer[1] == "0.0" else f"has torch {answer[1]}"
    done = subprocess.run([python, "-c", "import pytest, numpy"], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def has_locale(name: str) -> bool:
    try:
        known = subprocess.run(["locale", "-a"], capture_output=True, text=True, errors="replace", check=False).stdout
    except OSError:
        return False
    return name.replace("UTF-8", "utf8") in known or name in known


def kernels() -> dict[str, str | None]:
    """Return the variable that points to the compiled kernels, for an environment that would look elsewhere."""
    caches = runpy.run_path(str(ROOT / "quantlib/_build.py"))["caches"]()
    return {"QUANTLIB_CACHE": str(caches[0])}


@contextlib.contextmanager
def load(processes: int) -> Iterator[None]:
    """Start so many processes that compute without end."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@dataclass(frozen=True)
class Result:
    """The outcome of pytest."""

    status: int
    output: str
    seconds: float

    def count(self, what: str) -> int:
        """ "3 failed, 12 passed in 4.56s" -> 12"""
        lines = [line for line in self.output.splitlines() if re.search(r"\d+ \w+.* in [\d.]+s", line)]
        found = re.search(rf"(\d+) {what}", lines[-1]) if lines else None
        return int(found[1]) if found else 0

    @property
    def failures(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def run(environment: Environment, arguments: Sequence[str]) -> Result:
    """pytest in ``environment``."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment.variables}
    command = [environment.python, "-m", "pytest", *PYTEST, *environment.options, *arguments]
    start = time.monotonic()
    with load(environment.busy):
        done = subprocess.run(
            command, cwd=ROOT, umask=environment.umask, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", check=False, env={name: v for name, v in variables.items() if v is not None},
        )  # fmt: skip
    return Result(done.returncode, done.stdout, time.monotonic() - start)


def main(argv: Sequence[str] | None = None, every: Sequence[Environment] | None = None) -> int:
    """The command; ``every`` stands for what this machine can have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="environments whose name has NAME in it")
    parser.add_argument("--list", action="store_true", help="the environments, and what cannot be had here")
    given, arguments = parser.parse_known_args(argv)
    chosen = [e for e in every or environments() if not given.only or any(part in e.name for part in given.only)]
    if given.list:
        print(*(f"{e.name}{f': cannot be had, {e.lacks}' * bool(e.lacks)}" for e in chosen), sep="\n")
        return 0
    rows, failed = [], False
    for environment in chosen:
        if environment.lacks:
            rows.append(f"{environment.name:28} {'-':>7} {'-':>7} {'-':>8} {'-':>8}  {environment.lacks}")
            continue
        print(f"{environment.name} ...", flush=True)
        result = run(environment, arguments)
        bad = result.count("failed") + result.count("error")
        failed |= result.status != 0
        if result.status:
            print(*(result.failures or result.output.splitlines()[-20:]), sep="\n", flush=True)
        counts = f"{result.count('passed'):7} {bad:7} {result.count('skipped'):8} {result.seconds:8.0f}"
        ended = f"  pytest ended with {result.status}" * (result.status not in (0, 1))
        rows.append(f"{environment.name:28} {counts}{ended}")
    print(f"\n{'environment':28} {'passed':>7} {'failed':>7} {'skipped':>8} {'seconds':>8}", *rows, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
