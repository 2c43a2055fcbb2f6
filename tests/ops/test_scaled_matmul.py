"""Products of integer codes: the bytes of the reference on every backend and instruction set."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fresh
import pytest
import torch
from conftest import Served, forced, needs_level, serving
from torch import Tensor

import quantlib
from quantlib import _build, ops
from quantlib.backends.choice import instruction_set
from quantlib.reference.activation import ACTIVATIONS
from quantlib.testing import assert_same_bytes
from quantlib.testing.product import Product, call, expected, meaning, tensors
from quantlib.testing.table import DTYPES

BLOCKS = [(1, -1), (-1, -1), (1, 32), (3, 7), (4, 16), (1, 1)]
WEIGHTS = [(format, affine) for format in ("int8", "uint8", "int4") for affine in (False, True)]
SIZES = [(0, 64), (1, 0), (2, 1), (17, 7), (1, 63), (17, 64), (2, 65), (17, 65), (1, 1000), (17, 1000)]  # M, K
EPILOGUES = [(None, None), *((torch.float32, name) for name in ACTIVATIONS), (torch.bfloat16, None)]


@pytest.fixture(params=serving("scaled_matmul"), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that multiplies in turn, forced, on a device it serves."""
    yield from forced(request.param)


def scaled(M: int, N: int, K: int, format: str = "int8", affine: bool = False, **more: Any) -> Product:
    """x [M, K] of codes times a weight [N, K] in ``format``."""
    return Product("scaled_matmul", format, shape=(M, N, K), symmetric=not affine, **more)


def assert_right(case: Product, **changed: Tensor) -> None:
    """The bytes of the reference, with some of the case's tensors changed."""
    given = tensors(case) | changed
    arrays = {name: (x.float() if x.is_floating_point() else x).numpy() for name, x in given.items()}
    assert_same_bytes(call(case, given), meaning(case, arrays), str(case))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
@pytest.mark.parametrize(("x_format", "x_affine"), [("int8", False), ("uint8", True)], ids=str)
def test_bytes_of_the_reference(
    backend: Served, x_format: str, x_affine: bool, format: str, affine: bool, block: tuple[int, int]
) -> None:
    interpreted = backend.interpreted
    if interpreted and (BLOCKS.index(block) + WEIGHTS.index((format, affine)) + x_affine) % 2:
        pytest.skip("the interpreter takes seconds: each two of block, weight and x meet, in half of the triples")
    variants = itertools.cycle(itertools.product(DTYPES, EPILOGUES))
    for M, K in [(3, 65)] if interpreted else SIZES:
        dtype, (bias, activation) = next(variants)
        N = 5 if interpreted or K > 100 else 67
        more = {"dtype": dtype, "activation": activation, "bias": bias is not None, "per_row": (M + K) % 3 > 0}
        case = scaled(M, N, K, format, affine, block=block, x_format=x_format, x_symmetric=not x_affine, **more)
        assert_right(case, **({} if bias is None else {"bias": tensors(case)["bias"].to(bias)}))


@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
def test_larger_than_what_stays_in_a_cache(backend: Served, format: str, affine: bool) -> None:
    """Several pieces of the rows of x, of those of the weight and of the columns, none of them whole."""
    if backend.interpreted:
        pytest.skip("the interpreter would take minutes")
    for x_format, block in (("int8", (1, -1)), ("uint8", (1, 2700))):
        more = {"block": block, "x_format": x_format, "x_symmetric": not affine, "dtype": "float32"}
        assert_right(scaled(261, 131, 5301, format, affine, bias=True, **more))


@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
def test_weights_larger_than_a_cache(backend: Served, affine: bool) -> None:
    """Few rows of x, which take other ways where memory is waited for, and more rows of the weight than a piece."""
    if backend.interpreted:
        pytest.skip("the interpreter would take minutes")
    more = {"x_format": "uint8" if affine else "int8", "x_symmetric": not affine, "dtype": "float32"}
    for M, N, K in ((1, 331, 9997), (3, 331, 9997), (5, 601, 6001), (7, 331, 9997), (14, 331, 9997), (16, 25, 8192),
                    (18, 431, 260)):  # fmt: skip
        assert_right(scaled(M, N, K, "int8", affine, **more))


