"""The bytes of a fake quantization and of its gradients, the sums of its scales, and what torch says of them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from conftest import Served, forced, serving

import quantlib
from quantlib import formats, ops, reference, testing
from quantlib.reference.numerics import Array
from quantlib.reference.ops import reduce_blocks
from quantlib.testing import assert_same_bytes, values

SHAPE = (6, 67)
SPECS = [(f.name, affine) for f in formats.TABLE for affine in (False, True) if not (affine and f.is_float)]
BLOCKS = [(1, 67), (6, 67), (1, 8), (4, 5)]


def scale_shape(block: tuple[int, int]) -> tuple[int, int]:
    return -(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1])


def adversarial(format: str, scale: Array, block: tuple[int, int], affine: bool) -> Array:
    """x at the midpoints between codes times its scale and beside them, then what is special."""
    rng = np.random.default_rng(0)
    x = rng.choice(values.midpoints(format, affine), SHAPE).astype(np.float32)
    with np.errstate(all="ignore"):
        x = (x * np.repeat(np.repeat(scale, block[0], 0)[:6], block[1], 1)[:, :67]).astype(np.float32)
    x = np.where(rng.random(SHAPE) < 0.3, np.nextafter(x, np.float32(np.inf)), x)
    special = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38], np.float32)
    return np.where(rng.random(SHAPE) < 0.1, rng.choice(special, SHAPE), x).astype(np.float32)


@pytest.fixture(params=serving("fake_quantize"), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend in turn, forced, on a device it serves."""
    yield from forced(request.param)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(("format", "affine"), SPECS, ids=str)
def test_forward_and_backward_are_the_references(
    backend: Served, format: str, affine: bool, block: tuple[int, int]
) -> None:
    rng = np.random.default_rng(1)
    scale = np.exp2(rng.uniform(-8, 8, scale_shape(block))).astype(np.float32)
    zero_point = (rng.standard_normal(scale.shape) * 40).astype(np.float32) if affine else None
    x = adversarial(format, scale, block, affine)
    dy = rng.standard_normal(SHAPE).astype(np.float32)
    for lsq in (False, True):
        leaves = [None if v is None else torch.tensor(v, requires_grad=True) for v in (x, scale, zero_point)]
        y = quantlib.fake_quantize(
            leaves[0], leaves[1], format, block=block, zero_point=leaves[2], mask="lsq" if lsq else "rounded"
        )
        expected = reference.fake_quantize(x, scale, format, block=block, zero_point=zero_point)
        testing.assert_same_bytes(y.detach(), expected, f"y of {backend}")
        y.backward(torch.from_numpy(dy))
        terms = reference.fake_quantize_backward(dy, x, scale, format, block=block, zero_point=zero_point, lsq_mask=lsq)
        testing.assert_same_bytes(leaves[0].grad, terms.dx, f"dx of {backend}")
        assert_sum(leaves[1].grad, terms.dscale, block)
        if affine:
            assert_sum(leaves[2].grad, terms.dzero_point, block)


def assert_sum(got: torch.Tensor, terms: Array, block: tuple[int, int]) -> None:
    """Within the bound of C10, n * 2^-24 * sum|terms|, wherever that sum is a float32."""
    exact = reduce_blocks(np.add, terms.astype(np.float64), block)
    size = reduce_blocks(np.add, np.abs(terms).astype(np.float64), block)
    representable = size < np.finfo(np.float32).max
    error = np.abs(got.numpy()[representable] - exact[representable])
    assert (error <= block[0] * block[1] * 2.0**-24 * size[representable]).all(), f"sum off by {error.max()}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_inputs_are_worked_on_in_float32(backend: Served, dtype: torch.dtype) -> None:
    x = torch.randn(4, 33).to(dtype).requires_grad_()
    scale = torch.rand(4, 1).add_(0.01)
    y = quantlib.fake_quantize(x, scale, "int8", block=(1, -1))
    wide = quantlib.fake_quantize(x.detach().float(), scale, "int8", block=(1, -1))
    testing.assert_same_bytes(y.detach(), quantlib.cast(wide, dtype), "y")
    y.backward(torch.ones_like(y))
    assert x.grad.dtype == dtype


def test_the_values_are_those_of_quantize_and_dequantize(backend: Served) -> None:
    x, scale = torch.linspace(-3, 3, 512).reshape(8, 64), torch.linspace(0.001, 4, 16).reshape(8, 2)
    with quantlib.use_backend("composite"):
        codes = quantlib.quantize(x, scale, "int4", block=(1, 32))
        expected = quantlib.dequantize(codes, scale, "int4", block=(1, 32))
    testing.assert_same_bytes(quantlib.fake_quantize(x, scale, "int4", block=(1, 32)), expected, "y")


