"""A format, an op and a backend are added to a copy of the tree, each as CONTRIBUTING describes it.

The one library that is compiled for the formats is also the one that the suite runs under AddressSanitizer and
UndefinedBehaviorSanitizer; `make sanitize` runs the tests under them, at every instruction set of the machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import textwrap
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fresh
import pytest

from quantlib import _build, backends, formats
from quantlib.backends.choice import instruction_set
from quantlib.formats import NF4, FloatFormat, Format, IntFormat, book
from quantlib.testing import names

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").is_dir(), reason="not a checkout")


def copy_of_tree(tmp_path: Path) -> Path:
    """The package and its C++ sources, to be changed."""
    for folder in ("quantlib", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    return tmp_path


def run(tree: Path, *arguments: str, **environment: str) -> str:
    """Return the output of this Python in ``tree``; it must succeed."""
    settings = {name: value for name, value in os.environ.items() if name not in ("QUANTLIB_BACKEND", "QUANTLIB_ISA")}
    settings |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", **environment}
    done = fresh.run([*arguments], env=settings, cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def write(path: Path, text: str) -> None:
    assert not path.exists(), "a new file"
    path.parent.mkdir(exist_ok=True)
    path.write_text(textwrap.dedent(text))


# ---- a format -------------------------------------------------------------------------------------------------------

# Codes without a sign, four to a byte, of six bits in a byte of their own, and NaN in the place of -0
ROWS: dict[str, Format] = {
    f.name: f
    for f in (
        FloatFormat("float8_e4m3fnuz", 4, 3, 8, False, "negative zero"),
        FloatFormat("float6_e3m2fn", 3, 2, 3, False, "none"),
        FloatFormat("float6_e2m3fn", 2, 3, 1, False, "none"),
        IntFormat("uint4", 4, False, 2),
        IntFormat("int2", 2, True, 4),
    )
}
WRONG = {
    "another NaN": FloatFormat("float8_e4m3fnuz", 4, 3, 8, False, "high"),
    "another bias": FloatFormat("float8_e4m3fnuz", 4, 3, 7, False, "negative zero"),
    "a NaN where there is none": FloatFormat("float6_e3m2fn", 3, 2, 3, False, "high"),
    "infinity where there is none": FloatFormat("float6_e3m2fn", 3, 2, 3, True, "high"),
    "another exponent": FloatFormat("float6_e3m2fn", 2, 3, 1, False, "none"),
    "a sign": IntFormat("uint4", 4, True, 2),
    "fewer bits": IntFormat("uint4", 2, False, 4),
    "another value of a code book": book("nf4", (*NF4[:8], NF4[8] + 2.0**-20, *NF4[9:])),
}
END_OF_TABLE = ")  # fmt: skip\n\nFORMATS"


def plant_rows(tree: Path, rows: Iterable[Format]) -> Path:
    """The rows, and the header that the table writes: nothing else."""
    table = tree / "quantlib/formats.py"
    text = table.read_text()
    assert text.count(END_OF_TABLE) == 1
    table.write_text(text.replace(END_OF_TABLE, "".join(f"    {row},\n" for row in rows) + END_OF_TABLE))
    (tree / "csrc/formats.h").write_text(run(tree, "quantlib/formats.py"))
    return tree


@pytest.fixture(scope="module")
def with_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree and of its tests, with `ROWS`."""
    tree = plant_rows(copy_of_tree(tmp_path_factory.mktemp("rows")), ROWS.values())
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tree)
    return tree


def tables(tree: Path, backend: str, name: str, part: str) -> None:
    """A part of the case tables of one format."""
    run(tree, "-m", "quantlib.testing", backend, "--format", name, "--part", part, QUANTLIB_BUILD="0")


def test_the_rows_are_new() -> None:
    assert not ROWS.keys() & formats.FORMATS.keys()


def test_the_tests_of_formats_take_the_rows(with_rows: Path) -> None:
    """Among them the comparison of every code with what the format's name says, and with ml_dtypes."""
    files = ("tests/test_formats.py", "tests/reference/test_reference.py", "tests/ops/test_packing.py")
    run(with_rows, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, QUANTLIB_BUILD="0")


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_row_is_seen(fault: str) -> None:
    with pytest.raises(AssertionError, match=f"{WRONG[fault].name}.* its name"):
        names.check(WRONG[fault])


