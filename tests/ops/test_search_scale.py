"""A search finds the part of the scale with the least loss, in float64; its bytes are in the case tables."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

import quantlib
from quantlib import ops
from quantlib.formats import NF4
from quantlib.reference.search_scale import by_magnitude, parts
from quantlib.spec import SEARCHES

FORMATS = ("nf4_bf16", "int4", "float4_e2m1fn", "float8_e4m3fn", "int8")


def weights(rows: int = 24, columns: int = 96) -> Tensor:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))
    return x * (1 + 9 * (torch.arange(columns) % 31 == 0))  # with columns that stand out


def losses(x: Tensor, scale: Tensor, format: str, bk: int, method: str, energy: Tensor) -> Tensor:
    """[I, J] float64"""
    codes = ops.quantize(x, scale, format, block=(1, bk))
    y = ops.dequantize(codes, scale, format, block=(1, bk), size=x.shape[1])
    error = (y.double() - x.double()).square() * energy
    error = error * x.double().abs() if by_magnitude(method) else error
    return error.unflatten(1, (-1, bk)).sum(2)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_least_loss_is_found(format: str, method: str) -> None:
    x, energy = weights(), torch.arange(96) % 7 / 3.0
    base = ops.compute_scale(x, format, (1, 32))
    found = ops.search_scale(x, base, format, block=(1, 32), method=method, energy=energy)
    every = torch.stack([losses(x, base * (part / 32), format, 32, method, energy) for part in parts(method)])
    got = losses(x, found, format, 32, method, energy)
    assert (got <= every.amin(0) * (1 + 1e-5)).all()
    assert (got < every[0]).any()  # and it is not always the first


def test_a_code_book_that_is_not_symmetric_takes_the_sign_of_its_largest_value() -> None:
    """Values of nf4 on its finer, positive side, and the same mirrored."""
    x = torch.tensor(NF4[8:]).repeat(4).reshape(1, 32)
    for sign in (1.0, -1.0):
        one = ops.compute_scale(sign * x, "nf4", (1, 32), method="mse")
        both = ops.compute_scale(sign * x, "nf4", (1, 32), method="signed_mse")
        assert both.item() == sign
        values = ops.dequantize(ops.quantize(sign * x, both, "nf4", block=(1, 32)), both, "nf4", block=(1, 32))
        assert torch.equal(values, sign * x)
        assert one.item() > 0


def test_a_search_with_signs_begins_with_one_without() -> None:
    """A signed search gives the scale of the one without signs, byte for byte, where the other sign is no better."""
    x = weights()
    for method in ("mse", "magnitude"):
        one = ops.compute_scale(x, "nf4", (1, 32), method=method)
        both = ops.compute_scale(x, "nf4", (1, 32), method=f"signed_{method}")
        assert torch.equal(both[both > 0], one[both > 0])
        assert 0.2 < (both < 0).float().mean() < 0.8
        symmetric = ops.compute_scale(x, "float4_e2m1fn", (1, 32), method=f"signed_{method}")
        assert torch.equal(symmetric, ops.compute_scale(x, "float4_e2m1fn", (1, 32), method=method))


def test_a_search_keeps_the_sign_that_it_is_given() -> None:
    x = weights()
    base = ops.compute_scale(x, "nf4", (1, 32))
    for kept in ("float32", "bfloat16"):
        found = ops.search_scale(-x, -base, "nf4", block=(1, 32), kept=kept)
        assert torch.equal(found, -ops.search_scale(x, base, "nf4", block=(1, 32), kept=kept))


def test_what_is_kept_is_searched() -> None:
    x = weights()
    for kept in ("bfloat16", torch.float16):
        found = ops.compute_scale(x, "int4", (1, 32), method="mse", kept=kept)
        dtype = kept if isinstance(kept, torch.dtype) else getattr(torch, kept)
        assert torch.equal(found.to(dtype).float(), found)
    assert not torch.equal(found.bfloat16().float(), found)


def test_the_unit_decides_nothing() -> None:
    x = weights()
    for unit in (2.0**-60, 2.0**60):
        for method in ("mse", "magnitude"):
            one = ops.compute_scale(x, "nf4", (1, 32), method=method)
            assert torch.equal(ops.compute_scale(x * unit, "nf4", (1, 32), method=method), one * unit)


def test_a_column_without_energy_counts_nothing() -> None:
    x, energy = weights(), torch.ones(96)
    energy[::31] = 0
    found = ops.compute_scale(x, "int4", (1, -1), method="mse", energy=energy)
    assert (found < ops.compute_scale(x, "int4", (1, -1), method="mse")).all()


def test_compute_scale_is_both_steps() -> None:
    x = weights()
    scale, zero_point = ops.compute_scale(x, "uint8", (1, 32), symmetric=False)
    want = ops.search_scale(x, scale, "uint8", block=(1, 32), method="mse", zero_point=zero_point)
    got = ops.compute_scale(x, "uint8", (1, 32), symmetric=False, method="mse")
    assert torch.equal(got[0], want)
    assert torch.equal(got[1], zero_point)
    into = torch.empty_like(scale), torch.empty_like(zero_point)
    returned = quantlib.compute_scale(x, "uint8", (1, 32), symmetric=False, method="mse", out=into)
    assert returned[0] is into[0]
    assert returned[1] is into[1]
    assert torch.equal(into[0], want)
    assert torch.equal(into[1], zero_point)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "hqq"}, "method must be minmax, mse, magnitude, signed_mse or signed_magnitude, got 'hqq'"),
        ({"kept": "bfloat16"}, "kept must be left out with method minmax, got bfloat16"),
        ({"energy": torch.ones(96)}, "energy must be left out with method minmax, got a tensor"),
        ({"method": "mse", "kept": "int8"}, "kept must be float32, float16 or bfloat16, got int8"),
        ({"method": "mse", "energy": torch.ones(95)}, "energy must be float32 [96] on cpu, got float32 [95] on cpu"),
        ({"method": "mse", "energy": -torch.ones(96)}, "energy must be finite and >= 0, got -1.0"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], said: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(said)):
        ops.compute_scale(weights(), "int4", (1, 32), **options)  # type: ignore[arg-type]
