"""The place of a program's tile in x, and the scale of each of its elements: (i, j) uses scale[i // br, j // bk].

A tile never straddles two block rows, unless br is 1 and every row of it has its own. Along K it lies inside one
block, straddles two, or holds several, each a whole number of runs of RUN elements.
"""

import triton
import triton.language as tl

from quantlib.backends.triton.nibbles import decodes_nibbles, fills, in_bytes, nibble_values
from quantlib.backends.triton.numerics import clamp_zero_point, decode_float, effective_scale, int_to_float


@triton.jit
def codes_at(ptr, F: tl.constexpr):
    """A pointer to values of format F as one to their codes, the integers that every kernel reads and writes."""
    if F.bits == 32:
        return ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    elif F.bits == 16:
        return ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    elif F.storage == "uint8":
        return ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    else:
        return ptr.to(tl.pointer_type(tl.int8), bitcast=True)


@triton.jit
def load(ptr, mask, MASKED: tl.constexpr):
    """Load elements; those that ``mask`` excludes read as 0. Without a mask a load keeps its 128-bit accesses."""
    return tl.load(ptr, mask, 0) if MASKED else tl.load(ptr)


@triton.jit
def store(ptr, value, mask, MASKED: tl.constexpr):
    value = value.to(ptr.dtype.element_ty)
    if MASKED:
        tl.store(ptr, value, mask)
    else:
        tl.store(ptr, value)


@triton.jit
def at_bytes(ptr, byte, X: tl.constexpr, F: tl.constexpr):
    """ptr + byte, [..., cols / P], to bytes that P codes share. A thread takes no more of them at once than go with 16
    bytes of values of X: more would have to change threads."""
    BYTES: tl.constexpr = 128 // X.bits // F.per_byte
    if F.bits <= 8 and BYTES > 1:
        if len(byte.shape) == 2:
            return tl.max_contiguous(ptr + byte, (1, BYTES))
        else:
            return tl.max_contiguous(ptr + byte, (1, 1, BYTES))
    else:
        return ptr + byte


