"""Launches of kernels: a class of calls is found again without Triton, and is never too wide for one binary."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import pytest
import torch

pytest.importorskip("triton")

from quantlib.backends.triton import launch

ROOT = Path(__file__).resolve().parents[2]


class Kernel:
    """A kernel of Triton's that remembers how it was started: through Triton, "slow", or by its binary, "fast"."""

    __name__ = "some_kernel"
    params = tuple(SimpleNamespace(name=name, is_constexpr=name == "T") for name in ("x_ptr", "z_ptr", "M", "T"))

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*args: Any, **options: Any) -> Any:
            self.started.append(("slow", *grid, *args))
            return SimpleNamespace(
                run=lambda *given: self.started.append(("fast", *given)), function="f", packed_metadata="m"
            )

        return start


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A device that is not there, and on it a kernel that nobody has started."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_classes", {})
    monkeypatch.setattr(launch, "context", lambda device: torch.no_grad())
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "current_stream", lambda index: 77)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return Kernel()


GPU, TILE = torch.device("cuda:0"), object()


def start(kernel: Kernel, x: Any, M: int, tile: Any = TILE, device: torch.device = GPU, **options: int) -> None:
    launch.launch(kernel, 5, device, x, None, M, tile, **{"warps": 4, **options})


def test_the_second_call_of_a_class_goes_past_triton(kernel: Kernel) -> None:
    x = torch.empty(32)
    for M in (48, 64):
        start(kernel, x, M)
    assert kernel.started == [
        ("slow", 5, x, None, 48, TILE),
        ("fast", 5, 1, 1, 77, "f", "m", None, None, None, x, None, 64, TILE),
    ]


def test_what_the_compiler_is_told_decides_the_class(kernel: Kernel) -> None:
    x, other = torch.empty(32), object()
    calls: list[tuple[Any, ...]] = [
        (x, 48), (x, 1), (x, 3), (x, 2**31 + 1), (x, 2**31), (x[1:], 48), (x.half(), 48), (x, 48, other),
        (x, 48, TILE, torch.device("cuda:1")), (x, 48, 1), (x, 48, 2),
    ]  # fmt: skip
    for call in calls:
        start(kernel, *call)
    start(kernel, x, 48, warps=8)
    start(kernel, x, 48, num_stages=3)
    assert [how for how, *_ in kernel.started] == ["slow"] * 13


def test_another_device_is_made_the_current_one(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    start(kernel, torch.empty(32), 48)
    monkeypatch.setattr(launch, "current_device", lambda: 1)
    start(kernel, torch.empty(32), 48)
    assert [how for how, *_ in kernel.started] == ["slow", "slow"]


def test_a_profiler_is_told_of_every_launch(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "profiled", lambda: True)
    for _ in range(2):
        start(kernel, torch.empty(32), 48)
    assert [how for how, *_ in kernel.started] == ["slow", "slow"]


def test_nothing_is_compiled_while_a_graph_is_captured(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(32)
    start(kernel, x, 48)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    start(kernel, x, 64)
    with pytest.raises(RuntimeError, match=r"some_kernel must have run .* before a CUDA graph .*quantlib warmup"):
        start(kernel, x, 3)
    assert [how for how, *_ in kernel.started] == ["slow", "fast"]


CLASSES = """
import collections, dataclasses, itertools, sys
import pytest, torch
from gpu_static import overhead, calls
from quantlib.backends.triton import launch

ours, tritons = collections.defaultdict(set), set()
chosen = [c for c in calls.FIRST] + [
    dataclasses.replace(c, M=M) for c in calls.FIRST if c.M for M in (1, 2, 7, 16, 17, 33, 100, 300, 2000)
]
for call in chosen:
    for args, options in overhead.calls_of(call):
        kernel, _, device, *given = args
        key = launch.key_function(kernel, given)(
            device, options["warps"], tuple(v for n, v in options.items() if n != "warps"), *given
        )
        theirs = overhead.triton_key(args, options)()
        # the addresses of constants that compare equal may differ: they are the same to Triton
        ours[(id(kernel), tuple(map(type, given)), key)].add(theirs)
        tritons.add((kernel.__name__, theirs))
assert all(len(theirs) == 1 for theirs in ours.values()), [t for t in ours.values() if len(t) > 1]
print(len(chosen), len(ours), len(tritons))
"""


def test_a_class_is_never_wider_than_tritons_own() -> None:
    """Calls that are started alike are calls that Triton compiles alike, and there are not many more classes."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "QUANTLIB_BUILD": "0"}
    done = fresh.run(["-c", CLASSES], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    calls, ours, tritons = map(int, done.stdout.split())
    assert calls > 90
    assert tritons <= ours <= 1.2 * tritons
