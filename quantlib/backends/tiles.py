"""tiles[n // 16, k // columns, byte]: the codes of a weight in the order in which matrix instructions take them.

A tile is 1024 bytes: 16 rows by 64 codes, or by P * 64 where P codes share a byte, the first 64 in its lowest bits.
Lane 4 g + t of a warp finds the 32 bytes of its fragments of ``mma.sync.m16n8k16`` side by side: rows g and g + 8, and
in each step of 16 columns the four at 4 t. The same tiles serve every tile size, Triton and CUDA C++.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.packing import pack, unpack
from quantlib.formats import Format

# column of a tile = 32 s + 16 h + 4 t + e, row = 8 r + g
CODES = ("r", "g", "s", "h", "t", "e")  # slowest first, as a matrix has them
TILE = ("g", "t", "r", "s", "h", "e")  # as a tile has them: a lane, then its fragments
SIZES = {"r": 2, "g": 8, "s": 2, "h": 2, "t": 4, "e": 4}


@dataclass(frozen=True)
class TileLayout:
    """Convert codes [N, K] of a format to tiles and back, without a change of any code."""

    format: Format
    FORMATS: ClassVar[tuple[str, ...]] = tuple(f.name for f in formats.TABLE if f.bits <= 8)
    ROWS: ClassVar[int] = 16
    BYTES: ClassVar[int] = 1024

    @property
    def columns(self) -> int:
        """A tile has 64 columns for each of the codes that share a byte."""
        return 64 * self.format.per_byte

    def shape(self, N: int, K: int) -> Sequence[int]:
        """[ceil(N / 16), ceil(K / columns), 1024]"""
        return [-(-N // self.ROWS), -(-K // self.columns), self.BYTES]

    def pack(self, codes: Tensor, K: int) -> Tensor:
        """[N, K] codes of the format, or [N, ceil(K / 2)] uint8 -> uint8 tiles; rows and columns past the end are 0."""
        f, code = self.format, codes.view(torch.uint8)
        if f.packed:
            code = unpack(code, f, K).view(torch.uint8)
        rows, columns, _ = self.shape(*code.shape)
        code = torch.nn.functional.pad(code, (0, columns * self.columns - K, 0, rows * self.ROWS - len(code)))
        split = code.view(rows, 2, 8, columns, f.per_byte, 2, 2, 4, 4)  # [rows, r, g, columns, places, s, h, t, e]
        axes = dict(zip(CODES, (1, 2, 5, 6, 7, 8), strict=True))
        tiles = split.permute(0, 3, *(axes[a] for a in TILE), 4).reshape(rows, columns, self.BYTES * f.per_byte)
        return (pack(tiles, f) if f.packed else tiles).contiguous()

    def unpack(self, tiles: Tensor, N: int, K: int) -> Tensor:
        """Undo `pack`: return the codes [N, K], packed where the format is packed."""
        (rows, columns, _), f = tiles.shape, self.format
        code = unpack(tiles, f, self.BYTES * f.per_byte).view(torch.uint8) if f.packed else tiles
        axes = {a: 2 + n for n, a in enumerate(TILE)}
        place = 2 + len(TILE)
        split = code.view(rows, columns, *(SIZES[a] for a in TILE), f.per_byte)
        r, g, s, h, t, e = (axes[a] for a in CODES)
        code = split.permute(0, r, g, 1, place, s, h, t, e).reshape(rows * self.ROWS, columns * self.columns)[:N, :K]
        return pack(code, f) if f.packed else code.contiguous().view(getattr(torch, f.dtype_name))
