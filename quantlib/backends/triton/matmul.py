"""Shared parts of the matmuls: codes of a weight as operands of a dot, their addresses, and the steps after the sum.

A dot takes values of type D: float32, or x's own 16-bit type where that holds every q - z exactly, as it does of the
usual formats of at most eight bits. Integers are read as signed bytes, uint8 less 128, its zero point too.
"""

import triton
import triton.language as tl

from quantlib import formats
from quantlib.backends.tiles import TileLayout
from quantlib.backends.triton.activation import activate
from quantlib.backends.triton.numerics import (
    convert_16,
    decode_float,
    effective_scale,
    encode_float,
    int_to_float,
)
from quantlib.backends.triton.tables import FEW
from quantlib.backends.triton.tile import codes_at, load_zero_point, spread_sign, unpack

ROWS: tl.constexpr = tl.constexpr(TileLayout.ROWS)
BYTES: tl.constexpr = tl.constexpr(TileLayout.BYTES)
BFLOAT16: tl.constexpr = tl.constexpr(formats.get("bfloat16"))
FLOAT16: tl.constexpr = tl.constexpr(formats.get("float16"))
AS_STORED: tl.constexpr = tl.constexpr((0, 1, 2, 3, 4, 5))  # chunk_bits of a tile as it lies in memory
# Rows of x from which on a warpgroup of sm_90 multiplies them together.
NARROWEST = 16 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 8
COLUMNS: tl.constexpr = tl.constexpr(64)  # of a tile that are side by side: all, or those of one place in a byte


@triton.constexpr_function
def operand_type(X, F, EXACT, ARCH):
    """D: float32 in the interpreter, whose 16-bit dots are wrong, and where w itself has more bits than x's type.

    EXACT says that codes are operands, not codes times a scale.
    """
    if ARCH == 0 or X.bits == 32 or not (EXACT and X.holds(F)):
        return tl.float32
    return tl.float16 if X.fraction_bits == 10 else tl.bfloat16


@triton.constexpr_function
def is_right(X, F, SCALES, T, ARCH):
    """True if the weight lies on the right. The tensor cores of sm_90 read it there from shared memory, to which it is
    stored in vectors; on the left its operands come from registers. With a scale for each group it stays there, where
    a thread has few rows and so few scales. The interpreter goes both ways."""
    return T.right and ARCH in (0, 90) and SCALES == "row" and X.bits == 16 and X.holds(F)


@triton.constexpr_function
def offset(F):
    """A signed byte holds a code less this number."""
    return 0 if F.is_float else F.excess


# ---- codes to operands -----------------------------------------------------------------------------------------------


@triton.jit
def load_x(ptr, mask, X: tl.constexpr, D: tl.constexpr, ARCH: tl.constexpr):
    """Values of row X as D; 0 where the mask is not set, or None."""
    if tl.float32 != D:
        return tl.load(ptr) if mask is None else tl.load(ptr, mask, 0.0)
    else:
        ptr = codes_at(ptr, X)
        return decode_float(tl.load(ptr) if mask is None else tl.load(ptr, mask, 0), X, ARCH)


@triton.jit
def operand(code, F: tl.constexpr, D: tl.constexpr, ARCH: tl.constexpr):
    """[...] code of F, one an element -> [...] D, exact: its value, less its offset"""
    if F.is_float:
        if F.bits == 16 and tl.float32 != D:
            return code.to(D, bitcast=True)
        return decode_float(code, F, ARCH).to(D)
    elif F.bits == 8 and tl.float32 != D:
        return byte_operand(code, F, D)
    else:
        return int_to_float(code.to(tl.int32) - offset(F)).to(D)