def test_the_case_tables_see_a_wrong_row(tmp_path: Path) -> None:
    tree = plant_rows(copy_of_tree(tmp_path), [WRONG["another NaN"]])
    wrong = "-m", "quantlib.testing", "composite", "--op", "compute_scale", "--format", "float8_e4m3fnuz"
    with pytest.raises(AssertionError, match="float8_e4m3fnuz, saturate=False, by its name: "):
        run(tree, *wrong, QUANTLIB_BUILD="0")


@pytest.mark.parametrize("name", ROWS)
def test_pure_torch_serves_a_row(with_rows: Path, name: str) -> None:
    tables(with_rows, "composite", name, "0/3")


@pytest.mark.parametrize("name", ROWS)
def test_triton_serves_a_row(with_rows: Path, name: str) -> None:
    pytest.importorskip("triton")
    tables(with_rows, "triton", name, "16/61")  # every op, and few of the large products


COMPILED = """
import sys

sys.path[:0] = ["tests", "tests/emulator", "tests/ops"]
from gpu_static import launches, triton_kernels
from gpu_static.calls import Call

for name in sys.argv[1:]:
    for call in (
        Call("quantize_dynamic", "bfloat16", name),
        Call("dequantize", "bfloat16", name),
        Call("dequant_matmul", "bfloat16", name, M=1, tiled=True),
    ):
        for config in launches.configs(90, [call]):
            triton_kernels.compiled(config, 90)
"""


def test_triton_compiles_with_the_rows(with_rows: Path) -> None:
    """The kernels compile for a GPU, with none here: the interpreter accepts code that the compiler does not."""
    pytest.importorskip("triton")
    run(with_rows, "-c", COMPILED, *ROWS, TRITON_INTERPRET="0", QUANTLIB_BUILD="0")


# Checks that are calls compile in half the time, where the compiler knows of them.
CALLED = ("--param", "asan-instrumentation-with-call-threshold=0")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
WATCHED = ((*SANITIZERS, *CALLED), SANITIZERS)


def watched(folder: Path) -> tuple[tuple[str, ...], str]:
    """The flags for both sanitizers, and what has to be loaded before Python; neither where the compiler lacks them."""
    probe, libraries = folder / "probe.cpp", ("libasan.so", "libubsan.so", "libstdc++.so.6")
    probe.write_text("int main() {}\n")
    for flags in WATCHED:
        command = [*_build.cxx_command(), *flags, str(probe), "-o", str(probe.with_suffix(""))]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            asked = ([*_build.cxx_command(), f"-print-file-name={name}"] for name in libraries)
            found = [subprocess.run(one, capture_output=True, text=True, check=True).stdout.strip() for one in asked]
            return (flags, " ".join(found)) if all(map(os.path.isabs, found)) else ((), "")
    return (), ""


def compile_one_isa(package: Path, isa: str, flags: tuple[str, ...]) -> None:
    """The library of ``package`` as a wheel has it, but its kernels are of ``isa``, whichever it chooses.

    The kernels in one call of the compiler, which reads every header once, and without -O3: in a tenth of the time.
    ``flags`` are of the kernels alone.
    """
    csrc = package / "_csrc"
    chosen, every = csrc / "cpu/backend.h", ", ".join(f"{name}::OP" for name in _build.ISAS)
    assert every in chosen.read_text() or len(_build.ISAS) == 1
    chosen.write_text(chosen.read_text().replace(every, ", ".join(f"{isa}::OP" for _ in _build.ISAS)))
    units = [(unit.source.relative_to(_build.CSRC), unit.before) for unit in _build.cpu_units()]
    kernels = sorted({path for path, _ in units if path.parts[0] == "cpu" and path.stem != "backend"})
    (csrc / "kernels.cpp").write_text("".join(f'#include "{path}"\n' for path in kernels))
    include = ("-I", csrc / "cpu", "-I", csrc, "-I", package, "-isystem", _build.find_torch() / "include")
    shared = [flag for flag in (*_build.CPU, *_build.HOST) if flag != "-O3"]
    sources = {csrc / "kernels.cpp": [*flags, *_build.ISAS[isa], f"-DQL_ISA={isa}"]}
    for path, before in units:
        if path not in kernels:
            included = (word for p in before for word in ("-include", str(p.relative_to(_build.CSRC))))
            sources[csrc / path] = ["-O0", *included]
    objects = [source.with_suffix(".o") for source in sources]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = [
            pool.submit(compiler, *shared, *more, *include, "-c", source, "-o", source.with_suffix(".o"))
            for source, more in sources.items()
        ]
    for one in made:
        one.result()
    linked = [flag for flag in flags if flag.startswith("-fsanitize")]
    compiler("-shared", *linked, *objects, _build.find_torch() / "lib/libtorch_cpu.so", "-o", package / "_C.so")


