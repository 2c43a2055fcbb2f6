"""The product with a dequantized weight: bytes where every sum is exact, the bound of C11 elsewhere, and gradients."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import fresh
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Served, forced, needs_level, serving
from torch import Tensor

import quantlib
from quantlib import _build, backends, formats, ops, reference
from quantlib.backends.choice import instruction_set
from quantlib.reference.matmul import bound
from quantlib.reference.numerics import Array, decode_float
from quantlib.testing import assert_same_bytes, bits

BLOCKS = [(1, -1), (-1, -1), (1, 32), (4, 16), (3, 7), (1, 1)]
SPECS = [(f.name, affine) for f in formats.TABLE for affine in (False, True) if not (affine and f.is_float)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Weight = tuple[Tensor, Tensor, Tensor | None]


@pytest.fixture(params=serving("dequant_matmul"), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that multiplies in turn, forced, on a device it serves."""
    yield from forced(request.param)


def quantized(N: int, K: int, format: str, block: tuple[int, int], affine: bool, exact: bool = False) -> Weight:
    """A weight; with ``exact`` its codes are small integers and its scales powers of two."""
    generator = torch.Generator().manual_seed(N * K)
    w = torch.randn(N, K, generator=generator)
    with backends.use_backend("composite"):
        codes, scale, *zero_point = quantlib.quantize_dynamic(w, format, block=block, symmetric=not affine)
        if not exact:
            return codes, scale, zero_point[0] if affine else None
        integers = torch.randint(-3, 4, (N, K), generator=generator).float()
        scale = torch.exp2(torch.randint(-3, 4, scale.shape, generator=generator))
        z = torch.randint(0, 4, scale.shape, generator=generator, dtype=torch.int32) if affine else None
        return (
            quantlib.quantize(spread(scale, (N, K), block) * integers, scale, format, block=block, zero_point=z),
            scale,
            z,
        )


def spread(scale: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    br, bk = (size if b == -1 else b for size, b in zip(shape, block, strict=True))
    return scale.repeat_interleave(br, 0)[: shape[0]].repeat_interleave(bk, 1)[:, : shape[1]]


def as_array(codes: Tensor, format: str) -> Array:
    return bits(codes).view(formats.get(format).storage)


def resolved(block: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    br, bk = (max(size, 1) if b == -1 else b for b, size in zip(block, shape, strict=True))
    return br, bk


def expected(
    x: Tensor, weight: Weight, format: str, block: tuple[int, int], bias: Tensor | None, act: str | None
) -> Array:
    codes, scale, z = weight
    return reference.dequant_matmul(
        x.float().numpy(),
        as_array(codes, format),
        scale.numpy(),
        format,
        block=resolved(block, (len(codes), x.shape[-1])),
        zero_point=None if z is None else z.numpy(),
        bias=None if bias is None else bias.float().numpy(),
        activation=act,
        dtype=str(x.dtype).removeprefix("torch."),
    )


def small_integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(3)).float()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("format", "affine"), SPECS, ids=str)
def test_exact_sums_have_the_bytes_of_the_reference(
    backend: Served, format: str, affine: bool, block: tuple[int, int]
) -> None:
    shapes = [(1, 64, 128), (3, 5, 7), (7, 33, 70)] if not backend.interpreted else [(3, 18, 70)]
    for (M, N, K), dtype, act in zip(shapes, DTYPES, (None, "relu", "silu"), strict=False):
        weight = quantized(N, K, format, block, affine, exact=True)
        x, bias = small_integers(M, K).to(dtype), small_integers(N)
        want = expected(x, weight, format, block, bias, act)
        codes, scale, z = weight
        given = {"block": block, "zero_point": z, "bias": bias, "activation": act}
        assert_same_bytes(quantlib.dequant_matmul(x, codes, scale, format, **given), want, str(dtype))
        given["batch_invariant"] = True
        assert_same_bytes(quantlib.dequant_matmul(x, codes, scale, format, **given), want, "batch invariant")


