"""Codes of four bits to float32 and back on a GPU, the bytes of numerics.py in fewer instructions.

The table of a code book lies in the lanes of a warp, an entry in each, and a shuffle looks one up. So every lane of a
warp must come by, as it does where no branch depends on a thread. That leaves out loops: where a mask stays the same in
one, LLVM makes two of it, and a branch on the mask. A shuffle is not declared pure, so that none is moved.
"""

import numpy as np
import triton
import triton.language as tl

BUCKETS: tl.constexpr = tl.constexpr(32)  # as many as lanes
TWO_23: tl.constexpr = tl.constexpr(8388608.0)  # 2^23: its last place is one, so adding it rounds to an integer


@triton.constexpr_function
def fills(shape, count):
    """Say if every thread of a warp has ``count`` elements, which instructions for as many would else make up.

    Only tiles of one warp give a thread fewer.
    """
    size = 1
    for n in shape:
        size *= n
    return size >= 32 * count


@triton.constexpr_function
def decodes_nibbles(shape, F, ARCH):
    """Say if `nibble_values` takes bytes of F."""
    return ARCH >= 80 and F.bits == 4 and F.per_byte == 2 and fills(shape, 4)


@triton.constexpr_function
def encodes_nibbles(F, ARCH):
    """Say if `nearest_code` takes F: a code book with one midpoint to a bucket, or fields of few exponents."""
    if ARCH < 80 or F.bits != 4 or not F.is_float:
        return False
    return bool(buckets(F)[2]) if F.is_book else has_lines(F)


@triton.constexpr_function
def hex_of(value):
    """A float32 number as PTX writes it"""
    return f"0f{int(np.float32(value).view(np.uint32)):08X}"


# ---- tables in lanes -------------------------------------------------------------------------------------------------


@triton.jit
def shuffled(table, lane):
    """[...] number of a lane, in its low five bits -> [...] float32: that of the bits in the lane"""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,r,r", [table, lane], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.constexpr_function
def entry(F, TABLE, i):
    """The bits of value i of F, or of midpoint i, infinity after the last. The float -0.0 itself is 0.0 to Triton."""
    value = F.value(i) if TABLE == "values" else (*F.midpoints, float("inf"))[i]
    return int(np.float32(value).view(np.uint32))


