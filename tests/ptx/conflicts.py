"""Bank conflicts of the products' loops, counted as their PTX runs: ``python -m ptx.conflicts [--arch 90]``.

For each tile one program multiplies, its bytes are compared with the reference's, and every access to shared memory
that a step of K makes is shown with the wavefronts it takes beside those it needs. Exit status 1: a tile whose bytes
are wrong, or an access that takes more than `MOST` times what it needs.
"""

from __future__ import annotations

import argparse
import collections
import re
import sys
from dataclasses import replace
from typing import Any

import torch

from ptx import banks
from ptx.parse import PtxError

STEPS = 6
MOST = 1.25
# Codes that a warpgroup loads in twos are sixteen words, of eight chunks in each 128 bytes; fragments of few rows are
# loaded as they are stored, two to a bank. No instruction of sm_80 converts eight bits, whose values go through shared
# memory.
KNOWN = {(90, "ld.shared.v2.b8"): 2.0, (80, "st.shared.v4.b16"): 2.0}
KNOWN |= {(arch, "ld.shared.v4.b32"): 2.0 for arch in (80, 86, 89, 90, 120)}
FORMATS = {"int8": 0, "int4": 128, "nf4_bf16": 128, "float8_e4m3fn": 0}  # columns that share a scale, 0: all
ROWS = (1, 16, 64, 128)
# n, m, k, splits, warps, stages: tiles that `quantlib tune` has tried; some gave other bytes on a GPU before
TRIED = (
    (128, 8, 64, 1, 4, 3),
    (128, 16, 64, 1, 4, 3),
    (128, 32, 64, 1, 4, 3),
    (128, 128, 64, 1, 4, 3),
    (128, 256, 64, 1, 8, 3),
    (128, 256, 64, 1, 16, 3),
)


def tiles(format: str, shared: int) -> list[Any]:
    from quantlib import formats
    from quantlib.backends.triton import tuning
    from quantlib.backends.triton.tables import MatmulTile

    row, bk = formats.get(format), FORMATS[format] or 4096
    found = [
        tuning.choose_matmul((M, 4096, 4096), row, torch.bfloat16, bk, True, False, tuning.UNTUNED, shared)
        for M in ROWS
    ]
    if format == "int8" and shared >= tuning.WARPGROUPS:
        made = [MatmulTile(*tile) for tile in TRIED]
        found += [*made, replace(made[-1], right=True), replace(made[1], paired=True)]
    return list(dict.fromkeys(replace(tile, splits=1) for tile in found))


def multiplied(format: str, tile: Any) -> tuple[bool, dict[str, banks.Asked]]:
    """If the bytes of one program are right, and what its loop asks of shared memory."""
    from quantlib import formats
    from quantlib.backends.composite import KERNELS
    from quantlib.backends.triton import search
    from quantlib.backends.triton.tables import Key
    from quantlib.backends.weight import Epilogue

    group, K = FORMATS[format], STEPS * tile.tile_k
    key = Key("dequant_matmul", tile.tile_n, K, tile.tile_m, format, "bfloat16", group if group < K else 0, True)
    matmul = search.Matmul(key, search.Machine(torch.device("cpu"), "", 0, 0))
    with banks.counted() as book:
        got = matmul.exact(tile)
    want = torch.empty_like(matmul.y)
    KERNELS["dequant_matmul"](matmul.exact_x, matmul.weight(matmul.codes[0]), Epilogue(), False, want)
    assert formats.get(format) is matmul.format
    found: dict[str, banks.Asked] = collections.defaultdict(banks.Asked)
    for i, asked in book.items():
        if asked.times >= STEPS * tile.warps:
            total = found[re.sub(r"\.(sync|aligned)", "", i.opcode)]
            total.times += asked.times
            total.wavefronts += asked.wavefronts
            total.least += asked.least
    return torch.equal(got, want.view(torch.uint8)), found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m ptx.conflicts", description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compile for sm_80, 90, ...")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)
    from ptx import launches
    from quantlib.backends.triton import launch

    wrong = 0
    with launches.served(given.arch):
        for format in FORMATS:
            for tile in tiles(format, launch.shared_memory(torch.device("cpu"))):
                name = f"{format} {tile.tile_n}x{tile.tile_m}x{tile.tile_k} {tile.warps} warps"
                name += " right" * tile.right + " paired" * tile.paired
                try:
                    same, found = multiplied(format, tile)
                except PtxError as error:
                    print(f"{name}: {error}")
                    wrong += 1
                    continue
                over = any(asked.ways > KNOWN.get((given.arch, opcode), MOST) for opcode, asked in found.items())
                wrong += over or not same
                print(f"{name}: {'' if same else 'WRONG BYTES, '}" + ("TOO MANY CONFLICTS, " if over else ""), end="")
                print(", ".join(f"{opcode} {asked.ways:.2f}" for opcode, asked in found.items()), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
