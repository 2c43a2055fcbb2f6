"""Instructions of PTX that Triton's interpreter lacks, run one by one on arrays of registers, as bits in uint32.

The lanes of a warp lie side by side in the last axis.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from quantlib import formats, reference

Array = Any
LANES = 32


def run(text: str, inputs: dict[int, Array]) -> dict[int, Array]:
    """Return what is left in $0, $1, ... below the first input; ``inputs``: n -> the bits of $n."""
    shape = next(iter(inputs.values())).shape
    registers = {f"${n}": np.broadcast_to(bits.astype(np.uint32), shape) for n, bits in inputs.items()}

    def value(name: str) -> Array:
        if name == "%laneid":
            return np.arange(np.prod(shape), dtype=np.uint32).reshape(shape) % LANES
        if name in registers:
            return registers[name]
        number = int(name.removeprefix("0f"), 16) if name.startswith("0f") else int(name, 0)
        return np.full(shape, number & 0xFFFFFFFF, np.uint32)

    for statement in filter(None, map(str.strip, text.strip("{} ").split(";"))):
        operation, _, rest = statement.partition(" ")
        to, *names = (name.strip() for name in rest.split(","))
        if operation != ".reg":
            registers[to] = result(operation, [value(name) for name in names], statement).astype(np.uint32)
    return {int(name[1:]): bits for name, bits in registers.items() if re.fullmatch(r"\$\d+", name)}


def result(operation: str, given: list[Array], statement: str) -> Array:
    """The bits that an instruction writes"""
    kind, _, rest = operation.partition(".")
    if operation in ("mov.b32", "mov.u32"):
        return given[0]
    if operation == "mul.hi.u32":
        return given[0].astype(np.uint64) * given[1] >> np.uint64(32)
    if kind in BITWISE and rest in ("b32", "u32"):
        return BITWISE[kind](*given)
    if operation == "popc.b32":
        return np.bitwise_count(given[0]) if hasattr(np, "bitwise_count") else popc(given[0])
    if operation == "lop3.b32":
        return lop3(*given)
    if operation == "prmt.b32":
        return prmt(*given)
    if operation == "shfl.sync.idx.b32":
        lanes, index = given[0].reshape(-1, LANES), given[1].reshape(-1, LANES) % LANES
        assert (given[2] == LANES - 1).all()
        assert (given[3] == 0xFFFFFFFF).all(), "every lane of a warp"
        return np.take_along_axis(lanes, index, -1).reshape(given[0].shape)
    if kind in ("fma", "sub") and rest.endswith("f32"):
        return arithmetic(kind, [bits.view(np.float32) for bits in map(np.ascontiguousarray, given)], ".sat" in rest)
    if kind in ("fma", "sub") and rest.endswith("x2"):
        format = {"bf16x2": "bfloat16", "f16x2": "float16"}[rest.rpartition(".")[2]]
        halves = zip(*(pair(bits, format) for bits in given), strict=True)
        low, high = (paired(kind, list(values), format) for values in halves)
        return low | high << np.uint32(16)
    raise AssertionError(f"no meaning for {statement!r}")


BITWISE = {
    "xor": np.bitwise_xor,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "shr": lambda bits, places: np.where(places < 32, bits >> np.minimum(places, 31), 0),
    "shl": lambda bits, places: np.where(places < 32, bits << np.minimum(places, 31), 0),
    "add": np.add,
}


def popc(bits: Array) -> Array:
    return sum((bits >> np.uint32(n)) & 1 for n in range(32))


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    """The bits of a, b and c, a's the highest, are the number of a bit of the table."""
    found = np.zeros_like(a)
    for row in (row for row in range(8) if int(table.flat[0]) >> row & 1):
        terms = [bits if row >> place & 1 else ~bits for bits, place in zip((a, b, c), (2, 1, 0), strict=True)]
        found |= terms[0] & terms[1] & terms[2]
    return found


def prmt(a: Array, b: Array, selectors: Array) -> Array:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    places = [selectors.astype(np.uint64) >> np.uint64(4 * n) & np.uint64(15) for n in range(4)]
    assert max(place.max() for place in places) < 8, "a byte of signs"
    chosen = [both >> np.uint64(8) * place & np.uint64(255) for place in places]
    return sum(c << np.uint64(8 * n) for n, c in enumerate(chosen))


def arithmetic(kind: str, given: list[Array], saturates: bool) -> Array:
    """One float32 operation, rounded once. Its NaN is 0x7FFFFFFF, 0 where it saturates, as the CUDA guide says."""
    with np.errstate(all="ignore"):
        exact = given[0] - given[1] if kind == "sub" else fma(*given)
        if saturates:
            exact = np.where(exact == exact, np.clip(exact, np.float32(0), np.float32(1)), np.float32(0))
    return np.where(exact == exact, exact.astype(np.float32).view(np.uint32), np.uint32(0x7FFFFFFF))


def fma(a: Array, b: Array, c: Array) -> Array:
    """fl(a b + c): the product is exact in float64, and their sum is rounded to odd there, then to float32."""
    product, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    odd = total.view(np.uint64) & np.uint64(1) == 1
    moved = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(np.isfinite(total) & (error != 0) & ~odd, moved, total).astype(np.float32)


def pair(bits: Array, format: str) -> list[Array]:
    """The values of both halves of a register"""
    halves = ((bits >> np.uint32(shift) & np.uint32(0xFFFF)).astype(np.uint16) for shift in (0, 16))
    return [reference.decode_float(half, formats.get(format)) for half in halves]  # type: ignore[arg-type]


def paired(kind: str, given: list[Array], format: str) -> Array:
    """One operation of 16-bit floats, whose exact result float64 holds"""
    exact = given[0] - given[1] if kind == "sub" else given[0].astype(np.float64) * given[1] + given[2]
    code = reference.encode_float(exact.astype(np.float32), formats.get(format))  # type: ignore[arg-type]
    return code.astype(np.uint32)