# M, N, K, block: where the C++ kernels of the CPU change their way
EDGES = {
    "whole rows of whole lines, read where they lie": (49, 70, 256, (1, -1)),
    "more columns than are multiplied at a time": (24, 33, 5120, (1, -1)),
    "blocks that fill lines": (33, 40, 384, (1, 128)),
    "more blocks than are multiplied at a time": (5, 40, 4224, (1, 128)),
    "registers of x in pairs and in threes, and a last block that is shorter": (80, 26, 4250, (1, 100)),
    "a block longer than what is multiplied at a time": (4, 34, 9500, (3, 4700)),
    "blocks with zeros behind them": (20, 25, 300, (1, 50)),
    "few rows, and lines of two nibbles": (3, 37, 2432, (1, 128)),
    "the same in blocks of several lines": (1, 21, 640, (2, 256)),
    "more rows than nibbles meet at a time": (37, 19, 1280, (1, 256)),
    "rows that end within a register": (13, 41, 1003, (1, -1)),
    "blocks that begin within a byte": (7, 33, 90, (2, 17)),
    "more rows than stay in a cache": (300, 20, 192, (1, 64)),
    "more rows than are packed at a time": (514, 3, 33000, (1, -1)),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
def test_edges_of_blocks(backend: Served, edge: str, format: str, affine: bool) -> None:
    M, N, K, block = EDGES[edge]
    if backend.interpreted or (backend.backend != "cpp" and M * N * K > 1 << 22):
        pytest.skip("slow, and made for the C++ kernels")
    for x_format, x_affine in (("int8", False), ("uint8", affine))[: 2 if M < 500 else 1]:
        assert_right(scaled(M, N, K, format, affine, block=block, x_format=x_format, x_symmetric=not x_affine))


def test_threads(backend: Served) -> None:
    """Sums are exact: who makes which part of them does not matter."""
    if backend.interpreted:
        pytest.skip("runs in one thread")
    case = scaled(70, 300, 256, "int4", True, block=(1, 64), bias=True)
    given = tensors(case)
    before, y = torch.get_num_threads(), call(case, given)
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bytes(call(case, given), y, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("affine", [False, True])
def test_the_largest_sums(backend: Served, affine: bool) -> None:
    """An int32 holds the sum of either sign at the largest K; one more is an error that says so."""
    K = (2**31 - 1) // (255 * 255) if affine else (2**31 - 1) // (128 * 128)
    for x_code, code in itertools.product((-128, 127), repeat=2):
        case = scaled(2, 3, K, affine=affine, x_symmetric=not affine)
        same = {"x_codes": x_code, "codes": code, "x_zero_point": -1 - x_code, "zero_point": -1 - code}
        assert_right(case, **{n: torch.full_like(x, same[n]) for n, x in tensors(case).items() if n in same})
    longer = scaled(2, 3, K + 1, affine=affine, x_symmetric=not affine)
    with pytest.raises(RuntimeError, match=rf"K must be at most {K}, so that an int32 holds the sum, got {K + 1}$"):
        call(longer, tensors(longer))
    assert_right(replace(longer, block=(1, K)))


@pytest.mark.parametrize("x_format", ["int8", "uint8"])
@pytest.mark.parametrize(
    ("M", "block"), [(3, (1, 128)), (3, (1, 256)), (21, (1, 128)), (21, (1, -1)), (9, (1, 20))], ids=str
)
def test_the_largest_sums_of_nibbles(backend: Served, M: int, block: tuple[int, int], x_format: str) -> None:
    """Every product as large as any: what AVX2 adds up in 16 bits stays there."""
    N, K = 9, 512
    case = scaled(M, N, K, "int4", block=block, x_format=x_format)
    dtype = getattr(torch, x_format)
    limits = torch.iinfo(dtype)
    for x_code, byte in itertools.product((limits.min, limits.max), (0x77, 0x88)):
        x_codes, codes = torch.full((M, K), x_code, dtype=dtype), torch.full((N, K // 2), byte, dtype=torch.uint8)
        assert_right(case, x_codes=x_codes, codes=codes)


@pytest.mark.parametrize("block", [(1, -1), (1, 16), (-1, -1)], ids=str)
def test_special_scales(backend: Served, block: tuple[int, int]) -> None:
    special = torch.tensor([torch.nan, torch.inf, 0.0, -0.0, 1e-40, 3e38, 1.0])
    case = scaled(8, 19, 40, affine=True, block=block, x_symmetric=False, bias=True, activation="relu", dtype="float32")
    scales = {name: tensors(case)[name] for name in ("x_scale", "scale")}
    for scale in scales.values():
        scale.view(-1)[: len(special)] = special[: scale.numel()]
    assert_right(case, **scales)
    for dtype in DTYPES:
        assert_right(replace(case, dtype=dtype, activation=None), **scales)


@pytest.mark.parametrize("backend", [s for s in serving("scaled_matmul") if s.device == "cpu"], ids=str, indirect=True)
def test_a_zero_point_out_of_range(backend: Served) -> None:
    """A zero point out of range is an error where no device has to be waited for."""
    case = scaled(2, 5, 9, "int4", True, x_format="uint8", x_symmetric=False)
    given = tensors(case)
    for name, qmax in (("x_zero_point", 255), ("zero_point", 7)):
        with pytest.raises(RuntimeError, match=rf"zero_point must be in .*\.\.{qmax}, got {qmax + 1}$"):
            call(case, given | {name: torch.full_like(given[name], qmax + 1)})


@pytest.mark.parametrize("per_row", [False, True])
def test_a_row_alone_and_in_batches(backend: Served, per_row: bool) -> None:
    M, N, K = (9, 18, 40) if backend.interpreted else (300, 70, 333)
    more = {"block": (1, 32), "x_symmetric": False, "per_row": per_row, "bias": True, "activation": "silu"}
    case = scaled(M, N, K, affine=True, **more)
    given = tensors(case)
    y = call(case, given)
    assert_same_bytes(call(case, given), y, "a second run")
    for m in (0, M // 2, M - 1):
        rows = {name: given[name] for name in ("x_codes", "x_scale", "x_zero_point")}
        one = {n: t[m : m + 1] if len(t) == M else t for n, t in rows.items()}
        assert_same_bytes(call(case, given | one), y[m : m + 1], f"row {m}")


def test_leading_axes_strides_and_out(backend: Served) -> None:
    case = scaled(6, 12, 32, "uint8", True, block=(1, 8), x_symmetric=False, bias=True, dtype="float32")
    given, want = tensors(case), expected(case)
    apart = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in given.items()}
    assert not any(t.is_contiguous() for n, t in apart.items() if t.shape[-1] > 1)
    assert_same_bytes(call(case, apart), want)
    assert_same_bytes(call(case, given | {"x_codes": given["x_codes"].view(2, 3, 32)}).view(6, 12), want)
    out = torch.full((6, 24), 7.0)
    assert call(case, given, out[:, ::2]).data_ptr() == out.data_ptr()
    assert_same_bytes(out[:, ::2].contiguous(), want)
    assert bool((out[:, 1::2] == 7).all())


def test_an_output_over_an_input(backend: Served) -> None:
    """The output may lie over an input: an element is read before its place is written."""
    case = scaled(4, 16, 16, bias=True, dtype="float32")
    given, memory = tensors(case), torch.zeros(4 * 16)
    memory[:16] = given["bias"]
    assert_same_bytes(call(case, given | {"bias": memory[:16]}, memory.view(4, 16)), expected(case))


@pytest.mark.parametrize("block", [(1, -1), (4, 16)], ids=str)
@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
def test_dynamic_matmul_is_quantize_dynamic_and_scaled_matmul(
    backend: Served, format: str, affine: bool, block: tuple[int, int]
) -> None:
    interpreted = backend.interpreted
    variants = itertools.cycle(itertools.product(DTYPES, EPILOGUES))
    for M, K in [(3, 65)] if interpreted else [*SIZES, (140, 200)]:
        dtype, (bias, activation) = next(variants)
        case = Product("dynamic_matmul", format, dtype, (M, 13, K), block, symmetric=not affine, activation=activation)
        given = tensors(case) | ({} if bias is None else {"bias": torch.randn(13).to(bias)})
        if M * K > 100:
            given["x"][0], given["x"][-1, -1] = 0, torch.inf
        assert_right(case, **given)
        y, out = call(case, given), torch.empty(M, 13, dtype=getattr(torch, dtype))
        assert_same_bytes(call(case, given, out), y, str(case))
        if K:
            x_codes, x_scale = quantlib.quantize_dynamic(given.pop("x"), "int8", block=(1, -1))
            parts = given | {"x_codes": x_codes, "x_scale": x_scale}
            assert_same_bytes(call(replace(case, op="scaled_matmul"), parts), y, str(case))


def test_public_defaults(backend: Served) -> None:
    """A scale a row and int8, of a linear layer whose float product is near."""
    w, x = torch.randn(24, 48), torch.randn(2, 5, 48)
    codes, scale = ops.quantize_dynamic(w, "int8", block=(1, -1))
    y = quantlib.dynamic_matmul(x, codes, scale)
    assert y.shape == (2, 5, 24)
    error = (y - x @ w.T).norm() / (x @ w.T).norm()
    assert error < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("isa", _build.LEVELS)
def test_every_instruction_set(isa: str) -> None:
    needs_level(isa)
    if isa == instruction_set():
        pytest.skip(f"{isa}: is what this process runs in every other test")
    chosen = "cpp and (bytes or larger or edges or threads or largest or dynamic)"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = fresh.run(command, env={**os.environ, "QUANTLIB_ISA": isa})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
