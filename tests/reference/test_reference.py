"""The reference against what shares no code with it: ml_dtypes, exact arithmetic, torch, torchao, and by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import formats, reference
from quantlib.reference import numerics
from quantlib.testing import assert_same_bytes, values

FLOATS = [f for f in formats.WITHOUT_BOOKS if f.is_float]
INTS = [f for f in formats.TABLE if not f.is_float]
ORDINARY = [np.float32(s) for s in (1, 0.1, 2.0**-7, math.pi / 127, 2.0**-100)]  # C12


def name(f: formats.Format) -> str:
    return f.name


def foreign(f: formats.Format) -> np.dtype:
    return np.dtype(np.float16 if f.name == "float16" else getattr(ml_dtypes, f.name))


# ---- values to codes and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", FLOATS, ids=name)
def test_every_code_decodes_as_in_ml_dtypes(f: formats.FloatFormat) -> None:
    codes = values.codes(f.name)
    got = reference.decode_float(codes, f)
    want = codes.view(foreign(f)).astype(np.float32)
    assert_same_bytes(got, numerics.canonical(want), f.name, codes)


@pytest.mark.parametrize("f", FLOATS, ids=name)
def test_finite_values_encode_as_in_ml_dtypes(f: formats.FloatFormat) -> None:
    x = np.concatenate([values.edges(), values.neighbours(values.midpoints(f.name))])
    x = x[np.isfinite(x)]
    if not f.has_inf and f.has_nan:  # ml_dtypes has its own idea of what is beyond E4M3
        x = x[np.abs(x) < f.max]
    with np.errstate(all="ignore"):
        want = x.astype(foreign(f)).view(f.storage)
    assert_same_bytes(reference.cast(x, f.name, saturate=not f.has_nan), want, f.name, x)


@pytest.mark.parametrize("f", FLOATS, ids=name)
def test_casting_a_value_of_the_format_gives_its_code(f: formats.FloatFormat) -> None:
    codes = values.codes(f.name)
    x = reference.decode_float(codes, f)
    for saturate in (False, True):
        again = reference.encode_float(x, f, saturate)
        kept = np.isfinite(x) if saturate else ~np.isnan(x)
        assert_same_bytes(again[kept], codes[kept], f.name, x[kept])
        assert (again[np.isnan(x)] == f.nan_code).all()


@pytest.mark.parametrize(
    ("value", "format", "bits", "stored"),
    [
        (3.141592, "float32", 0x40490FD8, 3.14159202575683593750),
        (math.pi, "float32", 0x40490FDB, 3.1415927410125732),
        (3.141592, "float16", 0x4248, 3.140625),
        (math.pi, "float16", 0x4248, 3.140625),
        (3.141592, "bfloat16", 0x4049, 3.140625),
        (math.pi, "bfloat16", 0x4049, 3.140625),
        (math.pi, "float8_e4m3fn", 0x45, 3.25),
        (math.pi, "float8_e5m2", 0x42, 3.0),
        (math.pi, "float4_e2m1fn", 0x05, 3.0),
    ],
)
def test_the_examples_everybody_tries_first(value: float, format: str, bits: int, stored: float) -> None:
    f = formats.get(format)
    code = reference.encode_float(np.float32(value), f)
    assert int(code) == bits
    assert float(reference.decode_float(code, f)) == stored


def test_pi_as_int8() -> None:
    one = np.ones((1, 1), np.float32)
    codes = reference.quantize(np.full((1, 1), 3.141592, np.float32), one, "int8", block=(1, 1))
    assert codes.tolist() == [[3]]
    assert reference.dequantize(codes, one, "int8", block=(1, 1)).view(np.float32).tolist() == [[3.0]]


@pytest.mark.parametrize(
    ("format", "x", "plain", "saturated"),
    [  # C1, C3: NaN with either sign and payload, what is just too large, infinity
        ("float16", 0xFFC00001, 0x7FFF, 0x7FFF),
        ("float16", 0x477FEFFF, 0x7BFF, 0x7BFF),
        ("float16", 0x477FF000, 0x7C00, 0x7BFF),
        ("float16", 0xFF800000, 0xFC00, 0xFBFF),
        ("bfloat16", 0x7F800001, 0x7FFF, 0x7FFF),
        ("bfloat16", 0x7F7F7FFF, 0x7F7F, 0x7F7F),
        ("bfloat16", 0x7F7F8000, 0x7F80, 0x7F7F),
        ("float8_e4m3fn", 0xFF800001, 0x7F, 0x7F),
        ("float8_e4m3fn", 0x43E80000, 0x7E, 0x7E),
        ("float8_e4m3fn", 0x43E80001, 0x7F, 0x7E),
        ("float8_e4m3fn", 0xC3E80001, 0xFF, 0xFE),
        ("float8_e4m3fn", 0xFF800000, 0xFF, 0xFE),
        ("float8_e5m2", 0x7FFFFFFF, 0x7F, 0x7F),
        ("float8_e5m2", 0x47700000, 0x7C, 0x7B),
        ("float8_e5m2", 0xFF800000, 0xFC, 0xFB),
        ("float4_e2m1fn", 0x7FC00000, 0x07, 0x07),
        ("float4_e2m1fn", 0xFF800000, 0x0F, 0x0F),
        ("float16", 0x80000001, 0x8000, 0x8000),  # C2: underflow keeps the sign
        ("float8_e4m3fn", 0x80000000, 0x80, 0x80),
    ],
)  # fmt: skip
def test_what_is_special(format: str, x: int, plain: int, saturated: int) -> None:
    bits = np.array(x, np.uint32).view(np.float32)
    f = formats.get(format)
    assert int(reference.cast(bits, format, saturate=False)) == plain
    assert int(reference.cast(bits, format, saturate=True)) == saturated
    assert int(reference.cast(bits, format)) == (saturated if f.bits <= 8 else plain)


def test_a_cast_rounds_once() -> None:
    x = np.float32(1 + 2**-4 + 2**-20)  # past the midpoint of two E4M3 codes, by less than FP16 can tell
    through = reference.decode_float(reference.cast(x, "float16"), formats.get("float16"))
    assert int(reference.cast(x, "float8_e4m3fn")) == int(reference.cast(through, "float8_e4m3fn")) + 1


# ---- scales ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("f", formats.TABLE, ids=name)
def test_special_blocks(f: formats.Format) -> None:
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    x = np.array([[0, -0.0], [inf, 1], [-inf, inf], [nan, 1], [nan, inf], [1e-45, 0]], np.float32)
    codes, scale = reference.quantize_dynamic(x, f.name, block=(1, 2))
    least = 2.0**-100
    assert scale[:, 0].tolist()[:3] == [least, f.scale_max, f.scale_max]
    assert np.isnan(scale[3:5, 0]).all()
    assert scale[5, 0] == least
    y = reference.dequantize(codes, scale, f.name, block=(1, 2), size=2).view(np.float32)
    assert (np.isnan(y) == np.isnan(scale)).all()
    assert y[0].tolist() == [0, 0]
    if not f.is_float:
        assert not np.signbit(y[0]).any()  # integers have one zero


@pytest.mark.parametrize("f", INTS, ids=name)
def test_special_affine_blocks(f: formats.IntFormat) -> None:
    inf, nan = np.float32(np.inf), np.float32(np.nan)
    qmin, qmax = f.range(affine=True)
    x = np.array([[0, -0.0], [5, 5], [-5, -5], [inf, 0], [-inf, 0], [nan, 3], [-3e38, 3e38]], np.float32)
    codes, scale, z = reference.quantize_dynamic(x, f.name, block=(1, 2), symmetric=False)
    assert z[:3, 0].tolist() == [qmin, qmin, qmax]  # zero is always in the range
    assert scale[[3, 4, 6], 0].tolist() == [f.scale_max] * 3
    assert z[5, 0] == 0
    assert np.isnan(scale[5, 0])
    y = reference.dequantize(codes, scale, f.name, block=(1, 2), zero_point=z, size=2).view(np.float32)
    assert y[0].tolist() == [0, 0]
    assert np.abs(y[1:3] / x[1:3] - 1).max() < 1e-6
    assert np.isnan(y[5]).all()


@pytest.mark.parametrize("f", formats.TABLE, ids=name)
def test_effective_scale_is_clamped(f: formats.Format) -> None:
    s = values.scales(f.name)
    got = numerics.effective_scale(s, f)
    assert np.isnan(got[np.isnan(s)]).all()
    magnitude = np.abs(got)
    assert ((magnitude >= 2.0**-100) & (magnitude <= f.scale_max) | np.isnan(s)).all()
    inside = (np.abs(s) >= 2.0**-100) & (np.abs(s) <= f.scale_max)
    assert_same_bytes(got[inside], s[inside])
    assert (np.signbit(got) == (s < 0))[~np.isnan(s)].all()
    assert (magnitude[np.abs(s) < 2.0**-100] == 2.0**-100).all()


# ---- projections in exact arithmetic --------------------------------------------------------------------------------


def samples(format: str, scale: np.float32, affine: bool) -> np.ndarray:
    """Finite x around the midpoints between codes."""
    x = values.neighbours((values.midpoints(format, affine) * scale).astype(np.float32))
    return np.concatenate([x, -x, x * 3, np.random.default_rng(0).standard_normal(500).astype(np.float32) * scale * 99])


@pytest.mark.parametrize("scale", [*ORDINARY, np.float32(2.0**120)], ids=str)
@pytest.mark.parametrize("f", INTS, ids=name)
def test_integer_codes_in_exact_arithmetic(f: formats.IntFormat, scale: np.float32) -> None:
    scale = min(scale, np.float32(f.scale_max))
    for z in (None, *values.zero_points(f.name)):
        qmin, qmax = f.range(affine=z is not None)
        with np.errstate(all="ignore"):
            x = samples(f.name, scale, z is not None)
        x = x[np.isfinite(x)]
        r = np.float32(1 / np.float64(scale))
        t = (x.astype(np.float64) * np.float64(r)).astype(np.float32)  # the product is exact in float64
        want = [min(max(round(float(v)) + (z or 0), qmin), qmax) for v in t]  # Python rounds ties to even
        points = None if z is None else np.full((1, 1), z, np.int32)
        shape = (1, len(x))
        scales = np.full((1, 1), scale, np.float32)
        codes = reference.quantize(x.reshape(shape), scales, f.name, block=shape, zero_point=points)
        assert (reference.unpack(codes, f, len(x)) if f.packed else codes).ravel().tolist() == want
        y = reference.dequantize(codes, scales, f.name, block=shape, zero_point=points, size=len(x)).view(np.float32)
        exact = (np.array(want, np.float64) - (z or 0)) * np.float64(scale)
        assert_same_bytes(y.ravel(), (exact + 0.0).astype(np.float32))


@pytest.mark.parametrize("f", INTS, ids=name)
def test_fake_quantize_of_torch_is_the_same(f: formats.IntFormat) -> None:
    """C5: quantize and dequantize are torch.fake_quantize_* for finite x."""
    for scale in ORDINARY:
        for z in values.zero_points(f.name):
            x = samples(f.name, scale, True)
            scales, points = np.full((1, 1), scale, np.float32), np.full((1, 1), z, np.int32)
            args = {"block": (1, len(x)), "zero_point": points}
            codes = reference.quantize(x[None], scales, f.name, **args)
            y = reference.dequantize(codes, scales, f.name, **args, size=len(x)).view(np.float32)
            qmin, qmax = f.range(affine=True)
            want = torch.fake_quantize_per_tensor_affine(torch.from_numpy(x[None]), float(scale), z, qmin, qmax)
            assert_same_bytes(y, want + 0.0, f"{f.name} {scale} {z}", x[None])
            rows, per_row = np.stack([x, x]), np.array([scale, 2 * scale], np.float32)
            args = {"block": (1, len(x)), "zero_point": np.array([[z], [0]], np.int32)}
            codes = reference.quantize(rows, per_row[:, None], f.name, **args)
            y = reference.dequantize(codes, per_row[:, None], f.name, **args, size=len(x)).view(np.float32)
            want = torch.fake_quantize_per_channel_affine(
                torch.from_numpy(rows), torch.from_numpy(per_row), torch.tensor([z, 0]).int(), 0, qmin, qmax
            )
            assert_same_bytes(y, want + 0.0, f"{f.name} {scale} {z}", rows)


@pytest.mark.parametrize("f", INTS, ids=name)
def test_quantize_affine_of_torchao_is_the_same(f: formats.IntFormat) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    dtype = torch.int8 if f.signed else torch.uint8
    for scale in ORDINARY:
        for z in values.zero_points(f.name):
            x = samples(f.name, scale, True)[None]
            scales, points = np.full((1, 1), scale, np.float32), np.full((1, 1), z, np.int32)
            codes = reference.quantize(x, scales, f.name, block=x.shape, zero_point=points)
            want = primitives.quantize_affine(
                torch.from_numpy(x), x.shape, torch.from_numpy(scales), torch.from_numpy(points), dtype,
                *f.range(affine=True),
            )  # fmt: skip
            got = reference.unpack(codes, f, x.shape[1]) if f.packed else codes
            assert_same_bytes(got, want, f"{f.name} {scale} {z}", x)


# ---- properties -----------------------------------------------------------------------------------------------------

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
anything = st.integers(0, 2**32 - 1).map(lambda u: np.array(u, np.uint32).view(np.float32)[()])


@given(st.sampled_from(FLOATS), anything, anything)
def test_casting_is_monotone(f: formats.FloatFormat, a: np.float32, b: np.float32) -> None:
    x = np.array([a, b])
    y = reference.decode_float(reference.cast(x, f.name, saturate=True), f)
    if not np.isnan(x).any() and a <= b:
        assert y[0] <= y[1]


@given(st.sampled_from(FLOATS), finite)
def test_casting_finds_the_nearest(f: formats.FloatFormat, x: float) -> None:
    got = float(reference.decode_float(reference.cast(np.float32(x), f.name, saturate=True), f))
    every = reference.decode_float(values.codes(f.name), f).astype(np.float64)
    assert abs(got - x) == np.abs(every[np.isfinite(every)] - x).min()


@given(st.sampled_from(FLOATS), anything)
def test_negation_flips_the_sign_bit(f: formats.FloatFormat, x: np.float32) -> None:
    if not np.isnan(x):
        code, negated = (int(reference.cast(v, f.name)) for v in (x, -x))
        one_zero = not f.has_negative_zero and code == 0
        assert negated == (code if one_zero else code ^ f.sign_bit)


@settings(deadline=None)
@given(st.sampled_from(INTS), st.lists(finite, min_size=1, max_size=40), st.booleans())
def test_a_dynamic_scale_covers_its_block_and_errs_by_half_a_step(
    f: formats.IntFormat, numbers: list[float], symmetric: bool
) -> None:
    x = np.array([numbers], np.float32)
    if not f.signed and symmetric:
        x = np.abs(x)
    block = x.shape
    codes, scale, *z = reference.quantize_dynamic(x, f.name, block=block, symmetric=symmetric)
    s = float(scale[0, 0])
    if s in (2.0**-100, f.scale_max):
        return
    more = {"zero_point": z[0]} if z else {}
    y = reference.dequantize(codes, scale, f.name, block=block, size=x.shape[1], **more).view(np.float32)
    steps = (1 if symmetric else 2) * 0.5  # a zero point is rounded too
    slack = float(np.abs(x).max()) * 2.0**-20
    assert (np.abs(x.astype(np.float64) - y) <= s * steps + slack).all()
    if symmetric:
        largest = np.abs((reference.unpack(codes, f, x.shape[1]) if f.packed else codes).astype(int)).max()
        assert largest == f.max


@pytest.mark.parametrize("f", formats.TABLE, ids=name)
def test_projecting_twice_changes_nothing(f: formats.Format) -> None:
    """quantize(dequantize(code)) == code for every code, wherever the products are exact."""
    codes = values.codes(f.name)
    if f.is_float:
        codes = codes[np.isfinite(reference.decode_float(codes, f))]
        points = [None]
    else:
        points = [None, *values.zero_points(f.name)]
        codes = codes[codes >= f.range(affine=False)[0]] if f.signed else codes
    one_row = (reference.pack(codes, f) if f.packed else codes)[None]
    for s in (np.float32(1), np.float32(2.0**-7)):
        scale = np.full((1, 1), s, np.float32)
        for z in points:
            more = {"block": (1, len(codes)), "zero_point": None if z is None else np.full((1, 1), z, np.int32)}
            y = reference.dequantize(one_row, scale, f.name, size=len(codes), **more).view(np.float32)
            assert_same_bytes(reference.quantize(y, scale, f.name, **more), one_row, f"{f.name} {s} {z}")


def test_the_reference_needs_no_torch() -> None:
    package = Path(reference.__file__).parent.parent
    code = (
        "import sys, types, importlib\n"
        "package = types.ModuleType('quantlib'); package.__path__ = [sys.argv[1]]; sys.modules['quantlib'] = package\n"
        "importlib.import_module('quantlib.reference'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