@triton.jit
def select(i, F: tl.constexpr, TABLE: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The bits of entry FIRST + i % COUNT of a table, by a tree of selections"""
    if COUNT == 1:
        return tl.cast(entry(F, TABLE, FIRST), tl.uint32)
    else:
        HALF: tl.constexpr = COUNT // 2
        low, high = select(i, F, TABLE, FIRST, HALF), select(i, F, TABLE, FIRST + HALF, HALF)
        return tl.where((i & HALF) != 0, high, low)


@triton.jit
def lane_values(F: tl.constexpr):
    """The bits of the value of code l, in lanes l and l + 16"""
    lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.uint32, is_pure=True, pack=1)
    return select(lane, F, "values", 0, 16)


# ---- decode ----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def values_assembly(F):
    """Four bytes, $8, -> the values at their low, $0..$3, and at their high nibbles, $4..$7.

    A float's are looked up in $9; 2^(23 - 4 i) has the weight of one at bit 4 i of its fraction, so an integer's code,
    its sign bit flipped, less the excess of that and the power.
    """
    text = "{ .reg .b32 t; " + ("" if F.is_float else "shr.u32 t, $8, 16; ")
    for n in range(8):
        to = n // 2 + n % 2 * 4
        if F.is_float:
            text += f"shr.u32 t, $8, {4 * n}; shfl.sync.idx.b32 ${to}, $9, t, 31, -1; "
        else:
            word, i, excess = ("$8", "t")[n // 4], n % 4, 8 if F.signed else 0
            less = 2.0 ** (23 - 4 * i) + excess
            power = int(np.float32(less - excess).view(np.uint32)) | excess << 4 * i
            text += f"lop3.b32 ${to}, {word}, 0x{15 << 4 * i:X}, 0x{power:08X}, 0x6A; "
            text += f"sub.rn.f32 ${to}, ${to}, {hex_of(less)}; "
    return text + "}"


@triton.jit
def nibble_values(byte, F: tl.constexpr):
    """[rows, cols] bytes of two codes -> [rows, 2 cols] float32: the value of each, of an integer format itself"""
    if F.is_float:
        low, high = tl.inline_asm_elementwise(
            values_assembly(F), "=f,=f,=f,=f,=f,=f,=f,=f,r,r,r,r,r", [byte, lane_values(F)],
            dtype=(tl.float32, tl.float32), is_pure=False, pack=4,
        )  # fmt: skip
    else:
        low, high = tl.inline_asm_elementwise(
            values_assembly(F), "=f,=f,=f,=f,=f,=f,=f,=f,r", [byte], dtype=(tl.float32, tl.float32), is_pure=True,
            pack=4,
        )  # fmt: skip
    return tl.join(low, high).reshape(byte.shape[0], byte.shape[1] * 2)


# ---- pairs -----------------------------------------------------------------------------------------------------------

# The first byte of each of four, $1..$4, as low nibbles, and of four more, $5..$8, as high ones
IN_BYTES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 a, b, c, d; prmt.b32 a, $1, $2, 0x0040; prmt.b32 b, $3, $4, 0x0040; prmt.b32 a, a, b, 0x5410; "
    "prmt.b32 c, $5, $6, 0x0040; prmt.b32 d, $7, $8, 0x0040; prmt.b32 c, c, d, 0x5410; shl.b32 c, c, 4; "
    "lop3.b32 $0, a, c, 0x0F0F0F0F, 0xE4; }"
)
WIDENED: tl.constexpr = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000;")


@triton.jit
def widened(code):
    """[...] code of bfloat16 -> [...] float32, two at a time: the compiler would move the upper one down, then up"""
    return tl.inline_asm_elementwise(WIDENED, "=f,=f,r", [code.to(tl.uint16)], dtype=tl.float32, is_pure=True, pack=2)


@triton.jit
def in_bytes(low, high):
    """[...] uint32, whose low four bits are codes -> [...] uint8: two to a byte"""
    return tl.inline_asm_elementwise(IN_BYTES, "=r,r,r,r,r,r,r,r,r", [low, high], dtype=tl.uint8, is_pure=True, pack=4)


# ---- encode ----------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def buckets(F):
    """Slope and offset of a line through a book's midpoints, and the buckets that hold one, a bit for each.

    x is in bucket RNE(31 clamp(offset - slope * x, 0, 1)): the last midpoint is in bucket 1, the first in the last, all
    above is in bucket 0. No bit is set where a bucket holds two midpoints, or rounding decides which holds one.
    """
    last = BUCKETS.value - 1
    slope = float(np.float32((last - 1) / last / (F.midpoints[-1] - F.midpoints[0])))
    offset = float(np.float32(slope * F.midpoints[-1] + 1 / last))
    places = [last * (offset - slope * m) for m in F.midpoints]
    held = {round(place) for place in places}
    sure = len(held) == len(places) and all(abs(place - round(place)) < 0.499 for place in places)
    return slope, offset, sum(1 << bucket for bucket in held) if sure else 0


@triton.constexpr_function
def has_lines(F):
    """Say if `on_lines` takes the fields of F."""
    return F.exponent_bits <= 2 and F.fraction_bits > 0 and F.nan == "none" and not F.has_inf


@triton.constexpr_function
def base_assembly(F):
    """The midpoints below bucket l, in lane l: those in the buckets of the lanes after it"""
    after = f"mov.u32 s, %laneid; add.u32 s, s, 1; shr.u32 s, {buckets(F)[2]:#x}, s;"  # of the last lane 0
    return "{ .reg .b32 s; " + after + " popc.b32 $0, s; }"


@triton.constexpr_function
def book_assembly(F):
    """x, $1, -> its code: the base of its bucket, $2 in the bucket's lane, and one more above the midpoint there, $3.

    The difference is below 0 then, and nowhere else: NaN has no sign, and is in bucket 0, as the clamp makes it 0.
    """
    slope, offset, _ = buckets(F)
    text = "{ .reg .f32 u, m; .reg .b32 d; "
    text += f"fma.rn.sat.f32 u, $1, {hex_of(-slope)}, {hex_of(offset)}; "
    text += f"fma.rn.f32 u, u, {hex_of(BUCKETS.value - 1)}, {hex_of(TWO_23.value)}; "
    text += "shfl.sync.idx.b32 $0, $2, u, 31, -1; shfl.sync.idx.b32 m, $3, u, 31, -1; "
    return text + "sub.rn.f32 m, m, $1; mov.b32 d, m; shr.u32 d, d, 31; add.u32 $0, $0, d; }"


@triton.jit
def in_book(x, F: tl.constexpr):
    """[...] float32 -> [...] uint32 code of the nearest value of a book, as midpoints_below has it; NaN is the last"""
    base = tl.inline_asm_elementwise(base_assembly(F), "=r", [], dtype=tl.uint32, is_pure=True, pack=1)
    midpoint = select(base, F, "midpoints", 0, 16)
    return tl.inline_asm_elementwise(
        book_assembly(F), "=r,f,r,r", [x, base, midpoint], dtype=tl.uint32, is_pure=False, pack=1
    )


@triton.constexpr_function
def steps(F, e):
    """Codes of exponent e for a difference of one"""
    return 2.0 ** (F.fraction_bits + F.bias - e)


@triton.jit
def line(a, F: tl.constexpr, e: tl.constexpr):
    """The line of exponent e, rounded: 2^23 + a code"""
    return tl.fma(a, tl.full(a.shape, steps(F, e), tl.float32), TWO_23 + ((e - 1) << F.fraction_bits))


@triton.jit
def on_lines(x, F: tl.constexpr):
    """[...] float32 -> [...] uint32 code of F in the low bits, saturating; NaN the largest value, with its sign.

    Over each binade of magnitudes codes are a line, and each is flatter than the one before. So the lowest of them all
    is the code, and rounds as it does.
    """
    a = tl.minimum(tl.abs(x), F.max)
    y = line(a, F, 1)
    EXPONENTS: tl.constexpr = 1 << F.exponent_bits
    for e in tl.static_range(2, EXPONENTS):
        y = tl.minimum(y, line(a, F, e))
    return y.to(tl.uint32, bitcast=True) | ((x.to(tl.uint32, bitcast=True) >> 28) & F.sign_bit)


@triton.jit
def nearest_code(x, F: tl.constexpr):
    """[...] float32 -> [...] uint32 code of F: nearest, saturating (C6). x is a product: its NaN has no sign."""
    if F.is_book:
        return in_book(x, F)
    else:
        return on_lines(x, F)
