"""Every op x backend x format x block gives the bytes of the reference: the case table of quantlib.testing, run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import fresh
import numpy as np
import pytest
import torch
from conftest import Served, needs_level

import quantlib
from quantlib import _build, backends, reference, testing
from quantlib.backends.choice import instruction_set
from quantlib.testing import Case
from quantlib.testing.table import GRID, OPS

TABLE = sorted({(case.op, case.format) for case in testing.cases()})


def run(arguments: list[str], **environment: str) -> fresh.Done:
    return fresh.run(["-m", "quantlib.testing", *arguments], env=os.environ | environment)


@pytest.mark.parametrize("of", TABLE, ids="-".join)
def test_every_case(of: tuple[str, str], served: Served) -> None:
    """All of the table; where Triton interprets its kernels, formats take turns at the halves of its shapes.

    Each op meets all shapes, blocks and layouts, each format all values; `python -m quantlib.testing triton` runs all.
    """
    first, step = (TABLE.index(of) % 2, 2) if served.interpreted else (0, 1)
    values = [case for case in testing.cases(*of) if case.shape is None]
    shapes = [case for case in testing.cases(*of) if case.shape is not None]
    for case in (*values, *shapes[first::step]):
        testing.check(case, served.device)


@pytest.mark.parametrize("isa", _build.LEVELS)
def test_every_instruction_set(isa: str) -> None:
    """One binary holds them all; a process chooses once. `make sanitize` has these under its sanitizers."""
    needs_level(isa)
    if isa == instruction_set():
        pytest.skip(f"{isa}: is what this process runs in every other test")
    done = run(["cpp"], QUANTLIB_ISA=isa, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr


LONG = [
    Case(op, format, dtype, shape, block, symmetric=symmetric)
    for op in OPS[1:]
    for format, dtype, shape, block, symmetric in [
        ("int8", "float32", (301, 4099), (1, -1), True),
        ("int8", "bfloat16", (301, 4099), (-1, -1), False),
        ("int8", "float32", (70001, 17), (-1, 1), True),
        ("uint8", "float16", (3, 400003), (1, 128), False),
        ("int4", "float32", (301, 4099), (64, 64), True),
        ("float8_e4m3fn", "float32", (70001, 17), (1, -1), True),
        ("float4_e2m1fn", "float32", (1, 1000003), (1, 32), True),
    ]
] + [Case("cast", format, "float32", (3, 400003)) for format in ("bfloat16", "float8_e4m3fn")]


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_many_elements_over_threads(case: Case, threads: int) -> None:
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(f"cpp: {why}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with quantlib.use_backend("cpp"):
            testing.check(case)
    finally:
        torch.set_num_threads(before)


def test_calls_from_many_threads(on_cpu: Served) -> None:
    if on_cpu.backend == "triton":
        pytest.skip("triton: its interpreter patches the language globally, for one thread at a time")
    table = [case for case in testing.cases(format="int8") if case.shape == (33, 130)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(testing.check, table * 4))


def test_dynamic_is_the_two_steps(on_cpu: Served) -> None:
    x = torch.randn(7, 65)
    for block in [(1, -1), (-1, -1), (2, 8)]:
        codes, scale, zero_point = quantlib.quantize_dynamic(x, "int8", block=block, symmetric=False)
        want = quantlib.compute_scale(x, "int8", block, symmetric=False)
        testing.assert_same_bytes(scale, want[0])
        testing.assert_same_bytes(zero_point, want[1])
        testing.assert_same_bytes(codes, quantlib.quantize(x, scale, "int8", block=block, zero_point=zero_point))


def test_subnormals_survive_a_caller_who_flushes_them() -> None:
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(f"cpp: {why}")
    table = [case for case in testing.cases("cast") if case.shape is None and case.dtype == "float32"]
    table += [case for case in testing.cases(format="int8") if case.shape == (33, 130)]
    given, want = [testing.tensors(case) for case in table], [testing.expected(case) for case in table]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        with quantlib.use_backend("cpp"):
            got = [testing.call(case, arguments) for case, arguments in zip(table, given, strict=True)]
    finally:
        torch.set_flush_denormal(False)
    for case, results, right in zip(table, got, want, strict=True):
        for a, b in zip(results, right, strict=True):
            testing.assert_same_bytes(a, b, str(case))


def test_the_table_covers_what_it_says() -> None:
    every = testing.cases()
    assert len(set(map(str, every))) == len(every)
    for op in OPS:
        assert {case.layout for case in every if case.op == op} == {layout for _, _, layout in GRID}
        assert {case.dtype for case in every if case.op == op} >= {"float32", "float16", "bfloat16"}


def test_the_comparison_names_the_first_mismatch() -> None:
    want = np.array([[0x3C00, 0x4000]], np.uint16)
    got = torch.tensor([[1.0, float("nan")]]).half()
    with pytest.raises(AssertionError) as error:
        testing.assert_same_bytes(got, want, "cast", torch.tensor([[1.0, 2.0]]))
    assert str(error.value) == (
        "cast: 1 of 2 differ, first at [0, 1]: got 0x7e00 (nan), expected 0x4000 (2.0), x = 0x40000000 (2.0)"
    )
    for wrong in (want[0], want.astype(np.uint32)):
        with pytest.raises(AssertionError, match="expected uint"):
            testing.assert_same_bytes(got, wrong)
    testing.assert_same_bytes(torch.tensor([-0.0]), np.array([1 << 31], np.uint32))
    with pytest.raises(AssertionError, match="1 of 1 differ"):
        testing.assert_same_bytes(torch.tensor([-0.0]), torch.tensor([0.0]))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("QUANTLIB_LARGE") != "1", reason="QUANTLIB_LARGE=1 runs it: it takes 7 GB")
def test_above_2_31_elements() -> None:
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(f"cpp: {why}")
    n = 2**31 + 1234
    finite = np.array([code for code in range(65536) if code & 0x7C00 != 0x7C00], np.uint16)
    pattern = testing.tensor(finite, "float16")
    values = reference.decode_float(finite, quantlib.formats.get("float16"))
    step = len(pattern) * 1024

    def fill(whole: torch.Tensor) -> None:
        for part in whole.split(step):
            part.copy_(pattern.repeat(1024)[: len(part)])

    def compare(whole: torch.Tensor, right: np.ndarray) -> None:
        repeated = torch.from_numpy(right).repeat(1024)
        for number, part in enumerate(whole.view(torch.uint8).split(step)):
            assert torch.equal(part, repeated[: len(part)]), f"after element {number * step}"

    x = torch.empty(n, dtype=torch.float16)
    fill(x)
    with quantlib.use_backend("cpp"):
        out = testing.poisoned((n,), torch.float8_e5m2)
        compare(quantlib.cast(x, "float8_e5m2", out=out), reference.cast(values, "float8_e5m2"))
        block = (1, len(values))
        right, *_ = reference.quantize_dynamic(values[None], "int8", block=block)
        into = out.view(torch.int8)[None], torch.empty(1, 1)
        codes, _ = quantlib.quantize_dynamic(x[None], "int8", block=(1, -1), out=into)
        compare(codes[0], right[0].view(np.uint8))
