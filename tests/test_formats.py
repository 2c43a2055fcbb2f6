"""The table of formats: what is derived of a row agrees with torch and ml_dtypes, and with the header for C++."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from quantlib import formats
from quantlib.testing import names

BOOKS = [f for f in formats.TABLE if isinstance(f, formats.FloatFormat) and f.is_book]
FLOATS = [f for f in formats.FORMATS.values() if isinstance(f, formats.FloatFormat) and not f.is_book]
INTS = [f for f in formats.FORMATS.values() if isinstance(f, formats.IntFormat)]
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("f", formats.FORMATS.values(), ids=lambda f: f.name)
def test_rows_are_what_their_names_say(f: formats.Format) -> None:
    names.check(f)


@pytest.mark.parametrize("f", FLOATS, ids=lambda f: f.name)
def test_float_rows_agree_with_ml_dtypes(f: formats.FloatFormat) -> None:
    dtype = np.dtype(f.name) if hasattr(np, f.name) else np.dtype(getattr(ml_dtypes, f.name))
    info = ml_dtypes.finfo(dtype)
    assert (info.nmant, info.nexp, info.bits) == (f.fraction_bits, f.exponent_bits, f.bits)
    assert float(info.max) == f.max
    assert float(info.smallest_subnormal) == 2.0 ** (1 - f.bias - f.fraction_bits)

    def value(code: int) -> np.generic:
        return np.array(code, f"uint{8 * dtype.itemsize}").view(dtype)[()]

    assert float(value(f.max_code)) == f.max
    assert bool(np.isinf(value(f.overflow_code))) == f.has_inf
    assert bool(np.isnan(value(f.nan_code))) == f.has_nan


@pytest.mark.parametrize("f", [f for f in FLOATS if f.whole], ids=lambda f: f.name)
def test_float_rows_agree_with_torch(f: formats.FloatFormat) -> None:
    info = torch.finfo(getattr(torch, f.name))
    assert (info.max, info.bits) == (f.max, f.bits)
    assert info.smallest_normal == 2.0 ** (1 - f.bias)


@pytest.mark.parametrize("f", INTS, ids=lambda f: f.name)
def test_integer_rows(f: formats.IntFormat) -> None:
    info = ml_dtypes.iinfo(getattr(ml_dtypes, f.name, f.name))
    assert f.range(affine=True) == (info.min, info.max)
    assert f.range(affine=False) == (-info.max if f.signed else 0, info.max)
    assert f.max == info.max


@pytest.mark.parametrize(
    ("name", "exponent"),
    [
        ("int8", 120), ("uint8", 120), ("int4", 124), ("float8_e4m3fn", 119), ("float8_e5m2", 112),
        ("float16", 112), ("bfloat16", 0), ("float4_e2m1fn", 125), ("nf4", 126),
    ],
)  # fmt: skip
def test_largest_scales_are_those_of_the_contract(name: str, exponent: int) -> None:
    assert formats.get(name).scale_max == 2.0**exponent


def test_get_takes_a_name_or_a_dtype() -> None:
    for name, f in formats.FORMATS.items():
        assert formats.get(name) is f
        if f.whole:
            assert formats.get(getattr(torch, name)) is f


@pytest.mark.parametrize("unknown", ["fp8", "", "torch.int8x", torch.float64, 8, None])
def test_get_names_what_there_is(unknown: object) -> None:
    with pytest.raises(ValueError, match=rf"format must be one of float32, .*{formats.TABLE[-1].name}, got ") as error:
        formats.get(unknown)
    assert repr(unknown) in str(error.value)


def test_header_is_current() -> None:
    assert (ROOT / "csrc/formats.h").read_text() == formats.c_header()


def test_the_table_needs_neither_torch_nor_numpy() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import formats; print({'torch', 'numpy'} & set(sys.modules))"
    folder = str(Path(formats.__file__).parent)
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
