"""The products of a mixture's experts: the bytes of a loop over them, gradients, and what torch does to the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Served, forced, serving
from torch import Tensor

import quantlib
from quantlib.testing import assert_same_bytes

E, N, K = 6, 150, 264
SMALL = (18, 34)  # (N, K) for the interpreter
SPECS = [("int8", (1, -1)), ("int4", (1, 128)), ("nf4", (1, 32)), ("float8_e4m3fn", (64, 64)), ("uint8", (3, 7))]
ENDS = {
    "one row each": [1, 2, 3, 4, 5, 6],
    "few rows": [0, 3, 3, 11, 13, 13],
    "many rows": [70, 70, 75, 105, 114, 114],
    "no rows": [0, 0, 0, 0, 0, 0],
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TAIL = 2  # rows that belong to no expert


@pytest.fixture(params=serving("grouped_dequant_matmul"), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that has the op in turn, forced, on a device it serves."""
    yield from forced(request.param)


def weight(
    format: str, block: tuple[int, int], affine: bool = False, shape: tuple[int, int] = (N, K)
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    made = [
        quantlib.quantize_dynamic(torch.randn(shape, generator=generator), format, block=block, symmetric=not affine)
        for _ in range(E)
    ]
    parts = dict(zip(("codes", "scale", "zero_point"), (torch.stack(t) for t in zip(*made, strict=True)), strict=False))
    return {**parts, "format": format, "block": block}


def rows(ends: list[int], dtype: torch.dtype = torch.bfloat16, columns: int = K) -> Tensor:
    return torch.randn(ends[-1] + TAIL, columns, generator=torch.Generator().manual_seed(2)).to(dtype)


def loop(op: Callable[..., Tensor], x: Tensor, ends: list[int], given: dict[str, Any], **options: Any) -> Tensor:
    """The rows of one expert after the other, and zeros for those of none."""
    own = [name for name in ("codes", "scale", "zero_point", "bias") if given.get(name) is not None]
    parts = [
        op(x[start:end], **{**given, **{name: given[name][e] for name in own}}, **options)
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    return torch.cat([*parts, parts[0].new_zeros(len(x) - ends[-1], parts[0].shape[1])])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(("format", "block"), SPECS, ids=str)
def test_bytes_of_the_loop(
    backend: Served, format: str, block: tuple[int, int], ends: list[int], dtype: torch.dtype
) -> None:
    turn = SPECS.index((format, block)) + list(ENDS.values()).index(ends)
    if backend.interpreted and dtype != DTYPES[turn % 3]:
        pytest.skip("the interpreter takes seconds for each: one dtype of x for a weight and its rows")
    shape = SMALL if backend.interpreted else (N, K)
    given = weight(format, block, format == "uint8", shape)
    given["bias"] = torch.randn(E, shape[0], generator=torch.Generator().manual_seed(3))
    given = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in given.items()}
    x, offsets = rows(ends, dtype, shape[1]).to(backend.device), torch.tensor(ends, device=backend.device)
    for invariant in (True,) if backend.interpreted else (False, True):
        y = quantlib.grouped_dequant_matmul(x, offsets=offsets, activation="silu", batch_invariant=invariant, **given)
        on_gpu = invariant or backend.backend in ("triton", "cuda")
        want = loop(quantlib.dequant_matmul, x, ends, given, activation="silu", batch_invariant=on_gpu)
        assert_same_bytes(y, want, f"invariant {invariant}")
    if format in ("int8", "int4", "uint8") and backend in serving("grouped_dynamic_matmul"):
        y = quantlib.grouped_dynamic_matmul(x, offsets=offsets.int(), activation="gelu", **given)
        assert_same_bytes(y, loop(quantlib.dynamic_matmul, x, ends, given, activation="gelu"), "dynamic")


@pytest.mark.parametrize("backend", serving("grouped_dequant_matmul_backward"), ids=str, indirect=True)
@pytest.mark.parametrize(("format", "block"), SPECS[:3], ids=str)
def test_gradient_of_x_has_the_bytes_of_the_loop(backend: Served, format: str, block: tuple[int, int]) -> None:
    shape = SMALL if backend.interpreted else (N, K)
    given, ends = weight(format, block, shape=shape), ENDS["few rows"]
    given = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in given.items()}
    x, offsets = rows(ends, columns=shape[1]).to(backend.device), torch.tensor(ends, device=backend.device)
    dy = torch.randn(len(x), shape[0], generator=torch.Generator().manual_seed(6)).to(x)
    found = []
    for call in (
        lambda x: quantlib.grouped_dequant_matmul(x, offsets=offsets, **given),
        lambda x: loop(quantlib.dequant_matmul, x, ends, given),
    ):
        leaf = x.clone().requires_grad_()
        found.append(torch.autograd.grad(call(leaf), leaf, dy)[0])
    assert_same_bytes(*found, "dx")


