"""The Triton kernels in Triton's interpreter: every rounding of the numerics, and tiles as small as a device's.

The table of ops, formats and blocks runs in test_bits.py; there a tile holds a whole case, here it does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fresh
import numpy as np
import pytest
import torch

from quantlib import formats, ops, reference, use_backend
from quantlib.backends import triton as backend
from quantlib.backends.weight import QuantizedWeight
from quantlib.testing import assert_same_bytes, poisoned, tensor, values

pytest.importorskip("triton")
if not backend.interpreted():
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)

FLOATS = tuple(f for f in formats.FORMATS.values() if f.is_float and f.bits >= 8)
FLAT = (
    ((3, 260), (1, 260)),
    ((8, 64), (1, 64)),
    ((2, 192), (1, 32)),
    ((6, 256), (1, 128)),
    ((6, 50), (1, 10)),
    ((9, 33), (9, 33)),
    ((5, 12), (2, 12)),
)
TILED = ((5, 70), (2, 8)), ((4, 70), (1, 32)), ((3, 45), (3, 5)), ((7, 9), (7, 1)), ((40, 33), (16, 16))
LONG = ((3, 1000), (1, 1000)), ((2, 1030), (2, 1030)), ((70, 20), (64, 16)), ((2, 3000), (1, 1500))


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("to", [f.name for f in FLOATS])
@pytest.mark.parametrize("source", [f.name for f in FLOATS])
def test_cast_where_rounding_is_decided(source: str, to: str, saturate: bool) -> None:
    x = _codes_of(source, to)
    widened = reference.decode_float(x, formats.get(source))
    want = reference.cast(widened, to, saturate=saturate)
    out = poisoned(want.shape, getattr(torch, to))
    backend.KERNELS["cast"](tensor(x, source), formats.get(source), formats.get(to), saturate, out)
    assert_same_bytes(out, want, f"cast {source} to {to}", widened)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("format", "affine"), [("nf4_bf16", False), ("int4", True), ("int8", False)])
def test_scales_of_16_bits_give_the_bytes_of_float32(format: str, affine: bool, dtype: torch.dtype) -> None:
    w = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    codes, found, *rest = ops.quantize_dynamic(w, format, block=(1, 32), symmetric=not affine)
    scale, zero_point = found.to(dtype), rest[0] if rest else None
    x = torch.randn(5, 160, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    with use_backend("triton"):
        for s in (scale, scale.float()):
            given: dict[str, Any] = {"block": (1, 32), "zero_point": zero_point}
            y = ops.dequant_matmul(x, codes, s, format, **given)
            results.append((y, ops.dequantize(codes, s, format, **given), ops.quantize(w, s, format, **given)))
    for got, want in zip(*results, strict=True):
        assert_same_bytes(got, want.contiguous(), f"{format} {dtype}")


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", [f.name for f in formats.TABLE])
def test_projection_where_rounding_is_decided(format: str, source: str) -> None:
    f = formats.get(format)
    for zero_point in (None,) if f.is_float else (None, *values.zero_points(format)):
        scale = values.scales(format)[:, None]
        units = values.neighbours(values.midpoints(format, zero_point is not None))
        with np.errstate(all="ignore"):
            x = np.concatenate(
                [units * np.where(scale == scale, scale, 1), np.broadcast_to(_edges(), (len(scale), 512))], 1
            )
            x = reference.encode_float(x, formats.get(source))
        z = None if zero_point is None else np.full(scale.shape, zero_point, np.int32)
        _same("quantize", x, source, f, (1, x.shape[1]), scale, z)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", [f.name for f in formats.TABLE])
def test_dequantize_every_code(format: str, dtype: str) -> None:
    f = formats.get(format)
    for zero_point in (None,) if f.is_float else (None, *values.zero_points(format)):
        scale = values.scales(format)[:, None]
        codes = np.tile(values.codes(format), (len(scale), 1))
        if f.packed:
            codes = reference.pack(codes, f)
        z = None if zero_point is None else np.full(scale.shape, zero_point, np.int32)
        K = codes.shape[1] * (2 if f.packed else 1)
        want = reference.dequantize(codes, scale, format, block=(1, K), zero_point=z, dtype=dtype)
        out = poisoned(want.shape, getattr(torch, dtype))
        zs = None if z is None else torch.tensor(z)
        weight = QuantizedWeight(tensor(codes, format), torch.tensor(scale), f, (1, K), zs, want.shape)
        backend.KERNELS["dequantize"](weight, out)
        assert_same_bytes(out, want, f"dequantize {format} to {dtype}, zero_point {zero_point}")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Tiles of 256 elements, so that a small x has all that a large one has on a device."""
    from quantlib.backends.triton import launch

    chosen = (launch.choose_tile, launch.choose_blocks)
    for cache in chosen:
        cache.cache_clear()
    for name, value in {"ELEMENTS": 256, "STRADDLE": 64, "HELD": 8192, "PARTS": 4}.items():
        monkeypatch.setattr(launch, name, value)
    yield launch
    for cache in chosen:
        cache.cache_clear()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("shape", "block"), [*FLAT, *TILED, *LONG], ids=str)
