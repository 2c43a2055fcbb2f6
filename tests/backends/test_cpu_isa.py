"""One library, several instruction sets, whatever the floats of the calling thread are set to.

That each gives the same bytes is in tests/ops: test_every_instruction_set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import fresh
import pytest
import torch

from quantlib import _build, backends
from quantlib.testing import assert_same_bytes

quant = torch.ops.quantlib
pytestmark = pytest.mark.skipif(backends.refuses("cpp", "cpu") is not None, reason="there is no compiled library")


def test_unknown() -> None:
    call = "import torch, quantlib; quantlib.cast(torch.ones(2), 'float16')"
    done = fresh.run(["-c", call], env={**os.environ, "QUANTLIB_ISA": "sse9"})
    assert done.returncode == 1
    assert "quantlib: QUANTLIB_ISA must be one of plain" in done.stderr
    assert "on this machine, got sse9" in done.stderr


def test_flush_to_zero_of_the_caller() -> None:
    """torch.set_flush_denormal must not reach the kernels: gradual underflow is in the contract (C0)."""
    x = torch.arange(0, 1 << 24, 1 << 9, dtype=torch.int32).view(torch.float32)  # half of them subnormal
    assert 0 < (x < 2.0**-126).sum() < len(x)
    calls = [lambda f=f: quant.cast(x, f, False) for f in ("bfloat16", "float32", "float16")]
    calls += [lambda s=s: quant.quantize(x, torch.tensor([[s]]), "bfloat16", [1, len(x)]) for s in (2.0**-100, 1.0)]
    calls += [lambda: quant.compute_scale(x, "int8", [1, 16])]
    tiny = torch.arange(1 << 15, dtype=torch.int16).view(torch.bfloat16)
    calls += [lambda: quant.dequantize(tiny, torch.tensor([[0.5]]), "bfloat16", [1, len(tiny)])]
    with backends.use_backend("cpp"):
        want = [call() for call in calls]
        if not torch.set_flush_denormal(True):
            pytest.skip("this machine cannot flush")
        try:
            got = [call() for call in calls]
        finally:
            torch.set_flush_denormal(False)
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b)


def test_out_over_the_input() -> None:
    with backends.use_backend("cpp"):
        for start in (0, 1, 1000):
            x = torch.linspace(-3, 3, 1000)
            want = quant.cast(x, "float16", False)
            out = x.view(torch.float16)[start : start + 1000]
            quant.cast.out(x, "float16", False, out=out)
            assert_same_bytes(out, want)


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.skipif(shutil.which(_build.cxx_command()[0]) is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", _build.ISAS)
def test_lends_no_code(isa: str, tmp_path: Path) -> None:
    """A function that two instruction sets emit under one name is linked once: on an old machine, the wrong one.

    All ops in one object, for which headers are read once; not optimised, so that nothing escapes by being inlined.
    """
    unity, made = tmp_path / "kernels.cpp", tmp_path / "kernels.o"
    kernels = sorted(p for p in _build.CSRC.glob("cpu/*.cpp") if p.name != "backend.cpp")
    unity.write_text("".join(f'#include "{kernel}"\n' for kernel in kernels))
    flags = ("-std=c++20", "-O0", f"-I{_build.CSRC}", *_build.ISAS[isa], f"-DQL_ISA={isa}")
    symbols = ""
    for command in ([*_build.cxx_command(), *flags, "-c", unity, "-o", made], ["nm", "-C", "--defined-only", made]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        symbols = done.stdout
    mine = re.compile(rf"\S+ ([a-z] |\S .*quantlib::{isa}::|V DW\.ref)")  # local; of this namespace; how to unwind
    shared = [line for line in symbols.splitlines() if not mine.match(line)]
    assert not shared, "\n".join(shared)
    assert f"quantlib::{isa}::quantize_dynamic(" in symbols
