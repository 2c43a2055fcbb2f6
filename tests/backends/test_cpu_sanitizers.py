"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer, one instruction set after the other.

``native/cpu_kernels.cpp`` calls every op over awkward sizes, in memory that ends where the data ends, on three threads,
and compares each value with the functions of ``csrc/numerics.h`` called one element at a time.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from quantlib import _build

NATIVE = Path(__file__).parents[1] / "native"
CXX = shlex.split(os.environ.get("CXX", "c++"))
KERNELS = sorted(p for p in _build.CSRC.glob("cpu/*.cpp") if p.name != "backend.cpp")
FLAGS = ("-std=c++20", f"-I{_build.CSRC}", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
CALLED = ("--param", "asan-instrumentation-with-call-threshold=0")  # checks that are calls compile in half the time

pytestmark = pytest.mark.skipif(shutil.which(CXX[0]) is None, reason=f"no C++ compiler: {CXX[0]}")


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done.stdout


def compile_kernels(folder: Path, isa: str, *flags: str) -> Path:
    """Every op in one object: the headers are read once."""
    unity = folder / "kernels.cpp"
    unity.write_text("".join(f'#include "{kernel}"\n' for kernel in KERNELS))
    made = folder / f"kernels_{isa}.o"
    run(*CXX, *FLAGS, *_build.ISAS[isa], f"-DQL_ISA={isa}", *flags, "-c", unity, "-o", made)
    return made


def runs_here(isa: str) -> bool:
    try:
        flags = re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[0]
        has = set(flags.replace("_", "").split())
    except (OSError, IndexError):
        has = set()
    return {flag.removeprefix("-m") for flag in _build.ISAS[isa] if "=" not in flag} <= has


def compiles(folder: Path, *flags: str) -> bool:
    (folder / "probe.cpp").write_text("int main() {}\n")
    probe = [*CXX, *flags, str(folder / "probe.cpp"), "-o", str(folder / "probe")]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def has_tiles() -> bool:
    return "amx_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else False


def levels() -> list[str]:
    """The instruction sets that this machine runs, from the slowest to the fastest."""
    return [isa for isa in _build.ISAS if runs_here(isa)] + ["amx"] * (runs_here("avx512_bf16") and has_tiles())


@pytest.mark.slow
@pytest.mark.parametrize("isa", [*_build.ISAS, "amx"])
def test_memory_and_arithmetic(isa: str, tmp_path: Path) -> None:
    here = levels()
    if isa not in here:
        pytest.skip(f"this machine has no {isa}")
    if isa != here[-1] and not os.environ.get("QUANTLIB_EVERY_ISA"):
        pytest.skip("make sanitize runs it")
    amx = isa == "amx"
    isa = "avx512_bf16" if amx else isa  # whose files hold the kernels with tiles
    flags = next((f for f in ((*SANITIZERS, *CALLED), SANITIZERS) if compiles(tmp_path, *f)), None)
    if flags is None:
        pytest.skip("the compiler has no sanitizers")
    kernels = compile_kernels(tmp_path, isa, "-Og", *flags)
    program = tmp_path / "cpu_kernels"
    driver = NATIVE / "cpu_kernels.cpp"  # what it computes for comparison is not watched: a third of the time
    run(
        *CXX,
        *FLAGS,
        "-O2",
        "-g1",
        f"-DTESTED_ISA={isa}",
        *["-DWITH_AMX"] * amx,
        "-c",
        driver,
        "-o",
        program.with_suffix(".o"),
    )
    run(*CXX, *SANITIZERS, program.with_suffix(".o"), kernels, "-pthread", "-o", program)
    assert re.fullmatch(r"\d{8} values, 0 wrong\n", run(program, isa, LD_PRELOAD=""))


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("isa", _build.ISAS)
def test_lends_no_code(isa: str, tmp_path: Path) -> None:
    """A function that two instruction sets emit under one name is linked once: on an old machine, the wrong one.

    Not optimised, so that nothing escapes by being inlined.
    """
    symbols = run("nm", "-C", "--defined-only", compile_kernels(tmp_path, isa, "-O0"))
    mine = re.compile(rf"\S+ ([a-z] |\S .*quantlib::{isa}::|V DW\.ref)")  # local; of this namespace; how to unwind
    shared = [line for line in symbols.splitlines() if not mine.match(line)]
    assert not shared, "\n".join(shared)
    assert f"quantlib::{isa}::quantize_dynamic(" in symbols
