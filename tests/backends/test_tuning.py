"""Tables of the fastest tiles: read, checked, preferred, and what a wrong one may do, which is to warn."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib import formats
from quantlib.backends.triton import tables
from quantlib.backends.triton.tables import Entry, Key, MatmulTile, Table
from quantlib.cli import info, tune

GPU, SHARED = "Imaginary GPU 9000", 232448
KEY = Key("dequant_matmul", 4096, 4096, 4, "int8", "bfloat16", 0, True)
TILE = MatmulTile(32, 8, 64, 2, 2, 5)
GROUPS = Key("scaled_matmul", 4096, 4096, 4, "int4", "bfloat16", 128)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's tables; no device has been asked for before or is afterwards."""
    monkeypatch.setenv("QUANTLIB_TUNED", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    tables.of_device.cache_clear()
    if tables_are_used():
        from quantlib.backends.triton import tuning

        for choose in (tuning.choose_matmul, tuning.choose_backward, tuning.choose_scaled):
            choose.cache_clear()


def tables_are_used() -> bool:
    from quantlib.backends import triton

    return triton.installed()


def written(path: Path, **changed: Any) -> Path:
    """A table with one entry, and then with ``changed`` fields in its head, its tile or its key."""
    Table(GPU, SHARED, {"torch": "2"}, {KEY: Entry(TILE, 10.0, 12.5)}).write(path)
    found = json.loads(path.read_text())
    (entry,) = found["entries"]
    for name, value in changed.items():
        for part in (found, entry, entry["tile"]):
            if name in part:
                part[name] = value
                break
        else:
            entry[name] = value
    path.write_text(json.dumps(found))
    return path


def choice(M: int, device: str = GPU, invariant: bool = False) -> MatmulTile:
    from quantlib.backends.triton import tuning

    int8 = formats.get("int8")
    found: MatmulTile = tuning.choose_matmul(
        (M, 4096, 4096), int8, torch.bfloat16, 4096, True, invariant, device, SHARED
    )
    return found


def test_a_table_is_what_was_written(tmp_path: Path) -> None:
    entries = {KEY: Entry(TILE, 10.0, 12.5), GROUPS: Entry(MatmulTile(64, 8, 128, 1, 2, 4), 3.25, 3.25)}
    table = Table(GPU, SHARED, {"torch": "2.11", "triton": "3.6"}, entries)
    path = tmp_path / "deep" / "down" / tables.file_name(GPU)
    table.write(path)
    assert tables.read(path, GPU) == (table, [])
    assert [line.count('"op"') for line in path.read_text().splitlines()[-4:]] == [1, 1, 0, 0]
    assert [file.name for file in path.parent.iterdir()] == ["imaginary-gpu-9000.json"]


def test_an_empty_table(tmp_path: Path) -> None:
    Table(GPU, SHARED).write(tmp_path / "empty.json")
    assert tables.read(tmp_path / "empty.json", GPU) == (Table(GPU, SHARED), [])


def test_what_was_measured_comes_first(folder: Path) -> None:
    pytest.importorskip("triton")
    written(folder / tables.file_name(GPU))
    assert choice(3) == choice(4) == TILE
    assert choice(5) != TILE
    assert choice(4, invariant=True) != TILE
    assert choice(4, "another GPU").splits == 8
    assert choice(4, "") != TILE


def test_a_batch_invariant_row_has_one_tile_for_every_batch(folder: Path) -> None:
    pytest.importorskip("triton")
    few, many = replace(KEY, M=32), replace(KEY, M=4096)
    entries = {few: Entry(replace(TILE, tile_m=32), 1, 1), many: Entry(replace(TILE, tile_m=128, splits=1), 1, 1)}
    Table(GPU, SHARED, {}, entries).write(folder / tables.file_name(GPU))
    assert {choice(M, invariant=True) for M in (1, 2, 31, 64, 1000, 4096)} == {entries[few].tile}
    assert choice(4000) == entries[many].tile


def test_the_users_table_wins_over_that_of_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHIPPED", folder / "shipped")
    other = replace(KEY, M=1)
    entries = {key: Entry(replace(TILE, warps=4), 1, 1) for key in (KEY, other)}
    Table(GPU, SHARED, {}, entries).write(folder / "shipped" / tables.file_name(GPU))
    assert tables.lookup(GPU, KEY) == tables.lookup(GPU, other) == replace(TILE, warps=4)
    written(folder / tables.file_name(GPU))
    forget()
    assert tables.lookup(GPU, KEY) == TILE
    assert tables.lookup(GPU, other) == replace(TILE, warps=4)
    assert tables.shipped() == [GPU]


def test_where_a_users_tables_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QUANTLIB_TUNED", "QUANTLIB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert tables.users("NVIDIA A100-SXM4-80GB") == Path("/cache/quantlib/tuned/nvidia-a100-sxm4-80gb.json")
    monkeypatch.setenv("QUANTLIB_CACHE", "/mine")
    assert tables.users("NVIDIA H200") == Path("/mine/tuned/nvidia-h200.json")
    monkeypatch.setenv("QUANTLIB_TUNED", "/tuned")
    assert tables.users("NVIDIA H200") == Path("/tuned/nvidia-h200.json")


WRONG = [
    ({"version": 2}, "version must be 1, got 2"),
    ({"device": "NVIDIA H200"}, f"device must be {GPU}, got NVIDIA H200"),
    ({"shared": "much"}, "shared must be a number of bytes, got much"),
    ({"entries": {}}, "entries must be a list, got {}"),
    ({"colour": "red"}, "entry 1: keys must be K, M, N, dtype, format, group, op, tiled, got K, M, N, colour, dtype"),
    ({"op": "matmul"}, "entry 1: op must be dequant_matmul, dequant_matmul_backward, scaled_matmul, got matmul"),
    ({"format": "int3"}, "got int3"),
    ({"dtype": "float64"}, "entry 1: dtype must be float32, bfloat16, float16, got float64"),
    ({"M": 3}, "entry 1: M must be a power of two up to 4096, got 3"),
    ({"N": 4096.0}, "entry 1: N must be an integer, got 4096.0"),
    ({"tiled": 1}, "entry 1: tiled must be true or false, got 1"),
    ({"group": -1}, "entry 1: group must be 0, or less than K, got -1"),
    ({"us": 0}, "entry 1: us must be microseconds, got 0"),
    ({"tile": None}, "entry 1: tile must be an object, got None"),
    ({"tile_n": 48}, "entry 1: tile_n must be a power of two from 16 to 256, got 48"),
    ({"tile_m": 64}, "entry 1: tile_m must be from 8 to 32, got 64"),
    ({"tile_k": 128}, "entry 1: tile_k must be 64, what tiles hold, got 128"),
    ({"splits": 3}, "entry 1: splits must be a power of two up to 64, got 3"),
    ({"warps": 3}, "entry 1: warps must be 1, 2, 4, 8 or 16, got 3"),
    ({"stages": 9}, "entry 1: stages must be from 1 to 8, got 9"),
    ({"slab": 128}, "entry 1: slab must be 0 here, got 128"),
    ({"described": True}, "entry 1: described must be false here, got True"),
    ({"shared": 10000}, "entry 1: tile must be within 10000 bytes of shared memory, got 20480 bytes"),
]


@pytest.mark.parametrize(("changed", "says"), WRONG, ids=[next(iter(changed)) for changed, _ in WRONG])
def test_a_wrong_entry_is_a_warning_and_the_default(changed: dict[str, Any], says: str, folder: Path) -> None:
    path = written(folder / tables.file_name(GPU), **changed)
    with pytest.warns(RuntimeWarning) as warned:
        assert tables.lookup(GPU, KEY) is None
    (message,) = [str(w.message) for w in warned]
    assert str(path) in message
    assert says in message
    with warnings.catch_warnings(action="error"):
        assert tables.lookup(GPU, KEY) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', "\0"])
def test_a_file_that_is_no_table(text: str, folder: Path) -> None:
    (folder / tables.file_name(GPU)).write_text(text)
    with pytest.warns(RuntimeWarning, match="imaginary-gpu-9000.json: .*; defaults instead"):
        assert tables.lookup(GPU, KEY) is None


def test_one_wrong_entry_leaves_the_others(folder: Path) -> None:
    other = replace(KEY, M=1)
    entries = {KEY: Entry(replace(TILE, warps=5), 1, 1), other: Entry(TILE, 1, 1)}
    Table(GPU, SHARED, {}, entries).write(folder / tables.file_name(GPU))
    with pytest.warns(RuntimeWarning, match="entry 1: warps"):
        assert tables.lookup(GPU, KEY) is None
    assert tables.lookup(GPU, other) == TILE


@pytest.mark.parametrize(
    ("key", "tile", "says"),
    [
        (GROUPS, MatmulTile(64, 8, 128, 2, 2, 4), "splits must be 1, got 2"),
        (replace(GROUPS, format="int8", group=0), MatmulTile(64, 8, 16, 1, 2, 4), "tile_k must be .* from 32 "),
        (replace(KEY, M=4096), MatmulTile(128, 256, 64, 1, 4, 2), "at most 128 sums a thread, got 256 sums a thread"),
        (replace(KEY, M=64), MatmulTile(128, 128, 64, 1, 8, 3, 4096, True), "slab must be 0 here"),
        (replace(KEY, M=4096), MatmulTile(128, 0, 64, 1, 8, 3, 4096, True), "tile_m must be from 8 to 256"),
        (replace(KEY, M=4096), MatmulTile(128, 128, 64, 1, 2, 3, 4096, True), "described must be false here"),
        (replace(KEY, M=4096), MatmulTile(128, 128, 64, 1, 8, 3, 4096), "tile_m must be from 0 to 0"),
        (replace(KEY, M=4096), MatmulTile(256, 128, 128, 1, 8, 3, 4096, True), "within 232448 bytes of shared memory"),
        (replace(KEY, M=4096, dtype="float32"), MatmulTile(64, 0, 64, 1, 4, 1, 512), "slab must be 0 here"),
        (replace(KEY, M=4096, dtype="float16", group=64), MatmulTile(64, 0, 64, 1, 4, 1, 512), "slab must be 0 here"),
        (replace(KEY, op="dequant_matmul_backward", tiled=False), MatmulTile(32, 16, 64, 2, 4, 2), "splits must be 1"),
        (replace(KEY, op="scaled_matmul"), MatmulTile(64, 8, 64, 1, 2, 4), "tiled must be false but for"),
    ],
)  # fmt: skip
def test_what_would_give_other_bytes_is_not_sound(key: Key, tile: MatmulTile, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tables.expect_sound(key, tile, SHARED)


@pytest.mark.parametrize("shared", [101376, 166912, SHARED])
def test_every_default_is_sound(shared: int) -> None:
    pytest.importorskip("triton")
    from quantlib.backends.triton import search

    on = search.Machine(torch.device("cpu"), GPU, shared, 1)
    for key in search.keys(search.FAMILIES, tune.SHAPES, search.ROWS):
        for describable in {False, key.op != "dequant_matmul_backward" and shared == SHARED}:
            for tile in search.starts(key, on, describable):
                tables.expect_sound(key, tile, shared)
                assert all(tables.is_sound(key, near, shared) for near in search.neighbours(key, tile, shared))


def test_every_default_of_other_weights_fits() -> None:
    """Every format, type of x and width of a group: what a device has of shared memory is enough."""
    pytest.importorskip("triton")
    from quantlib.backends.triton import search

    for name, dtype, group, tiled in itertools.product(
        (f.name for f in formats.TABLE if f.bits <= 16), tables.DTYPES, (0, 10, 32, 128), (False, True)
    ):
        if tiled and formats.get(name).bits > 8:
            continue
        for op, M in itertools.product(tables.OPS, (1, 16, 64, 100, 4096)):
            if op == "dequant_matmul" or not tiled:
                key = Key(op, 4096, 4096, tables.bucket(M), name, dtype, group, tiled)
                on = search.Machine(torch.device("cpu"), GPU, 101376, 1)
                tile = search.default_tile(key, on, False)
                assert tables.shared_bytes(key, tile) <= 101376, (key, tile)


def test_info_says_which_table_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = info.tuning()
    if not torch.cuda.is_available():
        assert facts == {"devices": {}, "shipped": tables.shipped()}
        assert info.tuning_rows(facts)[0] == ("no GPU", "-", "no table is read")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda k: (GPU, "Second", "Second")[k])
    path = written(folder / tables.file_name(GPU))
    facts = info.tuning()
    assert facts["devices"] == {GPU: {str(path): "1 matmuls"}, "Second": {}}
    assert info.tuning_rows(facts)[:2] == [
        (GPU, str(path), "1 matmuls"),
        ("Second", "no table", "the default tiles; quantlib tune measures faster ones"),
    ]
    written(path, warps=3)
    assert info.tuning()["devices"][GPU] == {str(path): "0 matmuls; entry 1: warps must be 1, 2, 4, 8 or 16, got 3"}


def test_shipped_tables_are_sound() -> None:
    for device in tables.shipped():
        table, wrong = tables.read(tables.SHIPPED / tables.file_name(device), device)
        assert table is not None
        assert not wrong
        assert table.entries
        assert table.entries


MULTIPROCESSORS = 170  # of the largest GPU, an RTX 5090; a B200 has 148, an H200 132
BATCHES = (1, 4, 16, 32, 64, 65, 128, 256, 512, 1024, 4096)


def programs(M: int, N: int, tile: MatmulTile) -> int:
    """Count the programs that a matmul starts; by slabs of the vendor's product these are tiles of 128 x 128."""
    vendors = tile.slab and not tile.described
    down, across, parts = (128, 128, 1) if vendors else (tile.tile_m, tile.tile_n, tile.splits)
    rows = min(tile.slab or N, N)
    return -(-M // down) * -(-rows // across) * parts


@pytest.mark.parametrize(("N", "K"), tune.SHAPES)
@pytest.mark.parametrize(("name", "group"), [("int8", 0), ("int4", 128)])
def test_every_default_fills_the_largest_gpu(N: int, K: int, name: str, group: int) -> None:
    """A product that starts fewer programs than there are multiprocessors leaves some idle, whatever its code is."""
    pytest.importorskip("triton")
    from quantlib.backends.triton import tuning

    f, bf16 = formats.get(name), torch.bfloat16
    for M in BATCHES:
        tile = tuning.choose_matmul((M, N, K), f, bf16, group or K, True, False, tuning.UNTUNED, SHARED)
        # up to 512 rows the vendor splits K; an H200 has 132
        assert programs(M, N, tile) >= (128 if tile.slab and M <= 512 else MULTIPROCESSORS), (M, tile)
        # 16 rows of the weight for each warp: of fewer, two warps would decode the same codes
        assert tile.slab or tile.tile_n >= 16 * tile.warps, (M, tile)
        assert tile.slab * M <= 4 * tuning.SLAB_SUMS or tile.slab * K <= tuning.SLAB // 2, (M, tile)
        tile = tuning.choose_matmul((M, N, K), f, bf16, group or K, True, False, tuning.UNTUNED, SHARED, True)
        assert programs(M, N, tile) >= 128, (M, tile)  # through descriptors K is not shared
        assert tile.slab * M <= 4 * tuning.SLAB_SUMS or tile.slab * K <= tuning.SLAB, (M, tile)
        if not group:
            tile = tuning.choose_scaled((M, N, K), f, K, tuning.UNTUNED, SHARED, bf16, False)
            assert programs(M, N, tile) >= MULTIPROCESSORS, (M, tile)
            tile = tuning.choose_scaled((M, N, K), f, K, tuning.UNTUNED, SHARED, bf16, True)
            assert programs(M, N, tile) >= 128, (M, tile)  # of an H200's 132: through descriptors K is not shared
        elif not f.is_float:
            tile = tuning.choose_scaled((M, N, K), f, group, tuning.UNTUNED, SHARED, bf16, False)
            assert tile.tile_n >= 16 * tile.warps, (M, tile)
        if M > 128:
            tile = tuning.choose_backward((M, N, K), f, bf16, group or K, tuning.UNTUNED, SHARED)
            assert tile.slab >= K or programs(M, K, tile) >= MULTIPROCESSORS, (
                M,
                tile,
            )  # a whole weight is the vendor's