LARGE = [
    ((1, -1), "int8", False),
    ((3, 7), "int8", False),  # no step of a kernel ends where a block does
    ((1, 128), "int4", False),
    ((1, 64), "uint8", True),
    ((1, 32), "nf4_bf16", False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("block", "format", "affine"), LARGE, ids=str)
def test_several_blocks_of_every_axis(
    backend: Served, block: tuple[int, int], format: str, affine: bool, dtype: torch.dtype
) -> None:
    """Few rows of x and many: exact sums, and rows beside one of values that BF16 pairs cannot multiply."""
    if backend.interpreted:
        pytest.skip("the interpreter takes minutes")
    N, K = 70, 1100
    codes, scale, z = quantized(N, K, format, block, affine, exact=format != "nf4_bf16")
    w = values(codes, scale, z, format, block, K)
    x = small_integers(600, K).to(dtype)
    for M in (1, 2, 3, 6, 9, 16, 17, 33, 48, 600) if backend.device == "cpu" else (3, 33):
        some = x[:M].clone()
        some[M // 2, 5] = torch.finfo(dtype).max
        some[M // 3, 7] = torch.finfo(dtype).smallest_normal / 2
        y = quantlib.dequant_matmul(some, codes, scale, format, block=block, zero_point=z)
        ordinary = [m for m in range(M) if m not in (M // 2, M // 3)]
        if format == "nf4_bf16":
            within(y[ordinary], some[ordinary], w)
        else:
            want = expected(some[ordinary], (codes, scale, z), format, block, None, None)
            assert_same_bytes(y[ordinary], want, f"{M} rows")
        within(y[[M // 3]], some[[M // 3]], w)
        assert_same_bytes(quantlib.dequant_matmul(some, codes, scale, format, block=block, zero_point=z), y, "again")


@pytest.mark.slow
@pytest.mark.parametrize("level", _build.LEVELS)
def test_every_instruction_set(level: str) -> None:
    needs_level(level)
    if level == instruction_set():
        pytest.skip(f"{level}: is what this process runs in every other test")
    chosen = "cpp and (blocks or exact or bound or special or batches)"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    done = fresh.run(command, env={**os.environ, "QUANTLIB_ISA": level})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", [(1, -1), (1, 32), (1, 5), (-1, -1), (16, 16)], ids=str)
@pytest.mark.parametrize(("format", "affine"), SPECS, ids=str)
def test_any_sum_is_within_the_bound(
    backend: Served, format: str, affine: bool, block: tuple[int, int], dtype: torch.dtype
) -> None:
    for M, N, K in [(1, 16, 96)] if backend.interpreted else [(1, 40, 300), (5, 33, 97), (66, 20, 64)]:
        codes, scale, z = quantized(N, K, format, block, affine)
        x = (torch.randn(M, K) * torch.exp2(torch.randint(-20, 20, (M, 1)))).to(dtype)
        x = x.clamp(-60000, 60000)
        y = quantlib.dequant_matmul(x, codes, scale, format, block=block, zero_point=z)
        # tensor cores may take group scales into operands of x's type (C11)
        operands = backend.device == "cuda" and M >= 64 and dtype != torch.float32 and scale.shape[1] > 1
        within(y, x, values(codes, scale, z, format, block, K), operands)


def values(codes: Tensor, scale: Tensor, z: Tensor | None, format: str, block: tuple[int, int], K: int) -> Array:
    """[N, K] float32: what the codes stand for."""
    z_array = None if z is None else z.numpy()
    block = resolved(block, (len(codes), K))
    q = as_array(codes, format)
    return reference.dequantize(q, scale.numpy(), format, block=block, zero_point=z_array, size=K).view(np.float32)


def within(y: Tensor, x: Tensor, w: Array, operands: bool = False) -> None:
    """C11: 2 K 2^-23 sum |x| |w|, and half a unit in the last place of y's dtype. The canary is tighter.

    With ``operands`` each w may have been rounded to x's type.
    """
    rows = x.float().numpy().reshape(-1, x.shape[-1])
    exact = rows.astype(np.float64) @ w.astype(np.float64).T
    allowed = bound(rows, w)
    info = torch.finfo(y.dtype)
    half = np.maximum(np.abs(exact) + allowed, info.smallest_normal) * info.eps / 2
    if operands:
        half += np.abs(rows.astype(np.float64)) @ np.abs(w.astype(np.float64)).T * info.eps / 2
    got = y.double().numpy().reshape(exact.shape)
    overflow = np.abs(exact) + allowed + half > info.max
    error = np.where(overflow, 0, np.abs(got - exact))
    assert (error <= allowed + half).all(), f"off by {np.max(error / (allowed + half))} bounds"
    K = x.shape[-1]
    assert (error <= allowed * max(0.25, 4 / np.sqrt(K)) + half).all(), "within the bound, far from what is usual"


@pytest.mark.parametrize("format", ["int8", "int4", "float8_e4m3fn"])
def test_special_rows(backend: Served, format: str) -> None:
    """Infinities, NaN, the smallest and the largest numbers of a row of x stay in that row."""
    K, N = 64, 24
    codes, scale, _ = quantized(N, K, format, (1, -1), False)
    w = values(codes, scale, None, format, (1, -1), K)
    for dtype in DTYPES:
        x = torch.randn(7, K).to(dtype)
        tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
        x[0] = x[0] * tiny  # subnormal
        x[1, 3], x[2, 5], x[3] = torch.inf, torch.nan, huge / 2**20
        x[4, 7] = -torch.inf
        x[4, 8] = torch.inf
        y = quantlib.dequant_matmul(x, codes, scale, format, block=(1, -1))
        with np.errstate(all="ignore"):
            exact = x.double().numpy() @ w.astype(np.float64).T
        for row in (1, 2, 4):
            assert np.array_equal(np.isnan(exact[row]), y[row].isnan().numpy()), (dtype, row)
            infinite = np.isinf(exact[row])
            assert np.array_equal(exact[row][infinite], y[row].double().numpy()[infinite]), (dtype, row)
        within(y[[0, 3, 5, 6]], x[[0, 3, 5, 6]], w)
        nan = y[2].view(torch.int32 if dtype == torch.float32 else torch.int16)
        assert (nan == (0x7FFFFFFF if dtype == torch.float32 else 0x7FFF)).all(), "another NaN than that of C1"


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(
    ("format", "block"), [("int8", (1, -1)), ("int4", (1, 32)), ("nf4", (1, -1)), ("float16", (1, -1))], ids=str
)
def test_a_row_alone_and_in_batches(backend: Served, format: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    interpreted = backend.interpreted  # there NumPy's BLAS sums, in an order of its own: only exact sums say anything
    N, K = (16, 64) if interpreted else (40, 1100)
    codes, scale, _ = quantized(N, K, format, block, False, exact=interpreted)
    x = small_integers(33, K).to(dtype) if interpreted else torch.randn(1000, K).to(dtype)
    call = {"block": block, "batch_invariant": True}
    alone = quantlib.dequant_matmul(x[:1], codes, scale, format, **call)
    for M in (2, 17, 33) if interpreted else (2, 17, 64, 1000):
        y = quantlib.dequant_matmul(x[:M], codes, scale, format, **call)
        assert_same_bytes(y[:1], alone, f"first of {M}")
        last = quantlib.dequant_matmul(x[M - 1 : M], codes, scale, format, **call)
        assert_same_bytes(y[M - 1 : M], last, f"last of {M}")
        assert_same_bytes(quantlib.dequant_matmul(x[:M], codes, scale, format, **call), y, "a second run")


def test_empty_sizes(backend: Served) -> None:
    """No rows, no outputs, and a sum of nothing: the bias."""
    bias = torch.tensor([1.0, -2.0, 3.0])
    for M, N, K in itertools.product((0, 2), (0, 3), (0, 4)):
        codes, scale = torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1 if K else 0)
        y = quantlib.dequant_matmul(torch.ones(M, K), codes, scale, "int8", block=(1, max(K, 1)), bias=bias[:N])
        assert_same_bytes(y, bias[:N].expand(M, N).contiguous(), f"{M} {N} {K}")


def test_leading_axes_strides_and_out(backend: Served) -> None:
    codes, scale, _ = quantized(12, 32, "int8", (1, -1), False)
    x = torch.randn(2, 3, 64)[..., ::2]
    y = quantlib.dequant_matmul(x, codes, scale, "int8", block=(1, -1))
    assert y.shape == (2, 3, 12)
    flat = quantlib.dequant_matmul(x.reshape(6, 32), codes, scale, "int8", block=(1, -1))
    assert_same_bytes(y.view(6, 12), flat)
    out = torch.empty(2, 3, 24)[..., ::2]
    assert quantlib.dequant_matmul(x, codes, scale, "int8", block=(1, -1), out=out) is out
    assert_same_bytes(out.contiguous(), y)


@pytest.mark.parametrize("format", [f.name for f in formats.TABLE if f.bits <= 8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 129), (35, 250)], ids=str)
def test_tiles_are_the_same_codes_in_another_order(format: str, shape: tuple[int, int]) -> None:
    N, K = shape
    codes, scale, _ = quantized(N, K, format, (1, -1), False, exact=True)
    tiles = ops.tile(codes, format, size=K if formats.get(format).packed else None)
    assert tiles.shape[-1] == 1024
    assert_same_bytes(ops.untile(tiles, format, shape), codes)
    x = small_integers(3, K)
    want = quantlib.dequant_matmul(x, codes, scale, format, block=(1, -1))
    for words in ({"layout": "tiles", "rows": N}, {"size": N}):
        assert_same_bytes(quantlib.dequant_matmul(x, tiles, scale, format, block=(1, -1), **words), want)


def test_lane_holds_its_fragment() -> None:
    """Byte 32 * (4 g + t) + ... of a tile: row 8 r + g, column 32 s + 16 h + 4 t + e, as mma.sync.m16n8k16 wants."""
    codes = torch.arange(16 * 64).view(16, 64).remainder(251).to(torch.int8)
    lanes = ops.tile(codes, "int8").view(8, 4, 2, 2, 2, 4).view(torch.int8)
    for g, t, r, s, h, e in [(0, 0, 0, 0, 0, 0), (5, 3, 1, 0, 1, 2), (7, 1, 0, 1, 1, 3)]:
        assert lanes[g, t, r, s, h, e] == codes[8 * r + g, 32 * s + 16 * h + 4 * t + e]


@pytest.mark.parametrize("activation", [None, *reference.activation.ACTIVATIONS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [(1, -1), (1, 16), (3, 5)], ids=str)
@pytest.mark.parametrize("backend", serving("dequant_matmul_backward_scale"), ids=str, indirect=True)
def test_gradients(backend: Served, block: tuple[int, int], dtype: torch.dtype, activation: str | None) -> None:
    """Gradients of x, scale and bias are those of F.linear with the dequantized weight."""
    N, K = 12, 35
    codes, scale, _ = quantized(N, K, "int8", block, False)
    leaves = [torch.randn(2, 3, K).to(dtype), scale, torch.randn(N).to(dtype)]
    function = {
        None: lambda u: u,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda u: F.gelu(u, approximate="tanh"),
        "silu": F.silu,
    }[activation]

    def gradients(multiply: object) -> tuple[Tensor, ...]:
        x, s, b = (v.clone().requires_grad_() for v in leaves)
        y = multiply(x, s, b)  # type: ignore[operator]
        return torch.autograd.grad((y.float() * torch.linspace(-1, 1, N)).sum(), (x, s, b))

    got = gradients(
        lambda x, s, b: quantlib.dequant_matmul(x, codes, s, "int8", block=block, bias=b, activation=activation)
    )
    leaves = [leaf.float() for leaf in leaves]
    want = gradients(lambda x, s, b: function(F.linear(x, codes.float() * spread(s, (N, K), block), b)))
    step = 2.0**-20 if dtype == torch.float32 else 2.0**-6
    for name, a, b in zip(("x", "scale", "bias"), got, want, strict=True):
        assert (a - b).abs().max() <= step * b.abs().max(), name


def test_a_transposed_product_is_within_the_bound(backend: Served) -> None:
    for (format, affine), block in itertools.product((("int8", True), ("int4", False), ("float8_e5m2", False)), BLOCKS):
        N, K = 20, 37
        codes, scale, z = quantized(N, K, format, block, affine)
        w = values(codes, scale, z, format, block, K)
        for dtype in DTYPES:
            dy = torch.randn(5, N).to(dtype)
            whole = resolved(block, (N, K))
            dx = torch.ops.quantlib.dequant_matmul_backward(dy, codes, scale, format, whole, z, K)
            exact, allowed = dy.double().numpy() @ w.astype(np.float64), bound(dy.float().numpy(), w.T)
            info = torch.finfo(dtype)
            half = np.maximum(np.abs(exact) + allowed, info.smallest_normal) * info.eps / 2
            assert (np.abs(dx.double().numpy() - exact) <= allowed + half).all(), (format, block, dtype)


def test_what_has_no_gradient_raises() -> None:
    codes, scale, _ = quantized(8, 16, "bfloat16", (1, -1), False)
    x = torch.randn(2, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="codes must not require a gradient"):
        quantlib.dequant_matmul(x, codes.requires_grad_(), scale, "bfloat16", block=(1, -1))


@pytest.mark.parametrize("activation", reference.activation.ACTIVATIONS)
def test_activations_are_what_they_are_called(activation: str) -> None:
    """Within 3 units of |x| * 2^-24 of float64, at every exponent; NaN stays, -inf gives the limit."""
    x = np.concatenate([np.linspace(-110, 110, 20001), np.exp2(np.arange(-149, 128)), -np.exp2(np.arange(-149, 128))])
    x = x.astype(np.float32)
    y = reference.activate(x, activation)
    u = torch.from_numpy(x).double()
    exact = {
        "relu": lambda: F.relu(u),
        "gelu": lambda: u * 0.5 * torch.special.erfc(-u / 2**0.5),
        "gelu_tanh": lambda: F.gelu(u, approximate="tanh"),
        "silu": lambda: F.silu(u),
    }[activation]()
    assert (np.abs(y - exact.numpy()) <= 3.2 * 2.0**-24 * np.abs(x) + 2.0**-149).all()
    special = reference.activate(np.array([np.nan, np.inf, -np.inf], np.float32), activation)
    assert special.view(np.uint32)[0] == 0x7FFFFFFF
    assert (special[1], special[2]) == (np.inf, 0)


@pytest.mark.parametrize("activation", reference.activation.ACTIVATIONS)
def test_activations_of_a_backend(backend: Served, activation: str) -> None:
    """The epilogue alone: K = 1, a weight of 1, and x at every exponent, beside steps, and special."""
    with np.errstate(all="ignore"):
        x = np.concatenate(
            [
                np.linspace(-120, 120, 4001),
                np.exp2(np.arange(-149, 128)),
                -np.exp2(np.arange(-149, 128)),
                [0.0, 88.7, -103.9],
            ]
        ).astype(np.float32)
    x = torch.from_numpy(np.concatenate([x, np.array([np.nan, np.inf, -np.inf], np.float32)])).view(-1, 1)
    y = quantlib.dequant_matmul(
        x, torch.ones(1, 1, dtype=torch.int8), torch.ones(1, 1), "int8", block=(1, 1), activation=activation
    )
    assert_same_bytes(y, reference.activate(x.numpy() + np.float32(0), activation))


def test_float8_weights_reach_every_value() -> None:
    """All 256 codes as a weight: the product with 1 is the value."""
    codes = torch.arange(256, dtype=torch.uint8).view(256, 1)
    for name in ("float8_e4m3fn", "float8_e5m2"):
        y = quantlib.dequant_matmul(
            torch.ones(1, 1), codes.view(getattr(torch, name)), torch.ones(256, 1), name, block=(1, 1)
        )
        want = decode_float(codes.numpy()[:, 0], formats.get(name)) + np.float32(0)
        assert_same_bytes(y[0], want)