@triton.jit
def byte_operand(code, F: tl.constexpr, D: tl.constexpr):
    """Four codes at a time beside the upper byte of a float whose last place is one, less what that adds."""
    if tl.bfloat16 == D:  # 128 + the seven low bits, less 128 or 256
        FLIP: tl.constexpr = "xor.b32 x, $2, 0x80808080;" if offset(F) else "mov.b32 x, $2;"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x, a, b, c, d, minus; mov.b32 minus, 0xBF80BF80; " + FLIP +
            "prmt.b32 a, x, 0x43434343, 0x4140; prmt.b32 b, x, 0x43434343, 0x4342;"
            "and.b32 c, a, 0xFF80FF80; and.b32 d, b, 0xFF80FF80; and.b32 a, a, 0xFF7FFF7F; and.b32 b, b, 0xFF7FFF7F;"
            "fma.rn.bf16x2 $0, c, minus, a; fma.rn.bf16x2 $1, d, minus, b; }",
            "=r,=r,r", [code], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip
    else:  # 1024 + the code's distance from the lowest, less 1152
        FLIP: tl.constexpr = "mov.b32 x, $2;" if offset(F) else "xor.b32 x, $2, 0x80808080;"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 x, a, b, magic; mov.b32 magic, 0x64806480; " + FLIP +
            "prmt.b32 a, x, 0x64646464, 0x4140; prmt.b32 b, x, 0x64646464, 0x4342;"
            "sub.f16x2 $0, a, magic; sub.f16x2 $1, b, magic; }",
            "=r,=r,r", [code], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def nibble_operands(byte, D: tl.constexpr):
    """[...] bytes -> the signed values of their low and of their high nibbles, as for byte_operand"""
    if tl.bfloat16 == D:  # 128 + the code's distance from the lowest, less 136
        return tl.inline_asm_elementwise(
            "{ .reg .b32 y, a, b, c, d, one, magic, flip; mov.b32 one, 0x3F803F80; mov.b32 magic, 0xC308C308;"
            "mov.b32 flip, 0x00080008; shr.u32 y, $4, 4;"
            "prmt.b32 a, $4, 0x43434343, 0x4140; prmt.b32 b, $4, 0x43434343, 0x4342;"
            "prmt.b32 c, y, 0x43434343, 0x4140; prmt.b32 d, y, 0x43434343, 0x4342;"
            "lop3.b32 a, a, 0xFF0FFF0F, flip, 0x6A; lop3.b32 b, b, 0xFF0FFF0F, flip, 0x6A;"
            "lop3.b32 c, c, 0xFF0FFF0F, flip, 0x6A; lop3.b32 d, d, 0xFF0FFF0F, flip, 0x6A;"
            "fma.rn.bf16x2 $0, a, one, magic; fma.rn.bf16x2 $1, b, one, magic;"
            "fma.rn.bf16x2 $2, c, one, magic; fma.rn.bf16x2 $3, d, one, magic; }",
            "=r,=r,=r,=r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:  # 1024 + the distance less 1032, and a sixteenth of 1024 + 16 times the distance less 72
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b, c, d, low, part, high, flip; mov.b32 low, 0x64086408;"
            "mov.b32 part, 0x2C002C00; mov.b32 high, 0xD480D480; mov.b32 flip, 0x00880088;"
            "prmt.b32 a, $4, 0x64646464, 0x4140; prmt.b32 b, $4, 0x64646464, 0x4342;"
            "lop3.b32 c, a, flip, 0xFFF0FFF0, 0x28; lop3.b32 d, b, flip, 0xFFF0FFF0, 0x28;"
            "lop3.b32 a, a, flip, 0xFF0FFF0F, 0x28; lop3.b32 b, b, flip, 0xFF0FFF0F, 0x28;"
            "sub.f16x2 $0, a, low; sub.f16x2 $1, b, low;"
            "fma.rn.f16x2 $2, c, part, high; fma.rn.f16x2 $3, d, part, high; }",
            "=r,=r,=r,=r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.constexpr_function
def looks_up(F, D):
    """Say if four bits are the index of a table of D."""
    return F.is_float and F.bits == 4 and F.per_byte == 2 and tl.float32 != D


@triton.constexpr_function
def look_up_assembly(F, X):
    """Four bytes -> the codes in X at their low and at their high nibbles. The two bytes of a code are looked up apart:
    a nibble selects one of eight by its low bits, twice, and one of those two by its highest.

    z is 0, the upper half of a lane's number squared. A compiler that knew so, or that it is the same in all lanes,
    would move the words of the table to a register for every instruction anew.
    """
    table = [X.code(F.value(code)) for code in range(16)]
    text = "{ .reg .b32 s, t, a, b, l, h, w, z; mov.u32 z, %laneid; mul.hi.u32 z, z, z;"
    text += "and.b32 s, $4, 0x77777777; shr.u32 t, $4, 1; lop3.b32 t, t, 0x44444444, 0x32103210, 0xEA;"
    for half in (0, 1):
        for to, shift in (("l", 0), ("h", 8)):
            at = [code >> shift & 255 for code in table]
            words = [f"0x{sum(at[4 * n + i] << 8 * i for i in range(4)):08X}" for n in range(4)]
            text += f"or.b32 w, z, {words[0]}; prmt.b32 a, w, {words[1]}, s;"
            if words[:2] == words[2:]:
                text += f"mov.b32 {to}, a;"
            else:
                text += f"or.b32 w, z, {words[2]}; prmt.b32 b, w, {words[3]}, s; prmt.b32 {to}, a, b, t;"
        text += f"prmt.b32 ${half}, l, h, 0x6240; prmt.b32 ${2 + half}, l, h, 0x7351;"
        text += "" if half else "shr.u32 s, s, 16; shr.u32 t, t, 16;"
    return text + "}"


@triton.jit
def look_up_operands(byte, F: tl.constexpr, D: tl.constexpr):
    """[...] bytes -> the values of their low and of their high nibbles, as for byte_operand"""
    if tl.bfloat16 == D:
        return tl.inline_asm_elementwise(
            look_up_assembly(F, BFLOAT16), "=r,=r,=r,=r,r", [byte], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            look_up_assembly(F, FLOAT16), "=r,=r,=r,=r,r", [byte], dtype=(tl.float16, tl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip


@triton.jit
def tile_operands(tiles, F: tl.constexpr, D: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr):
    """[tile_n / 16, 1024] bytes -> the operands of each place in a byte, [tile_n / 16, 1024] D"""
    if F.whole:
        code = tiles.to(tl.int8, bitcast=True) if F.storage == "int8" else tiles
        return (operand(code, F, D, ARCH),)
    elif F.per_byte == 2 and F.signed and not F.is_float and tl.float32 != D:
        return nibble_operands(tiles, D)
    elif looks_up(F, D):
        return look_up_operands(tiles, F, D)
    else:
        PLACES: tl.constexpr = F.per_byte
        values = ()
        for place in tl.static_range(PLACES):
            code = spread_sign((tiles >> (place * F.bits)).to(tl.int32) & ((1 << F.bits) - 1), F)
            values = values + (operand(code, F, D, ARCH),)  # noqa: RUF005 (Triton knows no starred tuple)
        return values


@triton.constexpr_function
def chunk_bits(X, F, SCALES, T, ARCH):
    """The order of a tile's 64 chunks of 16 bytes in shared memory, so that few lanes ask one bank for different words.

    Bit i of a chunk's place there is bit chunk_bits[i] of its place in the tile: r, t (2 bits), g (3). For the right
    operand a warpgroup of sm_90 stores eight bytes, of all g, which the swizzle sets apart, and both halves of its
    chunks. Its lanes load two codes at a time otherwise, of all g; or whole chunks where T is paired, each eight lanes
    those of t and a bit of g. The next bit is r, the half of a sector of the L2 cache. A warp of few rows loads chunks
    two to a bank as they are stored: side by side they would take more registers, and memory is what it waits for.
    """
    if ARCH > 0 and (ARCH != 90 or T.warps < 4 or operand_type(X, F, SCALES != "element", ARCH) == tl.float32):
        return AS_STORED.value
    if is_right(X, F, SCALES, T, ARCH):
        return (1, 3, 4, 5, 0, 2)
    if T.paired or ARCH == 0:
        return (1, 2, 3, 0, 4, 5)
    return (3, 4, 5, 0, 1, 2) if T.tile_n >= 64 and T.tile_m >= NARROWEST else AS_STORED.value


@triton.constexpr_function
def are_moved(CHUNKS):
    return tuple(CHUNKS) != AS_STORED.value


@triton.constexpr_function
def chunk_axes(CHUNKS):
    """The axes of g (3), t (2) and r of a tile whose chunks lie in shared memory as CHUNKS says."""
    return tuple(6 - tuple(CHUNKS).index(bit) for bit in (5, 4, 3, 2, 1, 0))


@triton.jit
def split_tiles(values, T: tl.constexpr, CHUNKS: tl.constexpr):
    """[tile_n / 16, 1024] -> [tile, g, t, r, s, h, e], the axes of backends/tiles.py"""
    if are_moved(CHUNKS):
        A: tl.constexpr = chunk_axes(CHUNKS)
        values = values.reshape(T.tile_n // ROWS, 2, 2, 2, 2, 2, 2, 2, 2, 4)
        values = values.permute(0, A[0], A[1], A[2], A[3], A[4], A[5], 7, 8, 9)
    return values.reshape(T.tile_n // ROWS, 8, 4, 2, 2, 2, 4)


@triton.jit
def byte_of_tile(CHUNKS: tl.constexpr):
    """[1024] the byte of a tile that lies at each byte of shared memory"""
    at = tl.arange(0, BYTES)
    if are_moved(CHUNKS):
        byte = at & 15
        for bit in tl.static_range(6):
            byte += ((at >> (4 + bit)) & 1) << (4 + CHUNKS[bit])
        return tl.multiple_of(tl.max_contiguous(byte, 16), 16)
    else:
        return at


@triton.jit
def tile_rows(n_first, T: tl.constexpr):
    """The row of every element of split_tiles, [tile, g, 1, r, 1, 1, 1]"""
    tile = tl.arange(0, T.tile_n // ROWS)[:, None, None, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None, None, None]
    r = tl.arange(0, 2)[None, None, None, :, None, None, None]
    return n_first + tile * ROWS + r * 8 + g


@triton.jit
def in_order(values, T: tl.constexpr):
    """[tile, g, t, r, s, h, e] -> [tile_n, 64]; a thread keeps its own. Where T is paired, columns are in the order of
    `paired`: a thread of a warpgroup takes two and two, eight apart, where one of a warp takes four side by side."""
    if T.paired:
        pairs = values.reshape(T.tile_n // ROWS, 8, 4, 2, 2, 2, 2, 2)
        return pairs.permute(0, 3, 1, 4, 5, 6, 2, 7).reshape(T.tile_n, COLUMNS)
    else:
        return values.permute(0, 3, 1, 4, 5, 2, 6).reshape(T.tile_n, COLUMNS)


@triton.jit
def load_operands(
    codes_ptr, n_first, step, stride, N, K, F: tl.constexpr, D: tl.constexpr, T: tl.constexpr, TILED: tl.constexpr,
    CHUNKS: tl.constexpr, MASKED: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Rows n_first.. of the weight, step ``step`` of K -> [tile_n, T.tile_k] D, from tiles one a place in a byte"""
    if TILED:
        row = n_first // ROWS + tl.arange(0, T.tile_n // ROWS)[:, None]
        byte = (row * stride + step) * BYTES + byte_of_tile(CHUNKS)[None, :]
        return tile_operands(tl.load(codes_ptr + byte, row * ROWS < N, 0), F, D, T, ARCH)
    else:
        row = n_first + tl.arange(0, T.tile_n)[:, None]
        ptr = codes_at(codes_ptr, F) + row * stride
        return (operand(load_codes(ptr, row < N, step * T.tile_k, K, F, T, MASKED), F, D, ARCH),)


@triton.jit
def load_codes(ptr, rows, k, end, F: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr):
    """Codes of the rows that ptr [tile_n, 1] points to, T.tile_k of them from column k, which begins a byte;
    0 past ``end`` and where there is no row"""
    column = k + tl.arange(0, T.tile_k)[None, :]
    if not F.whole:
        byte = k // F.per_byte + tl.arange(0, T.tile_k // F.per_byte)[None, :]
        code = unpack(tl.load(ptr + byte, rows & (F.per_byte * byte < end) if MASKED else rows, 0), F)
        return tl.where(column < end, code, 0) if MASKED else code
    else:
        return tl.load(ptr + column, rows & (column < end) if MASKED else rows, 0)


@triton.jit
def load_byte(ptr, mask, F: tl.constexpr):
    """Codes of eight bits as signed bytes, less their offset; 0 where there is none"""
    if offset(F):
        return (tl.load(ptr, mask, offset(F)) ^ offset(F)).to(tl.int8, bitcast=True)
    else:
        return tl.load(ptr, mask, 0)


@triton.jit
def load_narrow(ptr, rows, k, end, F: tl.constexpr, T: tl.constexpr, MASKED: tl.constexpr):
    """Codes of fewer than eight bits from column k on as signed bytes. Where a group may begin inside a byte, MASKED,
    each code is read by itself."""
    if MASKED:
        column = k + tl.arange(0, T.tile_k)[None, :]
        byte = tl.load(ptr + column // F.per_byte, rows & (column < end), 0).to(tl.int32)
        code = (byte >> (column % F.per_byte * F.bits).to(tl.int32)) & ((1 << F.bits) - 1)
        return spread_sign(code, F).to(tl.int8)
    else:
        byte = k // F.per_byte + tl.arange(0, T.tile_k // F.per_byte)[None, :]
        return unpack(tl.load(ptr + byte, rows, 0), F).to(tl.int8)


@triton.jit
def multiply(w, x, total, RIGHT: tl.constexpr, T: tl.constexpr, ARCH: tl.constexpr):
    """w x + total, [tile_n, tile_m] float32; RIGHT: as the product of the transposed"""
    if RIGHT:
        return tl.trans(tl.dot(tl.trans(x), tl.trans(w), tl.trans(total), input_precision="ieee"))
    elif ARCH == 90 and T.warps >= 4 and w.dtype != tl.float32:
        return settled(tl.dot(w, x, total))
    else:
        return tl.dot(w, x, total, input_precision="ieee")


@triton.jit
def settled(total):
    """The sums of a warpgroup's product, for which the trip of a loop that has started it waits, as it uses them here.

    The warpgroup multiplies beside what follows, and reads w from registers meanwhile. Triton 3.6 lets it run on in the
    next trip, which takes the registers for other values (Triton's issue 9433): wrong bytes on an H200.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [total], dtype=tl.float32, is_pure=True, pack=1)


@triton.constexpr_function
def fuses(D, T):
    """True if a sum times a scale is added in one instruction. For few sums, or products in float32, which are short of
    registers, the compiler takes more of them then."""
    return T.tile_m > FEW and tl.float32 != D


@triton.jit
def add_scaled(total, part, s, D: tl.constexpr, T: tl.constexpr):
    """total + part s"""
    if fuses(D, T):
        return tl.fma(part, s, total)
    else:
        return total + part * s


# ---- scales and zero points ------------------------------------------------------------------------------------------


@triton.jit
def load_scale(ptr, exists, F: tl.constexpr):
    """[...] effective float32 scale; 2^-100 where there is none"""
    return effective_scale(tl.load(ptr, exists, 0.0), F)


@triton.jit
def zero_points(ptr, at, exists, F: tl.constexpr):
    """[...] int32: what is subtracted from a signed byte"""
    if ptr is not None:
        return load_zero_point(ptr, at, exists, F) - offset(F)
    else:
        return tl.full((1, 1), -offset(F), tl.int32)


@triton.jit
def subtract_zero_point(w, zero_point_ptr, at, exists, F: tl.constexpr):
    """[...] D less the zero points at ``at``, exact: a magnitude of 255 needs eight bits"""
    if zero_point_ptr is not None:
        return w - int_to_float(zero_points(zero_point_ptr, at, exists, F)).to(w.dtype)
    elif offset(F):
        return w + tl.full((1, 1), offset(F), w.dtype)
    else:
        return w


# ---- sums of several programs ----------------------------------------------------------------------------------------


@triton.jit
def arrive(total, partial_ptr, ticket_ptr, inside, SPLITS: tl.constexpr):
    """Store the sum of a split at its pointers; return True for the split of its tile that arrives last, which leaves
    the ticket as the first has found it"""
    tl.store(partial_ptr, total, inside)
    tl.debug_barrier()  # the ticket of one thread stands for the stores of all
    last = tl.atomic_add(ticket_ptr, 1) == SPLITS - 1
    tl.store(ticket_ptr, 0, last)
    return last


@triton.jit
def sum_splits(partial_ptr, size, inside, SPLITS: tl.constexpr):
    """The sums of all splits, in their order, past the cache that other programs do not write to"""
    total = tl.load(partial_ptr, inside, 0, cache_modifier=".cg")
    for split in tl.static_range(1, SPLITS):
        total += tl.load(partial_ptr + split * size, inside, 0, cache_modifier=".cg")
    return total


# ---- after the sum ---------------------------------------------------------------------------------------------------


@triton.jit
def finish(
    total, y_ptr, bias_ptr, n, inside, N, Y: tl.constexpr, ACTIVATION: tl.constexpr, ARCH: tl.constexpr
):  # fmt: skip
    """y = encode(activation(fl(total + bias[n]))) at y_ptr, for what is inside"""
    if bias_ptr is not None:
        total = total + tl.load(bias_ptr + n, n < N, 0.0)
    y = activate(total, ACTIVATION)  # a NaN is 0x7FFFFFFF, which is converted to that of 16 bits
    code = convert_16(y, Y, False) if ARCH >= 80 and Y.bits == 16 else encode_float(y, Y, False, ARCH)
    ptr = codes_at(y_ptr, Y)
    tl.store(ptr, code.to(ptr.dtype.element_ty), inside)
