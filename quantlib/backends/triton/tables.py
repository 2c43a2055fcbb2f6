"""The fastest tiles of a device: one JSON file a device, written by ``quantlib tune``, read when a matmul first asks.

The tables of the package are read first, then the user's, which win: those in ``QUANTLIB_TUNED``, by default ``tuned``
in the cache. Nothing here is trusted: an entry that is not sound is left out with one warning, and its matmuls run
with the default.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from quantlib import _build, formats
from quantlib.backends.tiles import TileLayout

VERSION = 1
SHIPPED = Path(__file__).parent / "tuned"
FEW = 32  # rows of x up to which a group's scale multiplies its sum, and two warps share a tile
MOST = 4096  # rows of x of the last bucket
OPS = ("dequant_matmul", "dequant_matmul_backward", "scaled_matmul")
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


@dataclass(frozen=True)
class MatmulTile:
    """The work of one program: tile_n rows of the weight by tile_m rows of x, tile_k columns at a time."""

    tile_n: int
    tile_m: int
    tile_k: int
    splits: int  # of K; the last program to arrive adds their sums in order
    warps: int
    stages: int  # of loads in flight
    slab: int = 0  # rows of the weight that are made floats at a time, for the vendor's matmul; 0: none are
    described: bool = False  # loaded through tensor descriptors (descriptors.py), of a slab too: not by the vendor then
    right: bool = False  # the weight is the right operand, which tensor cores read from shared memory
    paired: bool = False  # the columns of both operands are multiplied in the order of a warpgroup's registers


@dataclass(frozen=True)
class Key:
    """The matmuls that an entry serves: those of a weight [N, K] with up to M rows of x."""

    op: str
    N: int
    K: int
    M: int  # a power of two, `bucket` of the rows of x
    format: str  # of the codes
    dtype: str  # of x, or of y where x is codes
    group: int = 0  # columns that share a scale; 0: all of a row
    tiled: bool = False

    def __str__(self) -> str:
        words = [self.op, f"{self.N}x{self.K}", f"M={self.M}", self.format, self.dtype]
        return " ".join(words + [f"group {self.group}"] * (self.group > 0) + ["tiled"] * self.tiled)


@dataclass(frozen=True)
class Entry:
    """The fastest tile, its microseconds and those of the default."""

    tile: MatmulTile
    us: float
    default_us: float


@dataclass
class Table:
    """The measurements of a device."""

    device: str
    shared: int  # bytes of shared memory that a program may have
    software: dict[str, str] = field(default_factory=dict)
    entries: dict[Key, Entry] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Replace the file as a whole, an entry a line."""
        head = {"version": VERSION, "device": self.device, "shared": self.shared, "software": self.software}
        lines = [
            json.dumps(
                {**asdict(key), "tile": asdict(e.tile), "us": round(e.us, 2), "default_us": round(e.default_us, 2)}
            )
            for key, e in self.entries.items()
        ]
        text = json.dumps(head, indent=1)[:-2] + ',\n "entries": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


# ---- reading ---------------------------------------------------------------------------------------------------------


def bucket(M: int) -> int:
    """The M of a table: the next power of two, at most 4096."""
    return min(1 << max(M - 1, 0).bit_length(), MOST)


def lookup(device: str, key: Key) -> MatmulTile | None:
    """Return the fastest tile for ``key`` on the device of that name, or None."""
    entry = of_device(device).get(key)
    return entry.tile if entry else None


@functools.cache
def of_device(device: str) -> dict[Key, Entry]:
    """The entries of every table of a device; what is wrong with one is a warning."""
    entries: dict[Key, Entry] = {}
    for path in paths(device):
        table, wrong = read(path, device)
        entries |= table.entries if table else {}
        if wrong:
            more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            warnings.warn(f"quantlib: {path}: {wrong[0]}{more}; defaults instead", RuntimeWarning, stacklevel=2)
    return entries


def paths(device: str) -> list[Path]:
    """The files that there are for a device, the user's last."""
    found = [SHIPPED / file_name(device)]
    with contextlib.suppress(_build.BuildError):  # a QUANTLIB_CACHE that cannot be used
        found.append(users(device))
    return [path for path in found if device and os.path.isfile(path)]


def users(device: str) -> Path:
    """The user's own file for a device."""
    return Path(os.environ.get("QUANTLIB_TUNED") or _build.caches()[0] / "tuned", file_name(device))


