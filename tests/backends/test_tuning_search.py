"""``quantlib tune`` without a GPU: search and command in Triton's interpreter, with a clock that is made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.backends import triton as backend
from quantlib.backends.triton import tables
from quantlib.cli import main, tune

pytest.importorskip("triton")
if not backend.interpreted():
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)

from quantlib.backends.triton import search

ROOT = Path(__file__).resolve().parents[2]
CPU = search.Machine(torch.device("cpu"), "Imaginary GPU", 101376, 100)
SMALL = ["--shape", "32", "64"]


def invented(tile: tables.MatmulTile) -> float:
    """Microseconds of a tile: best with five loads in flight."""
    return 10.0 + abs(tile.stages - 5)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tables.MatmulTile]]:
    """The tiles that were timed; the timer runs every copy, so that it is what a GPU would run."""
    timed: list[tables.MatmulTile] = []

    def run(self: search.Matmul, tile: tables.MatmulTile, copy: int) -> None:
        self.call(self.x, self.codes[copy], tile)
        timed.append(tile)

    def timer(run: Callable[[int], None], copies: int) -> float:
        run(copies - 1)
        return invented(timed[-1])

    monkeypatch.setattr(search.Matmul, "run", run)
    monkeypatch.setattr(search, "graph_timer", timer)
    monkeypatch.setattr(tune, "machine", lambda device: CPU)
    yield timed
    tables.of_device.cache_clear()


@pytest.mark.parametrize("family", search.FAMILIES)
def test_the_search_ends_where_nothing_near_is_faster(family: str, clock: list[tables.MatmulTile]) -> None:
    (key,) = search.keys([family], [(32, 64)], [2])
    entry = search.search(key, CPU, search.graph_timer)
    assert entry.us == invented(entry.tile) < entry.default_us
    assert entry.tile == replace(search.default_tile(key, CPU, False), stages=5)
    assert len(clock) == len(set(clock)), "a tile was timed twice"
    assert all(tables.is_sound(key, tile, CPU.shared) for tile in clock)


def test_every_tile_is_compiled_before_it_is_timed_and_once(clock: list[tables.MatmulTile]) -> None:
    (key,) = search.keys(["W8A16"], [(32, 64)], [2])
    compiled: list[tables.MatmulTile] = []

    def compile(of: tables.Key, tiles: Iterable[tables.MatmulTile]) -> None:
        assert of == key
        assert set(clock) == set(compiled)
        compiled.extend(tiles)

    search.search(key, CPU, search.graph_timer, compile)
    assert sorted(map(str, compiled)) == sorted(map(str, clock))


COMPILE = """
import os
from dataclasses import replace
from pathlib import Path
from quantlib.backends.triton import launch, search, tuning, warmup

def kept():
    cubins = Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")
    return sorted((path.name, path.stat().st_mtime_ns) for path in cubins)

on = launch.Planned(80, "some device", 101376)
(key,) = search.keys(["W8A16"], [(32, 64)], [2])
default = search.default_tile(key, on, False)
tiles = [replace(default, stages=stages, splits=splits) for stages in (2, 3) for splits in (1, 2)]
with search.Compilers(on, 2) as compile:
    compile(key, [*tiles, replace(default, tile_n=48)])  # no power of two: does not compile
before = kept()
warmup.start(on)
for tile in tiles:
    search.compile_tile(key, tile)
