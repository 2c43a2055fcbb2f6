"""Codes of four bits on a GPU: its instructions, run one by one, give the bytes of the reference."""

from __future__ import annotations

from typing import Any

import inline_ptx
import numpy as np
import pytest
import torch

from quantlib import formats, reference
from quantlib.backends import triton as backend
from quantlib.formats import FloatFormat, Format, IntFormat, book
from quantlib.testing import values

triton = pytest.importorskip("triton")
if not backend.interpreted():
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)

import triton.language as tl  # noqa: E402

from quantlib.backends.triton import nibbles  # noqa: E402

SKEWED = book("skewed", (-1.0, -0.75, -0.625, -0.5, *(i / 32 for i in range(-13, 11, 2))))  # no zero
BOOKS = (formats.get("nf4"), formats.get("nf4_bf16"), SKEWED)
FIELDS = (formats.get("float4_e2m1fn"), FloatFormat("float4_bias_2", 2, 1, 2, False, "none", 2))
INTEGERS = (formats.get("int4"), IntFormat("uint4", 4, False, 2))


@triton.jit
def select_kernel(i_ptr, found_ptr, F: tl.constexpr, TABLE: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(found_ptr + i, nibbles.select(tl.load(i_ptr + i), F, TABLE, 0, 16).to(tl.int32, bitcast=True))


@triton.jit
def lines_kernel(x_ptr, code_ptr, F: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(code_ptr + i, nibbles.on_lines(tl.load(x_ptr + i), F).to(tl.int32))


def table(f: Format, name: str, i: Any) -> Any:
    """[32] the bits of the entry of each lane, as the selections give it"""
    found = torch.empty(32, dtype=torch.int32)
    select_kernel[(1,)](torch.from_numpy(i.astype(np.int32)), found, f, name, 32)
    return found.numpy().view(np.uint32)


def decided(f: FloatFormat) -> Any:
    """[n, 32] float32 around every midpoint and the ends of every bucket, every bfloat16, and many between"""
    rng, edge = np.random.default_rng(0), np.arange(-8, 9)
    ends = np.linspace(-1.5, 1.5, 1 << 12)
    if f.is_book:
        slope, offset, _ = nibbles.buckets(f)
        ends = (offset - (np.arange(-1, 33) + 0.5) / 31) / slope
        middles = np.array(f.midpoints)
    else:
        codes = np.arange(f.max_code + 1, dtype=np.uint8)
        levels = reference.decode_float(codes, f).astype(np.float64)
        middles = (levels[1:] + levels[:-1]) / 2
    near = np.concatenate([ends, middles, -middles, [0.0, -0.0, f.max, -f.max]]).astype(np.float32).view(np.uint32)
    every = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    dense = rng.uniform(-1.2 * f.max, 1.2 * f.max, 1 << 18).astype(np.float32).view(np.uint32)
    bits = np.concatenate([(near[:, None] + edge.astype(np.uint32)).ravel(), every, dense, values.edges().view("u4")])
    return np.resize(bits, (-(-len(bits) // 32), 32)).view(np.float32)


@pytest.mark.parametrize("f", BOOKS, ids=lambda f: f.name)
def test_the_code_of_a_book(f: FloatFormat) -> None:
    """At every midpoint, and NaN, infinities and zeros too; no bit of the shuffled index but five counts."""
    assert nibbles.encodes_nibbles(f, 80)
    lane = np.zeros((1, 32), np.uint32)
    base = inline_ptx.run(nibbles.base_assembly(f), {1: lane})[0][0]
    assert base[0] == 15
    midpoint = table(f, "midpoints", base)
    x = decided(f)
    inputs = {1: x.view(np.uint32), 2: base, 3: midpoint}
    code = inline_ptx.run(nibbles.book_assembly(f), inputs)[0]
    assert np.array_equal(code, reference.encode_float(x, f).astype(np.uint32))


def test_a_book_with_two_midpoints_in_a_bucket_is_compared_with_all() -> None:
    near = book("near", (*(-(2.0**-i) for i in range(8)), *(2.0**-i for i in range(7, -1, -1))))
    pairs = book("pairs", (-1.0, 0.0, 0.5, 1.0))
    assert not nibbles.encodes_nibbles(near, 90)
    assert not nibbles.encodes_nibbles(pairs, 90)
    assert not nibbles.encodes_nibbles(BOOKS[0], 0)


@pytest.mark.parametrize("f", FIELDS, ids=lambda f: f.name)
def test_the_code_of_fields(f: FloatFormat) -> None:
    """NaN is left out: the interpreter's minimum is not a GPU's, which drops it."""
    x = decided(f).ravel()
    x = x[x == x]
    x = np.resize(x, 1 << (len(x) - 1).bit_length())
    code = torch.empty(len(x), dtype=torch.int32)
    lines_kernel[(1,)](torch.from_numpy(x), code, f, len(x))
    assert np.array_equal(code.numpy() & 15, reference.encode_float(x, f))


@pytest.mark.parametrize("f", [*INTEGERS, *FIELDS, *BOOKS], ids=lambda f: f.name)
def test_the_values_of_bytes(f: Format) -> None:
    """Every byte at every place of a word"""
    assert nibbles.decodes_nibbles((1, 128), f, 80)
    byte = np.arange(256, dtype=np.uint32).reshape(-1, 32)
    word = byte | (byte * 3 & 255) << 8 | (byte * 7 & 255) << 16 | (byte * 31 & 255) << 24
    lane, codes = np.arange(32, dtype=np.uint32), np.arange(16, dtype=np.uint8)
    if isinstance(f, FloatFormat):
        want = reference.decode_float(codes, f)
        assert np.array_equal(table(f, "values", lane), np.tile(want, 2).view(np.uint32))
    else:
        want = ((codes ^ 8) - 8.0 if f.signed else codes).astype(np.float32)
    made = inline_ptx.run(nibbles.values_assembly(f), {8: word, 9: np.tile(want, 2).view(np.uint32)})
    for n in range(8):
        code = word >> np.uint32(8 * (n % 4) + 4 * (n // 4)) & 15
        assert np.array_equal(made[n], want.view(np.uint32)[code])


def test_codes_share_bytes() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << 32, (9, 64, 32), np.uint32)
    word = inline_ptx.run(nibbles.IN_BYTES.value, dict(enumerate(codes[1:], 1)))[0]
    for n in range(4):
        assert np.array_equal(word >> np.uint32(8 * n) & 255, codes[1 + n] & 15 | (codes[5 + n] & 15) << 4)


def test_a_pair_of_bfloat16_is_widened() -> None:
    codes = np.arange(1 << 16, dtype=np.uint32).reshape(-1, 32)
    made = inline_ptx.run(nibbles.WIDENED.value, {2: codes | codes[::-1] << 16})
    assert np.array_equal(made[0], codes << 16)
    assert np.array_equal(made[1], codes[::-1] << 16)
