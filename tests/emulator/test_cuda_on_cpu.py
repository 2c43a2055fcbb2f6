"""Every CUDA kernel runs on this CPU, compiled by g++ unchanged and with sanitizers, and gives the right bytes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cuda_on_cpu.emulator import (
    COMPILER,
    CSRC,
    FAKE,
    GROUPED,
    MATMULS,
    SLAB,
    STEP,
    Call,
    Emulator,
    KernelError,
    build,
    call_of,
    expected_buffers,
    keep_formats,
)

from quantlib import formats
from quantlib.formats import IntFormat
from quantlib.testing import Case, assert_same_bytes, cases
from quantlib.testing.table import CASTS, OPS

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")

# Where launchers take another way than for the shapes of the table: (shape, block)
TURNS = (
    ((3, 20011), (1, -1)),  # a row that no thread block holds in registers: the scale first, sliced; odd, so unaligned
    ((2, 16384), (1, -1)),  # the longest float32 row that it does hold
    ((300, 260), (128, 128)),  # tiles, ragged on both sides
    ((7, 30), (-1, 1)),  # columns
    ((9, 33), (1, 5)),  # packed: blocks that share a byte, in rows that end in half of one
    ((9, 33), (3, -1)),  # packed: rows that end in half a byte, several a block
    ((4, 40), (1, 5)),  # blocks that begin anywhere in a vector
    ((4, 40), (2, 5)),
    ((1, 50001), (-1, -1)),
    ((5, 1), (1, 1)),
)


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("cuda_on_cpu")


@pytest.fixture(scope="session")
def emulator(cache: Path) -> Emulator:
    return build(cache)


def check(emulator: Emulator, chosen: list[Case], calls: list[Call], launched: set[str] | None = None) -> None:
    for case, call, got in zip(chosen, calls, emulator.run(calls, launched), strict=True):
        for k, (a, b) in enumerate(zip(got, expected_buffers(case, call), strict=True)):
            assert_same_bytes(a, b, f"{case}, thread order {call.seed}, buffer {k}")


def served(op: str) -> list[str]:
    return list(CASTS) if op == "cast" else [f.name for f in formats.TABLE]


@pytest.mark.parametrize(("op", "format"), [(op, name) for op in OPS for name in served(op)])
def test_the_case_table(emulator: Emulator, op: str, format: str) -> None:
    chosen = list(cases(op, format))
    calls = [call_of(case, seed, shift=case.layout == "offset") for seed, case in enumerate(chosen)]
    check(emulator, chosen, calls)


@pytest.mark.parametrize("op", OPS[1:])
def test_every_way_a_launcher_takes(emulator: Emulator, op: str) -> None:
    chosen = [
        Case(op, name, dtype, shape, block, symmetric=symmetric)
        for k, (shape, block) in enumerate(TURNS)
        for name, symmetric in (("int8", True), ("uint8", False), ("int4", k % 2 == 0), ("float4_e2m1fn", True))
        for dtype in ("float32", "bfloat16")
    ]
    check(emulator, chosen, [call_of(case, seed, shift=seed % 3) for seed, case in enumerate(chosen)])


def test_every_kernel_runs(emulator: Emulator) -> None:
    """Every instance of every template, in each of them a ragged end, in three orders of threads, and its bytes."""
    ways = (((6, 35), (1, -1)), ((2, 515), (1, -1)), ((1, 8209), (-1, -1)))  # a few lanes a row, a thread block, slices
    chosen = [
        Case(op, name, dtype, shape, block, symmetric=symmetric)
        for op in OPS
        for name in served(op)
        for dtype in (CASTS if op == "cast" else ("float32", "float16", "bfloat16"))
        for symmetric in ((True, False) if isinstance(formats.get(name), IntFormat) else (True,))
        for shape, block in (ways if op == "compute_scale" else ways[:2] if op == "quantize_dynamic" else ways[:1])
        for _ in range(3)
    ]
    launched: set[str] = set()
    check(emulator, chosen, [call_of(case, seed) for seed, case in enumerate(chosen)], launched)
    assert launched == set(emulator.kernels().values())


def test_every_file_of_kernels_runs_here() -> None:
    families = (*OPS, *MATMULS, SLAB, *FAKE, *STEP, *GROUPED)
    assert {path.stem for path in CSRC.glob("cuda/*.cu")} == {*families, "dynamic_matmul", "widen"}


@pytest.mark.parametrize("shape", [(6, 515), (3, 4099), (2, 20011)], ids=str)
def test_no_order_of_threads_changes_a_byte(emulator: Emulator, shape: tuple[int, int]) -> None:
    chosen = [
        Case(op, "int8", "float32", shape, block, symmetric=symmetric)
        for op in ("compute_scale", "quantize_dynamic")
        for block in ((1, -1), (-1, -1), (1, 64))
        for symmetric in (True, False)
    ]
    for seed in range(3):
        check(emulator, chosen, [call_of(case, seed) for case in chosen])


@dataclass(frozen=True)
class Fault:
    """An error of the kind that a person makes: text of a file of csrc, and what stands there instead."""

    name: str
    file: str
    right: str
    wrong: str
    caught: str  # by what the emulator says; "" for wrong bytes alone
    op: str = "quantize_dynamic"

    def __str__(self) -> str:
        return self.name


PRODUCT = "encode_int<F, AFFINE>(mul(x, r), z)"
EARLY = "which nobody wrote|race: it reads what is written"
FAULTS = (
    Fault("missing barrier", "cuda/range.cuh", "  __syncthreads();\n", "", EARLY),
    Fault("one warp's barrier", "cuda/range.cuh", "  __syncthreads();\n", "  __syncwarp();\n", EARLY),
    Fault(
        "divergent barrier",
        "cuda/range.cuh",
        "  if (lanes <= 32) return range;\n",
        "  if (lanes <= 32) return range;\n  if (threadIdx.x % 2) __syncthreads();\n  range.merge(range.shuffle(1));\n",
        "deadlock: .*barrier of line .*shuffle of line",
    ),
    Fault("two barriers for one", "cuda/range.cuh", "  __syncthreads();\n",
          "  if (threadIdx.x < 32) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }\n", "deadlock"),
    Fault("a lane that left", "cuda/quantize_dynamic.cu", "  Range<AFFINE> range;\n",
          "  if (threadIdx.x % 32 == 31) return;\n  Range<AFFINE> range;\n", "a shuffle names a lane that has left"),
    Fault("read past the end", "cuda/vector.cuh", "first <= e && e < last) some", "first <= e && e <= last) some",
          "outside of every buffer", "quantize"),
    Fault("unaligned vector", "cuda/vector.cuh", "return is_aligned(p, bytes) &&", "return is_aligned(p, 1) &&",
          "misaligned: 16 bytes", "quantize"),
    Fault("last chunk forgotten", "cuda/range.cuh", "right - j < V ? int(right - j) : V", "right - j < V ? 0 : V", ""),
    Fault("division for the reciprocal product", "cuda/vector.cuh", PRODUCT,
          "encode_int<F, AFFINE>(div(x, div(1.0f, r)), z)", "", "quantize"),
    Fault("ties away from zero", "cuda/vector.cuh", PRODUCT,
          "encode_int<F, AFFINE>(__builtin_roundf(mul(x, r)), z)", "", "quantize"),
)  # fmt: skip


def planted(fault: Fault, folder: Path) -> Path:
    """Serve one op, int8 codes of float32 x, so that it compiles in seconds."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    keep_formats(csrc, "int8")
    if fault.right:
        path = csrc / fault.file
        assert path.read_text().count(fault.right) == 1, "the fault's place has changed"
        path.write_text(path.read_text().replace(fault.right, fault.wrong))
    return csrc


