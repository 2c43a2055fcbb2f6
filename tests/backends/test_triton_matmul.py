"""The Triton matmuls in Triton's interpreter: bytes where the contract has bytes, its bound elsewhere."""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from dataclasses import replace
from typing import Any

import inline_ptx
import numpy as np
import pytest
import torch
from torch import Tensor

from quantlib import formats, quantize_dynamic, reference
from quantlib.backends import triton as backend
from quantlib.backends.tiles import TileLayout
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.reference.activation import ACTIVATIONS
from quantlib.reference.matmul import bound
from quantlib.testing import assert_same_bytes, poisoned

triton = pytest.importorskip("triton")
if not backend.interpreted():
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)

import triton.language as tl  # noqa: E402

from quantlib.backends.triton import dequant_matmul, descriptors, launch, tables, tuning  # noqa: E402
from quantlib.backends.triton.activation import activate  # noqa: E402

BLOCKS = ((1, -1), (-1, -1), (1, 64), (1, 32), (3, 10))
WEIGHTS = [
    (format, block, affine)
    for format, block, affine in itertools.product(("int8", "uint8", "int4"), BLOCKS, (False, True))
    if affine or format != "uint8"
]
WEIGHTS += [(f, block, False) for f in ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn") for block in BLOCKS[::2]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Weight:
    """A weight [N, K] as launchers and as the reference take it; small: codes, or scales that are powers of two."""

    def __init__(self, N: int, K: int, format: str, block: tuple[int, int], affine: bool, exact: bool = True) -> None:
        self.N, self.K, self.format = N, K, formats.get(format)
        self.block = (N if block[0] == -1 else min(block[0], N), K if block[1] == -1 else min(block[1], K))
        w = torch.randint(-8, 9, (N, K)).float() if self.format.is_float else torch.randn(N, K)
        made = quantize_dynamic(w, format, block=self.block, symmetric=not affine)
        self.codes, self.scale = made[0], made[1]
        self.zero_point = made[2] if affine else None
        if exact:
            self.scale = torch.exp2(torch.randint(-3, 3, self.scale.shape).float())
            if self.format.is_float and self.format.bits == 8:  # -8..8
                self.codes = w.to(self.codes.dtype)

    def launched(self, tiled: bool = False) -> QuantizedWeight:
        codes = TileLayout(self.format).pack(self.codes, self.K) if tiled else self.codes
        shape, layout = (self.N, self.K), "tiles" if tiled else "plain"
        return QuantizedWeight(codes, self.scale, self.format, self.block, self.zero_point, shape, layout)

    def described(self) -> dict[str, Any]:
        z = None if self.zero_point is None else self.zero_point.numpy()
        return {"block": self.block, "zero_point": z}

    def arrays(self) -> tuple[Any, ...]:
        return numpy_codes(self.codes), self.scale.numpy(), self.format.name


def numpy_codes(t: Tensor) -> Any:
    if t.dtype.is_floating_point:
        integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.dtype.itemsize]
        return t.view(integer).numpy().view({1: np.uint8, 2: np.uint16, 4: np.uint32}[t.dtype.itemsize])
    return t.numpy()


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("format", "block", "affine"), WEIGHTS, ids=str)
def test_dequant_matmul_of_exact_operands(format: str, block: tuple[int, int], affine: bool, tiled: bool) -> None:
    for n, (M, N, K) in enumerate(((3, 37, 150), (66, 20, 70), (1, 16, 64))):
        weight, dtype = Weight(N, K, format, block, affine), DTYPES[n]
        x, bias = torch.randint(-8, 9, (M, K)).to(dtype), torch.randint(-4, 5, (N,)).float()
        y = poisoned((M, N), dtype)
        kernel = backend.KERNELS["dequant_matmul"]
        kernel(x, weight.launched(tiled), Epilogue(bias, "gelu"), False, y)
        options = {"bias": bias.numpy(), "activation": "gelu", "dtype": name_of(dtype)}
        want = reference.dequant_matmul(x.float().numpy(), *weight.arrays(), **weight.described(), **options)
        assert_same_bytes(y, want, f"dequant_matmul {format} {block} M={M}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("format", "group", "affine"),
    [("int8", -1, False), ("uint8", -1, True), ("int4", 128, False), ("int4", 64, True), ("float8_e4m3fn", -1, False)],
)
def test_columns_in_the_order_of_a_warpgroup(format: str, group: int, affine: bool, dtype: str) -> None:
    """Both operands' in the same: the bytes of a sum that is exact are those of any other order."""
    M, N, K = 67, 40, 16 * 13
    weight = Weight(N, K, format, (1, group), affine)
    x, y = torch.randint(-8, 9, (M, K)).to(getattr(torch, dtype)), poisoned((M, N), getattr(torch, dtype))
    tile = tuning.MatmulTile(32, 64, TileLayout(weight.format).columns, 1, 4, 2, paired=True)
    key = tuning.key_of("dequant_matmul", (M, N, K), weight.format, x.dtype, group if group > 0 else K, True)
    assert tables.is_sound(key, tile, 1 << 18)
    dequant_matmul.dequant_matmul(x, weight.launched(True), Epilogue(), False, y, tile)
    options = {**weight.described(), "dtype": dtype}
    want = reference.dequant_matmul(x.float().numpy(), *weight.arrays(), **options)
    assert_same_bytes(y, want, f"{format} {group}")
    assert not tables.is_sound(replace(key, K=K + 8), tile, 1 << 18)
    assert not tables.is_sound(replace(key, tiled=False), replace(tile, tile_k=64), 1 << 18)


