"""What every test finds: Triton's interpreter where there is no GPU, one thread a worker, the same random numbers."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

from quantlib import backends  # noqa: E402


@dataclass(frozen=True)
class Served:
    """A backend that is forced, and a device whose tensors it runs."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if (self.backend, self.device) in HOME else f"{self.backend} on {self.device}"

    def refusal(self) -> str | None:
        if self.device == "cuda" and not GPU:
            return "there is no CUDA device"
        return backends.refuses(self.backend, self.device)


HOME = (("composite", "cpu"), ("cpp", "cpu"), ("triton", "cpu"), ("cuda", "cuda"))
SERVED = tuple(Served(*pair) for pair in (*HOME, ("composite", "cuda"), ("triton", "cuda")))


def forced(served: Served) -> Iterator[Served]:
    why = served.refusal()
    if why is not None:
        pytest.skip(f"{served}: {why}")
    with backends.use_backend(served.backend):
        yield served


@pytest.fixture(params=SERVED, ids=str)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend in turn, forced, with a device it serves."""
    yield from forced(request.param)


@pytest.fixture(params=[s for s in SERVED if s.device == "cpu"], ids=str)
def on_cpu(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that serves the CPU in turn, forced."""
    yield from forced(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)