NO_FAULT = Fault("none", "cuda/range.cuh", "", "", "")


def few(op: str) -> tuple[list[Case], list[Call]]:
    chosen = [
        Case(op, "int8", "float32", shape, block, symmetric=symmetric)
        for shape, block in (((4, 4099), (1, -1)), ((6, 35), (1, -1)), ((6, 35), (2, 3)))
        for symmetric in (True, False)
    ]
    return chosen, [call_of(case, seed, shift=seed % 2) for seed, case in enumerate(chosen)]


@pytest.mark.parametrize("fault", [NO_FAULT, *FAULTS], ids=str)
def test_a_planted_fault_is_caught(fault: Fault, cache: Path, tmp_path: Path) -> None:
    emulator = build(cache, (fault.op,), planted(fault, tmp_path))
    chosen, calls = few(fault.op)
    if fault is NO_FAULT:
        return check(emulator, chosen, calls)
    if fault.caught:
        with pytest.raises(KernelError, match=fault.caught):
            emulator.run(calls)
    if not fault.caught or "race" in fault.caught:
        with pytest.raises(AssertionError, match="differ, first at"):
            check(replace(emulator, watched=False), chosen, calls)


def test_address_sanitizer_agrees(cache: Path, tmp_path: Path) -> None:
    """Another witness of what lies outside of a buffer."""
    chosen, calls = few(NO_FAULT.op)
    check(build(cache, (NO_FAULT.op,), planted(NO_FAULT, tmp_path / "right"), "address"), chosen, calls)
    past_the_end = next(fault for fault in FAULTS if fault.name == "read past the end")
    emulator = build(cache, (past_the_end.op,), planted(past_the_end, tmp_path / "wrong"), "address")
    with pytest.raises(KernelError, match="heap-buffer-overflow"):
        emulator.run(few(past_the_end.op)[1])


def test_a_grid_that_no_gpu_takes_is_refused(emulator: Emulator) -> None:
    call = call_of(Case("cast", "float16", "float32", (8,)))
    with pytest.raises(KernelError, match=r"quantlib::cast: a CUDA grid must be at most 2147483647 blocks, got \d+"):
        emulator.run([Call("cast", "float32", "float16", False, 0, (1, 1 << 45, 1, 1 << 45), call.buffers)])
