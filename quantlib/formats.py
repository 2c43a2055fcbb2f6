"""THE table of number formats: a format is a row, everything else about it is derived.

Imports nothing of torch or NumPy, so that the build can read it to write ``csrc/formats.h``.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class FloatFormat:
    """``sign | exponent | fraction``: a code is worth (-1)^s * 2^(e - bias) * 1.f, or 2^(1 - bias) * 0.f at e = 0."""

    name: str
    exponent_bits: int
    fraction_bits: int
    bias: int
    has_inf: bool  # the top exponent is kept for infinity and NaN
    has_nan: bool  # at least one code is NaN

    is_float = True
    signed = True

    @cached_property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits

    @cached_property
    def sign_bit(self) -> int:
        return 1 << (self.bits - 1)

    @cached_property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        top = self.sign_bit - 1
        return top - (1 << self.fraction_bits) if self.has_inf else top - self.has_nan

    @cached_property
    def nan_code(self) -> int:
        """The one NaN that is ever written; a format without NaN writes its largest value instead (C1)."""
        return self.sign_bit - 1 if self.has_nan else self.max_code

    @cached_property
    def overflow_code(self) -> int:
        """What a magnitude above the largest finite value becomes when it does not saturate (C3)."""
        return self.max_code + 1 if self.has_inf else self.nan_code

    @cached_property
    def max(self) -> float:
        """Largest finite value: what ``amax`` is divided by to make a scale (Q of C4)."""
        exponent, fraction = divmod(self.max_code, 1 << self.fraction_bits)
        return 2.0 ** (exponent - self.bias) * (1 + fraction / (1 << self.fraction_bits))

    @cached_property
    def max_bits(self) -> int:
        """Bits of the largest finite value as FP32."""
        return float_bits(self.max)

    @cached_property
    def rounds_to_max_bits(self) -> int:
        """FP32 bits of the largest magnitude that rounds to a finite value: half a step above, ties to even."""
        return self.max_bits + (1 << (22 - self.fraction_bits)) - (self.max_code & 1)

    @cached_property
    def saturates(self) -> bool:
        """Whether ``cast`` saturates unless told otherwise (C3)."""
        return self.bits <= 8

    @cached_property
    def scale_max(self) -> float:
        """Largest effective scale, 2^(127 - exponent of the largest magnitude) (C4)."""
        return 2.0 ** (127 - ((self.max_code >> self.fraction_bits) - self.bias))

    packed = property(lambda self: self.bits < 8)
    storage = property(lambda self: f"uint{max(self.bits, 8)}")
    dtype_name = property(lambda self: "uint8" if self.packed else self.name)
    bytes_per_element = property(lambda self: self.bits / 8)


@dataclass(frozen=True)
class IntFormat:
    """Two's complement when signed. Symmetric codes leave out the most negative one (C4)."""

    name: str
    bits: int
    signed: bool

    is_float = False
    exponent_bits = 0

    @cached_property
    def max(self) -> int:
        """Largest code: what ``amax`` is divided by to make a scale (Q of C4)."""
        return (1 << (self.bits - self.signed)) - 1

    def range(self, affine: bool) -> tuple[int, int]:
        """(qmin, qmax): every code when there is a zero point, -max..max or 0..max when there is none."""
        lowest = -self.max if self.signed else 0
        return lowest - (affine and self.signed), self.max

    @cached_property
    def scale_max(self) -> float:
        """Largest effective scale, 2^(127 - exponent of the largest magnitude) (C4)."""
        largest = self.max + self.signed
        return 2.0 ** (127 - (largest.bit_length() - 1))

    packed = property(lambda self: self.bits < 8)
    storage = property(lambda self: "uint8" if self.packed or not self.signed else f"int{self.bits}")
    dtype_name = property(lambda self: "uint8" if self.packed else self.name)
    bytes_per_element = property(lambda self: self.bits / 8)


Format = FloatFormat | IntFormat

SCALE_MIN = 2.0**-100  # smallest effective scale: 1/s stays normal (C4)
FLOAT32 = FloatFormat("float32", 8, 23, 127, True, True)  # the source of every projection

TABLE: tuple[Format, ...] = (
    #            name             exponent fraction bias  inf    nan
    FloatFormat("float16",        5,       10,      15,   True,  True),
    FloatFormat("bfloat16",       8,       7,       127,  True,  True),
    FloatFormat("float8_e4m3fn",  4,       3,       7,    False, True),
    FloatFormat("float8_e5m2",    5,       2,       15,   True,  True),
    FloatFormat("float4_e2m1fn",  2,       1,       1,    False, False),
    #          name     bits signed
    IntFormat("int8",   8,   True),
    IntFormat("uint8",  8,   False),
    IntFormat("int4",   4,   True),
)  # fmt: skip

FORMATS: dict[str, Format] = {f.name: f for f in (FLOAT32, *TABLE)}


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


def float_bits(value: float) -> int:
    """The 32 bits of ``value`` as FP32."""
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


def c_header() -> str:
    """``csrc/formats.h``: the same rows, with what follows from them worked out."""
    floats, ints = [], []
    for f in TABLE:
        if isinstance(f, FloatFormat):
            codes = ", ".join(f"0x{c:x}" for c in (f.max_code, f.overflow_code, f.nan_code))
            values = ", ".join(f"0x{float_bits(v):08x}" for v in (f.max, f.scale_max))
            shape = f"{f.bits}, {f.exponent_bits}, {f.fraction_bits}, {f.bias}"
            floats.append(f"  X({f.name}, {shape}, {codes}, {values})")
        else:
            limits = ", ".join(str(q) for affine in (False, True) for q in f.range(affine))
            ints.append(f"  X({f.name}, {f.bits}, {limits}, {f.max}, 0x{float_bits(f.scale_max):08x})")
    return "\n".join(
        [
            "// Written by `python quantlib/formats.py > csrc/formats.h`: edit that table, not this file.",
            "#pragma once",
            "",
            "// X(name, bits, exponent_bits, fraction_bits, bias, max_code, overflow_code, nan_code, max, scale_max)",
            "// The last two are the bits of an FP32 value.",
            "#define QL_FLOATS(X) \\",
            " \\\n".join(floats),
            "",
            "// X(name, bits, qmin, qmax, affine_qmin, affine_qmax, max, scale_max)",
            "#define QL_INTS(X) \\",
            " \\\n".join(ints),
            "",
            f"#define QL_SCALE_MIN 0x{float_bits(SCALE_MIN):08x}",
            "",
        ]
    )


if __name__ == "__main__":
    print(c_header(), end="")
