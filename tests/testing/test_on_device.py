"""The sweep that stays on its device finds what the one through the host finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlib import backends
from quantlib.testing import on_device
from quantlib.testing.bytes import bits
from quantlib.testing.implementations import Backend, Reference
from quantlib.testing.on_device import sweep_on_device
from quantlib.testing.sweep import Case, sweep

CASES = [
    Case("cast", "bfloat16", "float8_e4m3fn", saturate=True),
    Case("quantize", "float16", "int4", scale=0.1, zero_point=3),
    Case("dequantize", "int4", "bfloat16", scale=0.1),
    Case("dequantize", "uint8", "float32", scale=0.1, zero_point=128),
]


class Wrong(Backend):
    """Two bits that are not as they should be."""

    def run(self, case: Case, x: torch.Tensor) -> torch.Tensor:
        y = super().run(case, x).clone()
        y.view(-1).view(torch.uint8)[[37, 200]] ^= 1
        return y


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_sweeps_find_the_same(case: Case) -> None:
    own = "composite" if backends.refuses("cpp", "cpu") else "cpp"
    right = sweep_on_device(case, Backend(own), Backend("composite"))
    assert (right.inputs, right.mismatches, right.first) == (case.inputs, 0, None)
    wrong, host = sweep_on_device(case, Wrong(own), Backend("composite")), sweep(case, Wrong(own), Reference())
    assert wrong.first == host.first
    assert wrong.mismatches in (1, 2)


@pytest.mark.parametrize("start", [0, 5 << 16, (1 << 31) - (1 << 16), 1 << 31, (1 << 32) - (1 << 16)])
def test_the_codes_of_a_batch(start: int) -> None:
    x = on_device.inputs(Case("cast", "float32", "float16"), start, 1 << 16, "cpu")
    assert np.array_equal(bits(x), np.arange(start, start + (1 << 16), dtype=np.uint64).astype(np.uint32))


def test_a_batch_fits_the_device() -> None:
    size = on_device.batch_of("cpu")
    assert size & (size - 1) == 0
