"""Every code of the formats of 8 bits and less, dequantized by scales that overflow, underflow or are NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlib
from quantlib import formats, reference
from quantlib.testing import assert_same_bytes
from quantlib.testing.bytes import bits

NARROW = [f.name for f in formats.FORMATS.values() if f.bits <= 8]
SCALES = [1.0, 2.0**-100, 2.0**-120, 3.1e38, 1e-3, 1.0 / 3.0, 0.0, float("inf"), float("nan"), 2.0**-14, 1.7e36]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("columns", [256, 250, 31])
@pytest.mark.parametrize("format", NARROW)
def test_every_code_by_every_scale(format: str, columns: int, dtype: str) -> None:
    f = formats.get(format)
    codes = np.resize(np.arange(256, dtype=np.uint8), (len(SCALES), f.columns(columns) if f.packed else columns))
    scale = np.array(SCALES, np.float32)[:, None]
    given = torch.from_numpy(codes).view(getattr(torch, f.dtype_name))
    for block in ((1, columns), (1, 32)):
        if block[1] > columns:
            continue
        s = np.repeat(scale, -(-columns // block[1]), 1)
        y = quantlib.dequantize(
            given, torch.from_numpy(s), format, block=block, dtype=getattr(torch, dtype), size=columns
        )
        want = reference.dequantize(codes.view(f.storage), s, format, block=block, dtype=dtype, size=columns)
        assert_same_bytes(bits(y), want)
