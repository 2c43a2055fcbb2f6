"""QUANTLIB_LOG: which kernel a product takes, said once for each shape; nothing without it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from quantlib import backends
from quantlib.backends import choice

PROGRAM = """
import torch, quantlib
w8, w4 = (quantlib.quantize_dynamic(torch.ones(48, 256), f, block=(1, b)) for f, b in (("int8", -1), ("int4", 128)))
for M in (1, 1, 40, 40):
    quantlib.dynamic_matmul(torch.ones(M, 256), *w8)
    quantlib.dequant_matmul(torch.ones(M, 256), *w4, "int4", block=(1, 128))
with quantlib.use_backend("composite"):
    y = quantlib.scaled_matmul(torch.ones(2, 256, dtype=torch.int8), torch.ones(1, 1), *w8, dtype=torch.bfloat16)
    quantlib.cast(torch.ones(2), "bfloat16")
multiply = torch.compile(lambda x: torch.ops.quantlib.dynamic_matmul(x, *w8, "int8", (1, 256)), backend="eager")
multiply(torch.ones(3, 256))
try:
    quantlib.dynamic_matmul(torch.ones(2, 3), *w8)
except RuntimeError:
    print(y.shape)
"""


def run(value: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "QUANTLIB_LOG": value, "QUANTLIB_BACKEND": "auto"}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(backends.refuses("cpp", "cpu") is not None, reason="there are no C++ kernels")
def test_each_choice_is_said_once() -> None:
    done = run("1")
    assert (done.returncode, done.stdout) == (0, "torch.Size([2, 48])\n"), done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("quantlib: ")]
    assert len(lines) == len({line.rpartition(" (rows")[0] for line in lines})
    one, *_ = lines
    isa = choice.instruction_set()
    kernel = choice.kernel_of((1, 48, 256), (1, 256), "int8", False, "int8")
    assert one == (
        "quantlib: dynamic_matmul, x float32, weight [48, 256] int8 in blocks of [1, 256]: "
        f"cpp, the first for cpu; {isa}, {kernel['kernel']}, {kernel['why']} (rows of x: 1)"
    )
    several = {choice.kernel_of((M, 48, 256), (1, 256), "int8", False, "int8")["kernel"] for M in (1, 3, 40)}
    assert sum("dynamic_matmul" in line for line in lines) == len(several)
    assert any(" dequant_matmul, x float32, weight [48, 256] int4 in blocks of [1, 128]: cpp" in line for line in lines)
    forced = [line for line in lines if "scaled_matmul" in line]
    assert [line.partition(": ")[2].partition("]: ")[2] for line in forced] == [
        "composite, which is forced (rows of x: 2)"
    ]


def test_a_value_that_is_none_is_refused() -> None:
    done = run("yes")
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: QUANTLIB_LOG must be 0 or 1, got 'yes'\n")


@pytest.mark.skipif(choice.is_logged(), reason="QUANTLIB_LOG is set")
def test_nothing_stands_before_a_kernel_without_it() -> None:
    assert backends._binders
    assert not backends._logged
    assert not choice.log.handlers