def file_name(device: str) -> str:
    """NVIDIA H200 -> nvidia-h200.json"""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def shipped() -> list[str]:
    """The devices whose tables are part of the package."""
    return [json.loads(path.read_text())["device"] for path in sorted(SHIPPED.glob("*.json"))]


def read(path: Path, device: str) -> tuple[Table | None, list[str]]:
    """The table of a file, without what is wrong with it, and that in words."""
    try:
        found = json.loads(path.read_text())
        expect("the file", found, isinstance(found, dict), "a JSON object")
        expect("version", found.get("version"), found.get("version") == VERSION, str(VERSION))
        expect("device", found.get("device"), found.get("device") == device, device)
        shared, software, rows = found.get("shared"), found.get("software", {}), found.get("entries")
        expect("shared", shared, is_int(shared) and shared > 0, "a number of bytes")
        expect("software", software, isinstance(software, dict), "an object")
        expect("entries", rows, isinstance(rows, list), "a list")
    except (OSError, ValueError) as error:
        return None, [" ".join(str(error).split())]
    table, wrong = Table(device, shared, software), []
    for number, row in enumerate(rows, 1):
        try:
            key, entry = parsed(row)
            expect_sound(key, entry.tile, shared)
            table.entries[key] = entry
        except ValueError as error:
            wrong.append(f"entry {number}: {error}")
    return table, wrong


def parsed(row: Any) -> tuple[Key, Entry]:
    """The key and the entry of a line, each field there and of its type."""
    expect("it", row, isinstance(row, dict), "an object")
    row = dict(row)
    tile, us, default_us = (row.pop(name, None) for name in ("tile", "us", "default_us"))
    expect("tile", tile, isinstance(tile, dict), "an object")
    for name, value in (("us", us), ("default_us", default_us)):
        expect(name, value, isinstance(value, int | float) and value > 0, "microseconds")
    return typed(Key, row), Entry(typed(MatmulTile, tile), us, default_us)


def typed(kind: Any, values: dict[str, Any]) -> Any:
    """``kind`` of a JSON object that has each of its fields, of its type, and no other."""
    known = {f.name: f.type for f in fields(kind)}
    names = sorted(values)
    expect("keys", ", ".join(names), names == sorted(known), ", ".join(sorted(known)))
    for name, type_name in known.items():
        right = is_int(values[name]) if type_name == "int" else type(values[name]).__name__ == type_name
        expect(name, values[name], right, {"int": "an integer", "bool": "true or false", "str": "text"}[type_name])
    return kind(**values)


# ---- what is sound ---------------------------------------------------------------------------------------------------


def is_sound(key: Key, tile: MatmulTile, shared: int) -> bool:
    try:
        expect_sound(key, tile, shared)
    except ValueError:
        return False
    return True


def expect_sound(key: Key, tile: MatmulTile, shared: int) -> None:
    """Raise a ValueError that says why ``tile`` cannot serve ``key`` with so many bytes of shared memory.

    Sound is what gives the contract's bytes and starts on the device; how fast it is, is another matter.
    """
    k, t, scaled = key, tile, key.op == "scaled_matmul"
    slab, decodes = t.slab > 0, t.slab > 0 and not t.described  # by tiles that have no rows of x
    expect("op", k.op, k.op in OPS, ", ".join(OPS))
    expect("format", k.format, k.format in formats.FORMATS, ", ".join(formats.FORMATS))
    expect("dtype", k.dtype, k.dtype in DTYPES, ", ".join(DTYPES))
    expect("N, K", (k.N, k.K), min(k.N, k.K) > 0, "positive")
    expect("M", k.M, bucket(k.M) == k.M, f"a power of two up to {MOST}")
    expect("group", k.group, 0 <= k.group < k.K, "0, or less than K")
    layout = TileLayout(formats.get(k.format))
    expect("tiled", k.tiled, not k.tiled or (k.op == OPS[0] and k.format in layout.FORMATS), f"false but for {OPS[0]}")
    expect("tile_n", t.tile_n, is_power(t.tile_n, 16, 256), "a power of two from 16 to 256")
    expect("slab", t.slab, t.slab >= 0 and (not slab or takes_slab(k)), "0 here")
    expect("slab", t.slab, k.op != OPS[1] or t.slab % t.tile_k == 0, "a multiple of tile_k")
    least, most = (0, 0) if decodes else (8, FEW if k.M <= FEW else 256)  # few rows: the same sums for each of them
    expect("tile_m", t.tile_m, t.tile_m == 0 if decodes else is_power(t.tile_m, least, most), f"from {least} to {most}")
    least = 32 if scaled else 16
    expect("tile_k", t.tile_k, is_power(t.tile_k, least, 512), f"a power of two from {least} to 512")
    own = not k.tiled or (slab and t.described)
    expect("tile_k", t.tile_k, own or t.tile_k == layout.columns, f"{layout.columns}, what tiles hold")
    expect("warps", t.warps, is_power(t.warps, 1, 16), "1, 2, 4, 8 or 16")
    expect("stages", t.stages, 1 <= t.stages <= 8, "from 1 to 8")
    expect("described", t.described, not t.described or takes_descriptors(k, t), "false here")
    expect("right", t.right, not t.right or takes_right(k, t), "false here")
    expect("paired", t.paired, not t.paired or takes_pairs(k, t), "false here")
    whole = slab or t.described or k.op == OPS[1] or (scaled and k.group > 0)
    expect("splits", t.splits, is_power(t.splits, 1, 1 if whole else 64), "1" if whole else "a power of two up to 64")
    sums = t.tile_m * (t.tile_k if k.op == OPS[1] else t.tile_n) // (32 * t.warps)
    expect("tile", f"{sums} sums a thread", sums <= 128, "of at most 128 sums a thread")
    expect(
        "tile", f"{shared_bytes(k, t)} bytes", shared_bytes(k, t) <= shared, f"within {shared} bytes of shared memory"
    )


