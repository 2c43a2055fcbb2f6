"""The table of number formats: a format is a row, and everything else about it is derived.

Imports nothing of torch or NumPy, so that the build can read it to write ``csrc/formats.h``.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args


class Stored:
    """The layout of the codes of a format in memory.

    A code of 8, 16 or 32 bits fills bytes of its own, and torch has a dtype of the format's name. A narrower one lies
    in the low bits of a byte, whose other bits are 0 when it is written and ignored when it is read; or ``per_byte``
    codes share a byte, and code ``per_byte * j + i`` of a row is bits ``i * bits`` and up of byte j. These bytes are
    uint8.
    """

    name: str
    bits: int
    per_byte: int
    is_float: bool
    signed: bool

    def __post_init__(self) -> None:
        shared = self.per_byte in (2, 4) and self.bits * self.per_byte == 8
        if not shared and (self.per_byte != 1 or self.bits > 32 or (self.bits > 8 and self.bits not in (16, 32))):
            raise ValueError(
                f"per_byte of {self.name} must be 1, or 2 or 4 where {self.bits} bits divide a byte so, "
                f"got {self.per_byte}"
            )

    def __hash__(self) -> int:
        """Hash the name, which no other row has: launchers look their choices up by rows at every call."""
        return hash(self.name)

    @cached_property
    def packed(self) -> bool:
        """True if codes share a byte."""
        return self.per_byte > 1

    @cached_property
    def whole(self) -> bool:
        """True if a code fills the bytes it is stored in."""
        return self.bits in (8, 16, 32)

    @cached_property
    def storage(self) -> str:
        """The integer dtype that codes are kept in, in NumPy's words."""
        signed = self.whole and self.signed and not self.is_float
        return f"{'' if signed else 'u'}int{max(self.bits, 8)}"

    @cached_property
    def dtype_name(self) -> str:
        """The dtype that codes are kept in, in torch's words."""
        return self.name if self.whole else "uint8"

    @cached_property
    def bytes_per_element(self) -> float:
        return max(self.bits, 8) / 8 / self.per_byte

    def columns(self, size: int) -> int:
        """Elements of ``storage`` that hold a row of ``size`` codes."""
        return (size + self.per_byte - 1) // self.per_byte if self.packed else size

    @cached_property
    def zero_byte(self) -> int:
        """The byte of `storage` in which every code is that of 0."""
        return 0

    def sizes(self, columns: int) -> tuple[int, ...]:
        """The sizes of a row that take ``columns`` elements of ``storage``, in ascending order."""
        return tuple(columns * self.per_byte - i for i in reversed(range(self.per_byte)))


NanCodes = Literal["none", "high", "negative zero"]


