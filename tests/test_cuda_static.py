"""What nvcc made of csrc/cuda, read from the machine code: no GPU needed."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from quantlib import _build

ARCHITECTURES = ("sm_80", "sm_90")
# kernel -> the 16-byte accesses that it must have; of a cast, the wider side's
WIDE = {
    "cast_kernel": (r"(LDG|STG)\.E\.128$",),
    "quantize_kernel": (r"LDG\.E\.128$",),
    "dequantize_kernel": (r"STG\.E\.128$",),
    "compute_scale_kernel": (r"LDG\.E\.128$",),
    "quantize_dynamic_kernel": (r"LDG\.E\.128$",),
    "fake_quantize_kernel": (r"LDG\.E\.128$", r"STG\.E\.128$"),
    "fake_quantize_backward_kernel": (r"LDG\.E\.128$", r"STG\.E\.128$"),
}
SPILLS = r"(LDL|STL)\b"
FORBIDDEN = r"(D(ADD|MUL|FMA|SETP)|(RED|ATOMG?)\S*\.(F16|F32|F64|BF16))\b"  # nothing in double, no float atomics


def cuobjdump() -> str | None:
    """CUDA's disassembler: beside nvcc, or in the Triton package."""
    nvcc, triton = _build.nvcc(), importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    folders += [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return next((found for f in folders if (found := shutil.which("cuobjdump", path=f))), shutil.which("cuobjdump"))


if _build.nvcc() is None:
    pytest.skip("there is no nvcc", allow_module_level=True)
if cuobjdump() is None:
    pytest.skip("there is no cuobjdump beside nvcc or in Triton", allow_module_level=True)


@dataclass(frozen=True)
class Kernel:
    """One instantiation in machine code."""

    name: str
    architecture: str
    sass: tuple[str, ...]  # instructions without predicates and operands
    stack: int
    local: int

    def has(self, pattern: str) -> list[str]:
        return [i for i in self.sass if re.match(pattern, i)]


def read(binary: Path) -> Iterator[Kernel]:
    """Every kernel of every architecture in ``binary``."""
    program = cuobjdump()
    assert program is not None
    for architecture in ARCHITECTURES:
        command = [program, "-arch", architecture]
        usage = subprocess.run([*command, "-res-usage", str(binary)], capture_output=True, text=True, check=True).stdout
        sass = subprocess.run([*command, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
        used = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage))
        for part in sass.split("Function : ")[1:]:
            name, counts = part.split()[0], dict(re.findall(r"(\w+):(\d+)", used[part.split()[0]]))
            code = tuple(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part))
            yield Kernel(name, architecture, code, int(counts["STACK"]), int(counts["LOCAL"]))


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Of the library that users load."""
    return list(read(_build.library("cuda")))


def family(kernel: Kernel) -> str:
    return next((stem for stem in WIDE if f"{len(stem)}{stem}" in kernel.name), "")


def spilled(kernels: list[Kernel]) -> list[str]:
    return [f"{k.architecture} {k.name}" for k in kernels if k.stack or k.local or k.has(SPILLS)]


def test_both_architectures_hold_the_same_kernels(kernels: list[Kernel]) -> None:
    names = [{k.name for k in kernels if k.architecture == a} for a in ARCHITECTURES]
    assert names[0] == names[1]
    assert {family(k) for k in kernels} == {*WIDE, ""}  # "" is finish_kernel, which has scales only
    assert len(names[0]) > 100


def test_nothing_spills(kernels: list[Kernel]) -> None:
    assert spilled(kernels) == []


def test_memory_moves_sixteen_bytes_at_a_time(kernels: list[Kernel]) -> None:
    narrow = [k for k in kernels if family(k) and not all(k.has(access) for access in WIDE[family(k)])]
    assert [f"{k.architecture} {k.name}" for k in narrow] == []


def test_nothing_is_computed_in_double_or_added_in_an_order_left_to_chance(kernels: list[Kernel]) -> None:
    assert [(k.name, found) for k in kernels if (found := k.has(FORBIDDEN))] == []


def test_nothing_is_contracted(kernels: list[Kernel]) -> None:
    """A cast has no division, so a fused multiply-add in it would be a contraction (C0)."""
    assert [k.name for k in kernels if family(k) == "cast_kernel" and k.has(r"FFMA")] == []


def test_a_spill_is_seen(tmp_path: Path) -> None:
    nvcc = _build.nvcc()
    assert nvcc is not None
    csrc, made = Path(shutil.copytree(_build.CSRC, tmp_path / "csrc")), tmp_path / "starved.cubin"
    source = csrc / "cuda/compute_scale.cu"
    bounds = "__launch_bounds__(kThreads)"
    assert bounds in source.read_text()
    source.write_text(source.read_text().replace(bounds, "__launch_bounds__(kThreads, 8)"))  # 32 registers a thread
    flags = ["-O3", "-std=c++17", "-arch=sm_90", "-cubin"]
    subprocess.run([nvcc, *flags, str(source), "-o", str(made)], check=True, capture_output=True)
    assert spilled(list(read(made)))
