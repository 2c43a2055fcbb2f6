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
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .case import Call, Case, Contender, Row, Tensors

SHAPES = ((1, 4096), (64, 8192), (1024, 4096), (16384, 8192))  # sizes that a line is fitted to
CACHES = 3  # of L2, which the inputs that take turns exceed
MOST = 1024  # copies of small inputs, which then do fit into it: that is what the intercept is about
SMALL = 1 << 22  # elements, of a shape that somebody asked for to see that it works
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
    """The cost of the calls of one contender over the sizes of one case."""

    case: str
    backend: str
    gb_per_s: float
    microseconds: float  # of a call that moves nothing


def shaped(common: dict[str, Any], first: bool) -> list[dict[str, Any]]:
    """``common``, and on a GPU, for the ``first`` cases, each of `SHAPES` too, unless its own shape is small."""
    if common.get("device") != "cuda" or not first or math.prod(common["shape"]) < SMALL:
        return [common]
    return [{**common, "shape": shape} for shape in dict.fromkeys((common["shape"], *SHAPES))]


def rotation(nbytes: int, cache: int) -> int:
    """The number of copies of ``nbytes`` that exceed `CACHES` times the cache; at least two."""
    return max(2, CACHES * cache // max(nbytes, 1) + 1)


def clock(case: Case, contender: Contender, inputs: Tensors, outs: Tensors) -> Callable[[], float]:
    """Seconds a call, each time it is asked."""
    if case.calls > 1 or not inputs:
        call = contender.bind(inputs, outs)
        return lambda: hosted(call, case.calls)
    stream = torch.cuda.Stream(case.device)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), contender.within():  # a backward runs where its forward ran, which was at binding
        calls = in_turn(contender, inputs, outs)
        graph = captured(calls, stream)
    return lambda: replayed(graph) / len(calls)


def in_turn(contender: Contender, inputs: Tensors, outs: Tensors) -> Sequence[Call]:
    """Calls that share no memory, so many that no cache holds it."""
    call = contender.bind(inputs, outs)
    if isinstance(call, Turns):
        return call.calls
    L2 = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
    count = min(MOST, rotation(sum(t.nbytes for t in (*inputs, *outs)), L2))
    copies = ((tuple(map(torch.clone, inputs)), tuple(map(torch.clone, outs))) for _ in range(count - 1))
    return [call, *(contender.bind(*copy) for copy in copies)]


def hosted(call: Call, calls: int) -> float:
    """Seconds a call, what Python and the driver need for it included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def captured(calls: Sequence[Call], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """The graph of all of ``calls``, one after the other; ``stream`` is the current one."""
    for call in itertools.islice(itertools.cycle(calls), max(WARM_UP, len(calls))):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
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
    """Fit a line for every contender that was timed at three sizes of a case or more."""
    points = defaultdict(list)
    for row in rows:
        if row.min is not None and row.bytes:
            points[row.case, row.backend].append((row.bytes, row.min))
    return [Line(*key, *fit(*zip(*of, strict=True))) for key, of in points.items() if len(set(of)) > 2]
