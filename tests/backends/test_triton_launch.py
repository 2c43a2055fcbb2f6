"""Launches of kernels: a class of calls is found again without Triton, and is never too wide for one binary."""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
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


def test_a_repeated_launch_keeps_what_it_has_found(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, ask = [], launch.launch

    def noted(*args: Any, **options: Any) -> Any:
        asked.append(args)
        return ask(*args, **options)

    monkeypatch.setattr(launch, "launch", noted)
    start = launch.repeated(kernel, 5, GPU, (8, TILE), warps=4, num_stages=2)
    x, y = torch.zeros(64), torch.ones(64)
    fast = "fast", 5, 1, 1, 77, "f", "m", None, None, None
    start(x[1:], None)  # another kind, of which nothing is kept
    start(x, None)
    assert [call[0] for call in kernel.started] == ["slow", "slow"]
    start(y, None)
    assert kernel.started[-1] == (*fast, y, None, 8, TILE)
    assert len(asked) == 2
    start(y[1:], None)
    assert len(asked) == 3
    assert kernel.started[-1][0] == "fast"
    for name, value in (("current_device", 1), ("profiled", True)):
        with monkeypatch.context() as patch:
            patch.setattr(launch, name, lambda value=value: value)
            start(x, None)
        assert kernel.started[-1] == ("slow", 5, x, None, 8, TILE)
    start(x, None)
    assert kernel.started[-1] == (*fast, x, None, 8, TILE)
    assert len(asked) == 5


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


@pytest.fixture
def where(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """The stream and the capture of the next call, on a device that nobody has asked for tickets."""
    now = {"": (1, 0)}
    monkeypatch.setattr(launch, "place", lambda device: now[""])
    for name in ("_slots", "_numbers"):
        monkeypatch.setattr(launch, name, {})
    monkeypatch.setattr(launch, "arena", functools.cache(launch.arena.__wrapped__))  # not the memory of other tests
    return now


CPU = torch.device("cpu")


def test_the_calls_of_a_stream_share_tickets_that_are_zeroed_once(where: dict[str, tuple[int, int]]) -> None:
    first = launch.tickets(5, CPU)
    assert len(first) >= 5
    assert not first.any()
    first[3] = 7  # seen by the next call, which does not zero them
    assert launch.tickets(launch.TICKETS, CPU).data_ptr() == first.data_ptr()
    assert first[3] == 7
    for stream, capture in ((2, 0), (1, 4), (2, 4), (1, 5)):
        where[""] = stream, capture
        other = launch.tickets(5, CPU)
        assert not other.any()
        other[:] = 9
        assert launch.tickets(5, CPU).data_ptr() == other.data_ptr()
        assert first.tolist() == [0, 0, 0, 7] + [0] * (len(first) - 4)


def test_tickets_without_a_slot_are_of_one_call(
    where: dict[str, tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def are_of_one_call(count: int) -> bool:
        ours, others = launch.tickets(count, CPU), launch.tickets(count, CPU)
        assert not ours.any()
        assert len(others) >= count
        return ours.data_ptr() != others.data_ptr()

    where[""] = 1, 4
    assert are_of_one_call(5)  # of a capture before any other call
    where[""] = 1, 0
    assert not are_of_one_call(5)
    assert are_of_one_call(launch.TICKETS + 1)
    where[""] = 1, -1  # a capture that the driver does not name
    assert are_of_one_call(5)
    monkeypatch.setattr(launch, "SLOTS", 2)
    where[""] = 2, 0
    assert not are_of_one_call(5)
    where[""] = 3, 0
    assert are_of_one_call(5)


def test_the_place_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls of two streams are told apart, and those of captures; a device that is not the current one has no slot."""
    now = {"stream": 7, "device": 0, "capturing": False}
    monkeypatch.setattr(launch, "current_stream", lambda index: now["stream"])
    monkeypatch.setattr(launch, "current_device", lambda: now["device"])
    monkeypatch.setattr(launch, "capture_of", lambda stream: 10 + stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: now["capturing"])
    assert launch.place(GPU) == (7, 0)
    now |= {"capturing": True}
    assert launch.place(GPU) == (7, 17)
    now |= {"device": 1}
    assert launch.place(GPU) == (7, -1)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(launch.place, CPU).result() != launch.place(CPU)


def test_the_driver_is_asked_which_capture_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(stream: Any, status: Any, number: Any, *rest: None) -> int:
        number._obj.value = stream.value + 2**40
        return int(stream.value == 9)

    driver = SimpleNamespace(cuStreamGetCaptureInfo_v2=answer)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: driver)
    assert launch.capture_of(7) == 7 + 2**40
    assert launch.capture_of(9) == -1
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert launch.capture_of(7) == -1


CLASSES = """
import collections, dataclasses, itertools, sys
import pytest, torch
from torch.utils._python_dispatch import TorchDispatchMode
from gpu_static import overhead, calls
from quantlib.backends.triton import launch

class Fills(TorchDispatchMode):
    found = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.found += op.overloadpacket.__name__ in ("zeros", "zeros_like", "zero_", "zero", "fill_", "full")
        return op(*args, **(kwargs or {}))

def fills(call):
    with Fills() as mode:
        started = len(overhead.calls_of(call))
    return mode.found, started

ours, tritons = collections.defaultdict(set), set()
chosen = [c for c in calls.FIRST] + [
    dataclasses.replace(c, M=M) for c in calls.FIRST if c.M for M in (1, 2, 7, 16, 17, 33, 100, 300, 2000)
]
for call in chosen:
    made = overhead.calls_of(call)
    assert fills(call) == (0, len(made)), f"{call} fills memory that another call has filled: {fills(call)}"
    for args, options in made:
        kernel, _, device, *given = args
        key = launch.key_function(kernel, given)(
            device, options["warps"], tuple(v for n, v in options.items() if n != "warps"), *given
        )
        theirs = overhead.triton_key(args, options)()
        # the addresses of constants that compare equal may differ: they are the same to Triton
        ours[(id(kernel), tuple(map(type, given)), key)].add(theirs)
        tritons.add((kernel.__name__, theirs))
assert all(len(theirs) == 1 for theirs in ours.values()), [t for t in ours.values() if len(t) > 1]
slots, launch.SLOTS = launch.SLOTS, 0  # then tickets are of one call
launch._slots.clear()
split = calls.Call("dequant_matmul", "bfloat16", "int8", M=1, tiled=True)
assert fills(split)[0] == 1, fills(split)
print(len(chosen), len(ours), len(tritons))
"""


def test_a_class_is_never_wider_than_tritons_own() -> None:
    """Calls that are started alike are calls that Triton compiles alike, and there are not many more classes.

    A second call of each starts nothing but its kernels: what tickets need is zeroed once.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "QUANTLIB_BUILD": "0"}
    done = fresh.run(["-c", CLASSES], env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    calls, ours, tritons = map(int, done.stdout.split())
    assert calls > 90
    assert tritons <= ours <= 1.2 * tritons


AGAIN = """
import contextlib, dataclasses
import torch
from triton.runtime.jit import JITFunction
from gpu_static import launches, overhead
import quantlib
from quantlib import backends
from quantlib.backends.triton import launch
from test_graph_capture import EVERY

triton = backends.BACKENDS["triton"]
backends.BACKENDS["triton"] = dataclasses.replace(triton, refuses=lambda device: None)  # it is said to serve the CPU
slow, fast = [], []
with quantlib.use_backend("triton"), launches.recording(90), overhead.driver(lambda *_: fast.append(1)):
    found = JITFunction.run
    JITFunction.run = lambda self, *args, **options: (slow.append(self.__name__), found(self, *args, **options))[1]
    launch.place = lambda device: (0, 0)
    ours = {name: call for name, call in EVERY.items() if call[0].overloadpacket.__name__ in triton.kernels}
    for name, (op, arguments) in ours.items():
        op(*arguments)
        started = len(slow)
        op(*arguments)
        assert len(slow) == started, f"{name}: a second call starts {slow[started:]} through Triton"
    JITFunction.run = found
print(len(ours), len(slow), len(fast))
"""


def test_a_second_call_of_any_op_finds_what_the_first_has_started() -> None:
    """Also where an argument is a string, which the dispatcher makes anew for each call."""
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests/ops")))
    done = fresh.run(["-c", AGAIN], env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    ops, slow, fast = map(int, done.stdout.split())
    assert ops > 20
    assert fast >= slow > 20