def test_two_runs_give_the_same_bytes(backend: Served) -> None:
    x, dy = torch.randn(64, 1000), torch.randn(64, 1000)

    def gradients() -> list[torch.Tensor]:
        scale = torch.full((1, 1), 0.03, requires_grad=True)
        zero_point = torch.full((1, 1), 3.0, requires_grad=True)
        y = quantlib.fake_quantize(x, scale, "int8", block=(-1, -1), zero_point=zero_point)
        return list(torch.autograd.grad(y, [scale, zero_point], dy))

    for first, second in zip(gradients(), gradients(), strict=True):
        testing.assert_same_bytes(first, second, "second run")


@pytest.mark.parametrize("limits", [(-128, 127), (0, 255), (-127, 127), (-8, 7), (0, 15)], ids=str)
def test_forward_and_dx_are_torchs(limits: tuple[int, int]) -> None:
    x = torch.from_numpy(adversarial("int8", np.full((1, 1), 0.1, np.float32), SHAPE, True))
    x = x.nan_to_num(0).clamp(-1e9, 1e9)  # beyond 2^63 scales torch takes the largest value to the lowest code
    qmin, qmax = limits
    scale, zero_point = torch.rand(6) + 0.01, torch.randint(qmin, qmax + 1, (6,), dtype=torch.int32)

    def both(ours, torchs, *args: object) -> None:
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        ya, yb = ours(a, *args), torchs(b, *args)
        assert torch.equal(ya, yb)
        ya.sum().backward(), yb.sum().backward()
        assert torch.equal(a.grad, b.grad)

    channel = (scale, zero_point, 0, *limits)
    both(ops.fake_quantize_per_channel_affine, torch.fake_quantize_per_channel_affine, *channel)
    tensor = (0.1, int(zero_point[0]), *limits)
    both(ops.fake_quantize_per_tensor_affine, torch.fake_quantize_per_tensor_affine, *tensor)


def test_any_axis_can_be_the_channels() -> None:
    x, scale, zero = torch.randn(3, 5, 7, 2), torch.rand(7) + 0.01, torch.zeros(7, dtype=torch.int32)
    got = ops.fake_quantize_per_channel_affine(x, scale, zero, 2, -128, 127)
    assert torch.equal(got, torch.fake_quantize_per_channel_affine(x, scale, zero, 2, -128, 127))


def test_gradients_of_a_saturated_and_of_a_rounded_value(backend: Served) -> None:
    """y = c * s is linear in s where x saturates; elsewhere x moves with the rounding: dy/ds = k - t."""
    scale = torch.full((1, 1), 0.5, requires_grad=True)
    saturated = torch.tensor([[100.0, -100.0]])
    y = quantlib.fake_quantize(saturated, scale, "int4", block=(-1, -1))
    (ds,) = torch.autograd.grad(y[0, 0] * 3 + y[0, 1], [scale])
    assert ds.item() == 7 * 3 - 7
    inside = torch.tensor([[1.1]])
    (ds,) = torch.autograd.grad(quantlib.fake_quantize(inside, scale, "int4", block=(-1, -1)), [scale])
    assert math.isclose(ds.item(), 2 - 1.1 / 0.5, rel_tol=1e-6)


def test_gradients_of_saturated_values_match_float64_differences(backend: Served) -> None:
    """y = (c - z) * s is smooth in scale and zero point where every x saturates: c is the lowest or highest code."""
    rng = np.random.default_rng(2)
    x = np.where(rng.random((4, 32)) < 0.5, -1e6, 1e6)
    dy, s, z = rng.standard_normal((4, 32)), rng.uniform(0.01, 0.1, (4, 1)), rng.integers(-9, 9, (4, 1)).astype(float)

    def loss(s: Array, z: Array) -> Array:
        return (dy * (np.where(x > 0, 127, -128) - z) * s).sum(1, keepdims=True)

    h = 1e-6
    differences = [(loss(s + h, z) - loss(s - h, z)) / (2 * h), (loss(s, z + h) - loss(s, z - h)) / (2 * h)]
    leaves = [torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in (s, z)]
    y = quantlib.fake_quantize(torch.from_numpy(x).float(), leaves[0], "int8", block=(1, -1), zero_point=leaves[1])
    y.backward(torch.from_numpy(dy).float())
    for leaf, want in zip(leaves, differences, strict=True):
        np.testing.assert_allclose(leaf.grad.numpy(), want, rtol=1e-3, atol=1e-3)