@dataclass(frozen=True)
class FloatFormat(Stored):
    """``sign | exponent | fraction``: a code is worth (-1)^s * 2^(e - bias) * 1.f, or 2^(1 - bias) * 0.f at e = 0.

    Or a code book, `book`: code i is worth ``values[i]``, and the fields say nothing.
    """

    # Its name in ml_dtypes, and in torch if it has a dtype for it.
    name: str
    # Bits of e, below the sign.
    exponent_bits: int
    # Bits of f, the lowest.
    fraction_bits: int
    # The e of the values from 1 up to 2.
    bias: int
    # True if the code after the largest finite value is infinity, of either sign.
    has_inf: bool
    # "none": no code is NaN. "high": the codes of either sign beyond infinity are, or the highest code of either sign
    # where there is no infinity. "negative zero": the code of -0 is the only NaN, and so there is no -0.
    nan: NanCodes
    # Codes that share a byte: see `Stored`.
    per_byte: int = 1
    # The values of a code book in ascending order, float32 numbers, one for each code. Empty where there are fields.
    values: tuple[float, ...] = ()

    is_float = True
    signed = True  # there are negative values; with fields, the highest bit of a code is the sign
    __hash__ = Stored.__hash__

    def __post_init__(self) -> None:
        if self.nan not in get_args(NanCodes):
            raise ValueError(f"nan of {self.name} must be one of {', '.join(get_args(NanCodes))}, got {self.nan!r}")
        if self.values and (len(self.values) != 1 << self.bits or self.nan != "none" or self.has_inf or self.bits > 4):
            raise ValueError(f"values of {self.name} must be {1 << self.bits}, at most 16, got {len(self.values)}")
        ascending = all(a < b for a, b in zip(self.values, self.values[1:], strict=False))
        if not ascending or any(float_of(float_bits(v)) != v for v in self.values):
            raise ValueError(f"values of {self.name} must be float32 numbers in ascending order, got {self.values}")
        super().__post_init__()

    @cached_property
    def bits(self) -> int:  # type: ignore[override]
        return 1 + self.exponent_bits + self.fraction_bits

    @cached_property
    def sign_bit(self) -> int:
        return 1 << (self.bits - 1)

    @cached_property
    def is_book(self) -> bool:
        """True if the values are a table."""
        return bool(self.values)

    @cached_property
    def has_nan(self) -> bool:
        return self.nan != "none"

    @cached_property
    def has_negative_zero(self) -> bool:
        return self.nan != "negative zero" and not self.values

    @cached_property
    def zero_byte(self) -> int:
        if not self.values:
            return 0
        code = min(range(len(self.values)), key=lambda i: abs(self.values[i]))
        return sum(code << (i * self.bits) for i in range(self.per_byte))

    @cached_property
    def is_symmetric(self) -> bool:
        """True if the negative of every value is a value too: the sign of a scale changes nothing."""
        return self.values == tuple(-v for v in reversed(self.values))

    @cached_property
    def midpoints(self) -> tuple[float, ...]:
        """fl(fl(a + b) / 2) of neighbours of a code book. A value above it gets the upper code (C6)."""
        pairs = zip(self.values, self.values[1:], strict=False)
        return tuple(float_of(float_bits(float_of(float_bits(a + b)) / 2)) for a, b in pairs)

    @cached_property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        if self.values:
            return len(self.values) - 1
        # below NaN: with an infinity it has the rest of the top exponent, else one code
        high_nans = ((1 << self.fraction_bits) - 1 if self.has_inf else 1) if self.nan == "high" else 0
        return self.sign_bit - 1 - high_nans - self.has_inf

    @cached_property
    def nan_code(self) -> int:
        """The one NaN that is ever written; a format without NaN writes its largest value instead (C1)."""
        return {"none": self.max_code, "high": self.sign_bit - 1, "negative zero": self.sign_bit}[self.nan]

    @cached_property
    def overflow_code(self) -> int:
        """The code of a magnitude above the largest finite value when ``cast`` does not saturate (C3)."""
        return self.max_code + 1 if self.has_inf else self.nan_code

    @cached_property
    def max(self) -> float:
        """The largest finite magnitude, Q of C4: a scale is ``amax`` / Q."""
        if self.values:
            return max(abs(v) for v in self.values)
        return self.value(self.max_code)

    @cached_property
    def smallest(self) -> float:
        """Smallest magnitude above 0."""
        if self.values:
            return min(abs(v) for v in self.values if v)
        return 2.0 ** (1 - self.bias - self.fraction_bits)

    @cached_property
    def max_bits(self) -> int:
        """Bits of the largest finite value as FP32."""
        return float_bits(self.max)

    @cached_property
    def rounds_to_max_bits(self) -> int:
        """FP32 bits of the largest magnitude that rounds to a finite value: half a step above, ties to even.

        A code book has no next step: its largest magnitude.
        """
        if self.values:
            return self.max_bits
        return self.max_bits + (1 << (22 - self.fraction_bits)) - (self.max_code & 1)

    @cached_property
    def saturates(self) -> bool:
        """True if ``cast`` saturates by default (C3)."""
        return self.bits <= 8

    @cached_property
    def scale_max(self) -> float:
        """Largest effective scale, 2^(127 - exponent of the largest magnitude), at most 2^126: 1/s is normal (C4)."""
        exponent = math.frexp(self.max)[1] - 1
        return 2.0 ** min(127 - exponent, 126)

    @cached_property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code, as `pack` takes them: bits without a sign."""
        return 0, (1 << self.bits) - 1

    def holds(self, f: Format) -> bool:
        """True if this format has every value of ``f``; of an integer format, every code minus a zero point."""
        if isinstance(f, IntFormat):
            return f.bits <= self.fraction_bits + 1 and 2**f.bits <= self.max
        if f.values:
            return not self.values and all(self.is_value(v) for v in f.values)
        special = f.has_inf <= self.has_inf and f.has_nan <= self.has_nan
        return special and f.fraction_bits <= self.fraction_bits and f.max <= self.max and f.smallest >= self.smallest

    def value(self, code: int) -> float:
        """The value of a code that is neither infinity nor NaN."""
        if self.values:
            return self.values[code]
        exponent, fraction = divmod(code & (self.sign_bit - 1), 1 << self.fraction_bits)
        magnitude = math.ldexp((exponent > 0) + fraction / (1 << self.fraction_bits), max(exponent, 1) - self.bias)
        return -magnitude if code & self.sign_bit else magnitude

    def code(self, value: float) -> int:
        """The code of one of the values of a format with fields: 0, or a normal one."""
        significand, exponent = math.frexp(abs(value))
        fraction = int((2 * significand - 1) * (1 << self.fraction_bits))
        magnitude = ((exponent - 1 + self.bias) << self.fraction_bits) + fraction if value else 0
        return magnitude | self.sign_bit * (math.copysign(1.0, value) < 0)

    def is_value(self, value: float) -> bool:
        """True if a code with fields has the value ``value``."""
        steps = abs(value) / max(2.0 ** (math.frexp(value)[1] - 1 - self.fraction_bits), self.smallest)
        return steps.is_integer() and abs(value) <= self.max


@dataclass(frozen=True)
class IntFormat(Stored):
    """Two's complement when signed. Symmetric codes leave out the most negative one (C4)."""

    # int or uint and the bits.
    name: str
    # Bits of a code.
    bits: int
    # True if there are negative codes.
    signed: bool
    # Codes that share a byte: see `Stored`.
    per_byte: int = 1

    is_float = False
    is_symmetric = True  # codes without a zero point are
    exponent_bits = 0
    __hash__ = Stored.__hash__

    def __post_init__(self) -> None:
        if not 1 + self.signed <= self.bits <= 8:
            raise ValueError(f"bits of {self.name} must be {1 + self.signed}..8, got {self.bits}")
        super().__post_init__()

    @cached_property
    def max(self) -> int:
        """The largest code, Q of C4: a scale is ``amax`` / Q."""
        return (1 << (self.bits - self.signed)) - 1

    def range(self, affine: bool) -> tuple[int, int]:
        """(qmin, qmax): every code when there is a zero point, -max..max or 0..max when there is none."""
        lowest = -self.max if self.signed else 0
        return lowest - (affine and self.signed), self.max

    @cached_property
    def code_range(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        return self.range(affine=True)

    @cached_property
    def excess(self) -> int:
        """A signed byte holds a code less this number."""
        return 0 if self.max <= 127 else 128

    @cached_property
    def scale_max(self) -> float:
        """Largest effective scale, 2^(127 - exponent of the largest magnitude) (C4)."""
        largest = self.max + self.signed
        return 2.0 ** (127 - (largest.bit_length() - 1))


Format = FloatFormat | IntFormat


def float_of(bits: int) -> float:
    """The value of 32 bits as FP32."""
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def float_bits(value: float) -> int:
    """The 32 bits of ``value`` as FP32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def book(name: str, values: tuple[float, ...]) -> FloatFormat:
    """The row of a code book of 4 or 16 values: 2 or 4 bits, 4 or 2 codes a byte."""
    bits = (len(values) - 1).bit_length()
    return FloatFormat(name, 0, bits - 1, 0, False, "none", 8 // bits, values)


def nearest_bfloat16(value: float) -> float:
    """A float32 number rounded to bfloat16, ties to even."""
    bits = float_bits(value)
    return float_of(bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000)


def power_fraction(f: Format) -> int:
    """The fraction, of 23 bits, from which on E8M0 keeps a scale of ``f`` as the next power of two.

    Below it the largest magnitude, the scale times Q, has the exponent of Q beside that of the scale.
    """
    return float_bits(2.0 ** math.frexp(f.max)[1] / f.max) & 0x7FFFFF


SCALE_MIN = 2.0**-100  # smallest effective scale: 1/s stays normal (C4)
FLOAT32 = FloatFormat("float32", 8, 23, 127, True, "high")  # the source of every projection

# The quantiles of a normal distribution that Dettmers et al., "QLoRA" (2023) chose, as bitsandbytes has them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

TABLE: tuple[Format, ...] = (
    #            name             exponent fraction bias  inf    nan     codes a byte
    FloatFormat("float16",        5,       10,      15,   True,  "high"),
    FloatFormat("bfloat16",       8,       7,       127,  True,  "high"),
    FloatFormat("float8_e4m3fn",  4,       3,       7,    False, "high"),
    FloatFormat("float8_e5m2",    5,       2,       15,   True,  "high"),
    FloatFormat("float4_e2m1fn",  2,       1,       1,    False, "none", 2),
    book("nf4", NF4),
    book("nf4_bf16", tuple(nearest_bfloat16(v) for v in NF4)),  # exact where 16-bit operands are multiplied
    #          name     bits signed codes a byte
    IntFormat("int8",   8,   True),
    IntFormat("uint8",  8,   False),
    IntFormat("int4",   4,   True,  2),
)  # fmt: skip

FORMATS: dict[str, Format] = {f.name: f for f in (FLOAT32, *TABLE)}
WITHOUT_BOOKS = tuple(f for f in TABLE if isinstance(f, IntFormat) or not f.is_book)  # the formats with fields


def get(format: Any) -> Format:
    """The row of ``format``: a name, or a ``torch.dtype`` of that name.

    Raises
    ------
    ValueError
        For a name that is not in the table.
    """
    name = format if isinstance(format, str) else str(format).removeprefix("torch.")
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}") from None


def c_header() -> str:
    """``csrc/formats.h``: the same rows, with what follows from them worked out."""
    floats, books, ints = [], [], []
    for f in TABLE:
        stored = f"{f.name}, {f.dtype_name}, {f.bits}, {f.per_byte}"
        if isinstance(f, FloatFormat):
            shape = f"{f.exponent_bits}, {f.fraction_bits}, {f.bias}"
            has = ", ".join("true" if b else "false" for b in (f.is_book, f.has_inf, f.has_nan, f.has_negative_zero))
            codes = ", ".join(f"0x{c:x}" for c in (f.max_code, f.overflow_code, f.nan_code))
            limits = ", ".join(f"0x{float_bits(v):08x}" for v in (f.max, f.scale_max))
            floats.append(f"  X({stored}, {shape}, {has}, {codes}, {limits})")
            if f.is_book:
                books.append(f"  X({f.name}, {', '.join(f'0x{float_bits(v):08x}' for v in f.values)})")
        else:
            limits = ", ".join(str(q) for affine in (False, True) for q in f.range(affine))
            signed = "true" if f.signed else "false"
            ints.append(f"  X({stored}, {signed}, {limits}, {f.max}, 0x{float_bits(f.scale_max):08x})")
    return "\n".join(
        [
            "// Written by `python quantlib/formats.py > csrc/formats.h`: edit that table, not this file.",
            "#pragma once",
            "#include <cstdint>",
            "",
            "namespace quantlib {",
            "",
            "// The rows of the table, in its order.",
            f"enum class Type : uint8_t {{ {', '.join(FORMATS)} }};",
            "",
            "}  // namespace quantlib",
            "",
            "// X(name, torch's dtype of its codes, bits, codes a byte, exponent_bits, fraction_bits, bias,",
            "//   is_book, has_inf, has_nan, has_negative_zero, max_code, overflow_code, nan_code, max, scale_max)",
            "// The last two are the bits of an FP32 value.",
            "#define QL_FLOATS(X) \\",
            " \\\n".join(floats),
            "",
            "// X(name, the bits of the FP32 values of a code book, code by code)",
            "#define QL_BOOKS(X) \\",
            " \\\n".join(books),
            "",
            "// X(name, torch's dtype of its codes, bits, codes a byte, is_signed, qmin, qmax, affine_qmin,",
            "//   affine_qmax, max, scale_max)",
            "#define QL_INTS(X) \\",
            " \\\n".join(ints),
            "",
            f"#define QL_SCALE_MIN 0x{float_bits(SCALE_MIN):08x}",
            "",
        ]
    )


if __name__ == "__main__":
    print(c_header(), end="")
