"""Workers, two at a time, and what they measured against its contracts."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu_static import contract, cuda_kernels, known
from gpu_static.budgets import Budgets
from gpu_static.measured import Measured

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 2


@dataclass(frozen=True)
class Row:
    """A kernel and what is said of it: what is wrong, and what is wrong but known."""

    measured: Measured
    budget: tuple[float, int] | None
    faults: list[str]
    known: list[str]


def measure(language: str, arch: int, scope: str, told: Callable[[str], None] = lambda line: None) -> list[Measured]:
    """Return the findings of a worker; ``told`` gets each line that it prints meanwhile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *sys.path])
    environment |= {"QUANTLIB_BUILD": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "gpu_static.worker", language, str(arch), scope]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
            assert process.stdout
            lines = [""]
            for lines[0] in process.stdout:
                told(lines[0].strip())
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{language} sm_{arch}: {errors.read()[-3000:]}")
    return [Measured(**measured) for measured in json.loads(lines[0])]


def missing(language: str) -> str | None:
    """Why kernels of a language cannot be compiled here, or None."""
    if language == "cuda":
        return cuda_kernels.missing()
    return None if importlib.util.find_spec("triton") else "the package triton is not installed"


def fast(arch: int) -> str:
    """The calls of the fast set: for the two architectures that differ most, matmuls of every size of a batch too."""
    return "fast" if arch in (80, 90) else "first"


def everything(
    scope: str, archs: Iterable[int], languages: Iterable[str], told: Callable[[str], None]
) -> list[Measured]:
    jobs = [(language, arch) for language in languages for arch in archs]
    with ThreadPoolExecutor(WORKERS) as pool:
        return [
            m
            for found in pool.map(lambda job: measure(*job, fast(job[1]) if scope == "fast" else scope, told), jobs)
            for m in found
        ]


def judged(measured: Iterable[Measured], budgets: Budgets, *, new: bool = False) -> list[Row]:
    """Each kernel beside its contract, sorted as they are printed; ``new``: a configuration may have no budget yet."""
    rows = []
    for m in sorted(measured, key=lambda m: (m.language, m.kernel, m.config, m.arch)):
        found = contract.faults(m, budgets.get(m), budgets.is_stale(m))
        excused = [fault for fault in found if known.reason(m, fault) or (new and fault == contract.NEW)]
        rows.append(Row(m, budgets.get(m), [fault for fault in found if fault not in excused], excused))
    return rows
