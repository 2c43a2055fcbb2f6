"""Products of integer codes: the bytes of the reference on every backend and instruction set."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import Served, forced, serving
from torch import Tensor

import quantlib
from quantlib import _build, backends, formats, ops, reference
from quantlib.formats import IntFormat
from quantlib.reference.activation import ACTIVATIONS
from quantlib.reference.numerics import Array
from quantlib.testing import assert_same_bytes

BLOCKS = [(1, -1), (-1, -1), (1, 32), (3, 7), (4, 16), (1, 1)]
WEIGHTS = [(format, affine) for format in ("int8", "uint8", "int4") for affine in (False, True)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(0, 64), (1, 0), (2, 1), (17, 7), (1, 63), (17, 64), (2, 65), (17, 65), (1, 1000), (17, 1000)]  # M, K
EPILOGUES = [(None, None), *((torch.float32, name) for name in ACTIVATIONS), (torch.bfloat16, None)]


@pytest.fixture(params=serving("scaled_matmul"), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that multiplies in turn, forced, on a device it serves."""
    yield from forced(request.param)


def int_format(name: str) -> IntFormat:
    f = formats.get(name)
    assert isinstance(f, IntFormat)
    return f


def random_codes(rows: int, columns: int, format: str) -> Tensor:
    """Every code, -128 too, and anything in the nibble past an odd row's end."""
    f = int_format(format)
    dtype = getattr(torch, f.dtype_name)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max + 1
    return torch.randint(low, high, (rows, (columns + 1) // 2 if f.packed else columns)).to(dtype)


def random_zero_point(shape: torch.Size, format: str) -> Tensor:
    low, high = int_format(format).range(affine=True)
    return torch.randint(low, high + 1, shape, dtype=torch.int32)


def as_array(x: Tensor | None) -> Array | None:
    return None if x is None else (x.float() if x.is_floating_point() else x).numpy()


@dataclass
class Case:
    """One call, and what the reference makes of it."""

    M: int
    N: int
    K: int
    x_format: str
    x_affine: bool
    format: str
    affine: bool
    block: tuple[int, int]
    per_row: bool = True
    bias: torch.dtype | None = None
    activation: str | None = None
    dtype: torch.dtype = torch.float32
    tensors: dict[str, Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        br, bk = (max(size, 1) if b == -1 else b for b, size in zip(self.block, (self.N, self.K), strict=True))
        self.block = br, bk
        scale = torch.rand(-(-self.N // br), -(-self.K // bk)) * 2.0**-6
        x_scale = torch.rand(self.M if self.per_row else 1, 1)
        self.tensors = {
            "x_codes": random_codes(self.M, self.K, self.x_format),
            "x_scale": x_scale,
            "codes": random_codes(self.N, self.K, self.format),
            "scale": scale,
            "x_zero_point": random_zero_point(x_scale.shape, self.x_format) if self.x_affine else None,
            "zero_point": random_zero_point(scale.shape, self.format) if self.affine else None,
            "bias": None if self.bias is None else torch.randn(self.N).to(self.bias),
        }

    def call(self, **more: Any) -> Tensor:
        given = {**self.tensors, "format": self.format, "block": self.block, "activation": self.activation}
        y: Tensor = quantlib.scaled_matmul(**{**given, "dtype": self.dtype, **more})
        return y

    def expected(self) -> Array:
        arrays = {name: as_array(t) for name, t in self.tensors.items()}
        given = {"format": self.format, "block": self.block, "activation": self.activation}
        return reference.scaled_matmul(**arrays, **given, dtype=str(self.dtype).removeprefix("torch."))

    def check(self) -> None:
        assert_same_bytes(self.call(), self.expected(), str(self))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
@pytest.mark.parametrize(("x_format", "x_affine"), [("int8", False), ("uint8", True)], ids=str)
def test_bytes_of_the_reference(
    backend: Served, x_format: str, x_affine: bool, format: str, affine: bool, block: tuple[int, int]
) -> None:
    interpreted = backend.interpreted
    variants = itertools.cycle(itertools.product(DTYPES, EPILOGUES))
    for M, K in [(3, 65)] if interpreted else SIZES:
        dtype, (bias, activation) = next(variants)
        N = 5 if interpreted or K > 100 else 67
        per_row = (M + K) % 3 > 0
        Case(M, N, K, x_format, x_affine, format, affine, block, per_row, bias, activation, dtype).check()


@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
def test_larger_than_what_stays_in_a_cache(backend: Served, format: str, affine: bool) -> None:
    """Several pieces of the rows of x, of those of the weight and of the columns, none of them whole."""
    if backend.interpreted:
        pytest.skip("the interpreter would take minutes")
    for x_format, block in (("int8", (1, -1)), ("uint8", (1, 2700))):
        Case(261, 131, 5301, x_format, affine, format, affine, block, bias=torch.float16).check()


# M, N, K, block: where the C++ kernels of the CPU change their way
EDGES = {
    "whole rows of whole lines, read where they lie": (49, 70, 256, (1, -1)),
    "more columns than are multiplied at a time": (16, 33, 5120, (1, -1)),
    "blocks that fill lines": (33, 40, 384, (1, 128)),
    "more blocks than are multiplied at a time": (5, 40, 4224, (1, 128)),
    "a block longer than what is multiplied at a time": (4, 34, 9500, (3, 4700)),
    "blocks with zeros behind them": (20, 25, 300, (1, 50)),
    "few rows, and lines of two nibbles": (3, 37, 2432, (1, 128)),
    "the same in blocks of several lines": (1, 21, 640, (2, 256)),
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
    for x_format in ("int8", "uint8")[: 2 if M < 500 else 1]:
        Case(M, N, K, x_format, affine, format, affine, block, dtype=torch.bfloat16).check()


def test_threads(backend: Served) -> None:
    """Sums are exact: who makes which part of them does not matter."""
    if backend.interpreted:
        pytest.skip("runs in one thread")
    case = Case(70, 300, 256, "int8", False, "int4", True, (1, 64), bias=torch.float32)
    before, y = torch.get_num_threads(), case.call()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bytes(case.call(), y, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("affine", [False, True])
def test_the_largest_sums(backend: Served, affine: bool) -> None:
    """At the largest K an int32 holds the sum, of either sign; one more is an error that says so."""
    K = (2**31 - 1) // (255 * 255) if affine else (2**31 - 1) // (128 * 128)
    for x_code, code in itertools.product((-128, 127), repeat=2):
        case = Case(2, 3, K, "int8", affine, "int8", affine, (1, -1))
        for name, value in (("x_codes", x_code), ("codes", code)):
            t = case.tensors[name]
            assert t is not None
            t.fill_(value)
            z = case.tensors[name.replace("codes", "zero_point")]
            if z is not None:
                z.fill_(-1 - value)
        case.check()
    longer = Case(2, 3, K + 1, "int8", affine, "int8", affine, (1, -1))
    with pytest.raises(RuntimeError, match=rf"K must be at most {K}, so that an int32 holds the sum, got {K + 1}$"):
        longer.call()
    Case(2, 3, K + 1, "int8", affine, "int8", affine, (1, K)).check()


@pytest.mark.parametrize("block", [(1, -1), (1, 16), (-1, -1)], ids=str)
def test_special_scales(backend: Served, block: tuple[int, int]) -> None:
    special = [torch.nan, torch.inf, 0.0, -0.0, 1e-40, 3e38, 1.0]
    case = Case(8, 19, 40, "int8", True, "int8", True, block, bias=torch.float32, activation="relu")
    for name in ("x_scale", "scale"):
        t = case.tensors[name]
        assert t is not None
        t.view(-1)[: len(special)] = torch.tensor(special)[: t.numel()]
    case.check()
    for dtype in DTYPES:
        case.dtype, case.activation = dtype, None
        case.check()


@pytest.mark.parametrize("backend", [s for s in serving("scaled_matmul") if s.device == "cpu"], ids=str, indirect=True)
def test_a_zero_point_out_of_range(backend: Served) -> None:
    """Which is told where no device has to be waited for."""
    case = Case(2, 5, 9, "uint8", True, "int4", True, (1, -1))
    for name, qmax in (("x_zero_point", 255), ("zero_point", 7)):
        kept = case.tensors[name]
        assert kept is not None
        case.tensors[name] = torch.full_like(kept, qmax + 1)
        with pytest.raises(RuntimeError, match=rf"zero_point must be in .*\.\.{qmax}, got {qmax + 1}$"):
            case.call()
        case.tensors[name] = kept


@pytest.mark.parametrize("per_row", [False, True])
def test_a_row_alone_and_in_batches(backend: Served, per_row: bool) -> None:
    M, N, K = (9, 18, 40) if backend.interpreted else (300, 70, 333)
    case = Case(M, N, K, "int8", True, "int8", True, (1, 32), per_row, torch.float32, "silu", torch.bfloat16)
    y = case.call()
    assert_same_bytes(case.call(), y, "a second run")
    for m in (0, M // 2, M - 1):
        rows = {name: case.tensors[name] for name in ("x_codes", "x_scale", "x_zero_point")}
        one = {n: t[m : m + 1] if t is not None and len(t) == M else t for n, t in rows.items()}
        assert_same_bytes(case.call(**one), y[m : m + 1], f"row {m}")


def test_leading_axes_strides_and_out(backend: Served) -> None:
    case = Case(6, 12, 32, "int8", True, "uint8", True, (1, 8), bias=torch.float32)
    want = case.expected()
    apart = {n: t.repeat_interleave(2, -1)[..., ::2] for n, t in case.tensors.items() if t is not None}
    assert not any(t.is_contiguous() for n, t in apart.items() if t.shape[-1] > 1)
    assert_same_bytes(case.call(**apart), want)
    x_codes = case.tensors["x_codes"]
    assert x_codes is not None
    assert_same_bytes(case.call(x_codes=x_codes.view(2, 3, 32)).view(6, 12), want)
    out = torch.full((6, 24), 7.0)
    assert case.call(out=out[:, ::2]).data_ptr() == out.data_ptr()
    assert_same_bytes(out[:, ::2].contiguous(), want)
    assert bool((out[:, 1::2] == 7).all())


def test_an_output_over_an_input(backend: Served) -> None:
    """What is still read is not yet written."""
    case = Case(4, 16, 16, "int8", False, "int8", False, (1, -1), bias=torch.float32)
    memory = torch.zeros(4 * 16)
    bias = case.tensors["bias"]
    assert bias is not None
    want = case.expected()
    memory[:16] = bias
    assert_same_bytes(case.call(bias=memory[:16], out=memory.view(4, 16)), want)


@pytest.mark.parametrize("block", [(1, -1), (4, 16)], ids=str)
@pytest.mark.parametrize(("format", "affine"), WEIGHTS, ids=str)
def test_dynamic_matmul_is_quantize_dynamic_and_scaled_matmul(
    backend: Served, format: str, affine: bool, block: tuple[int, int]
) -> None:
    interpreted = backend.interpreted
    variants = itertools.cycle(itertools.product(DTYPES, EPILOGUES))
    for M, K in [(3, 65)] if interpreted else [*SIZES, (140, 200)]:
        dtype, (bias, activation) = next(variants)
        case = Case(M, 13, K, "int8", False, format, affine, block, True, bias, activation, dtype)
        x = (torch.randn(M, K) * torch.exp2(torch.arange(M) % 40 - 20)[:, None]).to(dtype)
        if x.numel() > 100:
            x[0], x[-1, -1] = 0, torch.inf
        weight = {name: case.tensors[name] for name in ("codes", "scale", "zero_point", "bias")}
        call = {**weight, "format": format, "block": case.block, "activation": activation}
        y = quantlib.dynamic_matmul(x, **call)
        if K:
            codes, scale = quantlib.quantize_dynamic(x, "int8", block=(1, -1))
            assert_same_bytes(y, case.call(x_codes=codes, x_scale=scale), str(case))
        arrays = {name: as_array(t) for name, t in weight.items()}
        given = {"format": format, "block": case.block, "activation": activation}
        name = str(dtype).removeprefix("torch.")
        assert_same_bytes(y, reference.dynamic_matmul(x.float().numpy(), **arrays, **given, dtype=name), str(case))
        out = torch.empty_like(y)
        quantlib.dynamic_matmul(x, **call, out=out)
        assert_same_bytes(out, y)


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
    if backends.refuses("cpp", "cpu"):
        pytest.skip("there is no compiled library")
    chosen = "cpp and (bytes or larger or edges or threads or largest or dynamic)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env={**os.environ, "QUANTLIB_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    if "on this machine" in done.stdout:
        pytest.skip(f"this machine has no {isa}")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
