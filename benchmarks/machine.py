"""The machine of a run: processor, threads, versions, and how fast it copies memory."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path
from typing import Any

import torch

import quantlib
from quantlib import backends

from .case import Call, Limits, normal, ready
from .measure import timed

PRODUCTS = ("float32", "bfloat16", "int8")  # dtypes with a peak
SQUARES = {"cpu": (2048,), "cuda": (4096, 8192)}  # sizes of the products that the peaks are of
QUICK_SQUARES = {"cpu": (512,), "cuda": (4096,)}  # a CPU without instructions for bfloat16 takes seconds a larger one
STATE = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
PACKAGES = ("torch", "numpy", "triton", "torchao", "bitsandbytes", "optimum-quanto", "onnxruntime", "xllamacpp")
NOISE_RUNS, NOISE_SIZE = 100, 512  # of the product that the noise is measured with


def describe(device: str, backend: str | None = None) -> dict[str, Any]:
    """Everything that a figure depends on and that can be asked for."""
    gpu = gpu_facts() if device == "cuda" else {}
    return {
        "device": processor() if device == "cpu" else torch.cuda.get_device_name(),
        "instructions": gpu["architecture"] if gpu else torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "quantlib": commit(),
        "backend": backends.serving(device),
        "date": datetime.date.today().isoformat(),
        **({"gpu": gpu | gpu_state()} if gpu else {}),
    }


def gpu_facts() -> dict[str, Any]:
    """Return the properties of the GPU."""
    facts = torch.cuda.get_device_properties("cuda")
    return {
        "architecture": f"sm_{facts.major}{facts.minor}",
        "sms": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
    }


def gpu_state() -> dict[str, str]:
    """Clocks, power and temperature at this moment, as nvidia-smi words them; nothing where it does not say."""
    which = f"--id=GPU-{torch.cuda.get_device_properties('cuda').uuid}"  # CUDA may count devices in another order
    query = ["nvidia-smi", which, f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout
        return dict(zip(STATE, (value.strip() for value in said.split(",")), strict=True))
    except (OSError, subprocess.SubprocessError, ValueError):
        return {}


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


def commit() -> str:
    """Return the commit of the checkout, or the version of an installed wheel."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    try:
        if (here.parent / "csrc").is_dir():
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return quantlib.__version__


def noise(device: str) -> float:
    """Measure the noise: the slow ones of a hundred runs of one product over the fastest, less one.

    Three of four runs are within this share of the fastest: 0 on a machine that does nothing else.
    """
    x = torch.ones(NOISE_SIZE, NOISE_SIZE, device=device)
    return waver(times(functools.partial(torch.mm, x, x), device, NOISE_RUNS))


def waver(times: list[float]) -> float:
    """The upper quartile over the minimum, less 1."""
    return statistics.quantiles(times, n=4)[2] / min(times) - 1


def limits(shape: tuple[int, ...], device: str, quick: bool = False) -> Limits:
    """Measure the limits of which every share is taken, before any case."""
    squares = (QUICK_SQUARES if quick else SQUARES)[device]
    return Limits(
        copy_bandwidth(shape, device),
        read_bandwidth(shape, device),
        {dtype: peak(dtype, device, squares) for dtype in PRODUCTS},
    )


def copy_bandwidth(shape: tuple[int, ...], device: str, runs: int = 12) -> float:
    """Bytes a second that a plain copy of float32 reads and writes, best of ``runs``."""
    x, y = normal(shape, "float32", device), ready(shape, device)
    return 2 * x.nbytes / best(lambda: y.copy_(x), device, runs)


def read_bandwidth(shape: tuple[int, ...], device: str, runs: int = 12) -> float:
    """Bytes a second that the largest of many int32 takes in, best of ``runs``."""
    x = normal(shape, "float32", device)
    return x.nbytes / best(functools.partial(torch.amax, x.view(torch.int32)), device, runs)


def peak(dtype: str, device: str, sizes: tuple[int, ...], runs: int = 12) -> float:
    """FLOPs a second of torch's own product of square matrices, best of ``runs`` and of the sizes."""
    rates = []
    for size in sizes:
        x = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
        product = torch._int_mm if dtype == "int8" else torch.mm
        rates.append(2 * size**3 / best(functools.partial(product, x, x.t()), device, runs))
    return max(rates)


def best(call: Call, device: str, runs: int) -> float:
    """Seconds of the fastest of ``runs``, after one that is not timed."""
    return min(times(call, device, runs))


def times(call: Call, device: str, runs: int) -> list[float]:
    """Seconds of each of ``runs``, after one that is not timed."""
    call()
    return [timed(call, 1) if device == "cpu" else by_events(call) for _ in range(runs)]


def by_events(call: Call) -> float:
    """Seconds on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