@pytest.mark.parametrize(("group", "affine"), [(128, False), (256, True)])
def test_a_scale_of_one_step_or_more(group: int, affine: bool) -> None:
    """The two halves of a step of packed codes are summed before their one scale; the last step is half a step."""
    weight = Weight(20, 600, "int4", (1, group), affine)
    x, y = torch.randint(-8, 9, (3, 600)).bfloat16(), poisoned((3, 20), torch.bfloat16)
    backend.KERNELS["dequant_matmul"](x, weight.launched(True), Epilogue(), False, y)
    options = {**weight.described(), "dtype": "bfloat16"}
    want = reference.dequant_matmul(x.float().numpy(), *weight.arrays(), **options)
    assert_same_bytes(y, want, f"groups of {group}")


@pytest.mark.parametrize("M", [2, 65])
@pytest.mark.parametrize(("format", "block"), [("int8", (1, -1)), ("int4", (1, 64)), ("bfloat16", (1, 32))])
def test_dequant_matmul_is_within_the_bound(format: str, block: tuple[int, int], M: int) -> None:
    weight = Weight(24, 1200, format, block, False, exact=False)
    x, y = torch.randn(M, 1200).bfloat16(), poisoned((M, 24), torch.bfloat16)
    backend.KERNELS["dequant_matmul"](x, weight.launched(), Epilogue(), False, y)
    codes, scale, name = weight.arrays()
    w = reference.dequantize(codes, scale, name, block=weight.block).view(np.float32)
    exact = x.double().numpy() @ w.T.astype(np.float64)
    allowed = bound(x.float().numpy(), w)
    low, high = (torch.tensor(exact + sign * allowed).bfloat16().double().numpy() for sign in (-1, 1))
    found = y.double().numpy()
    assert ((found >= low) & (found <= high)).all()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("format", "block", "affine"), WEIGHTS[::2], ids=str)
