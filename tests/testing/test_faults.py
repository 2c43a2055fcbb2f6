"""Planted faults: in a scratch copy of the package, each kind of mistake is one that the suite sees.

The copy is the package with one piece of text changed; the case table then runs on it as on any backend.
"""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import fresh
import pytest

from quantlib import _build, backends
from quantlib.testing import support

ROOT = Path(__file__).parents[2]
X86 = platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Fault:
    name: str
    edits: tuple[tuple[str, str, str], ...]  # (file, what stands there, what the mistake is)
    table: tuple[str, ...]  # the part of the case table that has to see it

    def __str__(self) -> str:
        return self.name


COMPOSITE = "quantlib/backends/composite"
QUANTIZE, SCALE, NUMERICS, CAST = (f"{COMPOSITE}/{op}.py" for op in ("quantize", "compute_scale", "numerics", "cast"))
SEARCH = f"{COMPOSITE}/search_scale.py"
INT8 = ("--op", "quantize", "--format", "int8")
PACKING = "quantlib/backends/packing.py"
PROJECT = "t = x.float() * spread(effective_scale(scale, format).reciprocal(), M, K, block)"
ENCODE = "code = torch.minimum(torch.maximum(t, (qmin - z).float()), (qmax - z).float()).round().int() + z"

PYTHON = [
    Fault(
        "division instead of the reciprocal product",
        ((QUANTIZE, PROJECT, "t = x.float() / spread(effective_scale(scale, format), M, K, block)"),),
        INT8,
    ),
    Fault(
        "integer ties away from zero",
        ((QUANTIZE, ENCODE, ENCODE.replace(".round()", ".mul(2).add(1).div(2).floor()")),),
        INT8,
    ),
    Fault(
        "float ties away from zero",
        ((NUMERICS, "r = a + (a >> shift & 1) + ((1 << (shift - 1)) - 1)", "r = a + (1 << (shift - 1))"),),
        ("--op", "cast", "--format", "float8_e4m3fn"),
    ),
    Fault(
        "the zero point added before rounding",
        ((QUANTIZE, ENCODE, "code = (t + z).round().clamp(qmin, qmax).int()"),),
        INT8,
    ),
    Fault("symmetric codes down to -128", ((QUANTIZE, "format.range(affine)", "format.range(True)"),), INT8),
    Fault("NaN with the largest code", ((QUANTIZE, "torch.where(t == t, t, 0)", "torch.where(t == t, t, 999)"),), INT8),
    Fault(
        "two roundings on the way to 8 bits",
        ((CAST, "decode_float(x, x_format)", "decode_float(x, x_format).half().float()"),),
        ("--op", "cast", "--format", "float8_e5m2"),
    ),
    Fault(
        "a scale by a reciprocal constant",
        ((SCALE, "/ constant(amax, format.max)", "* (1 / constant(amax, format.max))"),),
        ("--op", "compute_scale", "--format", "int8"),
    ),
    Fault(
        "the last of equal losses",
        ((SEARCH, "better = loss < least", "better = loss <= least"),),
        ("--op", "search_scale", "--format", "int4"),
    ),
    Fault(
        "scales that are tried before they are rounded",
        ((SEARCH, "narrowed(s0 * (part / 32), kept)", "s0 * (part / 32)"),),
        ("--op", "search_scale", "--format", "int4"),
    ),
    Fault(
        "the high nibble first",
        ((PACKING, "codes[..., 0 :: f.per_byte]", "codes[..., 1 :: f.per_byte]"),
         (PACKING, "codes[..., i :: f.per_byte]", "codes[..., 1 - i :: f.per_byte]")),
        ("--op", "quantize", "--format", "int4"),
    ),
    Fault(
        "a kernel that writes to its input",
        ((QUANTIZE, PROJECT, PROJECT.replace("x.float() * spread(", "x.float().mul_(spread(") + ")"),),
        INT8,
    ),
    Fault(
        "an out that is left as it was",
        (("quantlib/ops/declare.py", "out.copy_(written)", "pass"),),
        ("--op", "dequantize", "--format", "uint8"),
    ),
]  # fmt: skip

