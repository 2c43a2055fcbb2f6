"""What nvcc made of the CUDA matmuls: codes become operands in a few instructions, with no conversion among them."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_cuda_static import ARCHITECTURES, cuobjdump

from quantlib import _build

FORMATS = ("int8", "int4", "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")  # uint8 is served by int8's kernel
# Instructions a code that a lane decodes in the main loop, at most. A GPU that gets codes as fast as its memory gives
# them has time for 7.8 where they have eight bits, and for 3.9 where four.
MOST = {"int8": 4.6, "int4": 2.9, "float8_e4m3fn": 5.7, "float8_e5m2": 5.7, "float4_e2m1fn": 4.4}
DECODE = r"dequant_matmul_kernelINS_\d+([a-z]\w*?)ENS_\d([a-z]+\d+)ELb([01])E"
# Neither a conversion nor a trip of operands through other memory, lanes or the stack.
FORBIDDEN = r"(I2F\w*|F2F|F2I|LDL|STL|LDS|STS|SHFL|BAR|MUFU)\b"


@dataclass(frozen=True)
class Loop:
    """The innermost instructions around a kernel's matrix instructions, without predicates and operands."""

    kernel: str
    architecture: str
    sass: tuple[str, ...]

    def has(self, pattern: str) -> list[str]:
        return [i for i in self.sass if re.match(pattern, i)]


def read(binary: Path) -> Iterator[Loop]:
    """The main loop of every kernel in ``binary`` that has matrix instructions."""
    program = cuobjdump()
    assert program is not None
    for architecture in ARCHITECTURES:
        command = [program, "-arch", architecture, "-sass", str(binary)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for part in sass.split("Function : ")[1:]:
            code = [
                (int(at, 16), name, operands)
                for at, name, operands in re.findall(
                    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", part
                )
            ]
            products = [at for at, name, _ in code if re.match(r"[HI]MMA", name)]
            if not products:
                continue
            jumps = [
                (int(to[1], 16), at) for at, name, o in code if name == "BRA" and (to := re.search("0x([0-9a-f]+)", o))
            ]
            around = [(first, last) for first, last in jumps if first <= products[0] and products[-1] <= last]
            first, last = min(around, key=lambda span: span[1] - span[0])
            yield Loop(part.split()[0], architecture, tuple(name for at, name, _ in code if first <= at <= last))


@pytest.fixture(scope="module")
def loops() -> list[Loop]:
    """Of the library that users load."""
    if _build.nvcc() is None or cuobjdump() is None:
        pytest.skip("there is no nvcc, or no cuobjdump")
    return list(read(_build.library("cuda")))


def faults(loop: Loop) -> list[str]:
    """What is wrong with the loop that decodes, if anything."""
    match = re.search(DECODE, loop.kernel)
    assert match is not None
    codes = 4 * len(loop.has("HMMA.16816.F32"))  # each multiplies 8 codes of a lane, and there are two for 16 rows of x
    found = [f"{name} in the loop" for name in sorted(set(loop.has(FORBIDDEN)))]
    if not loop.has(r"LDG\.E\.\S*128"):
        found.append("no vectors of 16 bytes")
    if len(loop.sass) > MOST[match[1]] * codes:
        found.append(f"{len(loop.sass) / codes:.2f} instructions a code")
    return [f"{loop.architecture} {match[1]} {match[2]}: {fault}" for fault in found]


def test_every_format_has_its_kernel(loops: list[Loop]) -> None:
    for architecture in ARCHITECTURES:
        found = [m.groups() for x in loops if x.architecture == architecture and (m := re.search(DECODE, x.kernel))]
        assert sorted(found) == sorted((f, x, t) for f in FORMATS for x in ("float16", "bfloat16") for t in "01")


def test_codes_become_operands_in_few_instructions(loops: list[Loop]) -> None:
    assert [fault for x in loops if re.search(DECODE, x.kernel) for fault in faults(x)] == []


def test_int8_is_multiplied_as_int8(loops: list[Loop]) -> None:
    scaled = [x for x in loops if "20scaled_matmul_kernel" in x.kernel]
    assert len(scaled) == 2 * len(ARCHITECTURES)
    for x in scaled:
        assert [p for p in (r"IMMA\.16832\.S8\.S8", r"LDG\.E\.128", "LDS") if not x.has(p)] == [], x
        assert not x.has("HMMA")


def test_a_conversion_is_seen(tmp_path: Path) -> None:
    nvcc = _build.nvcc()
    if nvcc is None or cuobjdump() is None:
        pytest.skip("there is no nvcc, or no cuobjdump")
    csrc, made = Path(shutil.copytree(_build.CSRC, tmp_path / "csrc")), tmp_path / "slow.cubin"
    operand, kernel = csrc / "cuda/operand.cuh", csrc / "cuda/dequant_matmul.cu"
    right = "return fma2(X{}, value, power, minus_zero);"
    assert right in operand.read_text()
    slow = "return both(encode_float<X>(float(value & 15) * float(minus_zero & 15), false));"
    operand.write_text(operand.read_text().replace(right, slow))
    kernel.write_text(re.sub(r"    case Type::float\w+:\n      return run.*\n", "", kernel.read_text()))
    flags = ["-O3", "-std=c++17", "-arch=sm_90", "-cubin"]
    subprocess.run([nvcc, *flags, str(kernel), "-o", str(made)], check=True, capture_output=True)
    assert all(any("I2F" in fault for fault in faults(x)) for x in read(made))
