"""Every op in pure torch: any device, no compiler, no Triton."""

from __future__ import annotations

import torch

from quantlib.backends.backend import Backend, Kernels

KERNELS = Kernels(__name__)


def refuses(device: torch.device) -> str | None:
    """Nothing: pure torch runs wherever torch runs."""
    return None


BACKEND = Backend("composite", ("cpu", "cuda"), refuses, KERNELS, preference={"any": 0})
