"""The Triton backend: the same kernels compiled on a CUDA device, and interpreted on the CPU for tests.

Nothing here imports Triton until a kernel is asked for: ``refuses`` first, then ``KERNELS``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

OPS = (
    "cast",
    "compute_scale",
    "quantize",
    "dequantize",
    "quantize_dynamic",
    "fake_quantize",
    "fake_quantize_backward",
    "dequant_matmul",
    "dequant_matmul_backward",
    "scaled_matmul",
    "dynamic_matmul",
)


def refuses(device: torch.device) -> str | None:
    """Why this backend cannot serve tensors on ``device``, or None."""
    if not installed():
        return "the package triton is not installed"
    if interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 serves cpu tensors only"
    if device.type != "cuda":
        return "needs a CUDA device, or TRITON_INTERPRET=1 for the CPU"
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    if torch.version.cuda is None:
        return "is compiled and tested for NVIDIA devices only"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"needs compute capability 8.0, got {major}.{minor}"


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels on the CPU; it decides so once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def __getattr__(name: str) -> Any:
    if name != "KERNELS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kernels: dict[str, Callable[..., None]] = {
        op: getattr(importlib.import_module(f"{__name__}.{op}"), op) for op in OPS
    }
    globals()["KERNELS"] = kernels
    return kernels