CPP = [
    Fault(
        "C++: ties away from zero",
        (("csrc/numerics.h", "magnitude + ((magnitude >> shift) & 1u) + ((1u << (shift - 1)) - 1u)",
          "magnitude + (1u << (shift - 1))"),),
        ("--op", "cast", "--format", "bfloat16"),
    ),
    Fault(
        "C++: division instead of the reciprocal product",
        (("csrc/numerics.h", "return div(1.0f, s_eff);", "return s_eff;"),
         ("csrc/cpu/encode.cpp", "t = mul(t, load<Floats>(r + j));", "t = t / load<Floats>(r + j);")),
        INT8,
    ),
    Fault(
        "C++: multiply and add contracted to FMA",
        (("quantlib/_build.py", 'COMMON = ("-O1"', 'COMMON = ("-O2"'),  # the least that contracts
         ("quantlib/_build.py", "-ffp-contract=off", "-ffp-contract=fast"),
         ("quantlib/_build.py", '{"plain": ()}', '{"plain": ("-mfma",)}' if X86 else '{"plain": ()}')),
        ("--op", "compute_scale", "--format", "int8"),
    ),
]  # fmt: skip
WRONG_LETTER = Fault(
    "C++: a wrong letter in a registration",
    (("csrc/ops/quantize.cpp", '"quantize", quantize', '"quantise", quantize'),),
    (),
)
# Only the plain instruction set, not optimised, and none of the products: seconds of compiling, not a minute.
PLAIN = (
    ("quantlib/_build.py", 'COMMON = ("-O3"', 'COMMON = ("-O1"'),
    ("csrc/cpu/backend.cpp", "QL_KERNEL(dequant_matmul_choice, DequantMatmulChoice)\n", ""),
    ("csrc/cpu/backend.cpp", "QL_KERNEL(scaled_matmul_choice, ScaledMatmulChoice)\n", ""),
    ("csrc/cpu/backend.cpp", "if (asked.x_type == Type::int8) launch(ScaledMatmulChoice{asked});", ""),
    ("csrc/cpu/backend.cpp", "else launch(DequantMatmulChoice{asked});", ""),
    ("quantlib/_build.py", 'if platform.machine() in ("x86_64", "AMD64"):\n    ISAS', "if False:\n    ISAS"),
    ("csrc/cpu/backend.h", "#ifdef __x86_64__", "#if 0"),
    ("csrc/cpu/backend.cpp", "#ifdef __x86_64__", "#if 0"),
)


def plant(scratch: Path, edits: tuple[tuple[str, str, str], ...]) -> Path:
    """A copy of the package and its C++ with ``edits`` made."""
    leave_out = shutil.ignore_patterns("*.so")
    for folder in ("quantlib", "csrc"):
        shutil.copytree(ROOT / folder, scratch / folder, ignore=leave_out)
    for name, right, wrong in edits:
        path = scratch / name
        text = path.read_text()
        assert right in text, f"{name} no longer has {right!r}: plant the fault where it is now"
        path.write_text(text.replace(right, wrong))
    return scratch


def plant_plain(scratch: Path, edits: tuple[tuple[str, str, str], ...], *ops: str) -> Path:
    """Plant ``edits`` in a build of the plain instruction set that has only ``ops``."""
    plant(scratch, (*PLAIN, *edits))
    for glue in scratch.glob("csrc/ops/*.cpp"):
        if glue.stem not in ops:
            (scratch / "csrc/cpu" / glue.name).unlink(missing_ok=True)
    return scratch


def run(scratch: Path, *arguments: str, build: str, **more: str) -> fresh.Done:
    environment = os.environ | more
    environment |= {
        "PYTHONPATH": str(scratch),
        "QUANTLIB_BUILD": build,
        "QUANTLIB_CACHE": str(scratch / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    for name in ("QUANTLIB_ISA", "QUANTLIB_BACKEND"):
        environment.pop(name, None)
    return fresh.run(["-m", *arguments], env=environment, cwd=scratch)


def needs_sources() -> None:
    if not (ROOT / "csrc").is_dir() or (why := backends.refuses("cpp", "cpu")):
        pytest.skip("cpp: " + (why if (ROOT / "csrc").is_dir() else "its sources are not here"))
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("cpp: no compiler")


@pytest.mark.parametrize("fault", PYTHON, ids=str)
def test_fault_in_python_is_seen(fault: Fault, tmp_path: Path) -> None:
    done = run(plant(tmp_path, fault.edits), "quantlib.testing", "composite", *fault.table, build="0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differ, first at [" in done.stdout, done.stdout + done.stderr


def test_without_a_fault_the_copy_is_right(tmp_path: Path) -> None:
    done = run(plant(tmp_path, ()), "quantlib.testing", "composite", *INT8, build="0")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("fault", CPP, ids=str)
def test_fault_in_cpp_is_seen(fault: Fault, tmp_path: Path) -> None:
    needs_sources()
    if "FMA" in fault.name and X86 and "fma" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no FMA")
    done = run(
        plant_plain(tmp_path, fault.edits, "cast", fault.table[1]), "quantlib.testing", "cpp", *fault.table, build="1"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "differ, first at [" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_an_op_that_is_no_longer_reached_is_seen(tmp_path: Path) -> None:
    """Nothing else would fail: pure torch lies below and gives the same bytes."""
    needs_sources()
    kept = ("cast", "quantize", "dequantize")
    scratch = plant_plain(tmp_path, WRONG_LETTER.edits, *kept)
    done = run(scratch, "quantlib.testing.support", str(tmp_path / "support.txt"), build="1", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr
    found = support.recorded((tmp_path / "support.txt").read_text(), "cpp")
    right = support.recorded((ROOT / "tests/support.txt").read_text(), "cpp")
    lost = {row for row in right if right[row] != found[row] and row.split()[0].partition(".")[0] in kept}
    assert lost
    assert {row.split()[0] for row in lost} == {"quantize", "quantize.out"}  # one line registers both


def test_the_flags_that_faults_replace_are_there() -> None:
    assert "-ffp-contract=off" in _build.HOST
    assert "-fmad=false" in _build.CUDA
