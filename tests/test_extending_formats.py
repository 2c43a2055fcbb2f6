"""What CONTRIBUTING promises to whoever adds something, tried in a copy of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from quantlib import _build, backends, formats
from quantlib.cli import info

ROOT = Path(__file__).parent.parent


def copy_of_tree(folder: Path) -> Path:
    """A copy of the sources and the tests, without anything that was built."""
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "results", ".*")
    for name in ("quantlib", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def python(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter on a copy, which compiles nothing."""
    settings = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "QUANTLIB_BUILD": "0", **environment}
    kept = {k: v for k, v in os.environ.items() if k not in ("QUANTLIB_ISA", "QUANTLIB_BACKEND", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=kept | settings, capture_output=True, text=True, check=False
    )


def expect_green(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]


# ---- a format -------------------------------------------------------------------------------------------------------

# Codes without a sign, four to a byte, six bits in a byte, NaN in the place of -0: name -> row
ROWS = {
    "float8_e4m3fnuz": 'FloatFormat("float8_e4m3fnuz", 4, 3, 8, False, "negative zero")',
    "float6_e3m2fn": 'FloatFormat("float6_e3m2fn", 3, 2, 3, False, "none")',
    "float6_e2m3fn": 'FloatFormat("float6_e2m3fn", 2, 3, 1, False, "none")',
    "uint4": 'IntFormat("uint4", 4, False, 2)',
    "int2": 'IntFormat("int2", 2, True, 4)',
}
# What a person may get wrong in them -> what must be said
WRONG = {
    'FloatFormat("float8_e4m3fnuz", 4, 3, 8, False, "high")': "float8_e4m3fnuz.* by its name",
    'FloatFormat("float8_e4m3fnuz", 4, 3, 7, False, "negative zero")': "float8_e4m3fnuz.* by its name",
    'FloatFormat("float6_e3m2fn", 3, 2, 3, False, "high")': "float6_e3m2fn.* by its name",
    'FloatFormat("float6_e3m2fn", 3, 2, 3, True, "high")': "float6_e3m2fn.* by its name",
    'FloatFormat("float6_e3m2fn", 2, 3, 1, False, "none")': "float6_e3m2fn.* by its name",
    'IntFormat("uint4", 4, True, 2)': r"uint4: range is \(-8, 7\), its name says \(0, 15\)",
}
IN_TABLE = ")  # fmt: skip\n\nFORMATS"


def add_rows(tree: Path, rows: Sequence[str]) -> Path:
    """What CONTRIBUTING says to do: the rows, then the header."""
    table = tree / "quantlib/formats.py"
    text = table.read_text()
    assert text.count(IN_TABLE) == 1, "the table no longer ends so"
    table.write_text(text.replace(IN_TABLE, "".join(f"    {row},\n" for row in rows) + IN_TABLE))
    header = python(tree, "quantlib/formats.py")
    expect_green(header)
    (tree / "csrc/formats.h").write_text(header.stdout)
    return tree


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with all of `ROWS`."""
    return add_rows(copy_of_tree(tmp_path_factory.mktemp("extended")), tuple(ROWS.values()))


@pytest.mark.parametrize("name", ROWS)
def test_a_planted_format_is_new(name: str) -> None:
    assert name not in formats.FORMATS


def test_the_tests_of_formats_take_new_rows(extended: Path) -> None:
    """Among them the comparison of every code with what the format's name says, and with ml_dtypes."""
    names = [f"tests/test_{stem}.py" for stem in ("formats", "reference", "packing")]
    expect_green(python(extended, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *names))


@pytest.mark.parametrize("row", WRONG)
def test_a_wrong_row_is_seen(row: str, tmp_path: Path) -> None:
    tree = add_rows(copy_of_tree(tmp_path), [row])
    name = re.findall(r'"(\w+)"', row)[0]
    done = python(tree, "-m", "quantlib.testing", "composite", "--op", "compute_scale", "--format", name)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(WRONG[row], done.stdout), done.stdout


def table_of(extended: Path, backend: str, name: str, **environment: str) -> None:
    """The case tables of one new format on a backend, of which every third case on one that is slow."""
    part = ("--part", "1/7") if backend == "triton" else ()
    expect_green(python(extended, "-m", "quantlib.testing", backend, "--format", name, *part, **environment))


@pytest.mark.parametrize("name", ROWS)
def test_pure_torch_serves_it(extended: Path, name: str) -> None:
    table_of(extended, "composite", name)


@pytest.mark.parametrize("name", ROWS)
def test_triton_serves_it(extended: Path, name: str) -> None:
    pytest.importorskip("triton")
    table_of(extended, "triton", name, TRITON_INTERPRET="1")


# The kernels of one instruction set by the names of the others, which the library chooses among.
OTHER_ISAS = """
#include "cpu/kernels.h"
#define QL_OTHER(OP, PROBLEM) \\
  void OP(const PROBLEM& problem, ParallelFor run) { quantlib::TESTED_ISA::OP(problem, run); }
namespace quantlib {
"""


def compile_library(package: Path, isa: str) -> None:
    """``_C.so`` as a wheel has it, of one instruction set's kernels and without -O3: a sixth of the time."""
    csrc, made = package / "_csrc", package / "_C.so"
    others = [other for other in _build.ISAS if other != isa]
    stand_ins = "".join(f"namespace {other} {{\nQL_KERNELS(QL_OTHER)\n}}\n" for other in others)
    (package / "others.cpp").write_text(f"{OTHER_ISAS}{stand_ins}}}  // namespace quantlib\n")
    ops = [path for path in sorted(csrc.glob("cpu/*.cpp")) if path.name != "register.cpp"]
    (package / "kernels.cpp").write_text("".join(f'#include "{op}"\n' for op in ops))
    torch = _build.find_torch()
    include = ("-I", csrc, "-I", package, "-isystem", torch / "include")
    flags = [*(flag for flag in (*_build.CPU, *_build.HOST) if flag != "-O3"), "-O1", f"-DTESTED_ISA={isa}", *include]
    objects = []
    for source, more in (
        (package / "kernels.cpp", (*_build.ISAS[isa], f"-DQL_ISA={isa}")),
        (package / "others.cpp", ()),
        (csrc / "registration.cpp", ()),
        (csrc / "cpu/register.cpp", ()),
    ):
        objects.append(source.with_suffix(".o"))
        compile_one([*_build.cxx_command(), *flags, *more, "-c", source, "-o", objects[-1]])
    compile_one([*_build.cxx_command(), "-shared", *objects, torch / "lib/libtorch_cpu.so", "-o", made])


def compile_one(command: Sequence[object]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def with_library(extended: Path) -> Path:
    """The same copy with its C++ kernels, those of the best instruction set that this machine has."""
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(why)
    shutil.copytree(extended / "csrc", extended / "quantlib/_csrc")
    compile_library(extended / "quantlib", info.instruction_set())
    return extended


@pytest.mark.parametrize("name", ROWS)
def test_cpp_serves_it(with_library: Path, name: str) -> None:
    table_of(with_library, "cpp", name)