def test_slabs_of_a_large_batch(
    format: str, block: tuple[int, int], affine: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = Weight(40, 150, format, block, affine)
    choice = tuning.MatmulTile(32, 0, TileLayout(weight.format).columns if tiled else 64, 1, 4, 1, slab=32)
    monkeypatch.setattr(tuning, "choose_matmul", lambda *_: choice)
    check_slabs(weight, tiled)


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("format", "block", "affine"), WEIGHTS[::2], ids=str)
def test_slabs_through_descriptors(
    format: str, block: tuple[int, int], affine: bool, tiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two slabs and three rows of tiles, the last of them ragged, and a last step that is."""
    choice = tuning.MatmulTile(32, 16, 64, 1, 4, 3, slab=32, described=True)
    monkeypatch.setattr(tuning, "choose_matmul", lambda *_: choice)
    check_slabs(Weight(40, 152, format, block, affine), tiled)


def check_slabs(weight: Weight, tiled: bool) -> None:
    """The bytes of 33 rows of x, where ``tuning`` chooses slabs."""
    M, N, K = 33, weight.N, weight.K
    x, bias, y = torch.randint(-8, 9, (M, K)).bfloat16(), torch.randn(N), poisoned((M, N), torch.bfloat16)
    backend.KERNELS["dequant_matmul"](x, weight.launched(tiled), Epilogue(bias, "relu"), False, y)
    options = {"bias": bias.numpy(), "activation": "relu", "dtype": "bfloat16"}
    want = reference.dequant_matmul(x.float().numpy(), *weight.arrays(), **weight.described(), **options)
    assert_same_bytes(y, want, f"slabs {weight.format.name} {weight.block}")


@pytest.mark.parametrize(("format", "block", "affine"), WEIGHTS[::2], ids=str)
def test_slabs_of_the_gradient_of_a_large_batch(
    format: str, block: tuple[int, int], affine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three slabs of columns, the last of them ragged."""
    weight = Weight(40, 150, format, block, affine)
    choice = tuning.MatmulTile(32, 0, 32, 1, 4, 1, slab=64)
    monkeypatch.setattr(tuning, "choose_backward", lambda *_: choice)
    dy, dx = torch.randint(-8, 9, (33, 40)).bfloat16(), poisoned((33, 150), torch.bfloat16)
    backend.KERNELS["dequant_matmul_backward"](dy, weight.launched(), dx)
    want = reference.dequant_matmul_backward(
        dy.float().numpy(), *weight.arrays(), **weight.described(), dtype="bfloat16"
    )
    assert_same_bytes(dx, want, f"slabs of the gradient {format} {block}")


def test_slabs_are_for_large_batches_of_what_they_hold() -> None:
    int8, bf16, fp16, fp32 = formats.get("int8"), torch.bfloat16, torch.float16, torch.float32
    shape = (1024, 4096, 4096)
    chosen = tuning.choose_matmul(shape, int8, bf16, 128, True, False, "a device", 232448)
    assert chosen.slab == 4096  # rows whose product is 256 tiles of 128 x 128
    for small in ((512, 2048, 8192), (300, 4096, 8192), (256, 57344, 8192)):  # two of fewer than 128 such
        assert not tuning.choose_matmul(small, int8, bf16, 128, True, False, "a device", 232448).slab
    assert tuning.choose_matmul((257, 8192, 4096), int8, bf16, 128, True, False, "a device", 232448).slab
    assert not tuning.choose_matmul(shape, int8, bf16, 128, True, True, "a device", 232448).slab
    assert not tuning.choose_matmul(shape, int8, fp16, 128, True, False, "a device", 232448).slab
    assert not tuning.choose_matmul(shape, int8, fp32, 4096, True, False, "a device", 232448).slab
    assert tuning.choose_backward(shape, int8, bf16, 4096, "a device", 232448).slab == 4096
    assert not tuning.choose_backward((128, 4096, 4096), int8, bf16, 4096, "a device", 232448).slab
    assert not tuning.choose_backward(shape, int8, fp16, 4096, "a device", 232448).slab


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((4096, 28672, 4096), (128, 256, 4096)),  # M, N, K; tile_m, tile_n, slab
        ((1024, 28672, 4096), (128, 256, 4096)),
        ((512, 28672, 4096), (128, 256, 8192)),
        ((512, 4096, 4096), (128, 128, 8192)),
        ((1024, 1024, 4096), (64, 128, 4096)),
    ],
)
def test_described_slabs_have_the_largest_tile_of_which_there_are_enough(
    shape: tuple[int, int, int], tile: tuple[int, int, int]
) -> None:
    int8, K = formats.get("int8"), shape[2]
    described, vendors = tuning.slab_ways(shape, int8, True, K)
    assert (described.tile_m, described.tile_n, described.slab, described.described) == (*tile, True)
    for describable in (True, False):  # no GPU has timed the other
        chosen = tuning.choose_matmul(shape, int8, torch.bfloat16, K, True, False, "a device", 232448, describable)
        assert chosen == vendors
        assert not chosen.described


