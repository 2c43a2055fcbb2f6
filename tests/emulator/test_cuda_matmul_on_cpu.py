"""The CUDA matmuls on this CPU: g++ compiles them unchanged, a warp's fibers meet in every product of a matrix."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.emulator import (
    COMPILER,
    CSRC,
    MATMULS,
    SLAB,
    Buffer,
    Call,
    Emulator,
    KernelError,
    build,
    keep_formats,
    with_small_slabs,
)

from quantlib import formats, reference
from quantlib.backends.tiles import TileLayout
from quantlib.formats import FloatFormat, IntFormat
from quantlib.reference import numerics
from quantlib.reference.matmul import bound
from quantlib.testing import assert_same_bytes, bits, tensor, values
from quantlib.testing.bytes import Array
from quantlib.testing.product import Product

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")

EIGHT, ALL = [f.name for f in formats.TABLE if f.bits <= 8], [f.name for f in formats.TABLE]
FINITE = [f.name for f in formats.TABLE if f.bits <= 8 and not (isinstance(f, FloatFormat) and f.has_nan)]
INTEGERS = [f.name for f in formats.TABLE if isinstance(f, IntFormat)]
ACTIVATIONS = (None, "gelu", "relu", "silu", "gelu_tanh")


@dataclass(frozen=True)
class Case(Product):
    """One product. ``exact`` operands are small integers times powers of two, others every code there is."""

    exact: bool = True
    shift: int = 0  # elements past an aligned address
    turn: int = 0  # another order of threads, other operands
    huge: bool = False  # sums of x times codes are infinite, those of x times the weight are not

    def random(self) -> np.random.Generator:
        return np.random.default_rng([self.turn, *self.sizes])

    def weight(self) -> tuple[Array, Array, Array | None]:
        """codes [N, K] or [N, ceil(K / 2)], scale, zero_point"""
        (N, K), (br, bk), blocks = self.matrix, self.resolved, self.grid
        f, random = formats.get(self.format), self.random()
        z, signs = None, random.choice(np.float32([1, -1]), blocks)
        if not self.symmetric:
            assert isinstance(f, IntFormat)
            z = random.integers(*f.range(affine=True), blocks, np.int32, endpoint=True)
        if not self.exact:
            codes = random.integers(0, 256, (N, f.columns(K) * np.dtype(f.storage).itemsize), np.uint8)
            if K % f.per_byte:
                codes[:, -1] &= (1 << K % f.per_byte * f.bits) - 1
            scale = random.uniform(0.5, 2, blocks).astype(np.float32) * signs
            return codes.view(f.storage), scale, z
        z = None if z is None else random.integers(0, min(4, f.code_range[1] + 1), blocks, np.int32)
        scale = np.exp2(random.integers(-3, 4, blocks) - 20 * self.huge).astype(np.float32) * signs
        w = random.integers(-3 if f.signed or z is not None else 0, 4, (N, K)).astype(np.float32)
        w *= np.repeat(np.repeat(scale, br, 0)[:N], bk, 1)[:, :K]
        return reference.quantize(w, scale, self.format, block=(br, bk), zero_point=z), scale, z

    def values(self, rows: int, columns: int) -> tuple[Array, Array]:
        """x or dy, as codes of its type and as float32"""
        random = self.random()
        x = random.integers(-8, 9, (rows, columns)) if self.exact else random.standard_normal((rows, columns))
        x = x * 2.0 ** (124 * self.huge)
        codes = reference.cast(x.astype(np.float32), self.dtype) if self.dtype != "float32" else x.astype(np.float32)
        if self.dtype == "float32":
            return codes, codes
        return codes, reference.decode_float(codes, formats.get(self.dtype))


def given(values: Array | None, shift: int = 0) -> Buffer | None:
    return None if values is None else Buffer(bits(values), True, shift * values.itemsize)


def expected(case: Case) -> tuple[Call, Array, Array]:
    """The call, what it gives, and how far a sum may be off."""
    (M, N, K), (codes, scale, z), f = case.sizes, case.weight(), formats.get(case.format)
    options = {"block": case.resolved, "zero_point": z}
    w = reference.dequantize(codes, scale, case.format, **options, size=K).view(np.float32)
    bias = case.random().integers(-4, 4, N).astype(np.float32)
    shared = (given(codes), given(scale), given(z))
    grid = (N, K, *case.resolved)
    kept = {"seed": case.turn, "grid": grid, "result": case.dtype, "activation": case.activation, "M": M}
    if case.op == "scaled_matmul":
        x = case.random().integers(0, 256, (M, K), np.uint8).view(case.x_format)
        per_row = case.turn % 2 == 0
        x_scale = case.random().uniform(0.01, 2, (M if per_row else 1, 1)).astype(np.float32)
        x_range = formats.get(case.x_format).range(affine=True)
        x_z = case.random().integers(*x_range, x_scale.shape, np.int32, endpoint=True) if not case.symmetric else None
        y = reference.scaled_matmul(
            x, x_scale, codes, scale, case.format, **options, x_zero_point=x_z, bias=bias, activation=case.activation,
            dtype=case.dtype,
        )  # fmt: skip
        buffers = (given(x, case.shift), given(x_scale), given(x_z), *shared, given(bias))
        out = Buffer(np.empty_like(bits(y)), False)
        return Call(case.op, case.x_format, case.format, per_row, buffers=(*buffers, out), **kept), y, np.zeros(y.shape)
    if case.op == "dequant_matmul_backward":
        x_codes, x = case.values(M, N)
        y = reference.dequant_matmul_backward(x, codes, scale, case.format, **options, dtype=case.dtype, size=K)
        out = Buffer(np.empty_like(bits(y)), False)
        off = bound(x, w.T)
        return Call(case.op, case.dtype, case.format, False, buffers=(given(x_codes), *shared, out), **kept), y, off
    x_codes, x = case.values(M, K)
    y = reference.dequant_matmul(
        x, codes, scale, case.format, **options, bias=bias, activation=case.activation, dtype=case.dtype
    )
    if case.tiled:
        shared = (given(TileLayout(f).pack(tensor(bits(codes), case.format), K).numpy()), *shared[1:])
    out = Buffer(np.empty_like(bits(y)), False, case.shift * y.itemsize)
    buffers = (given(x_codes, case.shift), *shared, given(bias), out)
    off = bound(x, w) + 2.0**-22 * np.abs(bias)
    return Call(case.op, case.dtype, case.format, case.tiled, buffers=buffers, **kept), y, off


def check(emulator: Emulator, cases: list[Case], launched: set[str] | None = None) -> None:
    wanted = [expected(case) for case in cases]
    results = emulator.run([w[0] for w in wanted], launched)
    for case, (_, want, off), buffers in zip(cases, wanted, results, strict=True):
        got = buffers[-1]
        if case.exact or case.op == "scaled_matmul":
            assert_same_bytes(got, bits(want), str(case))
            continue
        f = formats.FORMATS[case.dtype]
        y, exact = (numerics.decode_float(codes, f).astype(np.float64) for codes in (got, bits(want)))
        beyond = np.abs(y - exact) - off - np.abs(exact) * 2.0**-f.fraction_bits  # both are rounded to y's type
        assert np.max(beyond) <= 0, f"{case}: {np.max(beyond)} beyond the bound"


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("cuda_on_cpu")


@pytest.fixture(scope="session")
def emulator(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return build(cache, (*MATMULS, SLAB), with_small_slabs(tmp_path_factory.mktemp("small")))


def affines(format: str) -> tuple[bool, ...]:
    return (False, True) if format in INTEGERS else (False,)


# (M, N, K), block: whole tiles and ragged ones, a scale a row, a matrix, a group or a tile; K = 36: rows of no vectors
SMALL = (
    ((1, 16, 128), (1, -1)),
    ((3, 40, 256), (1, 128)),
    ((16, 33, 160), (-1, -1)),
    ((17, 7, 1312), (3, 128)),
    ((9, 20, 36), (1, -1)),
)


# Many rows of x: floats of the weight, and sums that become y. Ragged ends on every side, addresses of odd elements.
MANY = (((130, 37, 72), (1, -1)), ((129, 66, 160), (3, 36)), ((131, 40, 256), (-1, 128)), ((140, 21, 36), (-1, -1)))


@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("format", EIGHT)
def test_matrix_instructions_give_the_bytes_of_exact_sums(emulator: Emulator, format: str, tiled: bool) -> None:
    check(emulator, [
        Case("dequant_matmul", format, dtype, shape, block, symmetric=not affine, tiled=tiled, turn=turn,
             activation=ACTIVATIONS[turn % 5])
        for turn, (dtype, (shape, block), affine) in
        enumerate(itertools.product(("bfloat16", "float16"), SMALL, affines(format)))
    ])  # fmt: skip


@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("format", FINITE)
def test_matrix_instructions_with_every_code_stay_within_the_bound(
    emulator: Emulator, format: str, tiled: bool
) -> None:
    check(emulator, [
        Case("dequant_matmul", format, dtype, shape, block, symmetric=not affine, tiled=tiled, exact=False, turn=turn)
        for turn, (dtype, (shape, block), affine) in
        enumerate(itertools.product(("bfloat16", "float16"), SMALL[2:4], affines(format)))
    ])  # fmt: skip


@pytest.mark.parametrize("format", EIGHT)
def test_a_sum_is_infinite_only_where_y_is(emulator: Emulator, format: str) -> None:
    check(emulator, [
        Case("dequant_matmul", format, "bfloat16", shape, block, symmetric=not affine, tiled=tiled, turn=turn,
             huge=True)
        for turn, ((shape, block), affine, tiled) in
        enumerate(itertools.product((SMALL[0], SMALL[3], MANY[0]), affines(format), (False, True)))
    ])  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", EIGHT)
def test_every_code_becomes_its_value(emulator: Emulator, format: str, dtype: str) -> None:
    """x has a one a row, so that y is the weight: infinities, NaN and subnormals of float codes too."""
    f = formats.get(format)
    every, K = values.codes(format), 64 * f.per_byte
    rows = max(len(every) // 16, 1)
    codes = np.zeros((rows, K), every.dtype)
    codes[:, :16] = np.resize(every, (rows, 16))
    codes = codes if f.whole else reference.pack(codes, f)
    scale = np.full((rows, 1), 2.0**-3, np.float32)
    x = reference.cast(np.eye(16, K, dtype=np.float32), dtype)
    for z in (None,) if f.is_float else (None, *(np.full((rows, 1), edge, np.int32) for edge in f.range(True))):
        w = reference.dequantize(codes, scale, format, block=(1, K), zero_point=z, size=K)
        want = reference.cast(w.view(np.float32)[:, :16].T + np.float32(0), dtype, saturate=False)
        with np.errstate(invalid="ignore"):
            other = ~np.isfinite(w.view(np.float32)).all(1)  # 0 * infinity in the row's other sums
        want[:, other] = formats.FORMATS[dtype].nan_code
        for tiled in (False, True):
            laid = TileLayout(f).pack(tensor(bits(codes), format), K).numpy() if tiled else codes
            buffers = (given(x), given(laid), given(scale), given(z), None, Buffer(np.empty_like(want), False))
            call = Call("dequant_matmul", dtype, format, tiled, 0, (rows, K, 1, K), buffers, dtype, M=16)
            assert_same_bytes(emulator.run([call])[0][-1], want, f"{format} in {dtype}, zero point {z}")


@pytest.mark.parametrize("format", ALL)
def test_ordinary_instructions_serve_everything_else(emulator: Emulator, format: str) -> None:
    shapes = (((5, 9, 37), (1, -1)), ((65, 70, 21), (3, 7)), ((2, 5, 128), (1, 32)), ((3, 4, 0), (1, -1)))
    cases = [
        Case("dequant_matmul", format, dtype, shape, block, symmetric=not affine, exact=exact, shift=turn % 3,
             turn=turn)
        for turn, ((shape, block), (dtype, exact), affine) in enumerate(itertools.product(
            shapes, (("float32", False), ("bfloat16", True)), affines(format)
        ))
    ]  # fmt: skip
    tiled = [replace(c, tiled=True, shape=(3, 20, 131), exact=True) for c in cases if format in EIGHT][:4]
    check(emulator, [c for c in cases if c.exact or format in FINITE] + tiled)


@pytest.mark.parametrize("format", ALL)
def test_slabs_of_a_weight(emulator: Emulator, format: str) -> None:
    tiles = (False, True) if format in EIGHT else (False,)
    check(emulator, [
        Case("dequant_matmul", format, dtype, shape, block, symmetric=not affine, tiled=tiled, shift=turn % 2,
             turn=turn, activation=ACTIVATIONS[turn % 5])
        for turn, (((shape, block), dtype), affine, tiled) in enumerate(itertools.product(
            zip(MANY, ("bfloat16", "bfloat16", "bfloat16", "float16"), strict=True), affines(format), tiles
        ))
    ])  # fmt: skip


def test_every_kernel_runs(emulator: Emulator) -> None:
    """Every instance of every template, in three orders of threads, and its bytes."""
    tensor_core = [
        Case("dequant_matmul", format, dtype, (M, 20, 128), tiled=tiled)
        for format, dtype, tiled, M in itertools.product(EIGHT, ("bfloat16", "float16"), (False, True), (3, 129))
    ]  # fmt: skip
    scaled = [
        Case("scaled_matmul", format, shape=(M, 20, 64), symmetric=not affine, exact=False)
        for format, M, affine in itertools.product(("int8", "int4"), (3, 65), (False, True))
    ]
    others = [
        Case("dequant_matmul", "bfloat16", shape=(129, 20, 64), block=(1, 4)),
        Case("dequant_matmul", "int8", shape=(3, 20, 37)),
        Case("dequant_matmul_backward", "int8", shape=(3, 20, 37)),
    ]
    launched: set[str] = set()
    check(emulator, [replace(c, turn=n) for c in (*tensor_core, *scaled, *others) for n in range(3)], launched)
    assert launched == set(emulator.kernels().values())


@pytest.mark.parametrize("format", ALL)
def test_backward(emulator: Emulator, format: str) -> None:
    shapes = (((5, 9, 37), (1, -1)), ((66, 70, 65), (3, 7)), ((2, 33, 128), (-1, 32)))
    check(emulator, [
        Case("dequant_matmul_backward", format, dtype, shape, block, symmetric=not affine, turn=turn)
        for turn, ((shape, block), dtype, affine) in
        enumerate(itertools.product(shapes, ("float32", "float16"), affines(format)))
    ] + [
        Case("dequant_matmul_backward", format, shape=shape, block=block, symmetric=not affine)
        # two slabs, of which one may be empty
        for shape, block in (((130, 21, 264), (1, -1)), ((129, 16, 40), (3, 8))) for affine in affines(format)
        if format != "float16"
    ])  # fmt: skip


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("format", INTEGERS)
def test_scaled_matmul_is_exact(emulator: Emulator, format: str, affine: bool) -> None:
    shapes = (
        ((1, 1, 1), (1, -1)),
        ((3, 5, 37), (1, -1)),
        ((66, 70, 200), (-1, -1)),
        ((5, 66, 192), (1, 64)),
        ((17, 9, 70), (3, 5)),
        ((4, 8, 128), (1, 48)),
        ((2, 3, 0), (1, -1)),
        ((1, 33, 32), (1, -1)),  # from here on whole vectors: the kernel for a few rows of x
        ((17, 40, 1184), (3, -1)),
        ((32, 7, 2112), (-1, -1)),
    )
    dtypes = itertools.cycle(("float32", "bfloat16", "float16"))
    check(emulator, [
        Case("scaled_matmul", format, next(dtypes), shape, block, symmetric=not affine, exact=False, shift=turn % 3,
             turn=turn, activation=ACTIVATIONS[turn % 5], x_format=x_format)
        for turn, ((shape, block), x_format) in enumerate(itertools.product(shapes, ("int8", "uint8")))
    ])  # fmt: skip


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_a_row_has_the_same_bytes_in_every_batch(emulator: Emulator, format: str) -> None:
    case = Case("dequant_matmul", format, shape=(37, 40, 256), block=(1, 128), symmetric=False, exact=False, tiled=True)
    call, _, _ = expected(case)
    x, *weight, out = call.buffers
    whole = emulator.run([call])[0][-1]
    for rows in (slice(0, 1), slice(3, 20), slice(16, 37)):
        part, y = Buffer(x.values[rows], True), Buffer(out.values[rows], False)
        got = emulator.run([replace(call, M=rows.stop - rows.start, buffers=(part, *weight, y), seed=7)])[0][-1]
        assert_same_bytes(got, whole[rows], f"rows {rows}")


@dataclass(frozen=True)
class Fault:
    """Text of a file of csrc/cuda, what stands there instead, and what says so; "" for wrong bytes."""

    name: str
    file: str
    right: str
    wrong: str
    caught: str
    case: Case

    def __str__(self) -> str:
        return self.name


ROWS = Case("dequant_matmul", "int8", shape=(5, 40, 1024))
TILES = replace(ROWS, tiled=True)
CODES = Case("scaled_matmul", "int8", shape=(70, 66, 200), block=(1, 80), symmetric=False)
FEW = replace(CODES, shape=(9, 37, 672), block=(1, -1))
EARLY = "which nobody wrote|race: it reads what is written"
FAULTS = (
    Fault("sums read before they are there", "dequant_rows.cuh", "  __syncthreads();\n", "", EARLY, TILES),
    Fault("a lane that left", "dequant_rows.cuh", "  Codes next;", "  if (lane == 31) return;\n  Codes next;",
          "names a lane that has left", TILES),
    Fault("codes past the last row", "dequant_rows.cuh", "8 * r) < rows\n", "8 * r) < rows + 16\n",
          "outside of every buffer", ROWS),
    Fault("x past the last row", "dequant_rows.cuh", "k < ends[b]", "k < ends[0]", "outside of every buffer", TILES),
    Fault("fragments in another order", "dequant_rows.cuh", "r = f % 2, pair = 2 * h + f / 2",
          "r = f / 2, pair = 2 * h + f % 2", "", TILES),
    Fault("a code in too few bits", "operand.cuh", "F::bits <= X::fraction_bits;", "true;", "", TILES),
    Fault("terms multiplied before all are there", "matmul.cuh", "    __syncthreads();\n#pragma unroll\n    for (int l",
          "#pragma unroll\n    for (int l", EARLY, replace(ROWS, shape=(70, 70, 37))),
    Fault("codes multiplied before all are there", "scaled_matmul.cu", "    __syncthreads();\n    k = k",
          "    k = k", EARLY, CODES),
    Fault("codes overwritten while read", "scaled_matmul.cu", "    __syncthreads();\n    if (!last)", "    if (!last)",
          "race: it writes what is read", CODES),
    Fault("codes past the last row of all", "scaled_matmul.cu", "row >= c.rows ||", "row > c.rows ||",
          "outside of every buffer", CODES),
    Fault("a zero point for columns that are not there", "scaled_matmul.cu", "uint32_t(size) *",
          "uint32_t(0 * size + a.bk) *", "",
          CODES),
    Fault("sums of a few rows read before they are there", "scaled_rows.cuh", "  __syncthreads();\n", "", EARLY, FEW),
    Fault("codes past the last of a few rows", "scaled_rows.cuh", "16 * i + 8 * h < rows\n",
          "16 * i + 8 * h < rows + 8\n", "outside of every buffer", FEW),
)  # fmt: skip

# A planted executable has int8 codes and bfloat16 alone in the kernel of matrix instructions: it compiles in seconds.
OTHER_X = r"p.x_type == Type::float16 \? multiply<float16>\(p, stream\) : "


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_planted_fault_is_caught(fault: Fault, cache: Path, tmp_path: Path) -> None:
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    kernel, place = csrc / "cuda/dequant_matmul.cu", csrc / "cuda" / fault.file
    keep_formats(csrc, "int8", "float16", "bfloat16")
    narrow, n = re.subn(OTHER_X, "", kernel.read_text())
    assert n == 1, "the formats stand elsewhere"
    kernel.write_text(narrow)
    assert place.read_text().count(fault.right) == 1, "the fault's place has changed"
    place.write_text(place.read_text().replace(fault.right, fault.wrong))
    emulator = build(cache, (fault.case.op,), csrc)
    cases = [replace(fault.case, turn=turn) for turn in range(4)]
    if fault.caught:
        with pytest.raises(KernelError, match=fault.caught):
            check(emulator, cases)
    if not fault.caught or "race" in fault.caught:
        with pytest.raises(AssertionError, match="differ, first at"):
            check(replace(emulator, watched=False), cases)
