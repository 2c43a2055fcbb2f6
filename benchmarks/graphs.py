"""Time on a CUDA device: a CUDA graph of calls on inputs that take turns, replayed between two events.

A graph has no launches from Python in it, which cost more than a small kernel. Its inputs exceed three times the L2,
since what is read again at once comes out of that. ``triton.testing.do_bench`` clears the L2 before every call
instead, and its events then take 3 to 6 us of a small kernel's time for that of the kernel;
``triton.testing.do_bench_cudagraph`` repeats one call on one input, which stays in the L2;
``torch.utils.benchmark`` times calls from the host, which is what `hosted` does, everybody in turns.

Nothing here has been run on a GPU yet but the arithmetic.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .case import Call, Case, Contender, Row, Tensors

CACHES = 3  # of L2, which the inputs that take turns exceed
MOST = 1024  # copies of small inputs, which then do fit into it: that is what the intercept is about
WARM_UP = 3  # calls before the capture, in which kernels are compiled and memory is allocated


class Turns:
    """One of several calls after the other: each has memory of its own."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._next = itertools.cycle(calls)

    def __call__(self) -> Any:
        return next(self._next)()

    def __len__(self) -> int:
        return len(self.calls)


class Line(NamedTuple):
    """What the calls of one contender cost over the sizes of one case."""

    case: str
    backend: str
    gb_per_s: float
    microseconds: float  # of a call that moves nothing


def rotation(nbytes: int, cache: int) -> int:
    """How many copies of ``nbytes`` exceed `CACHES` times the cache; two at least."""
    return max(2, CACHES * cache // max(nbytes, 1) + 1)


def clock(case: Case, contender: Contender, inputs: Tensors, outs: Tensors) -> Callable[[], float]:
    """Seconds a call, each time it is asked."""
    call = contender.bind(inputs, outs)
    if case.calls > 1 or not inputs:
        return lambda: hosted(call, case.calls)
    if isinstance(call, Turns):
        calls = call.calls
    else:
        L2 = torch.cuda.get_device_properties(case.device).L2_cache_size
        count = min(MOST, rotation(sum(t.nbytes for t in (*inputs, *outs)), L2))
        copies = ((tuple(map(torch.clone, inputs)), tuple(map(torch.clone, outs))) for _ in range(count - 1))
        calls = [call, *(contender.bind(*copy) for copy in copies)]
    with contender.within():
        graph = captured(calls)
    return lambda: replayed(graph) / len(calls)


def hosted(call: Call, calls: int) -> float:
    """Seconds a call, what Python and the driver need for it included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def captured(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    """The graph of all of ``calls``, one after the other."""
    aside, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for call in itertools.islice(itertools.cycle(calls), max(WARM_UP, len(calls))):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay; the GPU is busy with another one while it is queued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def fit(nbytes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """GB/s and us of seconds = us + bytes / GB/s: least squares of the errors as shares of the times."""
    t = np.asarray(seconds)
    sides = np.stack((1 / t, np.asarray(nbytes) / t), 1)
    (intercept, slope), *_ = np.linalg.lstsq(sides, np.ones_like(t), rcond=None)
    return 1e-9 / slope, intercept * 1e6


def lines(rows: Iterable[Row]) -> list[Line]:
    """Of every contender that was timed at three sizes of a case or more."""
    points = defaultdict(list)
    for row in rows:
        if row.min is not None and row.bytes:
            points[row.case, row.backend].append((row.bytes, row.min))
    return [Line(*key, *fit(*zip(*of, strict=True))) for key, of in points.items() if len(set(of)) > 2]
