"""scaled_matmul through tensor descriptors, in Triton's interpreter: every byte, and which calls it is for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantlib import formats, reference
from quantlib.backends import triton as backend
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.testing import assert_same_bytes, poisoned

pytest.importorskip("triton")
if not backend.interpreted():
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)

from quantlib.backends.triton import descriptors, launch, tuning

INT8 = formats.get("int8")


def operands(M: int, N: int, K: int, rows: int = 1) -> dict[str, Any]:
    """Codes of the whole range, -128 too, with one scale for ``rows`` rows of the weight."""
    return {
        "x_codes": torch.randint(-128, 128, (M, K)).to(torch.int8),
        "codes": torch.randint(-128, 128, (N, K)).to(torch.int8),
        "scale": torch.rand(-(-N // rows), 1),
    }


# More row tiles than are grouped together, fewer, one; a last one that is ragged in M, in N and in K.
@pytest.mark.parametrize(
    ("shape", "rows"), [((150, 40, 48), 1), ((37, 100, 80), 3), ((16, 32, 64), 32), ((1, 1, 16), 1)]
)
@pytest.mark.parametrize(("dtype", "activation"), [("bfloat16", "silu"), ("float32", None)])
def test_every_byte(
    shape: tuple[int, int, int], rows: int, dtype: str, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (M, N, K), o = shape, operands(*shape, rows)
    tile = tuning.MatmulTile(32, 16, 64, 1, 4, 3, described=True)
    monkeypatch.setattr(tuning, "choose_scaled", lambda *_: tile)
    bias = None if activation is None else torch.randn(N)
    x_scale, y = torch.rand(M if rows == 1 else 1, 1), poisoned((M, N), getattr(torch, dtype))
    kernel = backend.KERNELS["scaled_matmul"]
    weight = QuantizedWeight(o["codes"], o["scale"], INT8, (rows, K), None, (N, K))
    kernel(o["x_codes"], x_scale, weight, None, Epilogue(bias, activation), y)
    want = reference.scaled_matmul(
        o["x_codes"].numpy(), x_scale.numpy(), o["codes"].numpy(), o["scale"].numpy(), "int8", block=(rows, K),
        bias=None if bias is None else bias.numpy(), activation=activation, dtype=dtype,
    )  # fmt: skip
    assert_same_bytes(y, want, f"scaled_matmul through descriptors {shape}")


def test_what_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Symmetric int8 with one scale a row, K a multiple of 16, on aligned memory, on ARCHS: and nothing else."""
    monkeypatch.setattr(launch, "arch", lambda device: 90)
    good, z = operands(4, 8, 32), torch.zeros(8, 1, dtype=torch.int32)

    def describable(x_zero_point: Any = None, zero_point: Any = None, **changed: Any) -> bool:
        o = good | changed
        weight = QuantizedWeight(o["codes"], o["scale"], INT8, (1, 32), zero_point, tuple(o["codes"].shape))
        return descriptors.describable(o["x_codes"], weight, x_zero_point)

    assert describable()
    assert not describable(x_zero_point=z)
    assert not describable(zero_point=z)
    assert not describable(x_codes=good["x_codes"].view(torch.uint8))
    assert not describable(codes=good["codes"].view(torch.uint8))
    assert not describable(scale=torch.rand(8, 2))
    assert not describable(codes=torch.zeros(8 * 32 + 1, dtype=torch.int8)[1:].view(8, 32))
    assert not describable(**operands(4, 8, 40))
    assert not describable(**operands(4, 8, 0))
    for arch in (0, 80, 89, 100):
        monkeypatch.setattr(launch, "arch", lambda device, arch=arch: arch)
        assert describable() == (arch in descriptors.ARCHS)


@pytest.mark.parametrize(
    ("shape", "dtype", "tile"),
    [
        ((4096, 4096, 4096), torch.bfloat16, (128, 256)),
        ((4096, 4096, 4096), torch.float32, (128, 128)),
        ((4096, 4097, 4096), torch.bfloat16, (128, 128)),
        ((256, 4096, 4096), torch.bfloat16, (64, 128)),
        ((65, 4096, 4096), torch.bfloat16, (64, 64)),
    ],
)
def test_the_largest_tile_of_which_there_are_enough(
    shape: tuple[int, int, int], dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    chosen = tuning.choose_scaled(shape, INT8, shape[2], "a device", 232448, dtype, True)
    assert (chosen.tile_m, chosen.tile_n, chosen.described) == (*tile, True)


def test_small_batches_and_other_devices_take_the_plain_kernel() -> None:
    assert not tuning.choose_scaled((64, 4096, 4096), INT8, 4096, "a device", 232448, torch.bfloat16, True).described
    assert not tuning.choose_scaled((4096, 4096, 4096), INT8, 4096, "a device", 232448, torch.bfloat16, False).described


@pytest.mark.parametrize(
    ("tile", "itemsize", "programs"),
    [
        (tuning.MatmulTile(256, 128, 64, 1, 8, 4, 4096, True), 2, 1),
        (tuning.MatmulTile(128, 128, 64, 1, 8, 3, 4096, True), 2, 2),
        (tuning.MatmulTile(128, 128, 64, 1, 8, 4, 4096, True), 2, 1),  # loads in flight take too much shared memory
        (tuning.MatmulTile(128, 128, 128, 1, 8, 3, described=True), 1, 2),
        (tuning.MatmulTile(256, 128, 32, 1, 8, 2, 4096, True), 2, 1),  # sums take too many registers
    ],
)
def test_a_multiprocessor_holds_two_programs_where_both_fit(
    tile: tuning.MatmulTile, itemsize: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "shared_memory", lambda device: 232448)
    assert descriptors.resident(tile, itemsize, torch.device("cpu")) == programs
