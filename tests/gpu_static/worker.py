"""One language on one architecture, in a process of its own: ``python -m gpu_static.worker triton 90 common``.

What was measured once is kept beside the compiled kernels, by the digest of all that it was compiled from. A worker
prints how many jobs it has, then a line for each that is done, then everything as JSON.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlib import _build

HERE = Path(__file__).parent
READERS = {"triton": ("sass", "reductions", "warpgroups", "triton_kernels"), "cuda": ("sass", "cuda_kernels")}


class Kept:
    """Measurements of earlier runs, of this very code."""

    def __init__(self, language: str, arch: int) -> None:
        sources = b"".join((HERE / f"{name}.py").read_bytes() for name in READERS[language])
        digest = hashlib.sha256(sources).hexdigest()[:12]
        self.path = folder() / f"{language}-{arch}-{digest}.jsonl"
        self._known: dict[str, Any] = {}
        self._read = 0  # bytes of the file

    def get(self, key: str, job: Callable[[], Any]) -> Any:
        """Return what is kept under ``key``, or the result of ``job``, which no other process runs meanwhile."""
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with open(self.path, "a+") as file:
                file.seek(self._read)
                self._known |= dict(json.loads(line) for line in file if line.endswith("]\n"))
                if key not in self._known:
                    self._known[key] = job()
                    file.write(json.dumps([key, self._known[key]]) + "\n")
                self._read = file.tell()
        return self._known[key]


def folder() -> Path:
    """Return the folder of measurements: the first cache that can be written."""
    for cache in _build.caches():
        with contextlib.suppress(OSError):
            (cache / "gpu-static").mkdir(0o700, parents=True, exist_ok=True)
            return cache / "gpu-static"
    raise SystemExit("no folder to keep measurements in: QUANTLIB_CACHE must be one that can be written")


def work(language: str, arch: int, scope: str) -> None:
    kept = Kept(language, arch)
    jobs = triton_jobs(arch, scope) if language == "triton" else cuda_jobs(arch, scope)
    say(len(jobs))
    found: list[Any] = []
    for key, facts, job in jobs:
        found += [measured | facts for measured in kept.get(key, job)]
        say(f"{language} sm_{arch}")
    say(json.dumps(found))


Job = tuple[str, dict[str, Any], Callable[[], list[dict[str, Any]]]]  # key, what is no part of it, and what to do


def triton_jobs(arch: int, scope: str) -> list[Job]:
    from gpu_static import launches, plants, triton_kernels
    from gpu_static.calls import FAST, FIRST

    scratch = Path(tempfile.mkdtemp())
    os.environ["TRITON_CACHE_DIR"] = str(scratch)

    def job(config: Any) -> list[dict[str, Any]]:
        measured = asdict(triton_kernels.measure(config, arch))
        shutil.rmtree(scratch, ignore_errors=True)
        return [measured]

    if scope == "plants":
        return planted(plants.triton(), digest(*sorted((_build.PACKAGE / "backends/triton").glob("*.py"))))
    configs = launches.configs(arch, {"fast": FAST, "first": FIRST}.get(scope), scope == "all")
    return [(c.key, {"config": str(c.call), "facts": launches.facts(c)}, functools.partial(job, c)) for c in configs]


def cuda_jobs(arch: int, scope: str) -> list[Job]:
    from gpu_static import cuda_kernels, plants

    if scope == "plants":
        return planted(plants.cuda(), digest(*sorted(_build.CSRC.rglob("*"))))
    return [
        (cuda_kernels.key(source, arch), {}, functools.partial(cuda_kernels.measure, source, arch))
        for source in cuda_kernels.sources()
        if scope not in ("fast", "first") or arch == 90 or source.stem in cuda_kernels.FAST
    ]


def planted(plants: dict[str, Any], sources: str) -> list[Job]:
    return [(f"{name} {sources}", {"plant": name}, job) for name, job in plants.items()]


def digest(*paths: Path) -> str:
    """Return the hash of files, and of what is planted in them."""
    contents = b"".join(path.read_bytes() for path in (HERE / "plants.py", *paths) if path.is_file())
    return hashlib.sha256(contents).hexdigest()[:20]


def say(line: Any) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
