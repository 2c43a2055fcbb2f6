"""The kernels of fake_quantize and its gradient compiled without a GPU, and their SASS read: see test_triton_static.py.

A step reads x and dy and writes dx once, in 128 bits each; nothing is added atomically, nothing is spilled.
``python tests/test_triton_fake_quantize_static.py 90`` prints the table of one architecture.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import test_triton_static as static

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SUMMING = ("fake_quantize_backward_kernel", "partial_gradients_kernel")


@dataclass(frozen=True)
class Case:
    """One call of both launchers."""

    source: torch.dtype
    format: str
    shape: tuple[int, int] = (4096, 4096)
    block: tuple[int, int] = (1, 4096)
    affine: bool = False
    registers: int = 64
    lsq: bool = False

    def __str__(self) -> str:
        M, K = self.shape
        kind = " affine" * self.affine + " lsq" * self.lsq
        return f"{str(self.source)[6:]} {self.format} {M}x{K} block {self.block}{kind}"


CASES = (
    *(Case(source, "int8") for source in (FP32, BF16, FP16)),
    Case(FP32, "int8", affine=True),
    Case(BF16, "int4", block=(1, 128), affine=True),
    Case(BF16, "int8", block=(4096, 4096), registers=96),
    Case(FP32, "uint8", block=(4096, 4096), affine=True, registers=128),
    Case(BF16, "int8", block=(128, 128), lsq=True),
    Case(BF16, "float8_e4m3fn"),
    Case(FP32, "float8_e5m2", block=(4096, 4096), registers=128),
)


@dataclass(frozen=True)
class Measured:
    """What one kernel was compiled to."""

    arch: int
    kernel: str
    registers: int
    spilled: int
    loads: tuple[int, ...]  # bytes of each load of x and dy by a thread
    stores: tuple[int, ...]
    instructions: float  # an element
    forbidden: tuple[str, ...]


def measure(case: Case, arch: int) -> list[Measured]:
    """Every kernel that the two launchers start, compiled and read."""
    return [read(arch, *launched) for launched in launches(case, arch)]


def launches(case: Case, arch: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    from quantlib import formats
    from quantlib.backends import triton as backend
    from quantlib.backends.triton import launch

    f = formats.get(case.format)
    (M, K), (br, bk) = case.shape, case.block
    x, dy, y = (torch.empty(M, K, dtype=case.source, device="meta") for _ in range(3))
    scale, dscale, dzero_point = (torch.empty(-(-M // br), -(-K // bk), device="meta") for _ in range(3))
    zero_point, dzero_point = (torch.empty_like(scale), dzero_point) if case.affine else (None, None)
    limits = (0, 0) if f.is_float else f.range(case.affine)
    given = (x, scale, f, case.block, zero_point, limits)
    with static.recording(launch, arch) as recorded:
        backend.KERNELS["fake_quantize"](*given, y)
        backend.KERNELS["fake_quantize_backward"](dy, *given, case.lsq, 1.0, y, dscale, dzero_point)
    return recorded


def read(arch: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Measured:
    binary = static.compiled(kernel, args, options, arch, True)
    text, (registers, stack, local) = static.sass(binary)
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text)
    main = loop(text) or operations[: operations.index("EXIT")]
    wide = [static.width(name) for name in main if name.startswith("LDG")]
    stores = [static.width(name) for name in main if name.startswith("STG")]
    elements = sum(s for s in stores if s == 16) / args[0].dtype.itemsize or 1
    forbidden = {name for name in operations if static.FORBIDDEN.match(name) and not static.integer_division(name)}
    return Measured(
        arch,
        kernel.__name__,
        registers,
        stack + local,
        tuple(wide),
        tuple(stores),
        len(main) / elements,
        tuple(sorted(forbidden)),
    )


def loop(text: str) -> list[str]:
    """The instructions of the loop that stores 128 bits, the longest there is."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*)", text)
    found: list[str] = []
    for at, (_, name, operands) in enumerate(lines):
        target = re.search(r"0x([0-9a-f]+)", operands) if name == "BRA" else None
        if target is None or int(target[1], 16) >= int(lines[at][0], 16):
            continue
        body = [n for address, n, _ in lines[: at + 1] if int(address, 16) >= int(target[1], 16)]
        if any(n.startswith("STG") and "128" in n for n in body) and len(body) > len(found):
            found = body
    return found


def faults(m: Measured, case: Case) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    found = [f"has {name}" for name in m.forbidden]
    if m.spilled:
        found.append(f"spills {m.spilled} bytes")
    if m.kernel == "combine_gradients_kernel":
        return found
    if m.registers > case.registers:
        found.append(f"{m.registers} registers > {case.registers}")
    reads = 2 if m.kernel in SUMMING else 1
    wide = m.stores.count(16)
    if not wide or m.loads.count(16) != reads * wide:
        found.append(f"{m.loads.count(16)} wide loads for {wide} wide stores, want {reads} for one")
    size = case.source.itemsize
    budget = static.PER_BYTE[m.arch] * (reads + 1) * size
    if m.instructions > budget:
        found.append(f"{m.instructions:.1f} instructions an element > {budget:.1f}")
    return found


def main(arch: int) -> int:
    """Print the table of ``arch``; the exit status says whether a kernel is at fault."""
    wrong = 0
    for case in CASES:
        for m in measure(case, arch):
            said = faults(m, case)
            wrong += bool(said)
            print(f"{case!s:58} {m.kernel:30} {m.registers:4} {m.instructions:6.1f}  {'; '.join(said) or 'ok'}")
    return min(wrong, 1)


@pytest.mark.parametrize("arch", static.SHARED_LIMIT)
def test_every_kernel_compiles_to_what_it_should(arch: int) -> None:
    """In a process of its own, without the interpreter: Triton keeps state."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, __file__, str(arch)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