def compiler(*arguments: object) -> None:
    command = [*_build.cxx_command(), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


WATCHED_TABLES = """
import sys

from quantlib.testing.__main__ import main

assert all(main(["cpp", "--format", name, "--part", "0/2"]) == 0 for name in sys.argv[1:])
sys.exit(main(["cpp", "--part", "0/4"]))
"""


def test_cpp_serves_the_rows_and_no_kernel_leaves_its_memory(with_rows: Path, tmp_path: Path) -> None:
    """The C++ kernels give the right bytes with the best instruction set of this machine, under both sanitizers.

    So does a quarter of the tables of all other formats; `make sanitize` has the whole, at every instruction set. A
    tensor's memory ends where its data ends, so that what is read beyond is seen.
    """
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(f"cpp: {why}")
    if shutil.which(_build.cxx_command()[0]) is None:
        pytest.skip("no compiler to compile with")
    tree = Path(shutil.copytree(with_rows, tmp_path / "tree"))
    (tree / "csrc").rename(tree / "quantlib/_csrc")
    flags, before = watched(tmp_path)
    compile_one_isa(tree / "quantlib", _build.LEVELS[instruction_set()], ("-Og" if flags else "-O1", *flags))
    more = {"LD_PRELOAD": before, "ASAN_OPTIONS": "detect_leaks=0"} if flags else {}
    run(tree, "-c", WATCHED_TABLES, *ROWS, QUANTLIB_BUILD="0", **more)


EMULATED_OPS = ("quantize", "dequantize", "scaled_matmul", "dequant_matmul")


@pytest.mark.parametrize("op", sorted({path.stem for path in ROOT.glob("csrc/cuda/*.cu")} - {*EMULATED_OPS}))
def test_cuda_compiles_with_the_rows(with_rows: Path, op: str) -> None:
    """The other CUDA sources pass a compiler for the CPU, which checks templates as CUDA's does."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    folders = (f"-I{with_rows}/tests/cuda_on_cpu", f"-I{with_rows}/csrc")
    warnings = ("-Wall", "-Werror", "-Wno-unknown-pragmas", "-fsyntax-only")
    compiler(*_build.COMMON[1:2], *warnings, *folders, "-x", "c++", with_rows / f"csrc/cuda/{op}.cu")


EMULATED = """
import sys

sys.path[:0] = ["tests", "tests/emulator", "tests/ops"]
from pathlib import Path

import test_cuda_matmul_on_cpu as products
import test_cuda_on_cpu as ops
from cuda_on_cpu.emulator import keep_formats
from quantlib.testing import cases

cache, csrc, emulated, names = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(), sys.argv[4:]
keep_formats(csrc, "float16", "bfloat16", "int8", "uint8", *names)
emulator = ops.build(cache, emulated, csrc)
for name in names:
    for op in ("quantize", "dequantize"):
        chosen = list(cases(op, name))[::9]
        ops.check(emulator, chosen, [ops.call_of(case, seed, seed % 3) for seed, case in enumerate(chosen)])
    products.check(emulator, [
        products.Case(op, name, shape=shape, block=block, symmetric=not affine, tiled=tiled)
        for op in ("scaled_matmul",) * (name in products.INTEGERS) + ("dequant_matmul",)
        for shape, block in (((3, 18, 70), (1, 32)), ((9, 20, 128), (1, -1)))
        for affine in products.affines(name)
        for tiled in (False, True)[: 2 - (op == "scaled_matmul")]
    ])
"""


def test_cuda_kernels_serve_the_rows(with_rows: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A part of what test_cuda_on_cpu.py and test_cuda_matmul_on_cpu.py do, by the emulator that they run on."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++")
    cache = request.config.cache.mkdir("cuda_on_cpu")
    shutil.copytree(with_rows / "csrc", tmp_path / "csrc")
    given = (str(cache), str(tmp_path / "csrc"), " ".join(EMULATED_OPS), *ROWS)
    run(with_rows, "-c", EMULATED, *given, QUANTLIB_BUILD="0")


# ---- an op -----------------------------------------------------------------------------------------------------------

SCHEMAS = """\
DEF("absmax(Tensor x, SymInt[2] block) -> Tensor")
DEF("absmax.out(Tensor x, SymInt[2] block, *, Tensor(a!) out) -> ()")
"""
REFERENCE = '''

def absmax(x: Array, block: Block) -> Array:
    """y[I, J] = max(|x[i, j]| of block (I, J)); a NaN wins"""
    largest = reduce_blocks(np.maximum, numerics.magnitude_bits(matrix(x)), block)
    return numerics.canonical(largest.view(np.float32))
'''
OP = '''\
    """y[I, J] = max(|x[i, j]| of block (I, J))"""

    from __future__ import annotations

    from torch import Tensor

    from quantlib.ops.check import INPUTS, Block, Result, check_block, check_dtype, no_gradient
    from quantlib.ops.declare import Kernel, declare, matrices, whole_axes


    def _results(x: Tensor, block: Block) -> list[Result]:
        check_dtype("absmax", "x", x.dtype, INPUTS)
        return [check_block("absmax", x.shape, block)]


    def _launch(kernel: Kernel, outs: list[Tensor], x: Tensor, block: Block) -> None:
        M, K, block = matrices(x.shape, block)
        kernel(x.contiguous().view(M, K), block, outs[0])


    _absmax, _ = declare("absmax", _results, _launch)


    def absmax(x: Tensor, *, block: Block) -> Tensor:
        """The largest magnitude of each block of ``x``: float32 [ceil(M / br), ceil(K / bk)]."""
        no_gradient("absmax", "x", x)
        y: Tensor = _absmax(x, whole_axes("absmax", x, block))
        return y
    '''
COMPOSITE = '''\
    """y[I, J] = max(|x[i, j]| of block (I, J))"""

    from __future__ import annotations

    import torch
    from torch import Tensor

    from quantlib.backends.composite.numerics import Block, canonical, reduce_blocks


    def absmax(x: Tensor, block: Block, y: Tensor) -> None:
        largest = reduce_blocks(x.float().view(torch.int32) & 0x7FFFFFFF, block, torch.amax)
        y.copy_(canonical(largest.view(torch.float32)))
    '''
PROBLEM = """\
    // y[I, J] = max(|x[i, j]| of block (I, J))
    #pragma once
    #include "../problem.h"

    namespace quantlib {

    struct Absmax {
      Grid grid;
      const void* x;  // [M, K] float32, float16 or bfloat16
      Type x_type;
      float* y;  // [ceil(M / br), ceil(K / bk)]
    };

    }  // namespace quantlib
    """
GLUE = """\
    // y[I, J] = max(|x[i, j]| of block (I, J))
    #include "absmax.h"

    #include "../glue.h"

    namespace quantlib {

    QL_KERNEL(absmax, Absmax)

    static void absmax(StableIValue* stack, uint64_t, uint64_t results) {
      const char* op = "absmax";
      Arguments in(op, stack, results);
      Tensor x = in.tensor("x");
      const Sizes block = in.sizes();
      auto out = in.out("out");

      const Format& x_format = check_dtype(op, "x", x.dtype(), inputs);
      const Grid grid = check_block(op, x.sizes(), block);
      Output y(op, "out", std::move(out), scale_of(grid), x.device());
      x.make_contiguous();
      auto* data = y.data<float>({&x});
      if (x.numel())
        Backend(x.device()).run(Absmax{.grid = grid, .x = x.data(), .x_type = x_format.type, .y = data});
      y.finish(stack[0]);
    }

    QL_REGISTER("absmax", absmax)

    }  // namespace quantlib
    """
KERNEL = """\
    // y[I, J] = max(|x[i, j]| of block (I, J))
    #include "../ops/absmax.h"

    #include "loops.h"

    namespace quantlib {
    namespace QL_ISA {

    void absmax(const Absmax& p, ParallelFor run) {
      const Grid& g = p.grid;
      const Decode decode = decoder(p.x_type);
      const Row x_row = row_of(p.x_type);
      const int64_t cols = g.scale_cols();
      parallel(run, g.scale_rows() * cols, 1, [&](int64_t begin, int64_t end) {
        float buffer[kChunk];
        for (int64_t block = begin; block < end; ++block) {
          const int64_t i0 = block / cols * g.br, j0 = block % cols * g.bk;
          uint32_t largest = 0;  // magnitudes are in the order of their bits, a NaN is above all
          for (int64_t i = i0; i < least(i0 + g.br, g.M); ++i)
            for (int64_t j = j0; j < least(j0 + g.bk, g.K); j += kChunk) {
              const int64_t n = least(kChunk, least(j0 + g.bk, g.K) - j);
              const char* x = static_cast<const char*>(p.x) + byte_offset(x_row, g.K, i, j);
              if (decode) decode(x, false, buffer, n);
              else __builtin_memcpy(buffer, x, size_t(n) * 4);
              for (int64_t k = 0; k < n; ++k) {
                const uint32_t magnitude = bits_of(buffer[k]) & 0x7fffffffu;
                largest = magnitude > largest ? magnitude : largest;
              }
            }
          p.y[block] = float_of(largest > 0x7f800000u ? kNaN : largest);
        }
      });
    }

    }  // namespace QL_ISA
    }  // namespace quantlib
    """
CHECK_OP = """\
    import numpy as np, pytest, torch, quantlib
    from quantlib import backends
    from quantlib.spec import matrix_shape
    from quantlib.testing import assert_same_bytes, support

    SHAPES = (((6, 35), (1, 8)), ((2, 3, 1300), (2, -1)), ((7,), (-1, -1)), ((), (1, 1)), ((0, 4), (1, 2)))

    for name in ("composite", "cpp"):
        with quantlib.use_backend(name):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for shape, block in SHAPES:
                    x = torch.randn(shape).to(dtype)
                    if x.dim() > 1 and x.numel():
                        x[..., 3] = torch.nan
                        x = x.mT.contiguous().mT
                    br, bk = (max(n, 1) if b == -1 else b for n, b in zip(matrix_shape(shape), block))
                    want = quantlib.reference.absmax(x.float().numpy(), (br, bk))
                    assert_same_bytes(quantlib.absmax(x, block=block), want, f"{name} {dtype} {shape} {block}")
                    out = torch.empty(want.shape[::-1]).T
                    torch.ops.quantlib.absmax.out(x, [br, bk], out=out)
                    assert_same_bytes(out.contiguous(), want, "out")
            with pytest.raises(RuntimeError, match="quantlib::absmax: x must be float32, float16 or bfloat16, got"):
                torch.ops.quantlib.absmax(torch.ones(2, dtype=torch.int32), [1, 1])
            assert torch.vmap(lambda x: quantlib.absmax(x, block=(1, 2)))(torch.ones(3, 4, 5)).shape == (3, 4, 3)
    assert quantlib.absmax(torch.empty(4, 6, device="meta"), block=(2, 3)).shape == (2, 2)

    for name in ("triton", "cuda"):
        said = f"quantlib::absmax: backend '{name}' refuses cpu tensors"
        with quantlib.use_backend(name), pytest.raises(NotImplementedError, match=said):
            quantlib.absmax(torch.ones(2), block=(1, 2))
    assert backends.refuses("triton", "cpu") or backends.refuses("triton", "cpu", "absmax") == "has no kernel of absmax"
    rows = [row for row in support.rows() if row.overload.startswith("absmax")]
    assert rows and all(support.serves("cpp", row) and not support.serves("triton", row) for row in rows)
    print("all of it")
    """


def plant_op(tree: Path) -> None:
    """absmax(x, block) in NumPy, pure torch and C++ on the CPU: two files edited, five new ones."""
    with (tree / "quantlib/ops.def").open("a") as schemas:
        schemas.write(SCHEMAS)
    page = tree / "quantlib/reference/ops.py"
    listed = '__all__ = ["cast",'
    assert listed in page.read_text()
    page.write_text(page.read_text().replace(listed, '__all__ = ["absmax", "cast",') + REFERENCE)
    write(tree / "quantlib/ops/absmax.py", OP)
    write(tree / "quantlib/backends/composite/absmax.py", COMPOSITE)
    write(tree / "csrc/ops/absmax.h", PROBLEM)
    write(tree / "csrc/ops/absmax.cpp", GLUE)
    write(tree / "csrc/cpu/absmax.cpp", KERNEL)


def objects_that_are_there(cache: Path) -> None:
    """Link the objects that this checkout was built of: a build into ``cache`` compiles what differs."""
    (cache / "objects").mkdir(0o700, parents=True)
    cache.chmod(0o700)
    recipe = _build.Recipe("cpu")
    for unit in recipe.units:
        for folder in _build.caches():
            made = folder / "objects" / recipe.object(unit)
            for path in (made, made.with_name(f"{made.name}.sha256")):
                if path.exists():
                    shutil.copy(path, cache / "objects")


def cuda_objects(tree: Path) -> dict[str, str]:
    """The name of every object of the CUDA library, by its source; nothing is compiled."""
    code = """if True:
        import json
        from quantlib import _build
        recipe = _build.Recipe("cuda")
        print(json.dumps({str(u.source.relative_to(_build.CSRC)): recipe.object(u) for u in recipe.units}))
    """
    found: dict[str, str] = json.loads(run(tree, "-c", code, NVCC="/bin/true", QUANTLIB_BUILD="0"))
    return found


def test_an_op(tmp_path: Path) -> None:
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(f"cpp: {why}")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no compiler to compile with")
    tree, cache = copy_of_tree(tmp_path), tmp_path / "cache"
    plant_op(tree)
    objects_that_are_there(cache)
    write(tmp_path / "check.py", CHECK_OP)
    assert run(tree, str(tmp_path / "check.py"), QUANTLIB_CACHE=str(cache), QUANTLIB_BUILD="1") == "all of it\n"
    assert cuda_objects(tree) == cuda_objects(ROOT), "the CUDA library is made of what it was made of"


# ---- a backend -------------------------------------------------------------------------------------------------------

STUB = '''\
    """Casts and nothing else."""

    import os

    import torch

    from quantlib.backends.backend import Backend, Kernels


    def refuses(device: torch.device) -> str | None:
        return os.environ.get("STUB_REFUSES", None if device.type == "cpu" else "serves cpu tensors only")


    preference = {"cpu": int(os.environ["STUB_PREFERENCE"])} if "STUB_PREFERENCE" in os.environ else {}
    BACKEND = Backend("stub", ("cpu",), refuses, Kernels(__name__), preference)
    '''
STUB_CAST = '''\
    """y[n] = encode(decode(x[n]))"""

    from quantlib.backends.composite import KERNELS

    calls = []


    def cast(x, x_format, format, saturate, y):
        calls.append(format.name)
        KERNELS["cast"](x, x_format, format, saturate, y)
    '''
CHECK_STUB = """\
    import pytest, torch, quantlib
    from quantlib import backends
    from quantlib.backends.stub.cast import calls

    x = torch.randn(4, 8)
    assert list(backends.BACKENDS)[-1] == "stub" and "stub" not in backends.order("cpu")
    quantlib.cast(x, "float16")
    assert not calls, "not asked unless it is forced"
    with quantlib.use_backend("stub"):
        assert backends.serving("cpu") == "stub"
        quantlib.cast(x, "bfloat16")
        assert calls == ["bfloat16"]
        with pytest.raises(NotImplementedError, match="quantize: backend 'stub' refuses cpu tensors: has no kernel"):
            quantlib.quantize(x, torch.ones(4, 1), "int8", block=(1, -1))
    print("all of it")
    """
CHECK_PREFERRED = """\
    import torch, quantlib
    from quantlib import backends
    from quantlib.backends.stub.cast import calls

    assert list(backends.BACKENDS)[0] == backends.order("cpu")[0] == backends.serving("cpu") == "stub"
    x = torch.randn(4, 8)
    y = quantlib.cast(x, "float16")
    assert calls == ["float16"], "it runs what it has a kernel of"
    quantlib.quantize(x, torch.ones(4, 1), "int8", block=(1, -1))
    with quantlib.use_backend("composite"):
        assert torch.equal(quantlib.cast(x, "float16"), y)
    assert calls == ["float16"]
    print("all of it")
    """


@pytest.fixture(scope="module")
def with_stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with one more folder."""
    tree = copy_of_tree(tmp_path_factory.mktemp("stub"))
    write(tree / "quantlib/backends/stub/__init__.py", STUB)
    write(tree / "quantlib/backends/stub/cast.py", STUB_CAST)
    return tree


def test_a_backend_can_be_forced(with_stub: Path, tmp_path: Path) -> None:
    write(tmp_path / "check.py", CHECK_STUB)
    assert run(with_stub, str(tmp_path / "check.py")) == "all of it\n"


def test_a_backend_can_be_preferred(with_stub: Path, tmp_path: Path) -> None:
    write(tmp_path / "check.py", CHECK_PREFERRED)
    assert run(with_stub, str(tmp_path / "check.py"), STUB_PREFERENCE="1000") == "all of it\n"


def test_a_backend_is_listed_and_says_why_it_refuses(with_stub: Path) -> None:
    facts = json.loads(run(with_stub, "-m", "quantlib", "info", "--json"))
    assert facts["refusals"]["cpu"]["stub"]["ops"]["quantize"] == "has no kernel of quantize"
    assert "cast" not in facts["refusals"]["cpu"]["stub"]["ops"]
    facts = json.loads(run(with_stub, "-m", "quantlib", "info", "--json", STUB_REFUSES="is switched off"))
    assert facts["refusals"]["cpu"]["stub"]["device"] == "is switched off"
    code = """if True:
        import torch, quantlib
        with quantlib.use_backend("stub"):
            try: quantlib.cast(torch.ones(2), "float16")
            except NotImplementedError as error: print(error)
    """
    said = run(with_stub, "-c", code, STUB_REFUSES="is switched off")
    assert said == "quantlib::cast: backend 'stub' refuses cpu tensors: is switched off\n"


def test_a_backend_is_proved(with_stub: Path, tmp_path: Path) -> None:
    """The case tables, `verify` and a column of the support table find the new backend."""
    said = run(with_stub, "-m", "quantlib.testing", "stub", "--op", "cast", "--format", "float16")
    assert re.search(r"^stub: (\d+) of \1 cases$", said, re.MULTILINE), said
    verify = ("-m", "quantlib", "verify", "--share", "0", "--op", "cast", "--format", "float16")
    assert "stub on cpu equals reference" in run(with_stub, *verify, "--backend", "stub")
    assert "equals stub on cpu" in run(with_stub, *verify, "--against", "stub")
    table = tmp_path / "support.txt"
    shutil.copy(ROOT / "tests/support.txt", table)
    run(with_stub, "-m", "quantlib.testing.support", str(table), TRITON_INTERPRET="0")  # its column is kept
    before, after = ((path.read_text()).splitlines() for path in (ROOT / "tests/support.txt", table))
    assert after[1] == before[1].replace("zero point, ", "zero point, stub ")
    column = before[2].index("composite")
    for old, new in zip(before[2:], after[2:], strict=True):
        entry, others = new[column:].split(maxsplit=1)
        assert new[:column] + others == old
        assert entry == ("stub" if new.startswith("cast") else "-")
