"""FlopCounterMode of torch counts the products with codes: 2 M N K, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fresh
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import quantlib
from quantlib.ops import flops

M, N, K = 6, 10, 32


def counted(function: Callable[[], Any]) -> int:
    flops.register()
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "spec", ["int8:row", "int4:group:16", "float8_e4m3fn:tensor", "W8A8", "int8@uint8:tensor:affine"]
)
def test_a_layer(spec: str) -> None:
    """A quantized layer counts as many as the float layer: a product forward, and backward one for x."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(K, N)), torch.randn(2, M // 2, K, requires_grad=True)
    want = counted(lambda: net(x))
    assert want == 2 * M * N * K
    quantlib.quantize_(net, spec)
    assert counted(lambda: net(x)) == want
    if "uint8" not in spec:
        assert counted(lambda: net(x).sum().backward()) == 2 * want


def test_the_gradient_of_a_scale() -> None:
    x = torch.randn(M, K)
    codes, scale = quantlib.quantize_dynamic(torch.randn(N, K), "int8", block=(1, -1))
    scale.requires_grad_()
    y = quantlib.dequant_matmul(x, codes, scale, "int8", block=(1, -1))
    assert counted(lambda: y.sum().backward()) == 2 * M * N * K


def test_tiles_one_row_and_ready_memory() -> None:
    x, weight = torch.randn(M, K), torch.randn(N, K)
    codes, scale = quantlib.quantize_dynamic(weight, "int8", block=(1, -1))
    tiles, out = quantlib.ops.tile(codes, "int8"), torch.empty(M, N)
    for call, rows in (
        (lambda: quantlib.dequant_matmul(x, tiles, scale, "int8", block=(1, -1), size=N), M),
        (lambda: quantlib.dequant_matmul(x[0], codes, scale, "int8", block=(1, -1)), 1),
        (lambda: quantlib.dequant_matmul(x, codes, scale, "int8", block=(1, -1), out=out), M),
        (lambda: quantlib.dynamic_matmul(x, codes, scale, out=out), M),
    ):
        assert counted(call) == 2 * rows * N * K


PROGRAM = """
import sys, torch, quantlib
from torch.utils.flop_counter import FlopCounterMode
net = torch.nn.Sequential(torch.nn.Linear(32, 10))
quantlib.quantize_(net, "int8:row")
with FlopCounterMode(display=False) as counter:
    net(torch.randn(6, 32))
print(counter.get_total_flops())
"""


def test_a_program_asks_for_nothing() -> None:
    """The counter is imported after quantlib, as in a sorted list of imports."""
    done = fresh.run(["-c", PROGRAM])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 2 * M * N * K
