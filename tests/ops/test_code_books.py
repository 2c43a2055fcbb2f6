"""Formats whose values are a table: nf4 has the codes, the scales and the values of bitsandbytes."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch

import quantlib
from quantlib import backends, formats, ops
from quantlib.formats import FloatFormat, book
from quantlib.testing import names

BACKENDS = [name for name in ("cpp", "composite") if backends.refuses(name, "cpu") is None]
# CRC-32 of the codes, one a byte, that bitsandbytes 0.50.2 gives `weights` by quantize_4bit(blocksize=64)
CODES_OF_BITSANDBYTES = 4044882269


def weights() -> torch.Tensor:
    """[64, 64] float32 of many sizes; the first rows hold every midpoint of nf4 and the floats beside it, and zeros."""
    n = np.arange(64 * 64, dtype=np.int64)
    x = ((n * 7919) % 10007 / 10007 - 0.5).astype(np.float32).reshape(64, 64)
    x = (x * np.abs(x) * np.exp2(np.arange(64) % 21 - 10)[:, None]).astype(np.float32)
    f = formats.get("nf4")
    assert isinstance(f, FloatFormat)
    m = np.array(f.midpoints, np.float32)
    x[:3] = 0
    x[0, :45] = np.stack([np.nextafter(m, np.float32(-np.inf)), m, np.nextafter(m, np.float32(np.inf))], -1).reshape(-1)
    x[0, 63] = 1
    x[1] = -x[0]
    return torch.from_numpy(x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nf4_has_the_codes_of_bitsandbytes(backend: str) -> None:
    x = weights()
    with quantlib.use_backend(backend):
        packed, scale = quantlib.quantize_dynamic(x, "nf4", block=(1, 64))
    codes = ops.unpack(packed, "nf4", 64)
    assert zlib.crc32(codes.to(torch.uint8).numpy().tobytes()) == CODES_OF_BITSANDBYTES
    largest = x.abs().amax(1, keepdim=True)
    assert torch.equal(scale[largest > 0], largest[largest > 0])
    y = quantlib.dequantize(packed, scale, "nf4", block=(1, 64))
    assert torch.equal(y, torch.tensor(formats.NF4)[codes.long()] * largest)


def test_bitsandbytes_agrees_where_it_is_installed() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weights(), blocksize=64, quant_type="nf4", compress_statistics=False)
    bytes_ = packed.reshape(-1)
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], -1)  # it has the first of two codes in the high nibble
    assert zlib.crc32(codes.numpy().tobytes()) == CODES_OF_BITSANDBYTES
    ours = quantlib.quantize_dynamic(weights(), "nf4", block=(1, 64))
    values = quantlib.dequantize(*ours, "nf4", block=(1, 64))
    assert torch.equal(functional.dequantize_4bit(packed, state), values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("format", ["nf4", "nf4_bf16"])
def test_a_midpoint_is_the_lower_value_and_nan_the_largest(backend: str, format: str) -> None:
    f = formats.get(format)
    assert isinstance(f, FloatFormat)
    x = torch.tensor([f.midpoints])
    above = torch.nextafter(x, torch.tensor(torch.inf))
    special = torch.tensor([[torch.nan, torch.inf, -torch.inf, -0.0, 0.0]])
    with quantlib.use_backend(backend):
        codes = [
            ops.unpack(quantlib.quantize(t, torch.ones(1, 1), format, block=(1, -1)), format, t.shape[1]).tolist()[0]
            for t in (x, above, special)
        ]
    assert codes == [list(range(15)), list(range(1, 16)), [15, 15, 0, 7, 7]]


def test_a_book_whose_values_are_bfloat16_is_exact_where_16_bits_are_multiplied() -> None:
    rows = {name: formats.get(name) for name in ("nf4", "nf4_bf16", "bfloat16", "float16")}
    held = {(a, b): rows[a].holds(rows[b]) for a in ("bfloat16", "float16") for b in ("nf4", "nf4_bf16")}  # type: ignore[union-attr]
    assert held == {(a, b): b == "nf4_bf16" for a, b in held}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (formats.NF4[:-1], "must be 16, at most 16, got 15"),
        (formats.NF4[::-1], "must be float32 numbers in ascending order"),
        ((*formats.NF4[:-1], 0.1 + 1), "must be float32 numbers in ascending order"),
    ],
)
def test_a_table_that_is_none_is_refused(values: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=f"values of nf4 {said}"):
        book("nf4", values)


@pytest.mark.parametrize("place", [1, 8, 14])
def test_another_value_is_seen(place: int) -> None:
    values = list(formats.NF4)
    values[place] += 2.0**-20
    with pytest.raises(AssertionError, match=r"nf4: its values are .* its name says"):
        names.check(book("nf4", tuple(values)))