@triton.jit
def place(K, T: tl.constexpr):
    """This program's tile -> (row of tiles, column of tiles)."""
    tile = tl.program_id(0)
    if T.flat:
        return 0, tile
    else:
        across = tl.cdiv(K, T.cols)
        return (tile // across).to(tl.int32), (tile % across).to(tl.int32)


@triton.jit
def block_rows(tile, M, br, T: tl.constexpr):
    """Row of tiles -> its first row of x, how many there are, and the block row of each: [T.rows, 1] or [1, 1]."""
    if T.flat:
        return 0, 1, tl.full((1, 1), 0, tl.int64)
    elif T.own_rows:
        first = tile.to(tl.int64) * T.rows
        return first, M - first, first + tl.arange(0, T.rows)[:, None]
    else:
        tiles = tl.cdiv(br, T.rows)
        block = (tile // tiles).to(tl.int64)
        first = block * br + tile % tiles * T.rows
        return first, tl.minimum(M, block * br + br) - first, tl.full((1, 1), 0, tl.int64) + block


@triton.jit
def block_cols(tile, K, bk, T: tl.constexpr):
    """Column of tiles -> its first column of x, how many there are, the block column of each run, [1, T.runs], and
    the column, counted from the first, where the second of two blocks begins."""
    first = tile.to(tl.int64) * T.cols
    if T.bk:
        block = first // T.bk
        column = (first - block * T.bk).to(tl.int32) + tl.arange(0, T.runs) * T.run
        return first, K - first, (block + column // T.bk)[None, :], 0
    elif T.runs == 2:
        block = first // bk
        return first, K - first, (block + tl.arange(0, 2))[None, :], (block + 1) * bk - first
    elif T.across:
        return first, K - first, tl.full((1, 1), 0, tl.int64), 0
    else:
        return first, K - first, tl.full((1, 1), 0, tl.int64) + tile // (bk // T.cols), 0


@triton.jit
def zero_cols(ptr, cols, F: tl.constexpr):
    """Zero points from a row to the next, of ``cols``: a row that is kept as codes of F begins with a byte"""
    if ptr is None or ptr.dtype.element_ty == tl.int32 or not F.packed:
        return cols
    else:
        return (cols + F.per_byte - 1) // F.per_byte * F.per_byte


@triton.jit
def zero_row(ptr, row, cols, F: tl.constexpr):
    """A pointer to the zero points of ``row``"""
    if ptr.dtype.element_ty == tl.int32 or not F.packed:
        return ptr + row * cols
    else:
        return ptr + row * ((cols + F.per_byte - 1) // F.per_byte)


@triton.jit
def load_zero_point(ptr, at, exists, F: tl.constexpr):
    """[...] int32 zero points at ``at``, rows of `zero_cols`: int32, or kept as codes of F"""
    if ptr.dtype.element_ty == tl.int32:
        return clamp_zero_point(tl.load(ptr + at, exists, 0), F)
    elif F.packed:
        byte = tl.load(ptr + at // F.per_byte, exists, 0).to(tl.int32)
        return spread_sign((byte >> (at % F.per_byte * F.bits).to(tl.int32)) & ((1 << F.bits) - 1), F)
    else:
        return spread_sign(tl.load(ptr + at, exists, 0).to(tl.int32), F)


@triton.jit
def block_scale(scale_ptr, zero_point_ptr, block_i, block_j, M, scale_cols, F: tl.constexpr, AFFINE: tl.constexpr):
    """Effective scale and zero point of every run of a tile: [rows or 1, runs]."""
    at, exists = block_i * scale_cols + block_j, (block_i < M) & (block_j < scale_cols)
    s_eff = effective_scale(tl.load(scale_ptr + at, exists, 1.0), F)
    z = clamp_zero_point(tl.load(zero_point_ptr + at, exists, 0), F) if AFFINE else tl.full((1, 1), 0, tl.int32)
    return s_eff, z


@triton.jit
def spread(values, edge, T: tl.constexpr):
    """[rows, T.runs] -> [rows, T.cols] or what broadcasts to it: the value of every column's block."""
    if T.runs == 1:
        return values
    elif T.bk:
        rows: tl.constexpr = values.shape[0]
        return tl.broadcast_to(values[:, :, None], (rows, T.runs, T.run)).reshape(rows, T.cols)
    else:
        left, right = tl.split(values)
        return tl.where(tl.arange(0, T.cols)[None, :] < edge, left[:, None], right[:, None])


@triton.jit
def pack(codes, F: tl.constexpr, ARCH: tl.constexpr, BITS: tl.constexpr = None):
    """[rows, cols] codes -> [rows, cols / P] bytes that P of them share: pairs of BITS bits, then pairs of those."""
    WIDTH: tl.constexpr = F.bits if BITS is None else BITS
    if F.packed and WIDTH < 8:
        even, odd = tl.split(codes.reshape(codes.shape[0], codes.shape[1] // 2, 2))
        if WIDTH == 4 and ARCH >= 80 and fills(even.shape, 4):
            return in_bytes(even.to(tl.uint32), odd.to(tl.uint32))
        else:
            return pack((even & ((1 << WIDTH) - 1)) | (odd << WIDTH), F, ARCH, 2 * WIDTH)
    elif F.packed:
        return codes
    else:
        return codes & ((1 << F.bits) - 1)


@triton.jit
def unpack(packed, F: tl.constexpr):
    """[rows, cols / P] bytes that P codes share -> [rows, cols] codes, with their sign in an integer format."""
    return spread_sign(halve(packed.to(tl.int32), F.bits if F.packed else 8), F)


@triton.jit
def unpack_values(packed, F: tl.constexpr, ARCH: tl.constexpr):
    """[rows, cols / P] bytes that P codes share -> [rows, cols] float32: their values, of integers the codes, exact"""
    if decodes_nibbles(packed.shape, F, ARCH):
        return nibble_values(packed, F)
    else:
        codes = unpack(packed, F)
        return decode_float(codes, F, ARCH) if F.is_float else int_to_float(codes)


@triton.jit
def halve(codes, BITS: tl.constexpr, WIDTH: tl.constexpr = 8):
    """[rows, cols] of WIDTH bits -> as many of BITS bits as those are, side by side"""
    if WIDTH == BITS:
        return codes
    else:
        low, high = codes & ((1 << (WIDTH // 2)) - 1), codes >> (WIDTH // 2)
        codes = tl.join(low, high).reshape(codes.shape[0], codes.shape[1] * 2)
        return halve(codes, BITS, WIDTH // 2)


@triton.jit
def spread_sign(code, F: tl.constexpr):
    """The low bits of an int32 -> a code, with its sign in an integer format"""
    code = code if F.packed else code & ((1 << F.bits) - 1)
    return (code ^ (1 << (F.bits - 1))) - (1 << (F.bits - 1)) if F.signed and not F.is_float else code


@triton.jit
def block_at(b, M, K, br, bk, scale_cols, B: tl.constexpr):
    """Number of a block -> its first row and column of x, and how many of each it has."""
    if B.flat and B.across:
        return b * 0, b * 0, 1, K
    elif B.flat:
        width = B.bk if B.bk else bk
        return b * 0, b * width, 1, tl.minimum(width, K - b * width) if B.ragged else width
    else:
        i, j = b // scale_cols * br, b % scale_cols * bk
        return i, j, tl.minimum(br, M - i), tl.minimum(bk, K - j)


@triton.jit
def chunk_at(u, B: tl.constexpr):
    """Chunk u of a block -> its rows, [1, rows, 1] int64, and columns, [1, 1, cols], counted from the block's first."""
    r, c = tl.arange(0, B.rows)[None, :, None], tl.arange(0, B.cols)[None, None, :]
    if B.rows > 1:
        r += u * B.rows
    else:
        c += u * B.cols
    return r.to(tl.int64), c


# ---- [count, rows, cols] -> [count] ----------------------------------------------------------------------------------
# Triton 3.6 adds up the wrong lanes of an axis that a reshape has made of two, where a third lies between them in a
# thread's order, as in blocks of a column: then one axis after the other. Otherwise both at once, which is cheaper.


@triton.jit
def flat(x):
    """[count, rows, cols] -> [count, rows * cols]"""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2])


@triton.constexpr_function
def apart(shape):
    """True if rows and columns may lie apart."""
    return shape[0] > 1 and shape[1] > 1


@triton.jit
def block_sum(x):
    if apart(x.shape):
        return tl.sum(tl.sum(x, 2), 1)
    else:
        return tl.sum(flat(x), 1)


@triton.jit
def block_max(x):
    if apart(x.shape):
        return tl.max(tl.max(x, 2), 1)
    else:
        return tl.max(flat(x), 1)


@triton.jit
def block_min(x):
    if apart(x.shape):
        return tl.min(tl.min(x, 2), 1)
    else:
        return tl.min(flat(x), 1)
