"""What every test finds: Triton's interpreter where there is no GPU, one thread a worker, the same random numbers.

Tests run on every device there is. With QUANTLIB_STAND_IN=1 that is also one which is made up, see stand_in.py: what
would fail on a GPU because of where a tensor lies fails there.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

import stand_in  # noqa: E402

from quantlib import backends  # noqa: E402

DEVICES = ["cpu", *["cuda"] * GPU, *[stand_in.NAME] * (os.environ.get("QUANTLIB_STAND_IN") == "1")]


@dataclass(frozen=True)
class Served:
    """A backend that is forced, and a device whose tensors it runs."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if (self.backend, self.device) in HOME else f"{self.backend} on {self.device}"

    def refusal(self, overload: str | None = None) -> str | None:
        if self.device not in DEVICES:
            return f"there is no {'CUDA' if self.device == 'cuda' else self.device} device"
        return backends.refuses(self.backend, self.device, overload)


HOME = (("composite", "cpu"), ("cpp", "cpu"), ("triton", "cpu"), ("cuda", "cuda"))
ALL = tuple(Served(*pair) for pair in (*HOME, ("composite", "cuda"), ("triton", "cuda")))
SERVED = tuple(s for s in ALL if s.refusal() is None) + tuple(
    Served("composite", d) for d in DEVICES[1:] if d != "cuda"
)


def serving(overload: str) -> tuple[Served, ...]:
    """Those that run ``overload``."""
    return tuple(s for s in SERVED if s.refusal(overload) is None)


class Placed(TorchFunctionMode):
    """What a test makes lies on the device, and what it reads as an array comes from there.

    What the library makes lies where the library says: only its constructors, like those of torch, follow.
    """

    MAKERS = frozenset({
        *(torch.as_tensor, torch.from_numpy, torch.tensor, torch.empty, torch.full, torch.ones, torch.zeros, torch.eye),
        *(torch.arange, torch.linspace, torch.rand, torch.randn, torch.randint, torch.randperm),
    })  # fmt: skip

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling() or func not in self.MAKERS | {torch.Tensor.numpy}:
            return func(*args, **kwargs)
        caller = sys._getframe(1)
        module = str(caller.f_globals.get("__name__"))
        if module.startswith("quantlib.") and caller.f_code.co_name != "__init__":
            return func(*args, **kwargs)
        if func is torch.Tensor.numpy:
            return func(args[0].cpu(), *args[1:], **kwargs)
        if kwargs.get("device") is not None or "out" in kwargs or any(isinstance(a, torch.Tensor) for a in args):
            return func(*args, **kwargs)
        leaf = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(leaf)  # the same numbers on every device


@contextlib.contextmanager
def placed(device: str) -> Iterator[None]:
    """Inside, a test is on ``device``."""
    with contextlib.ExitStack() as stack:
        if device == stand_in.NAME:
            stack.enter_context(stand_in.present())
        if device != "cpu":
            stack.enter_context(Placed(device))
        yield


def forced(served: Served) -> Iterator[Served]:
    """A fixture's body: the backend is forced, and the test is on the device."""
    with backends.use_backend(served.backend), placed(served.device):
        yield served


@pytest.fixture(params=SERVED, ids=str)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend in turn, forced, with a device it serves."""
    yield from forced(request.param)


@pytest.fixture(params=[s for s in SERVED if s.device == "cpu"], ids=str)
def on_cpu(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that serves the CPU in turn, forced."""
    yield from forced(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device in turn, served in the order of preference; a whole module asks for it by usefixtures."""
    where = getattr(request, "param", "cpu")
    with placed(where):
        yield where


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames and len(DEVICES) > 1:
        metafunc.parametrize("device", DEVICES, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on a GPU can be asked for: -m gpu."""
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
        if any(getattr(v, "device", v) == "cuda" for v in values or () if isinstance(v, (str, Served))):
            item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A kernel that breaks its device breaks every later test of this process: another one goes on with those."""
    if GPU and item.get_closest_marker("gpu"):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)
            pytest.exit(f"{item.nodeid} broke the CUDA context: {error}", returncode=3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)
