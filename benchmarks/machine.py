"""What was measured on: processor, threads, versions, and how fast this machine copies memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from quantlib import backends

from .case import normal, ready
from .measure import timed

PACKAGES = ("torch", "numpy", "triton", "torchao", "bitsandbytes")


def describe(device: str, backend: str | None = None) -> dict[str, Any]:
    """Everything that a figure depends on and that can be asked for."""
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "quantlib": commit(),
        "backend": backends.serving(device),
        "date": datetime.date.today().isoformat(),
    }


def load() -> float | None:
    """Processes that wanted to run, on average over the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """The model name that the system gives."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout, where this is one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def copy_bandwidth(shape: tuple[int, ...], device: str, runs: int = 20) -> float:
    """GB/s of a plain copy of float32, bytes read and written, best of ``runs``."""
    x, y = normal(shape, "float32", device), ready(shape, device)
    best = min(timed(lambda: y.copy_(x), 1) for _ in range(runs))
    return 2 * x.nbytes / best / 1e9
