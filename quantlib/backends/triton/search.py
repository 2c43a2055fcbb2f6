"""The fastest tile of a matmul on this device: what ``quantlib tune`` does for every key of a table.

From the default, and from the other way to load or to multiply where there is one, a field of the tile at a time is
halved or doubled as long as that is faster. A candidate is timed only when operands that no order of sums can round
give the bytes of the default.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton

from quantlib import formats
from quantlib.backends.tiles import TileLayout
from quantlib.backends.triton import dequant_matmul, dequant_matmul_backward, launch, scaled_matmul, tuning, warmup
from quantlib.backends.triton.descriptors import describable, slab_describable
from quantlib.backends.triton.tables import Entry, Key, MatmulTile, is_sound
from quantlib.backends.weight import Epilogue, Layout, QuantizedWeight
from quantlib.formats import Format

# The matmuls that modules start: op, format, columns that share a scale, and whether the codes lie in tiles.
FAMILIES = {
    "W8A16": ("dequant_matmul", "int8", 0, True),
    "W4A16": ("dequant_matmul", "nf4_bf16", 128, True),
    "int4": ("dequant_matmul", "int4", 128, True),
    "FP8": ("dequant_matmul", "float8_e4m3fn", 0, True),
    "W8A8": ("scaled_matmul", "int8", 0, False),
    "backward": ("dequant_matmul_backward", "int8", 0, False),
}
ROWS = tuple(1 << power for power in range(13))  # every bucket
FASTER = 0.98  # of the time of another tile: less of a gain is noise
TIMED = 0.01  # seconds of replays of one tile

Timer = Callable[[Callable[[int], None], int], float]  # (run(copy), copies) -> microseconds
Compile = Callable[[Key, Iterable[MatmulTile]], None]  # what of these tiles is not compiled yet


def keys(families: Iterable[str], shapes: Iterable[tuple[int, int]], rows: Iterable[int]) -> Iterator[Key]:
    for family, (N, K), M in itertools.product(families, shapes, rows):
        op, format, group, tiled = FAMILIES[family]
        yield Key(op, N, K, M, format, "bfloat16", group if group < K else 0, tiled)


@dataclass(frozen=True)
class Machine:
    """The properties of a device that the search uses."""

    device: torch.device
    name: str
    shared: int  # bytes of shared memory a program may have
    cache: int  # bytes of the L2 cache


def machine(device: torch.device) -> Machine:
    cache = launch.properties(device).L2_cache_size
    return Machine(device, launch.device_name(device), launch.shared_memory(device), cache)


def search(key: Key, on: Machine, timer: Timer, compile: Compile = lambda key, tiles: None) -> Entry:
    """The entry of ``key``; ``compile`` is given the tiles that are timed next."""
    matmul = Matmul(key, on)
    default, *others = starts(key, on, matmul.describable)
    compile(key, (default, *others))
    want = matmul.exact(default)
    times: dict[MatmulTile, float] = {}

    def time(tile: MatmulTile) -> float:
        if tile not in times:
            same = tile == default or gives(matmul, tile, want)
            times[tile] = timer(lambda copy: matmul.run(tile, copy), matmul.copies) if same else float("inf")
        return times[tile]

    for start in (default, *others):
        best, improved = start, True
        time(start)
        while improved:
            near = list(neighbours(key, best, on.shared))
            compile(key, [tile for tile in near if tile not in times])
            faster = min(near, key=time, default=best)
            improved = time(faster) < FASTER * time(best)
            best = faster if improved else best
    fastest = min(times, key=lambda tile: times[tile])
    fastest = fastest if times[fastest] < FASTER * times[default] else default
    return Entry(fastest, times[fastest], times[default])


def starts(key: Key, on: Machine, describable: bool) -> list[MatmulTile]:
    """The default without a table, then the other kernels that multiply the same."""
    default, shape = default_tile(key, on, describable), (key.M, key.N, key.K)
    others = []
    if key.op == "dequant_matmul":
        format = formats.get(key.format)
        ways = tuning.slab_ways(shape, format, key.tiled, key.group or key.K)
        others = [way for way in ways if way != default and (describable or not way.described)]
        if default.slab:
            tile_k = TileLayout(format).columns if key.tiled else 64
            others += [tuning.fitted(key, MatmulTile(128, 128, tile_k, 1, 8, 3), on.shared)]
    elif default.described:
        others = [default_tile(key, on, False)]
    elif describable:
        others = [tuning.choose_described(shape, torch.bfloat16)]
    return [default, *(tile for tile in others if is_sound(key, tile, on.shared))]


def default_tile(key: Key, on: Machine, describable: bool) -> MatmulTile:
    shape, format, dtype = (key.M, key.N, key.K), formats.get(key.format), getattr(torch, key.dtype)
    bk = key.group or key.K
    if key.op == "dequant_matmul":
        return tuning.choose_matmul(shape, format, dtype, bk, key.tiled, False, tuning.UNTUNED, on.shared, describable)
    if key.op == "scaled_matmul":
        return tuning.choose_scaled(shape, format, bk, tuning.UNTUNED, on.shared, dtype, describable)
    return tuning.choose_backward(shape, format, dtype, bk, tuning.UNTUNED, on.shared)


def neighbours(key: Key, tile: MatmulTile, shared: int) -> Iterator[MatmulTile]:
    """The sound tiles with one field halved or doubled, of loads in flight one more or less, or a choice turned."""
    for name in ("tile_n", "tile_m", "tile_k", "splits", "warps", "stages", "slab"):
        value = getattr(tile, name)
        steps = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        for changed in (replace(tile, **{name: step}) for step in steps if step != value):
            if is_sound(key, changed, shared):
                yield changed
    for turned in (replace(tile, right=not tile.right), replace(tile, paired=not tile.paired)):
        if is_sound(key, turned, shared):
            yield turned


def gives(matmul: Matmul, tile: MatmulTile, want: torch.Tensor) -> bool:
    """True if a tile compiles, starts and gives the bytes of the default tile."""
    try:
        same = torch.equal(matmul.exact(tile), want)
    except (triton.TritonError, RuntimeError):  # the compiler's, and the device's that lacks what the tile needs
        return False
    if not same:
        warnings.warn(f"{matmul.key}: {tile} gives other bytes than the default, a bug", RuntimeWarning, stacklevel=2)
    return same


class Compilers:
    """Processes that compile tiles into Triton's own cache, where this process finds them; they touch no GPU.

    A tile that does not compile there does not here either, where that is told; nor do the tiles of processes that
    have died, which this process compiles itself.
    """

    def __init__(self, on: launch.Planned, jobs: int) -> None:
        self._pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), warmup.start, (on,))

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *raised: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, key: Key, tiles: Iterable[MatmulTile]) -> None:
        with contextlib.suppress(BrokenProcessPool):
            wait([self._pool.submit(compile_tile, key, tile) for tile in tiles])


def compile_tile(key: Key, tile: MatmulTile) -> None:
    """Compile what ``tile`` starts, in a process that only compiles."""
    assert launch.planned is not None
    Matmul(key, Machine(torch.device("meta"), launch.planned.name, launch.planned.shared, 0)).run(tile, 0)


class Matmul:
    """The operands of a key: random codes in copies that no cache holds, and once more such that sums are exact."""

    def __init__(self, key: Key, on: Machine) -> None:
        self.key, self.format = key, formats.get(key.format)
        M, N, K, device = key.M, key.N, key.K, on.device
        self.block, self.dtype = (1, key.group or K), getattr(torch, key.dtype)
        groups = -(-K // self.block[1])
        shape = TileLayout(self.format).shape(N, K) if key.tiled else (N, self.format.columns(K))
        stored = torch.uint8 if key.tiled or self.format.packed else getattr(torch, self.format.dtype_name)
        bytes_of_codes = torch.Size(shape).numel()
        self.copies = max(1, min(64, -(-3 * on.cache // bytes_of_codes)))
        self.codes = [random_codes(self.format, shape, device).view(stored) for _ in range(self.copies)]
        self.scale = torch.exp2(torch.randint(-3, 3, (N, groups), device=device).float())
        if key.op == "scaled_matmul":
            self.x, self.x_scale = random_bytes((M, K), device).view(torch.int8), torch.ones(M, 1, device=device)
            self.exact_x = self.x
        else:
            width = N if key.op == "dequant_matmul_backward" else K
            self.x = torch.randn(M, width, device=device).to(self.dtype)
            self.exact_x = torch.randint(-1, 2, (M, width), device=device).to(self.dtype)
        self.y = torch.empty(M, K if key.op == "dequant_matmul_backward" else N, dtype=self.dtype, device=device)
        self.describable = key.op == "dequant_matmul" and slab_describable(self.x)
        if key.op == "scaled_matmul":
            self.describable = describable(self.x, self.weight(self.codes[0]), None)

    def exact(self, tile: MatmulTile) -> torch.Tensor:
        """Return y of a tile, written into memory that held NaN."""
        self.y.fill_(float("nan"))
        self.call(self.exact_x, self.codes[0], tile)
        return self.y.view(torch.uint8).clone()

    def run(self, tile: MatmulTile, copy: int) -> None:
        self.call(self.x, self.codes[copy], tile)

    def weight(self, codes: torch.Tensor) -> QuantizedWeight:
        layout: Layout = "tiles" if self.key.tiled else "plain"
        return QuantizedWeight(codes, self.scale, self.format, self.block, None, (self.key.N, self.key.K), layout)

    def call(self, x: torch.Tensor, codes: torch.Tensor, tile: MatmulTile) -> None:
        weight = self.weight(codes)
        if self.key.op == "dequant_matmul":
            dequant_matmul.dequant_matmul(x, weight, Epilogue(), False, self.y, tile)
        elif self.key.op == "scaled_matmul":
            scaled_matmul.scaled_matmul(x, self.x_scale, weight, None, Epilogue(), self.y, tile)
        else:
            dequant_matmul_backward.dequant_matmul_backward(x, weight, self.y, tile)


def random_bytes(shape: Any, device: torch.device) -> torch.Tensor:
    return torch.randint(0, 256, tuple(shape), dtype=torch.uint8, device=device)


def random_codes(format: Format, shape: Any, device: torch.device) -> torch.Tensor:
    """Bytes of codes. Those of an 8-bit float are small integers: of any other, sums are not exact, or NaN."""
    made = random_bytes(shape, device)
    if not (format.is_float and format.bits == 8):
        return made
    integers = torch.tensor([format.code(float(value)) for value in range(-8, 8)], dtype=torch.uint8, device=device)
    return integers[(made & 15).int()]


def graph_timer(run: Callable[[int], None], copies: int) -> float:
    """The median over replays of a CUDA graph in which copies take turns, as many as take `TIMED` seconds.

    ``triton.testing.do_bench_cudagraph`` captures twice and replays for ten times as long, for each of some 30 tiles.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run(0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(copies):
                run(copy)
        replayed(graph)
        times: list[float] = []
        while len(times) < 5 or (sum(times) < 1e3 * TIMED and len(times) < 50):
            times.append(replayed(graph))
    torch.cuda.current_stream().wait_stream(stream)
    return 1e3 * statistics.median(times) / copies


def replayed(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of a replay; the GPU is busy with another one while it is queued."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
