"""The tiles of a matmul: one frozen dataclass, chosen by one function of shapes, formats and device.

Measurements on a device come first (tables.py); nothing is timed at a call. The rest follows from what the
compiler makes of the kernels, which the static tests say. ``QUANTLIB_SHOW_LAUNCH=1`` prints every choice.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from quantlib import formats
from quantlib.backends.tiles import TileLayout
from quantlib.backends.triton.launch import cdiv, divisor, power_of_2, shown
from quantlib.backends.triton.tables import FEW, Key, MatmulTile, bucket, lookup, shared_bytes
from quantlib.formats import FloatFormat, Format

# Numbers of no device, so that the bytes are those of every device.
PROGRAMS = 512  # that share the weight where x has few rows; half as many for more, each of which has more sums
FILLED = 192  # programs, more than there are multiprocessors
ENOUGH = 128  # tiles of a kernel that cannot share K, nearly one a multiprocessor
WIDE_TILES = 96  # tiles of 128 x 128 from which on they are taken
SLAB = 1 << 24  # weights of a slab, at least: 32 MiB, which the cache of an H100 holds beside tiles of x and y
SLAB_SUMS = 1 << 22  # sums of a slab, at least: 256 tiles of 128 x 128, twice as many as multiprocessors
UNTUNED = "an untuned device"
SLABS_FROM = 128  # rows of dy above which the gradient takes slabs: a weight is decoded once, and not every 128 rows
WARPGROUPS = 200_000  # bytes of shared memory, of devices whose tensor cores read operands from it (sm_90, sm_100)
LONGEST = 8  # steps at least of a split, so that its loads overlap

Shape = tuple[int, int, int]  # M, N, K


def key_of(op: str, shape: Shape, format: Format, dtype: torch.dtype, bk: int, tiled: bool = False) -> Key:
    M, N, K = shape
    name = str(dtype).removeprefix("torch.")
    return Key(op, N, K, bucket(M), format.name, name, bk if bk < K else 0, tiled)


@functools.lru_cache(4096)
def choose_matmul(
    shape: Shape,
    format: Format,
    dtype: torch.dtype,
    bk: int,
    tiled: bool,
    invariant: bool,
    device: str,
    shared: int,
    describable: bool = False,
) -> MatmulTile:
    """The tile of dequant_matmul of x [M, K] with codes [N, K]; ``invariant``: the same for every M. One of described
    slabs, from a table, is for x and slabs that are ``describable``."""
    M, N, K = (FEW, *shape[1:]) if invariant else shape
    key = key_of("dequant_matmul", (M, N, K), format, dtype, bk, tiled)
    found = lookup(device, key)
    if found and (describable or not found.described):
        return shown(found)
    if device and takes_slabs((M, N, K), format, dtype, bk):
        return shown(slab_ways((M, N, K), format, tiled, bk)[1])  # no GPU has timed the other yet: `quantlib tune` does
    tile_k = TileLayout(format).columns if tiled else step_of(bk, 64) if bk < K else 64
    wide = not holds(format, dtype)  # multiplied in float32, without tensor cores
    if bk < K and bk % (64 if tiled else tile_k):  # a weight has a scale of its own, loaded like it
        tile_n, tile_m, warps, stages = 32, max(8, min(power_of_2(M), FEW)), 4, 2
    elif M <= FEW:
        tile_n, tile_m, warps = 64, max(8, power_of_2(M)), 4 if wide and (M > 8 or format.packed) else 2
        stages = 3 if format.packed and not wide else 4
    elif wide:
        tile_n, tile_m, warps, stages = 64, 64, 8 if tile_k > 64 else 4, 3
    elif M <= 64:
        tile_n, tile_m, warps, stages = 64, 64, 4, 3
        if shared >= WARPGROUPS and not (format.packed and format.is_float):  # two warps are faster than a warpgroup
            tile_n, warps = 128 if not format.packed and N >= 8192 else 64, 2
    elif tile_k > 64:  # the sums of a step beside all: registers hold no more where operands need some too
        tile_n, tile_m, warps, stages = 64, 128 if shared >= WARPGROUPS else 64, 4, 3
    else:
        tile_n, tile_m, warps, stages = widest(M, N)
    if device and K % 16:
        tile_n, tile_m, tile_k, warps = ragged(tile_n, tile_m, tile_k if tiled else 32)
    splits = 1 if wide and M > 64 else splits_of((M, N, K), tile_n, tile_m, tile_k, format.packed)
    right = not wide and tile_m > 64 and bk >= K and (not device or shared >= WARPGROUPS)
    return shown(fitted(key, MatmulTile(tile_n, tile_m, tile_k, splits, warps, stages, right=right), shared))


def takes_slabs(shape: Shape, format: Format, dtype: torch.dtype, bk: int) -> bool:
    """True if it is faster to decode the weight once than in every tile of 128 rows of x (slab.py).

    Fused tiles of an H200 were measured to do 350 TFLOP/s with int8 and 330 with four bits, 256 rows at a time, where
    16-bit operands do 650 and more. At the speed of memory a weight is decoded in what they lose with 270 and 200 rows.
    A product that is too small for all multiprocessors has K split between them, up to 512 rows.
    """
    M, N, K = shape
    large = M > 512 or (M > 256 and cdiv(M, 128) * cdiv(N, 128) >= ENOUGH)
    return large and holds(format, dtype) and (bk >= K > 0 or dtype == torch.bfloat16)


def slab_ways(shape: Shape, format: Format, tiled: bool, bk: int) -> tuple[MatmulTile, MatmulTile]:
    """The tiles of a product by slabs: through tensor descriptors, and by the vendor, whose sums need the cache too."""
    M, N, K = shape
    rows = slab_rows(M, K, SLAB)
    sizes = [(256, 128, 8, 4), (128, 128, 8, 3), (128, 64, 4, 4), (64, 64, 4, 4)]
    enough = (size for size in sizes if cdiv(min(rows, N), size[0]) * cdiv(M, size[1]) >= ENOUGH)
    tile_n, tile_m, warps, stages = next(enough, sizes[-1])
    vendors = replace(decode_tile(format, tiled, bk, K), slab=slab_rows(M, K, SLAB // 2))
    return MatmulTile(tile_n, tile_m, 64, 1, warps, stages, rows, described=True), vendors


def decode_tile(format: Format, tiled: bool, bk: int, K: int) -> MatmulTile:
    """The tile of the kernel that makes a slab: of fewer weights where few of them in a row share a scale."""
    run = min(divisor(bk), 64) if bk < K else 64
    tile_n = 128 if run == 64 else 64 if run >= 16 else 32
    return MatmulTile(tile_n, 0, TileLayout(format).columns if tiled else 64, 1, 4, 1)


def holds(format: Format, dtype: torch.dtype) -> bool:
    """True if values of ``dtype``, of 16 bits, hold every q - z of ``format``."""
    x_format = formats.get(dtype)
    return isinstance(x_format, FloatFormat) and x_format.bits == 16 and x_format.holds(format)


def widest(M: int, N: int) -> tuple[int, int, int, int]:
    """Sizes, warps and loads in flight of a tile of many rows: 128 x 128 where there are enough of them, else half."""
    return 128 if cdiv(N, 128) * cdiv(M, 128) >= WIDE_TILES else 64, 128, 4, 3


def longest_splits(K: int, tile_k: int, packed: bool) -> int:
    """The most splits of K for many rows; LONGEST steps of packed codes are of 64 columns, whose loads are few."""
    return cdiv(K, tile_k) // (LONGEST * 64 // tile_k if packed else LONGEST)


def slab_rows(M: int, K: int, weights: int) -> int:
    """Rows of a slab: as many as the cache holds, or more where their product would not fill a device twice over."""
    return max(weights // max(K, 1) // 128, SLAB_SUMS // max(M, 1) // 128, 1) * 128


@functools.lru_cache(4096)
def choose_backward(shape: Shape, format: Format, dtype: torch.dtype, bk: int, device: str, shared: int) -> MatmulTile:
    """The tile of dequant_matmul_backward of dy [M, N] with codes [N, K]: tile_n is what its steps take of N."""
    M, key = shape[0], key_of("dequant_matmul_backward", shape, format, dtype, bk)
    found = lookup(device, key)
    if found:
        return shown(found)
    if device and M > SLABS_FROM and shape[1] > 0 and dtype == torch.bfloat16 and holds(format, dtype):
        return shown(replace(decode_tile(format, False, bk, shape[2]), slab=slab_rows(M, shape[1], SLAB // 2)))
    if M < 64 or dtype == torch.float32:
        tile = MatmulTile(32, 16 if M <= 16 else 32, 64, 1, 4, 2)
    elif M == 64:
        tile = MatmulTile(64, 64, 64, 1, 4, 3)
    else:
        tile = MatmulTile(32, 128, 64, 1, 4, 3)
    return shown(fitted(key, tile, shared))


@functools.lru_cache(4096)
def choose_scaled(
    shape: Shape, format: Format, bk: int, device: str, shared: int, dtype: torch.dtype, describable: bool
) -> MatmulTile:
    """The tile of scaled_matmul of x_codes [M, K] with codes [N, K], y of ``dtype``."""
    M, N, K = shape
    key = key_of("scaled_matmul", shape, format, dtype, bk)
    found = lookup(device, key)
    if found and (describable or not found.described):
        return shown(found)
    if describable and M > 64:
        return shown(choose_described(shape, dtype))
    if M <= FEW:
        tile_n, tile_m, tile_k, warps, stages = 32, max(8, power_of_2(M)), 128, 2, 4
    elif M <= 64:
        tile_n, tile_m, tile_k, warps, stages = 64, 64, 128, 4, 4
    else:
        tile_k, (tile_n, tile_m, _, stages), warps = 128, widest(M, N), 8
    if bk < K:  # two sums are held, of a group and of all
        tile_k, tile_m = max(step_of(bk, tile_k), 32), min(tile_m, 64)
    if tile_n == 64 and (bk < K or format.packed):  # eight would decode each code twice
        warps = min(warps, 4)
    if device and K % 16:
        tile_n, tile_m, tile_k, warps = ragged(tile_n, tile_m, 32)
    splits = splits_of(shape, tile_n, tile_m, tile_k, False) if bk >= K else 1
    return shown(fitted(key, MatmulTile(tile_n, tile_m, tile_k, splits, warps, stages), shared))


def choose_described(shape: Shape, dtype: torch.dtype) -> MatmulTile:
    """The largest tile of which there are enough; 128 x 256 sums leave no registers for narrow stores, wide values."""
    M, N, _ = shape
    wide = dtype.itemsize == 2 and N % 16 == 0
    sizes = [(256, 128, 8, 4)] * wide + [(128, 128, 8, 5), (128, 64, 4, 5), (64, 64, 4, 5)]
    enough = (size for size in sizes if cdiv(N, size[0]) * cdiv(M, size[1]) >= ENOUGH)
    tile_n, tile_m, warps, stages = next(enough, sizes[-1])
    return MatmulTile(tile_n, tile_m, 128, 1, warps, stages, described=True)


def fitted(key: Key, tile: MatmulTile, shared: int) -> MatmulTile:
    """``tile`` with fewer loads in flight, then of fewer rows, until the device has the shared memory for it."""
    while shared_bytes(key, tile) > shared:
        if tile.stages > 2:
            tile = replace(tile, stages=tile.stages - 1)
        elif tile.tile_m > 16:
            tile = replace(tile, tile_m=tile.tile_m // 2, right=tile.right and tile.tile_m > 2 * FEW)
        elif tile.tile_n > 16:
            tile = replace(tile, tile_n=tile.tile_n // 2)
        else:
            break
    return tile


def step_of(bk: int, most: int) -> int:
    """Columns of a step that lie inside one block, where a power of two from 16 on divides it."""
    return min(most, max(divisor(bk), 16))


def ragged(tile_n: int, tile_m: int, tile_k: int) -> tuple[int, int, int, int]:
    """Sizes and warps where rows begin anywhere: they are loaded an element at a time, and a thread holds few."""
    return min(tile_n, 32), min(tile_m, 32), tile_k, 4


def splits_of(shape: Shape, tile_n: int, tile_m: int, tile_k: int, packed: bool) -> int:
    """The number of programs that share K where y has few tiles: a power of two."""
    M, N, K = shape
    tiles, steps = cdiv(N, tile_n) * cdiv(M, tile_m), cdiv(K, tile_k)
    if M > 64:  # to fill the device, and no more: every split adds M N sums
        splits = min(power_of_2(cdiv(FILLED, tiles)), longest_splits(K, tile_k, packed), 16)
    elif M > FEW:
        splits = min(PROGRAMS // 2 // tiles, steps // LONGEST, 16)
    elif packed:  # a split is two steps, and the sums of all take half the bytes of the weight at most
        splits = min(PROGRAMS // tiles, steps // 2, 16, max(K // (32 * M), 4) if M else 1)
    else:
        splits = min(PROGRAMS // tiles, steps // LONGEST, 16)
    return 1 << max(splits, 1).bit_length() - 1
