"""The CUDA products of a mixture's experts on this CPU: one launch gives the bytes of a loop over the experts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.emulator import COMPILER, GROUPED, Buffer, Call, Emulator, build

from quantlib import formats, reference
from quantlib.testing import assert_same_bytes, bits
from quantlib.testing.bytes import Array

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")

ALL = [f.name for f in formats.TABLE]
EIGHT = [f.name for f in formats.TABLE if f.bits <= 8]
ENDS = ((1, 2, 3, 4), (0, 3, 3, 20), (17, 17, 50, 51), (0, 0, 0, 0))  # of blocks of 16 rows
TAIL = 3  # rows of no expert


@dataclass(frozen=True)
class Grouped:
    """A product of experts, whose operands are any values there are."""

    format: str
    dtype: str
    ends: tuple[int, ...]
    matrix: tuple[int, int]  # (N, K)
    block: tuple[int, int]
    affine: bool = False

    @property
    def rows(self) -> int:
        return max(*self.ends, 0) + TAIL

    def operands(self) -> dict[str, Array | None]:
        """x [T, K], and of each expert codes, scale, zero_point, bias"""
        (N, K), E, random, f = self.matrix, len(self.ends), np.random.default_rng(1), formats.get(self.format)
        bk = self.block[1] if self.block[1] > 0 else K
        blocks = (E, -(-N // self.block[0]), -(-K // bk))
        x = random.standard_normal((self.rows, K)).astype(np.float32)
        codes = random.integers(0, 256, (E, N, f.columns(K) * np.dtype(f.storage).itemsize), np.uint8)
        if f.is_float:  # neither NaN nor infinity: their sums say nothing
            codes &= np.uint8(0x77 if f.packed else 0x7F >> 2)
        if K % f.per_byte:
            codes[..., -1] &= (1 << K % f.per_byte * f.bits) - 1
        z = random.integers(*f.range(affine=True), blocks, np.int32, endpoint=True) if self.affine else None
        return {
            "x": x if self.dtype == "float32" else reference.cast(x, self.dtype),
            "codes": codes,
            "scale": random.uniform(0.5, 2, blocks).astype(np.float32) * random.choice(np.float32([1, -1]), blocks),
            "zero_point": z,
            "bias": random.standard_normal((E, N)).astype(np.float32),
        }

    def call(self, op: str, rows: slice, e: int | slice, *more: Array) -> Call:
        """``rows`` of x with the weight of expert e, or of all."""
        (N, K), (br, bk), given = self.matrix, self.block, self.operands()
        x, bias = given.pop("x"), given.pop("bias")
        assert x is not None
        assert bias is not None
        x = x[rows]
        values = (x, *(None if t is None else t[e] for t in given.values()), *more, bias[e])
        buffers = [None if v is None else Buffer(np.ascontiguousarray(bits(v)), True) for v in values]
        y = Buffer(np.empty((len(x), N), bits(x).dtype), False)
        grid = (N, K, br, bk if bk > 0 else K)
        return Call(op, self.dtype, self.format, False, 3, grid, (*buffers, y), self.dtype, "silu", len(x))

    def calls(self, offsets: tuple[int, ...] | None = None) -> list[Call]:
        """The call of all experts, and those of a loop; ``offsets``: what the first is given in place of the ends."""
        given = np.array(self.ends if offsets is None else offsets, np.int32)
        experts = [(slice(a, b), e) for e, (a, b) in enumerate(zip((0, *self.ends), self.ends, strict=False)) if a < b]
        loop = [self.call("dequant_matmul", rows, e) for rows, e in experts]
        return [self.call(*GROUPED, slice(None), slice(None), given), *loop]


def check(
    emulator: Emulator,
    cases: list[Grouped],
    launched: set[str] | None = None,
    offsets: tuple[int, ...] | None = None,
) -> None:
    """The first call of each case gives the bytes of the others, and zeros for rows of no expert."""
    calls = [case.calls(offsets) for case in cases]
    made = iter(emulator.run([call for of_case in calls for call in of_case], launched))
    for case, of_case in zip(cases, calls, strict=True):
        y, *parts = [next(made)[-1] for _ in of_case]
        rest = np.zeros((case.rows - case.ends[-1], case.matrix[0]), y.dtype)
        assert_same_bytes(y, np.concatenate([*parts, rest]), str(case))


# int8 and its like by tensor cores, and what those do not take
CASES = (
    ((40, 64), (1, -1), "bfloat16"),
    ((33, 256), (1, 128), "float16"),
    ((70, 37), (3, 7), "bfloat16"),
    ((9, 64), (1, -1), "float32"),
)


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest) -> Emulator:
    cache: Path = request.config.cache.mkdir("cuda_on_cpu")
    return build(cache, ("dequant_matmul", *GROUPED))


@pytest.mark.parametrize("format", ALL)
def test_bytes_of_the_loop(emulator: Emulator, format: str) -> None:
    """Every case with every format, with zero points too; the ends take turns."""
    affines = (False, True) if "int" in format else (False,)
    check(emulator, [
        Grouped(format, dtype, ENDS[(ALL.index(format) + n + 2 * affine) % len(ENDS)], matrix, block, affine)
        for n, (matrix, block, dtype) in enumerate(CASES) for affine in affines
    ])  # fmt: skip


def test_every_kernel_runs(emulator: Emulator) -> None:
    launched: set[str] = set()
    shapes = (((8, 128), (1, -1), "bfloat16"), ((8, 128), (1, -1), "float16"), CASES[2])
    check(emulator, [Grouped(f, dtype, (1, 1), *of) for f in EIGHT for *of, dtype in shapes], launched)
    every = set(emulator.kernels().values())
    assert {name for name in every if name.startswith("grouped")} <= launched


@pytest.mark.parametrize("experts", [31, 32, 33, 70])
def test_more_experts_than_a_warp_has_lanes(emulator: Emulator, experts: int) -> None:
    ends = np.cumsum(np.random.default_rng(experts).integers(0, 3, experts))
    check(emulator, [Grouped("int8", "bfloat16", tuple(ends.tolist()), (8, 32), (1, -1))])


def test_ends_outside_of_x_touch_nothing_else(emulator: Emulator) -> None:
    case = Grouped("int8", "bfloat16", (0, 3, 3 + 18, 3 + 18), (40, 64), (1, -1))
    check(emulator, [case], offsets=(-7, 3, 21, 21))
    y = emulator.run(
        [case.call(*GROUPED, slice(None), slice(None), np.array([-(2**31), 3, *[2**31 - 1] * 2], np.int32))]
    )
    assert y[0][-1].shape == (case.rows, 40)