def test_grad_factor_scales_what_is_learned_only() -> None:
    x, scale = torch.randn(4, 8, requires_grad=True), torch.full((4, 1), 0.1, requires_grad=True)
    one = torch.autograd.grad(quantlib.fake_quantize(x, scale, "int8", block=(1, -1)).sum(), [x, scale])
    factor = ops.grad_factor(8, 127)
    y = quantlib.fake_quantize(x, scale, "int8", block=(1, -1), grad_factor=factor)
    dx, dscale = torch.autograd.grad(y.sum(), [x, scale])
    assert torch.equal(dx, one[0])
    assert torch.equal(dscale, one[1] * factor)


def test_a_second_derivative_is_refused() -> None:
    x, scale = torch.randn(4, 8, requires_grad=True), torch.full((4, 1), 0.1)
    (dx,) = torch.autograd.grad(quantlib.fake_quantize(x, scale, "int8", block=(1, -1)).sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_compiled_training_is_the_eager_one(backend: Served) -> None:
    def loss(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return quantlib.fake_quantize(x * 1.5, scale, "int8", block=(1, -1)).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x, scale = torch.linspace(-2, 2, 32).reshape(2, 16).requires_grad_(), torch.full((2, 1), 0.03)
        scale.requires_grad_()
        function(x, scale).backward()
        gradients.append((x.grad, scale.grad))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_opcheck() -> None:
    x, scale, zero_point = torch.randn(4, 8, requires_grad=True), torch.full((4, 1), 0.1), torch.zeros(4, 1)
    op = torch.ops.quantlib
    torch.library.opcheck(op.fake_quantize.default, (x, scale, "int8", [1, 8], zero_point))
    x = x.detach()
    torch.library.opcheck(op.fake_quantize_backward.default, (x, x, scale, "int8", [1, 8]))
    torch.library.opcheck(op.fake_quantize_backward.affine, (x, x, scale, zero_point, "int8", [1, 8]))


BAD = {
    "scale must be a number other than 0, got 0.0": {"scale": torch.zeros(2, 1)},
    "scale must be a number other than 0, got -0.0": {"scale": torch.tensor([[1.0], [-0.0]])},
    "scale must be a number other than 0, got nan": {"scale": torch.tensor([[-1.0], [math.nan]])},
    r"scale must be float32 \[2, 1\] on cpu, got float32 \[2\] on cpu": {"scale": torch.ones(2)},
    r"scale must be float32 \[2, 1\] on cpu, got float16 \[2, 1\] on cpu": {"scale": torch.ones(2, 1).half()},
    "x must be float32, float16 or bfloat16, got int32": {"x": torch.ones(2, 8, dtype=torch.int32)},
    r"zero_point must be float32 \[2, 1\] on cpu, got float32 \[1, 1\] on cpu": {"zero_point": torch.zeros(1, 1)},
    r"zero_point must be in -128..127, got 128": {"zero_point": torch.full((2, 1), 128, dtype=torch.int32)},
    "mask must be rounded or lsq, got 'none'": {"mask": "none"},
    "zero_point must be None for float8_e5m2, got a value": {"format": "float8_e5m2", "zero_point": torch.zeros(2, 1)},
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", [s for s in serving("fake_quantize") if s.device == "cpu"], ids=str, indirect=True)
def test_bad_input(backend: Served, message: str) -> None:
    given = {"x": torch.randn(2, 8), "scale": torch.ones(2, 1), "format": "int8", "block": (1, -1)} | BAD[message]
    with pytest.raises(RuntimeError, match=f"quantlib::fake_quantize: {message}"):
        quantlib.fake_quantize(**given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_float_zero_point_that_is_not_learned_is_that_of_torch(dtype: torch.dtype) -> None:
    x = (torch.arange(-40, 40).view(2, 40) / 8).to(dtype)
    scale, zero_point = torch.tensor([0.1, 0.0125]), torch.tensor([2.4, 85.0])
    got = quantlib.ops.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, 255)
    assert_same_bytes(got, torch.fake_quantize_per_channel_affine(x, scale, zero_point, 0, 0, 255))
    got = quantlib.ops.fake_quantize_per_tensor_affine(x, scale[0], torch.tensor(3.5), 0, 255)
    assert_same_bytes(got, torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 255))