print(len(before), kept() == before)
"""


def test_processes_compile_into_the_cache_that_this_one_reads(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "QUANTLIB_BUILD": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["4", "True"], done.stderr


def test_no_gain_leaves_the_default(clock: list[tables.MatmulTile]) -> None:
    (key,) = search.keys(["W8A16"], [(32, 64)], [2])
    entry = search.search(key, CPU, lambda run, copies: 10.0 - 0.01 * len(clock))
    assert entry.tile == search.default_tile(key, CPU, False)
    assert entry.us == entry.default_us


def test_a_large_batch_begins_with_slabs_and_with_none(clock: list[tables.MatmulTile]) -> None:
    (key,) = search.keys(["W8A16"], [(32, 64)], [1024])
    slabs, plain = search.starts(key, CPU, False)
    assert slabs.slab
    assert not plain.slab
    large = replace(CPU, shared=232448)
    ways = search.starts(key, large, True)
    assert [tile.described for tile in ways] == [False, True, False]
    assert [tile.slab > 0 for tile in ways] == [True, True, False]
    (few,) = search.keys(["W8A16"], [(32, 64)], [4])
    assert not any(tile.slab for tile in search.starts(few, CPU, False))
    (codes,) = search.keys(["W8A8"], [(4096, 4096)], [1024])
    assert [tile.described for tile in search.starts(codes, large, True)] == [True, False]
    assert [tile.described for tile in search.starts(replace(codes, M=64), large, True)] == [False, True]


def test_a_tile_that_gives_other_bytes_is_never_chosen(
    clock: list[tables.MatmulTile], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = search.Matmul.call

    def planted(self: search.Matmul, x: Any, codes: Any, tile: tables.MatmulTile) -> None:
        call(self, x, codes, tile)
        if tile.stages == 5:
            self.y[-1, -1] += 1
        elif tile.warps == 4:
            raise RuntimeError("no room for four")

    monkeypatch.setattr(search.Matmul, "call", planted)
    (key,) = search.keys(["W8A16"], [(32, 64)], [2])
    with pytest.warns(RuntimeWarning, match=r"dequant_matmul 32x64 M=2 int8 .* gives other bytes than the default"):
        entry = search.search(key, CPU, search.graph_timer)
    assert entry.tile == search.default_tile(key, CPU, False)
    assert len(clock) > 3
    assert not any(tile.stages == 5 or tile.warps == 4 for tile in clock)


def test_the_command_writes_a_table_and_goes_on_where_it_stopped(
    clock: list[tables.MatmulTile], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUANTLIB_TUNED", str(tmp_path))
    monkeypatch.setattr(search.Matmul, "call", lambda *_: None)
    path, timer = tmp_path / "imaginary-gpu.json", search.graph_timer
    asked = ["tune", *SMALL, "--rows", "1", "--rows", "2", "--only", "W4A16"]

    def interrupted(run: Callable[[int], None], copies: int) -> float:
        if path.exists():
            raise KeyboardInterrupt
        return timer(run, copies)

    monkeypatch.setattr(search, "graph_timer", interrupted)
    assert main(asked) == 130
    out, err = capsys.readouterr()
    assert err.endswith("quantlib tune: interrupted\n")
    assert out.endswith(f"{path}: 1 entries for Imaginary GPU, 1 of them new\n")

    monkeypatch.setattr(search, "graph_timer", timer)
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert out.endswith(f"{path}: 2 entries for Imaginary GPU, 1 of them new\n")
    assert "dequant_matmul 32x64 M=2 nf4_bf16 bfloat16 tiled" in out
    table, wrong = tables.read(path, CPU.name)
    assert table is not None
    assert not wrong
    assert table.software.keys() == {"quantlib", "torch", "triton"}
    one, two = search.keys(["W4A16"], [(32, 64)], [1, 2])
    assert list(table.entries) == [one, two]
    assert tables.lookup(CPU.name, one) == table.entries[one].tile != search.default_tile(one, CPU, False)

    timed = len(clock)
    assert timed > 10
    assert main(asked) == 0
    assert capsys.readouterr().out == f"{path}: 2 entries for Imaginary GPU, 0 of them new\n"
    assert len(clock) == timed
    assert main([*asked, "--again"]) == 0
    assert len(clock) > timed


def test_a_file_that_is_no_table_is_not_replaced(
    clock: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.json"
    path.write_text("{}")
    assert main(["tune", *SMALL, "--out", str(path)]) == 2
    assert capsys.readouterr().err.startswith(
        "quantlib tune: --out must be a table of Imaginary GPU or no file yet, got "
    )
    assert path.read_text() == "{}"


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "cpu", "gpu"])
def test_without_a_gpu_it_says_so(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--device", device]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quantlib tune: needs a CUDA device: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--shape", "0", "64"], "--shape must be a number >= 1, got '0'"),
        (["--rows", "3"], "--rows must be a power of two up to 4096, got '3'"),
        (["--only", "W2A2"], "--only must be W8A16, W4A16, int4, FP8, W8A8 or backward, got 'W2A2'"),
    ],
)
def test_wrong_arguments(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *argv]) == 2
    assert says in capsys.readouterr().err