def takes_slab(key: Key) -> bool:
    """True if weights may be made x's type (C11): many rows, and their codes or, in bfloat16, their products fit."""
    x_format = formats.get(key.dtype)
    fits = isinstance(x_format, formats.FloatFormat) and x_format.holds(formats.get(key.format))
    scaled = key.op == OPS[1] or key.group > 0
    return key.op in OPS[:2] and key.M > 64 and fits and key.dtype in ("bfloat16", *(() if scaled else ("float16",)))


def takes_right(key: Key, tile: MatmulTile) -> bool:
    """True if the weight may be the right operand: codes in x's type, with a scale a row, for many rows of x."""
    x_format = formats.get(key.dtype)
    fits = isinstance(x_format, formats.FloatFormat) and x_format.bits == 16 and x_format.holds(formats.get(key.format))
    return key.op == OPS[0] and fits and key.group == 0 and not tile.slab and tile.tile_m > FEW


def takes_pairs(key: Key, tile: MatmulTile) -> bool:
    """True if columns may be multiplied in another order: of tiles on the left of 16-bit x, all with one scale."""
    fits = key.K % 16 == 0 and key.group % 64 == 0 and DTYPES[key.dtype] == 2
    return key.tiled and fits and not tile.right and not tile.slab and tile.tile_m >= 64


def takes_descriptors(key: Key, tile: MatmulTile) -> bool:
    """True if a matmul may load its tiles through tensor descriptors: see descriptors.py."""
    fits = key.K % 16 == 0 and 32 <= tile.tile_k <= 128 and tile.warps % 4 == 0 and tile.tile_m >= 64
    if tile.slab:
        return key.op == OPS[0] and fits
    return key.op == OPS[2] and formats.get(key.format).storage == "int8" and key.group == 0 and fits


def shared_bytes(key: Key, tile: MatmulTile) -> int:
    """An upper bound of what a program of the tile needs: loads in flight, and operands or sums that change threads."""
    t, backward, scaled = tile, key.op == OPS[1], key.op == OPS[2]
    steps, cols = (t.tile_n, t.tile_k) if backward else (t.tile_k, t.tile_n)  # of a sum, and of sums
    wide = 1 if scaled else DTYPES[key.dtype]
    weights, sums = t.tile_n * t.tile_k, t.tile_m * cols * 4
    made = t.slab > 0 and t.described  # the weights have x's type
    codes = weights * wide if made else int(weights * formats.get(key.format).bytes_per_element)
    loads = t.stages * (codes + t.tile_m * steps * wide)
    if key.op == OPS[0] and not made and key.group % (64 if key.tiled else t.tile_k):
        loads += t.stages * weights * 8  # a scale and a zero point for every weight
    return (loads + sums // 4 if t.described else max(loads + weights * wide, sums)) + 1024


def is_power(value: int, least: int, most: int) -> bool:
    return least <= value <= most and value & (value - 1) == 0


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def expect(what: str, got: Any, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{what} must be {expected}, got {got}")
