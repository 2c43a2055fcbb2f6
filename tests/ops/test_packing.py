"""Codes that share bytes: the reference by hand, the op by the reference, packing unpacking's inverse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlib
from quantlib import formats, reference
from quantlib.testing import assert_same_bytes

PACKED = [f.name for f in formats.TABLE if f.packed]
SHAPES = [(1,), (2,), (5,), (0,), (3, 7), (3, 8), (0, 5), (2, 0), (2, 3, 9)]


def codes(format: str, shape: tuple[int, ...]) -> np.ndarray:
    lowest, highest = formats.get(format).code_range
    return np.random.default_rng(0).integers(lowest, highest + 1, shape, np.int8 if lowest else np.uint8)


def test_by_hand() -> None:
    f = formats.get("int4")
    assert reference.pack(np.array([1, 2, -1, -8, 7]), f).tolist() == [0x21, 0x8F, 0x07]
    assert reference.unpack(np.array([0x21, 0x8F, 0xA7], np.uint8), f, 5).tolist() == [1, 2, -1, -8, 7]
    f = formats.get("float4_e2m1fn")
    assert reference.pack(np.array([1, 2, 15, 8]), f).tolist() == [0x21, 0x8F]
    assert reference.unpack(np.array([0x21, 0x8F], np.uint8), f, 4).tolist() == [1, 2, 15, 8]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("format", PACKED)
def test_op_is_the_reference_and_unpack_the_inverse(format: str, shape: tuple[int, ...]) -> None:
    given, f = codes(format, shape), formats.get(format)
    packed = quantlib.pack(torch.from_numpy(given), format)
    assert_same_bytes(packed, reference.pack(given, f), f"pack {format}")
    assert packed.shape == (*shape[:-1], -(-shape[-1] // f.per_byte))
    assert_same_bytes(quantlib.unpack(packed, format, shape[-1]), given, f"unpack {format}")
    assert_same_bytes(reference.unpack(packed.numpy(), f, shape[-1]), given, f"reference.unpack {format}")


@pytest.mark.parametrize("format", PACKED)
def test_every_byte(format: str) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    unpacked = quantlib.unpack(every, format)
    assert_same_bytes(unpacked, reference.unpack(every.numpy(), formats.get(format), unpacked.numel()))
    assert_same_bytes(quantlib.pack(unpacked, format), every)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_pack_takes_any_integer_dtype_and_any_layout(dtype: torch.dtype) -> None:
    given = torch.from_numpy(codes("int4", (6, 10)))
    want = quantlib.pack(given, "int4")
    assert_same_bytes(quantlib.pack(given.to(dtype), "int4"), want)
    assert_same_bytes(quantlib.pack(given.mT.contiguous().mT.to(dtype), "int4"), want)


def test_quantize_writes_what_pack_packs() -> None:
    x = torch.randn(5, 9)
    codes8, scale = quantlib.quantize_dynamic(x, "int4", block=(1, -1))
    unpacked = quantlib.unpack(codes8, "int4", 9)
    values = quantlib.dequantize(codes8, scale, "int4", block=(1, -1), size=9)
    assert_same_bytes(unpacked.float() * scale + 0.0, values)
    assert_same_bytes(quantlib.pack(unpacked, "int4"), codes8)


@pytest.mark.parametrize(
    ("format", "wrong", "said"),
    [("int4", 8, "-8..7"), ("int4", -9, "-8..7"), ("float4_e2m1fn", 16, "0..15"), ("float4_e2m1fn", -1, "0..15")],
)
def test_codes_out_of_range(format: str, wrong: int, said: str) -> None:
    given = torch.tensor([0, 1, wrong])
    with pytest.raises(RuntimeError, match=f"^quantlib::pack: codes must be in {said}, got {wrong}$"):
        quantlib.pack(given, format)
    with pytest.raises(ValueError, match=f"codes of {format} must be in {said}, got {wrong}"):
        reference.pack(given.numpy(), formats.get(format))
