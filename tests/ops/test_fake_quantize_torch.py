"""The functions in place of torch's fake quantization: its bytes and its errors for every combination it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from quantlib import ops

TENSOR = ops.fake_quantize_per_tensor_affine, torch.fake_quantize_per_tensor_affine
CHANNEL = ops.fake_quantize_per_channel_affine, torch.fake_quantize_per_channel_affine
INF, NAN = float("inf"), float("nan")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
RANGES = (
    *((0, 255), (-128, 127), (-127, 127), (-8, 7), (0, 15), (0, 1), (-1, 1), (0, 65535), (-32768, 32767)),
    *((-65536, 65536), (-70000, 70000), (0, 2**24 + 1), (-(2**31), 2**31 - 1), (0, 2**33)),
    *((1, 10), (-10, -1), (-1, 0), (0, 0), (5, 5), (10, 0), (0.0, 255.0), (True, 255)),
)  # fmt: skip
SCALES = (0.1, 1, 3e-38, 0.0, -0.1, NAN, INF, 1e-40, 1e-44, 1e-46, 1e30, 1e38, 1e39, 2.0**-100, 2.0**120)
CODES = (0, 5, 255, 300, -1, 1.5, 2.5, -3.7, 300.0, NAN, INF)


def inputs() -> Iterator[tuple[str, Tensor]]:
    """Ties of the scales 0.1 and 1, values that are not finite or beyond an int64 of scales, and every layout."""
    ties = (torch.arange(-24, 24).view(4, 12) + 0.5) / 10
    huge = torch.tensor([NAN, INF, -INF, -0.0, 1e38, -1e38, 1e-40, 9.3e17, -9.3e17, 3.0, 300.0, 0.5]).expand(4, 12)
    for dtype in FLOATS:
        yield f"ties {dtype}", ties.to(dtype)
        yield f"huge {dtype}", huge.to(dtype)
    for dtype in (torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn):
        yield f"{dtype}", ties.to(dtype)
    yield "1e300", torch.full((4, 3), 1e300, dtype=torch.float64)
    yield "no rows", torch.empty(0, 12)
    yield "no columns", torch.empty(4, 0)
    yield "a scalar", torch.tensor(1.25)
    yield "a row", ties[0]
    yield "transposed", ties.t().contiguous().t()
    yield "strided", ties.repeat(1, 2)[:, ::2]
    yield "expanded", ties[:1].expand(4, 12)
    yield "channels last", ties.view(2, 4, 3, 2).contiguous(memory_format=torch.channels_last)
    yield "3-d", ties.view(2, 4, 6)


INPUTS = dict(inputs())


def called(function: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """The result; None where the call raises what an argument raises."""
    try:
        return function(*args)
    except (RuntimeError, TypeError, IndexError):
        return None


def bytes_of(y: Tensor) -> Tensor:
    """y as integers, every NaN as one."""
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[y.element_size()]
    return torch.where(y.isnan(), 1, y.contiguous().view(ints))


def differs(functions: tuple[Callable[..., Tensor], ...], *args: Any) -> bool:
    got, want = (called(function, *args) for function in functions)
    if got is None or want is None:
        return got is not want
    same = got.dtype == want.dtype and got.shape == want.shape
    return not same or not torch.equal(bytes_of(got), bytes_of(want))


def assert_equal(functions: tuple[Callable[..., Tensor], ...], calls: Iterator[tuple[Any, ...]]) -> None:
    wrong = [args[1:] for args in calls if differs(functions, *args)]
    assert not wrong, f"{len(wrong)} calls, the first with {wrong[0]}"


@pytest.mark.parametrize("name", INPUTS)
def test_one_scale_and_any_input(name: str) -> None:
    scales = (0.1, -0.1, torch.tensor(0.1), torch.tensor([0.1], dtype=torch.float64))
    codes = (0, 5, 1.5, torch.tensor([5], dtype=torch.int32), torch.tensor([1.5]))
    each = itertools.product(scales, codes, RANGES[:5])
    assert_equal(TENSOR, ((INPUTS[name], scale, code, *limits) for scale, code, limits in each))


@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_one_scale_of_any_kind(limits: tuple[Any, Any]) -> None:
    x = INPUTS["ties torch.float32"]
    scales: list[Any] = [
        *SCALES,
        True,
        torch.tensor(0.1),
        torch.tensor([[0.1]]),
        torch.tensor([0.1, 0.2]),
        torch.ones(0),
    ]
    scales += [torch.tensor([s]) for s in SCALES]
    scales += [torch.tensor([1.0]).to(dtype) for dtype in (*FLOATS, torch.int32, torch.bool)]
    codes: list[Any] = [*CODES, True, 2**40, torch.tensor(3), torch.tensor([1, 2]), torch.ones(0, dtype=torch.int32)]
    codes += [torch.tensor([z]) for z in CODES]
    codes += [torch.tensor([5]).to(dtype) for dtype in (*FLOATS, torch.int32, torch.int16, torch.uint8, torch.bool)]
    assert_equal(TENSOR, ((x, scale, code, *limits) for scale, code in itertools.product(scales, codes)))


@pytest.mark.parametrize("name", INPUTS)
def test_a_scale_a_channel_and_any_input(name: str) -> None:
    x = INPUTS[name]

    def calls() -> Iterator[tuple[Any, ...]]:
        for axis in range(-x.dim() - 1, x.dim() + 2):
            n = x.shape[axis] if -x.dim() <= axis < x.dim() else 4
            scale, codes = torch.linspace(0.05, 0.4, n), torch.arange(n) % 7
            for dtype in (*FLOATS, torch.int32, torch.int64, torch.int8, torch.bool):
                yield x, scale, codes.to(dtype), axis, 0, 255
                yield x, scale.to(dtype), codes.int(), axis, -128, 127

    assert_equal(CHANNEL, calls())


@pytest.mark.parametrize("limits", RANGES, ids=str)
def test_a_scale_a_channel_of_any_kind(limits: tuple[Any, Any]) -> None:
    def calls() -> Iterator[tuple[Any, ...]]:
        for name, s, z in itertools.product(("ties torch.float32", "huge torch.bfloat16"), SCALES, CODES):
            for dtype in (torch.int32,) if isinstance(z, int) else (torch.float32, torch.float16):
                yield INPUTS[name], torch.tensor([s] * 4), torch.tensor([z] * 4).to(dtype), 0, *limits

    assert_equal(CHANNEL, calls())


def test_a_scale_a_channel_of_any_shape() -> None:
    shapes = ((), (0,), (1,), (3,), (4,), (5,), (12,), (4, 1), (1, 4))
    each = itertools.product(shapes, shapes, (0, 1))
    x = INPUTS["ties torch.float32"]
    assert_equal(CHANNEL, ((x, torch.full(s, 0.1), torch.zeros(z, dtype=torch.int32), a, 0, 255) for s, z, a in each))


@pytest.mark.parametrize("limits", [r for r in RANGES if type(r[0]) is int and r[0] <= r[1]], ids=str)
def test_the_gradient_of_the_input(limits: tuple[int, int]) -> None:
    """A masked gradient is +0, where torch multiplies it by 0: equal as numbers."""
    for name, s in itertools.product((n for n, x in INPUTS.items() if x.is_floating_point()), (0.1, -0.1, 1e-40)):
        x = INPUTS[name]
        if x.dtype == torch.float8_e4m3fn or x.dim() < 2 or not x.numel():
            continue
        code = min(max(3, limits[0]), limits[1])
        scale, codes = torch.full((x.shape[1],), s), torch.full((x.shape[1],), code, dtype=torch.int32)
        for functions, args in (
            (TENSOR, (s, code)),
            (CHANNEL, (scale, codes, 1)),
            (CHANNEL, (scale, codes.float(), 1)),
        ):
            gradients = []
            for function in functions:
                leaf = x.detach().clone().requires_grad_()
                y = function(leaf, *args, *limits)
                gradients.append(torch.autograd.grad(y, leaf, torch.ones_like(y).cumsum(-1) - 2)[0])
            assert torch.equal(*gradients), (name, s, args)


def test_the_keywords_are_torchs() -> None:
    x, limits = INPUTS["ties torch.float32"], {"quant_min": -8, "quant_max": 7}
    for function in TENSOR:
        assert function(input=x, scale=0.1, zero_point=0, **limits).shape == x.shape
    for function in CHANNEL:
        codes = torch.zeros(4, dtype=torch.int32)
        assert function(input=x, scale=torch.ones(4), zero_point=codes, axis=0, **limits).shape == x.shape


def test_the_layout_is_kept() -> None:
    x = INPUTS["channels last"]
    scale, codes = torch.full((4,), 0.1), torch.zeros(4, dtype=torch.int32)
    assert ops.fake_quantize_per_tensor_affine(x, 0.1, 0, -8, 7).stride() == x.stride()
    assert ops.fake_quantize_per_channel_affine(x, scale, codes, 1, -8, 7).stride() == x.stride()
    assert ops.fake_quantize_per_channel_affine(x.contiguous(), scale, codes, 1, -8, 7).is_contiguous()


@pytest.mark.parametrize("learned", ["scale", "zero_point"])
def test_what_is_learned_has_a_gradient(learned: str) -> None:
    x = INPUTS["ties torch.float32"]
    for functions, n, args in ((TENSOR, 1, ()), (CHANNEL, 4, (0,))):
        given = {"scale": torch.full((n,), 0.1), "zero_point": torch.full((n,), 2.4)}
        leaf = given[learned].requires_grad_()
        y = functions[0](x, given["scale"], given["zero_point"], *args, -8, 7)
        assert torch.autograd.grad(y.sum(), leaf)[0].shape == (n,)


def call(**changed: Any) -> Callable[[], Tensor]:
    given: dict[str, Any] = {"input": torch.ones(2, 3), "scale": torch.ones(2), "axis": 0, "quant_max": 7}
    given |= {"zero_point": torch.zeros(2, dtype=torch.int32), "quant_min": -8} | changed
    return lambda: ops.fake_quantize_per_channel_affine(**given)


REFUSED = {
    "input must be float32, float16, bfloat16 or float64, got int64": call(input=torch.ones(2, 3).long()),
    "scale must be float32 or bfloat16, got float16": call(scale=torch.ones(2).half()),
    "zero_point must be int32, float32 or float16, got int64": call(zero_point=torch.zeros(2).long()),
    "zero_point must be in -8..7, got 300": call(zero_point=torch.tensor([0, 300], dtype=torch.int32)),
    "axis must be at least 0 and below 2, got -1": call(axis=-1),
    "scale must be [2], one for each entry of axis 0, got [3]": call(scale=torch.ones(3)),
    "zero_point must be [2], one for each entry of axis 0, got [2, 1]": call(zero_point=torch.zeros(2, 1).int()),
    "quant_min must be at most quant_max -9, got -8": call(quant_max=-9),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message: str) -> None:
    with pytest.raises(RuntimeError) as error:
        REFUSED[message]()
    assert str(error.value) == f"quantlib::fake_quantize: {message}"


def test_values_that_the_host_cannot_see() -> None:
    """Compiled or batched calls are not asked for their values, which would wait or break the graph."""
    x, scale, codes = torch.randn(4, 12), torch.rand(4) + 0.1, torch.arange(4, dtype=torch.int32)

    def run(x: Tensor) -> Tensor:
        y = ops.fake_quantize_per_channel_affine(x, scale, codes, 0, -8, 7)
        return ops.fake_quantize_per_tensor_affine(y, 0.3, 1, -8, 7)

    want = run(x)
    assert torch.equal(torch.compile(run, backend="aot_eager", fullgraph=True)(x), want)
    assert torch.equal(torch.vmap(run)(torch.stack([x, x.flip(0)]))[0], want)