def test_what_slabs_are_described_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of x of 16 bits, a multiple of 16 in a row, on aligned memory, on sm_90 and sm_100."""
    monkeypatch.setattr(launch, "arch", lambda device: 90)
    assert descriptors.slab_describable(torch.zeros(3, 32, dtype=torch.bfloat16))
    assert descriptors.slab_describable(torch.zeros(3, 32, dtype=torch.float16))
    assert not descriptors.slab_describable(torch.zeros(3, 32))
    assert not descriptors.slab_describable(torch.zeros(3, 24, dtype=torch.bfloat16))
    assert not descriptors.slab_describable(torch.zeros(3, 0, dtype=torch.bfloat16))
    assert not descriptors.slab_describable(torch.zeros(97, dtype=torch.bfloat16)[1:].view(3, 32))
    for arch in (0, 80, 89, 120):
        monkeypatch.setattr(launch, "arch", lambda device, arch=arch: arch)
        assert not descriptors.slab_describable(torch.zeros(3, 32, dtype=torch.bfloat16))


@pytest.mark.parametrize("format", ["int8", "uint8", "int4", "nf4_bf16", "float4_e2m1fn", "float8_e4m3fn"])
def test_a_scale_of_eight_bits_is_multiplied_exactly(format: str) -> None:
    """fl32(w s) has no error for any operand w, its zero point subtracted, and bfloat16 s, so that the one rounding of
    bfloat16 arithmetic gives fl(w s) rounded to bfloat16."""
    f = formats.get(format)
    if f.is_float:
        w = reference.decode_float(np.arange(1 << f.bits, dtype=np.uint8), f)
        w = w[np.isfinite(w)]
    else:
        w = np.arange(1 - (1 << f.bits), 1 << f.bits, dtype=np.float32)
    bits = np.arange(0x0D80, 0x7C00, dtype=np.uint32)  # from 2^-100 on
    s = (bits << 16).view(np.float32)
    s = s[s <= f.scale_max]
    product = w[:, None] * s[None]
    assert product.dtype == np.float32
    assert np.array_equal(product.astype(np.float64), w[:, None].astype(np.float64) * s[None].astype(np.float64))


def split_calls(times: int) -> list[bool]:
    """For each of some calls of products that are split, of one stream: if its bytes are right, its tickets 0 again."""
    launch._slots.clear()
    weight = Weight(20, 2100, "int8", (1, -1), True)
    choice = tuning.choose_matmul((2, 20, 2100), weight.format, torch.float32, 2100, True, False, "", 232448)
    assert choice.splits == 4
    x, x_codes = torch.randint(-8, 9, (2, 2100)).float(), torch.randint(-128, 128, (2, 2100)).to(torch.int8)
    want = reference.dequant_matmul(x.numpy(), *weight.arrays(), **weight.described())
    scaled = reference.scaled_matmul(
        x_codes.numpy(), np.ones((2, 1), np.float32), *weight.arrays(), **weight.described(), dtype="float32"
    )
    right = []
    for _ in range(times):
        y, z = poisoned((2, 20), torch.float32), poisoned((2, 20), torch.float32)
        backend.KERNELS["dequant_matmul"](x, weight.launched(True), Epilogue(), False, y)
        right.append(np.array_equal(y.numpy().view(np.uint32), want.view(np.uint32)))
        backend.KERNELS["scaled_matmul"](x_codes, torch.ones(2, 1), weight.launched(), None, Epilogue(), z)
        right[-1] &= np.array_equal(z.numpy().view(np.uint32), scaled.view(np.uint32))
        (tickets,) = launch._slots.values()
        right[-1] &= not tickets.any()
    return right


def test_splits_of_k_are_summed_in_order_at_every_call() -> None:
    assert split_calls(3) == [True] * 3


@triton.jit
def arrive_and_keep(total, partial_ptr, ticket_ptr, inside, SPLITS: tl.constexpr):
    tl.store(partial_ptr, total, inside)
    return tl.atomic_add(ticket_ptr, 1) == SPLITS - 1


def test_tickets_that_nobody_resets_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("quantlib.backends.triton.dequant_matmul"), "arrive", arrive_and_keep)
    monkeypatch.setattr(launch, "_slots", {})  # no later test gets these
    assert split_calls(2) == [False] * 2


def test_a_call_that_is_interrupted_leaves_no_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_calls(1) == [True]
    (tickets,) = launch._slots.values()
    tickets[0] = 3  # as Ctrl-C leaves them between two programs of a tile
    with pytest.raises(triton.runtime.errors.InterpreterError):
        launch.launch(divide_kernel, 1, torch.device("cpu"), 0, warps=1)
    assert not launch._slots


@triton.jit
def divide_kernel(n: tl.constexpr):
    1 // n


@pytest.mark.parametrize(("format", "block"), [("int8", (1, -1)), ("int4", (1, 64))])
def test_a_row_alone_has_the_bytes_it_has_in_a_batch(format: str, block: tuple[int, int]) -> None:
    weight = Weight(40, 640, format, block, False, exact=False)
    x = torch.randn(70, 640).bfloat16()
    y, alone = poisoned((70, 40), torch.bfloat16), poisoned((1, 40), torch.bfloat16)
    kernel = backend.KERNELS["dequant_matmul"]
    kernel(x, weight.launched(), Epilogue(), True, y)
    for m in (0, 37, 69):
        kernel(x[m : m + 1], weight.launched(), Epilogue(), True, alone)
        assert torch.equal(alone.view(torch.int16)[0], y.view(torch.int16)[m])


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_infinities_nan_and_subnormals_of_x(dtype: torch.dtype) -> None:
    weight = Weight(17, 64, "int8", (1, -1), False)
    x = torch.zeros(5, 64, dtype=dtype)
    x[0, 0], x[1, 1], x[2, 2] = float("inf"), float("nan"), -float("inf")
    x[3] = torch.finfo(dtype).smallest_normal / 4
    y = poisoned((5, 17), dtype)
    backend.KERNELS["dequant_matmul"](x, weight.launched(True), Epilogue(), False, y)
    want = reference.dequant_matmul(x.float().numpy(), *weight.arrays(), **weight.described(), dtype=name_of(dtype))
    assert_same_bytes(y, want, "what is not normal")


@pytest.mark.parametrize(("format", "block", "affine"), WEIGHTS, ids=str)
def test_dequant_matmul_backward_of_exact_operands(format: str, block: tuple[int, int], affine: bool) -> None:
    for n, (M, N, K) in enumerate(((3, 37, 75), (66, 20, 70), (17, 16, 64))):
        weight, dtype = Weight(N, K, format, block, affine), DTYPES[n]
        dy, dx = torch.randint(-8, 9, (M, N)).to(dtype), poisoned((M, K), dtype)
        backend.KERNELS["dequant_matmul_backward"](dy, weight.launched(), dx)
        want = reference.dequant_matmul_backward(
            dy.float().numpy(), *weight.arrays(), **weight.described(), dtype=name_of(dtype), size=K
        )
        assert_same_bytes(dx, want, f"dequant_matmul_backward {format} {block} M={M}")


@pytest.mark.parametrize("shape", [(3, 37, 150), (66, 20, 75), (2, 18, 2100)], ids=str)
@pytest.mark.parametrize("x_format", ["int8", "int8 affine", "uint8 affine", "uint8"])
def test_scaled_matmul(x_format: str, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    name, affine = x_format.split(maxsplit=1)[0], "affine" in x_format
    dtype = getattr(torch, name)
    info = torch.iinfo(dtype)
    per_row = (M, 1) if affine else (1, 1)
    x = torch.randint(info.min, info.max + 1, (M, K)).to(dtype)
    x_scale, z = torch.rand(per_row), torch.randint(info.min, info.max + 1, per_row).int() if affine else None
    kernel = backend.KERNELS["scaled_matmul"]
    for format, block, w_affine in WEIGHTS[:: 5 if K > 1000 else 2]:
        if formats.get(format).is_float:
            continue
        weight, bias = Weight(N, K, format, block, w_affine, exact=False), torch.randn(N)
        y = poisoned((M, N), torch.bfloat16)
        kernel(x, x_scale, weight.launched(), z, Epilogue(bias, "silu"), y)
        want = reference.scaled_matmul(
            x.numpy(), x_scale.numpy(), *weight.arrays(), **weight.described(), bias=bias.numpy(), activation="silu",
            x_zero_point=None if z is None else z.numpy(), dtype="bfloat16",
        )  # fmt: skip
        assert_same_bytes(y, want, f"scaled_matmul {x_format} {format} {block} {shape}")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_dynamic_matmul(dtype: torch.dtype) -> None:
    for format, block, affine in (("int8", (1, -1), False), ("int4", (1, 32), True)):
        weight, x = Weight(21, 130, format, block, affine, exact=False), torch.randn(9, 130).to(dtype)
        y = poisoned((9, 21), dtype)
        backend.KERNELS["dynamic_matmul"](x, weight.launched(), Epilogue(activation="gelu_tanh"), y)
        want = reference.dynamic_matmul(
            x.float().numpy(), *weight.arrays(), **weight.described(), activation="gelu_tanh", dtype=name_of(dtype)
        )
        assert_same_bytes(y, want, f"dynamic_matmul {format} {block}")


@pytest.mark.parametrize("op", ["dequant_matmul", "dynamic_matmul"])
def test_no_columns_leave_the_bias(op: str) -> None:
    codes, scale, bias = torch.empty(6, 0, dtype=torch.int8), torch.empty(6, 0), torch.randn(6)
    x, y = torch.empty(3, 0), poisoned((3, 6), torch.float32)
    rest = (False, y) if op == "dequant_matmul" else (y,)
    weight = QuantizedWeight(codes, scale, formats.get("int8"), (1, 1), None, (6, 0))
    backend.KERNELS[op](x, weight, Epilogue(bias), *rest)
    assert torch.equal(y, bias.expand(3, 6))


@triton.jit
def activate_kernel(x_ptr, y_ptr, ACTIVATION: tl.constexpr, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(y_ptr + i, activate(tl.load(x_ptr + i), ACTIVATION))


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_activations(activation: str | None) -> None:
    n = 1 << 17
    edges = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    bits = torch.randint(-(2**31), 2**31 - 1, (n // 2,)).int().view(torch.float32)
    x = torch.cat([edges, bits, torch.linspace(-120, 120, n - n // 2 - len(edges))])
    y = torch.empty(n)
    with np.errstate(all="ignore"):
        activate_kernel[(1,)](x, y, activation, n)
    assert_same_bytes(y, reference.activate(x.numpy(), activation).view(np.uint32), f"activate {activation}")


def test_a_choice_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QUANTLIB_SHOW_LAUNCH", "1")
    tuning.choose_matmul.cache_clear()
    tuning.choose_matmul((3, 4096, 4096), formats.get("int8"), torch.bfloat16, 4096, True, False, "a device", 232448)
    assert capsys.readouterr().err.startswith(
        "MatmulTile(tile_n=64, tile_m=8, tile_k=64, splits=8, warps=2, stages=4, slab=0, described=False, right=False,"
    )


@pytest.mark.parametrize("D", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["int8", "uint8", "int4"])
def test_the_assembly_that_makes_operands(format: str, D: str) -> None:
    """Instructions that the interpreter lacks are run here one by one on every byte: exact, and -0 nowhere."""
    from quantlib.backends.triton import matmul

    byte = np.arange(256, dtype=np.uint32)
    word = byte | byte[::-1] << 8 | (byte * 7 & 255) << 16 | (byte * 31 & 255) << 24
    made = run_assembly(
        assembly(matmul.nibble_operands if format == "int4" else matmul.byte_operand, format, D), word, D
    )
    four = np.stack([word >> shift & 255 for shift in (0, 8, 16, 24)], 1)
    codes = [four & 15, four >> 4] if format == "int4" else [four]
    half = 8 if format == "int4" else 128
    for n, code in enumerate(codes):
        want = code.astype(np.float32) - 128 if format == "uint8" else ((code ^ half).astype(np.float32) - half)
        found = np.stack([made[2 * n + e // 2][e % 2] for e in range(4)], 1)
        assert np.array_equal(found.view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("D", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["float4_e2m1fn", "nf4_bf16"])
def test_the_assembly_that_looks_operands_up(format: str, D: str) -> None:
    from quantlib.backends.triton import matmul

    f, byte = formats.get(format), np.arange(256, dtype=np.uint32)
    word = byte | byte[::-1] << 8 | (byte * 7 & 255) << 16 | (byte * 31 & 255) << 24
    made = run_assembly(matmul.look_up_assembly.fn(f, formats.get(D)).strip("{} "), word, D)
    values = reference.decode_float(np.arange(16, dtype=np.uint8), f).view(np.uint32)
    for n, place in enumerate((0, 4)):
        found = np.stack([made[2 * n + e // 2][e % 2] for e in range(4)], 1)
        want = np.stack([values[word >> (8 * e + place) & 15] for e in range(4)], 1)
        assert np.array_equal(found.view(np.uint32), want)


def assembly(function: Any, format: str, D: str) -> str:
    """The text that a function hands to the assembler for D; of two alternatives for a format, the one it takes."""
    branches = re.split(r"\n    else:", inspect.getsource(function.fn))
    text = branches[0 if D == "bfloat16" else 1]
    body = "".join(re.findall(r'"([^"]*[{};][^"]*)"', text[text.index("inline_asm") :]))
    flips = re.search(r'FLIP: tl.constexpr = "([^"]*)" if offset\(F\) else "([^"]*)"', text)
    if flips:
        declared = body.index("prmt")
        body = body[:declared] + flips[1 if format == "uint8" else 2] + body[declared:]
    return body.strip("{} ")


def run_assembly(text: str, word: Any, D: str) -> list[list[Any]]:
    """The pairs of floats left in $0, $1, ...; the last register is the input."""
    outputs = max(map(int, re.findall(r"\$(\d)", text)))
    made = inline_ptx.run(text, {outputs: word})
    return [inline_ptx.pair(made[n], D) for n in range(outputs)]
