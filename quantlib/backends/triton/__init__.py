"""The Triton backend: the same kernels compiled on a CUDA device, and interpreted on the CPU for tests.

Nothing here imports Triton until a kernel is asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

from quantlib.backends.backend import Backend, Kernels

KERNELS = Kernels(__name__)


def refuses(device: torch.device) -> str | None:
    """Return why this backend cannot serve tensors on ``device``, or None."""
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
    """True if Triton runs kernels on the CPU; Triton decides it once, when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


# The interpreter is a thousand times slower: it serves the CPU only where it is forced.
BACKEND = Backend("triton", ("cpu", "cuda"), refuses, KERNELS, preference={"cuda": 20})
