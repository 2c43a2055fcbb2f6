"""The CUDA kernels of fake_quantize and its gradient on this CPU, compiled by g++ unchanged and with sanitizers."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from cuda_on_cpu.emulator import COMPILER, FAKE, Buffer, Call, Emulator, build
from test_fake_quantize import BLOCKS, adversarial, assert_sum

from quantlib import formats, reference
from quantlib.reference.numerics import Array
from quantlib.testing import assert_same_bytes

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")
SHAPE = (6, 67)
SPECS = [(f.name, affine) for f in formats.TABLE for affine in (False, True) if not (affine and f.is_float)]
PARTIALS = 1024  # kPartials of csrc/problem.h


@pytest.fixture(scope="module")
def emulator(request: pytest.FixtureRequest) -> Emulator:
    return build(request.config.cache.mkdir("cuda_on_cpu"), FAKE)


def calls(
    x: Array,
    dy: Array,
    scale: Array,
    zero_point: Array | None,
    format: str,
    block: tuple[int, int],
    dtype: str = "float32",
    lsq: bool = False,
    seed: int = 0,
) -> list[Call]:
    """Forward and backward."""
    f = formats.get(format)
    limits = np.array((0, 0) if f.is_float else f.range(zero_point is not None), np.int32)
    grid, empty = (*x.shape, *block), lambda like: Buffer(np.empty_like(like), False, like.itemsize * (seed % 3))
    z = None if zero_point is None else Buffer(zero_point, True)
    given = (Buffer(x, True, x.itemsize * (seed % 3)), Buffer(scale, True), z, Buffer(limits, True))
    dzero_point = None if z is None else empty(scale)
    partial = Buffer(np.empty((2, PARTIALS), np.float32), False)
    made = (empty(x), empty(scale), dzero_point, partial)
    return [
        Call(FAKE[0], dtype, format, False, seed, grid, (*given, empty(x))),
        Call(FAKE[1], dtype, format, lsq, seed, grid, (Buffer(dy, True, dy.itemsize * (seed % 3)), *given, *made)),
    ]


def results(forward: tuple[Array, ...], backward: tuple[Array, ...], affine: bool) -> tuple[Array, ...]:
    """y, dx, dscale, dzero_point"""
    return forward[-1], *backward[-3 - affine : -1]


def run(emulator: Emulator, *args: Any, **options: Any) -> tuple[Array, ...]:
    forward, backward = calls(*args, **options)
    affine = forward.buffers[2] is not None
    return results(*emulator.run([forward, backward]), affine)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("format", "affine"), SPECS, ids=str)
def test_bytes_and_sums(emulator: Emulator, format: str, affine: bool, block: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    shape = (-(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1]))
    scale = np.exp2(rng.uniform(-8, 8, shape)).astype(np.float32)
    zero_point = (rng.standard_normal(shape) * 40).astype(np.float32) if affine else None
    x, dy = adversarial(format, scale, block, affine), rng.standard_normal(SHAPE).astype(np.float32)
    for lsq in (False, True):
        y, dx, *sums = run(emulator, x, dy, scale, zero_point, format, block, lsq=lsq, seed=int(lsq))
        want = reference.fake_quantize(x, scale, format, block=block, zero_point=zero_point)
        terms = reference.fake_quantize_backward(dy, x, scale, format, block=block, zero_point=zero_point, lsq_mask=lsq)
        assert_same_bytes(y, want, "y")
        assert_same_bytes(dx, terms.dx, "dx")
        for got, exact in zip(sums, (terms.dscale, terms.dzero_point), strict=False):
            assert_sum(torch.from_numpy(got.copy()), exact, block)


def test_every_kernel_runs(emulator: Emulator) -> None:
    """Every instance of every template, in three orders of threads, and its bytes."""
    rng = np.random.default_rng(3)
    asked, wanted, block = [], [], (1, 67)
    names = [f.name for f in formats.TABLE]
    ways = itertools.product(names, ("float32", "float16", "bfloat16"), (False, True), range(3))
    for seed, (format, dtype, lsq, _) in enumerate(ways):
        for affine in (False,) if formats.get(format).is_float else (False, True):
            scale = np.exp2(rng.uniform(-4, 4, (6, 1))).astype(np.float32)
            z = (rng.standard_normal(scale.shape) * 9).astype(np.float32) if affine else None
            x, dy = (
                reference.cast(v, dtype)
                for v in (adversarial(format, scale, block, affine), rng.standard_normal(SHAPE).astype(np.float32))
            )
            wide_x, wide_dy = (reference.decode_float(v, formats.get(dtype)) for v in (x, dy))
            y = reference.fake_quantize(wide_x, scale, format, block=block, zero_point=z)
            terms = reference.fake_quantize_backward(
                wide_dy, wide_x, scale, format, block=block, zero_point=z, lsq_mask=lsq
            )
            asked += calls(x, dy, scale, z, format, block, dtype, lsq, seed)
            wanted.append((f"{format} of {dtype}, {affine=}, {lsq=}", affine, reference.cast(y, dtype, saturate=False),
                           reference.cast(terms.dx, dtype, saturate=False)))  # fmt: skip
    x, dy = rng.standard_normal((2, 3, 20011)).astype(np.float32)
    asked += calls(x, dy, np.ones((1, 1), np.float32), None, "int8", x.shape)  # slices
    launched: set[str] = set()
    got = emulator.run(asked, launched)
    for (what, affine, y, dx), forward, backward in zip(wanted, got[0:-2:2], got[1:-2:2], strict=True):
        made = results(forward, backward, affine)
        assert_same_bytes(made[0], y, f"y, {what}")
        assert_same_bytes(made[1], dx, f"dx, {what}")
    assert launched == set(emulator.kernels().values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("shape", "block"), [((3, 20011), (3, 20011)), ((2, 40000), (1, 40000)), ((300, 260), (128, 128))]
)
def test_no_order_of_threads_changes_a_byte(
    emulator: Emulator, shape: tuple[int, int], block: tuple[int, int], dtype: str
) -> None:
    rng = np.random.default_rng(2)
    x, dy = (reference.cast(rng.standard_normal(shape).astype(np.float32), dtype) for _ in range(2))
    scale = np.full((-(-shape[0] // block[0]), -(-shape[1] // block[1])), 0.02, np.float32)
    results = [run(emulator, x, dy, scale, np.ones_like(scale), "int8", block, dtype, seed=seed) for seed in (0, 3)]
    for first, second in zip(*results, strict=True):
        assert_same_bytes(first, second, "another order of threads")
    wide = [reference.decode_float(v, formats.get(dtype)) for v in (dy, x)]
    terms = reference.fake_quantize_backward(*wide, scale, "int8", block=block, zero_point=np.ones_like(scale))
    assert_sum(torch.from_numpy(results[0][2].copy()), terms.dscale, block)