def test_scales_of_16_bits_and_threads() -> None:
    """One task an expert and piece, whichever thread takes it."""
    given, ends = weight("int4", (1, 32)), ENDS["many rows"]
    given["scale"] = given["scale"].bfloat16()
    x, offsets, threads = rows(ends), torch.tensor(ends), torch.get_num_threads()
    want = loop(quantlib.dequant_matmul, x, ends, given)
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            assert_same_bytes(quantlib.grouped_dequant_matmul(x, offsets=offsets, **given), want, f"{n} threads")
    finally:
        torch.set_num_threads(threads)


def test_values_of_an_expert_without_rows_do_not_matter() -> None:
    given, ends = weight("int8", (1, -1)), ENDS["few rows"]
    x, offsets = rows(ends), torch.tensor(ends)
    y = quantlib.grouped_dequant_matmul(x, offsets=offsets, **given)
    given["scale"][[0, 2, 5]] = torch.nan
    assert_same_bytes(quantlib.grouped_dequant_matmul(x, offsets=offsets, **given), y)
    given["zero_point"] = torch.zeros(given["scale"].shape, dtype=torch.int32)
    given["zero_point"][[0, 2, 5]] = 300
    quantlib.grouped_dequant_matmul(x, offsets=offsets, **given)
    given["zero_point"][1, 3] = 300
    with pytest.raises(RuntimeError, match=r"grouped_dequant_matmul: zero_point must be in -128..127, got 300"):
        quantlib.grouped_dequant_matmul(x, offsets=offsets, **given)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "gelu"])
@pytest.mark.parametrize("name", ["dequant_matmul", "dynamic_matmul"])
def test_gradients_are_those_of_the_loop(name: str, activation: str | None) -> None:
    given, ends = weight("int8", (1, -1)), ENDS["few rows"]
    single, grouped = getattr(quantlib, name), getattr(quantlib, f"grouped_{name}")
    found = []
    for call in (
        lambda x, bias: grouped(x, offsets=torch.tensor(ends), activation=activation, bias=bias, **given),
        lambda x, bias: loop(single, x, ends, {**given, "bias": bias}, activation=activation),
    ):
        x = rows(ends, torch.float32).requires_grad_()
        bias = torch.randn(E, N, generator=torch.Generator().manual_seed(5)).requires_grad_()
        y = call(x, bias)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(6))
        found.append(torch.autograd.grad(y, (x, bias), dy))
    if activation in (None, "relu"):  # torch's derivatives of the others depend on where a value lies
        assert_same_bytes(found[0][0], found[1][0], "x")
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert not found[0][0][ends[-1] :].any()


def test_derivatives() -> None:
    """Forward mode, and gradients of gradients: the products are linear in x and in the bias."""
    given, ends = weight("int8", (1, -1)), ENDS["few rows"]
    offsets = torch.tensor(ends, dtype=torch.int32)
    x, direction = rows(ends, torch.float32), rows(ends, torch.float32).flip(0)
    bias, bias_direction = torch.zeros(E, N), torch.ones(E, N)

    def call(x: Tensor, bias: Tensor) -> Tensor:
        return quantlib.grouped_dequant_matmul(x, offsets=offsets, bias=bias, **given)

    _, tangent = torch.func.jvp(call, (x, bias), (direction, bias_direction))
    torch.testing.assert_close(tangent, call(direction, bias_direction))
    _, tangent = torch.func.jvp(lambda bias: call(x, bias), (bias,), (bias_direction,))
    assert torch.equal(tangent, (torch.arange(len(x)) < ends[-1]).float()[:, None].expand(-1, N))
    dy = torch.randn(len(x), N, generator=torch.Generator().manual_seed(7)).requires_grad_()
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(call(leaf, bias), leaf, dy, create_graph=True)
    (second,) = torch.autograd.grad(dx, dy, direction)
    torch.testing.assert_close(second, call(direction, bias))


def test_what_has_no_gradient_raises() -> None:
    given, offsets = weight("int8", (1, -1)), torch.tensor(ENDS["few rows"])
    given["scale"].requires_grad_()
    x = rows(ENDS["few rows"])
    with pytest.raises(RuntimeError, match="grouped_dequant_matmul: scale must not require a gradient"):
        quantlib.grouped_dequant_matmul(x, offsets=offsets, **given)
    raw = torch.ops.quantlib.grouped_dequant_matmul
    y = raw(x, given["codes"], given["scale"], "int8", [1, K], offsets.int()).float().sum()
    with pytest.raises(RuntimeError, match="grouped_dequant_matmul: scale must be frozen"):
        y.backward()


def test_offsets_are_data() -> None:
    """One graph serves every routing, compiled and exported."""
    given = weight("int8", (1, -1))

    def call(x: Tensor, offsets: Tensor) -> Tensor:
        return quantlib.grouped_dequant_matmul(x, offsets=offsets, **given)

    class Model(torch.nn.Module):
        def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
            return call(x, offsets)

    first, second = torch.tensor([1, 1, 5, 6, 6, 9]), torch.tensor([0, 4, 5, 6, 11, 11])
    x = rows([9])
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(Model(), (x, first)).module()
    for offsets in (first, second):
        want = call(x, offsets)
        assert_same_bytes(compiled(x, offsets), want, "compiled")
        assert_same_bytes(exported(x, offsets), want, "exported")