@pytest.mark.parametrize(
    ("source", "format", "affine"),
    [("bfloat16", "int4", True), ("float32", "float8_e4m3fn", False), ("float16", "uint8", True)],
)
def test_tiles_cover_every_element_once(
    shape: tuple[int, int], block: tuple[int, int], source: str, format: str, affine: bool
) -> None:
    f, rng = formats.get(format), np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    x[0, 0], x[-1, -1] = np.nan, -np.inf
    x = reference.encode_float(x, formats.get(source))
    _same("quantize_dynamic", x, source, f, block, None, np.zeros(1) if affine else None)
    I, J = -(-shape[0] // block[0]), -(-shape[1] // block[1])  # noqa: E741
    scale = rng.uniform(0.01, 1, (I, J)).astype(np.float32)
    z = rng.integers(*f.range(True), (I, J), np.int32) if affine else None
    codes = _same("quantize", x, source, f, block, scale, z)
    want = reference.dequantize(codes, scale, format, block=block, zero_point=z, dtype=source, size=shape[1])
    out = poisoned(shape, getattr(torch, source))
    zs = None if z is None else torch.tensor(z)
    weight = QuantizedWeight(tensor(codes, format), torch.tensor(scale), f, block, zs, shape)
    backend.KERNELS["dequantize"](weight, out)
    assert_same_bytes(out, want, f"dequantize {format} {shape} {block}")


def test_small_tiles_reach_every_way_to_tile(small_tiles: Any) -> None:
    f, packed, tiles, blocks, halved = formats.get("uint8"), formats.get("int4"), [], [], []
    for shape, block in (*FLAT, *TILED, *LONG):
        halved.append(small_tiles.choose_blocks(*small_tiles.flatten(shape, block, packed), 2, packed))
        flat = small_tiles.flatten(shape, block, f)
        tiles.append(small_tiles.choose_tile(*flat, f))
        blocks.append(small_tiles.choose_blocks(*flat, 4, f))
    assert {t.flat for t in tiles} == {t.own_rows for t in tiles} == {True, False}
    assert {min(t.runs, 3) for t in tiles} == {1, 2, 3}
    assert {min(b.chunks, 2) for b in blocks} == {0, 1, 2}
    assert {b.count > 1 and b.chunks > 1 for b in halved} == {True, False}
    assert {b.count > 1 for b in blocks} == {b.rows > 1 for b in blocks} == {b.exact for b in blocks} == {True, False}


def test_it_says_why_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.refuses(torch.device("cpu")) is None
    assert "cpu tensors only" in str(backend.refuses(torch.device("cuda")))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert backend.refuses(torch.device("cpu")) == "needs a CUDA device, or TRITON_INTERPRET=1 for the CPU"
    monkeypatch.setattr(backend, "installed", lambda: False)
    assert backend.refuses(torch.device("cuda")) == "the package triton is not installed"


def test_importing_quantlib_imports_no_triton() -> None:
    code = "import sys, quantlib, quantlib.backends.triton; sys.exit('triton.language' in sys.modules)"
    assert fresh.run(["-c", code]).returncode == 0


def test_a_choice_is_shown_on_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from quantlib.backends.triton import launch

    monkeypatch.setenv("QUANTLIB_SHOW_LAUNCH", "1")
    launch.choose_tile.cache_clear()
    launch.choose_tile((1, 4096), (1, 4096), formats.get("int8"))
    assert capsys.readouterr().err.startswith("Tile(rows=1, cols=")


def _codes_of(source: str, to: str) -> Any:
    """Codes of ``source``: all of a narrow format, for FP32 where a cast to ``to`` is decided."""
    if formats.get(source).bits <= 16:
        return values.codes(source)
    decided = values.midpoints(to) if formats.get(to).bits < 32 else np.zeros(0, np.float32)
    return np.concatenate([values.edges(), values.neighbours(decided), -values.neighbours(decided)]).view(np.uint32)


def _edges() -> Any:
    return np.resize(values.edges()[:: max(1, len(values.edges()) // 512)], 512)


def _same(op: str, x: Any, source: str, f: Any, block: Any, scale: Any, z: Any) -> Any:
    """Run quantize, or quantize_dynamic and compute_scale where there is no scale; the codes of the reference."""
    M, K = x.shape
    widened = reference.decode_float(x, formats.get(source))
    given, where = tensor(x, source), f"{op} {source} to {f.name} {x.shape} {block}"
    affine = z is not None
    found = SimpleNamespace(scale=None, zero_point=None)
    if scale is None:
        made = reference.compute_scale(widened, f.name, block, symmetric=not affine)
        scale, z = made if affine else (made, None)
        for launcher in ("compute_scale", "quantize_dynamic"):
            found.scale = poisoned(scale.shape, torch.float32)
            found.zero_point = poisoned(scale.shape, torch.int32) if affine else None
            if launcher == "compute_scale":
                backend.KERNELS[launcher](given, f, block, found.scale, found.zero_point)
            else:
                codes = poisoned((M, (K + 1) // 2 if f.packed else K), getattr(torch, f.dtype_name))
                backend.KERNELS[launcher](given, f, block, codes, found.scale, found.zero_point)
            assert_same_bytes(found.scale, scale, f"{launcher} scale {where}")
            if affine:
                assert_same_bytes(found.zero_point, z, f"{launcher} zero_point {where}")
    else:
        codes = poisoned((M, (K + 1) // 2 if f.packed else K), getattr(torch, f.dtype_name))
        zs = torch.tensor(z) if affine else None
        backend.KERNELS["quantize"](given, torch.tensor(scale), f, block, zs, codes)
    want = reference.quantize(widened, scale, f.name, block=block, zero_point=z)
    assert_same_bytes(codes, want, where, widened if not f.packed else None)
    return want
