"""A user's installation: the wheel, the source archive, and an import with and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import fresh
import pytest

from quantlib import _build, formats

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = (
    "quantlib",
    "csrc",
    "benchmarks",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "LICENSE",
    "README.md",
    "Makefile",
)
NO_COMPILER = {"QUANTLIB_BUILD": "auto", "CXX": "/no/compiler", "NVCC": "/no/nvcc"}

checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a checkout")


def run(*args: object, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """This Python on ``args``, with ``environment`` over the one of the tests."""
    command = [sys.executable, *map(str, args)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, check=False, timeout=1200)


def after_torch(code: str, *args: Path, cwd: Path | None = None, **environment: str) -> fresh.Done:
    """Run ``code`` in a process that has imported torch."""
    return fresh.run(["-c", code, *args], env={**os.environ, **environment}, cwd=cwd)


QUANTIZE = """if True:
    import torch, quantlib
    from quantlib import backends
    codes, scale = quantlib.quantize_dynamic(torch.tensor([[3.0, -1.0]]), "int8", block=(1, -1))
    assert codes.tolist() == [[127, -42]], codes
    print(backends.serving("cpu"), quantlib.__file__)
"""


def import_quantlib(cwd: Path, folder: Path, **environment: str) -> fresh.Done:
    """Quantize one tensor with the quantlib in ``folder``; stdout: what served, and its file; stderr: warnings."""
    return after_torch(QUANTIZE, cwd=cwd, PYTHONPATH=str(folder), **environment)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packed, so that no build leaves anything in the checkout."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    (folder / "README.md").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """The wheel that a machine without a compiler makes, from the source archive."""
    pytest.importorskip("setuptools", minversion="70.1")
    packed = run("setup.py", "-q", "sdist", cwd=sources)
    assert packed.returncode == 0, packed.stderr
    archive = next(sources.glob("dist/*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(sources / "unpacked", filter="data")
    unpacked = next((sources / "unpacked").iterdir())
    built = run("setup.py", "-q", "bdist_wheel", cwd=unpacked, **NO_COMPILER)
    assert built.returncode == 0, built.stderr
    assert "_C.so is not in this wheel" in built.stderr
    return next(unpacked.glob("dist/*.whl"))


def test_the_header_of_formats_is_current() -> None:
    header = ROOT / "csrc/formats.h"
    assert header.read_text() == formats.c_header(), "run: python quantlib/formats.py > csrc/formats.h"


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / "quantlib").rglob("*.py")}
    assert [str(f) for f in folders if not (f / "__init__.py").exists()] == []


@checkout
def test_the_wheel_serves_every_python_of_the_platform(wheel: Path) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.startswith("quantlib_torch-")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")


@checkout
def test_the_wheel_holds_all_that_a_first_import_compiles(wheel: Path, sources: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    csrc = {f"quantlib/_csrc/{p.relative_to(sources / 'csrc')}" for p in sources.glob("csrc/**/*.*")}
    package = {str(p.relative_to(sources)) for p in sources.glob("quantlib/**/*.py")}
    benchmarks = {f"quantlib/benchmarks/{p.name}" for p in sources.glob("benchmarks/*.py")}
    assert (csrc | package | benchmarks | {"quantlib/ops.def", "quantlib/py.typed"}) - names == set()
    assert {name for name in names if name.startswith("quantlib/benchmarks/")} == benchmarks, "no figures of ours"
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"quantlib"}


@checkout
def test_the_wheel_installs_the_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "quantlib = quantlib.cli:main" in archive.read(entry).decode()


@checkout
def test_the_wheel_measures_itself_anywhere(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    code = """if True:
        from quantlib.cli import main
        tiny = "--quick --family cast --shape 16 16 --seconds 0.001 --without torch --json run.json"
        for arguments in (tiny, "compare run.json run.json", "--save"):
            print("status", main(["bench", *arguments.split()]))
    """
    done = after_torch(code, cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path), QUANTLIB_BUILD="0")
    assert [line for line in done.stdout.splitlines() if "status" in line] == ["status 0", "status 0", "status 2"]
    assert "quantlib composite" in done.stdout
    assert done.stderr == f"quantlib bench: --save must be in a checkout, got {tmp_path / 'quantlib/benchmarks'}\n"


@checkout
def test_the_wheel_compiles_at_the_first_import(wheel: Path, tmp_path: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None or _build.mode() == "0":
        pytest.skip("no compiler to compile with")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    done = run("-c", QUANTIZE, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["cpp", str(tmp_path / "quantlib/__init__.py")], done.stderr


UNUSABLE = pytest.mark.parametrize(
    ("environment", "why"),
    [
        ({"CXX": "/no/compiler"}, "no compiler: /no/compiler is not there"),
        ({"CXX": "false"}, "does not compile: exit status 1; `quantlib build` shows all of it"),
        ({"CXX": "c++ '"}, "CXX must be words that a shell can split, got"),
        ({"CXXFLAGS": "'"}, "CXXFLAGS must be words that a shell can split, got"),
        ({"MAX_JOBS": "x"}, "MAX_JOBS must be a positive integer, got 'x'"),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a positive integer, got '0'"),
        ({"QUANTLIB_CACHE": "/dev/null/cache"}, "cannot keep compiled kernels in /dev/null/cache: Not a directory"),
        ({"QUANTLIB_CACHE": "cache"}, "QUANTLIB_CACHE must be an absolute path, got 'cache'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "=".join(*value.items()),
)


@UNUSABLE
def test_without_kernels_one_warning_says_why(environment: dict[str, str], why: str, tmp_path: Path) -> None:
    settings = {"QUANTLIB_BUILD": "auto", "QUANTLIB_BACKEND": "auto", "QUANTLIB_CACHE": str(tmp_path), **environment}
    done = import_quantlib(tmp_path, ROOT, **settings)
    assert done.stdout.split()[:1] == ["composite"], done.stderr
    warnings = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1
    assert why in warnings[0]


def test_build_0_compiles_nothing_and_says_nothing(tmp_path: Path) -> None:
    settings = {"QUANTLIB_BUILD": "0", "QUANTLIB_BACKEND": "auto", "QUANTLIB_CACHE": str(tmp_path / "cache")}
    done = import_quantlib(tmp_path, ROOT, **settings)
    assert done.stdout.split()[:1] == ["composite"], done.stderr
    assert "Warning" not in done.stderr
    assert not (tmp_path / "cache").exists()


@UNUSABLE
def test_build_1_makes_it_an_error(environment: dict[str, str], why: str, tmp_path: Path) -> None:
    settings = {"QUANTLIB_BUILD": "1", "QUANTLIB_CACHE": str(tmp_path), **environment}
    done = import_quantlib(tmp_path, ROOT, **settings)
    assert done.returncode == 1
    error = next(line for line in done.stderr.splitlines() if line.startswith("RuntimeError"))
    assert error.startswith("RuntimeError: QUANTLIB_BUILD=1 asks for the cpu kernels: ")
    assert why in error


def test_build_1_makes_a_library_that_does_not_load_an_error(tmp_path: Path) -> None:
    code = """if True:
        import pathlib, sys, quantlib._build as build
        build.library = lambda name, build=True: pathlib.Path(sys.argv[1])
        import quantlib.ops
    """
    (tmp_path / "library.so").write_text("no library")
    for mode, status in (("auto", 0), ("1", 1)):
        settings = {"PYTHONPATH": str(ROOT), "QUANTLIB_BUILD": mode, "QUANTLIB_BACKEND": "auto"}
        done = after_torch("import sys; sys.argv[0] = 'quantlib'\n" + code, tmp_path / "library.so", **settings)
        assert done.returncode == status, done.stderr
        assert f"{tmp_path / 'library.so'} does not load" in done.stderr


def test_a_user_without_a_home(tmp_path: Path) -> None:
    """The library works in a container that is started for a user id that it does not know."""
    code = """if True:
        import pwd
        def unknown(user): raise KeyError(user)
        pwd.getpwuid = unknown
        import quantlib; from quantlib import backends; print(backends.serving("cpu"))
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME", "QUANTLIB_CACHE")}
    environment |= {**NO_COMPILER, "PYTHONPATH": str(ROOT), "QUANTLIB_BACKEND": "auto", "TMPDIR": str(tmp_path)}
    done = fresh.run(["-c", code], env=environment)
    assert done.stdout == "composite\n", done.stderr
    assert "quantlib runs without its C++ kernels, slower: no compiler" in done.stderr


@pytest.mark.parametrize("gpu", [False, True], ids=["no GPU", "a GPU"])
@pytest.mark.parametrize("triton", [False, True], ids=["no Triton", "Triton"])
@pytest.mark.parametrize("mode", ["auto", "1"])
@pytest.mark.parametrize("capability", [(9, 0), (7, 5)])
def test_an_import_compiles_cuda_only_where_it_would_serve(
    gpu: bool, triton: bool, mode: str, capability: tuple[int, int], tmp_path: Path
) -> None:
    """A torch that says it has CUDA, and an nvcc that says that it was called."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] || touch {tmp_path}/called\nexit 1\n")
    nvcc.chmod(0o755)
    code = f"""if True:
        import sys, warnings; sys.argv[0] = "quantlib"  # `import quantlib` alone then loads no kernels
        warnings.simplefilter("ignore")
        import torch, quantlib._build as _build
        torch.version.cuda, torch.cuda.is_available = "13.0", lambda: {gpu}
        torch.cuda.get_device_capability = lambda device: {capability}
        library = _build.library
        def only_cuda(name, build=True):
            if name == "cpu": raise _build.BuildError("is of no interest here")
            return library(name, build)
        _build.library = only_cuda
        import quantlib.backends; from quantlib.backends import compiled; print(compiled.load("cuda"))
    """
    environment = {"TRITON_INTERPRET": "0" if triton else "1", "QUANTLIB_BUILD": mode, "NVCC": str(nvcc)}
    done = after_torch(code, PYTHONPATH=str(ROOT), QUANTLIB_CACHE=str(tmp_path / "cache"), **environment)
    serves = gpu and not triton and capability >= (8, 0)
    assert (tmp_path / "called").exists() == (mode == "1" or serves), done.stderr
    if mode == "1":
        assert "RuntimeError: QUANTLIB_BUILD=1 asks for the cuda kernels: cuda/" in done.stderr
    elif not serves:
        assert done.stdout == "is not compiled: `quantlib build --cuda` compiles it\n", done.stderr


def test_build_must_be_one_of_three(tmp_path: Path) -> None:
    done = import_quantlib(tmp_path, ROOT, QUANTLIB_BUILD="yes")
    assert "QUANTLIB_BUILD must be auto, 0 or 1, got 'yes'" in done.stderr


def test_the_build_imports_neither_torch_nor_quantlib() -> None:
    code = "import runpy, sys; runpy.run_path(sys.argv[1]); print({'torch', 'quantlib', 'numpy'} & set(sys.modules))"
    assert run("-c", code, ROOT / "quantlib/_build.py").stdout.strip() == "set()"


@checkout
@pytest.mark.network
@pytest.mark.parametrize("compilers", ["", "c++", "c++ nvcc"])
@pytest.mark.parametrize("torch", [True, False])
def test_pip_install_in_isolation(sources: Path, tmp_path: Path, compilers: str, torch: bool) -> None:
    """pip fetches setuptools and nothing else; the torch of this environment is there before the build or after it."""
    if "nvcc" in compilers and _build.nvcc() is None:
        pytest.skip("no nvcc")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv/bin/python"
    packages = next((tmp_path / "venv").glob("lib/python3*/site-packages"))
    borrowed = f"{sysconfig.get_path('purelib')}\n"
    if torch:
        (packages / "_outer.pth").write_text(borrowed)
    environment = {**os.environ, "QUANTLIB_CACHE": str(tmp_path / "cache")}
    if "c++" not in compilers:
        environment |= NO_COMPILER
    elif "nvcc" not in compilers:
        environment["NVCC"] = "/no/nvcc"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", sources]
    subprocess.run(install, env=environment, check=True, capture_output=True, timeout=1200)
    (packages / "_outer.pth").write_text(borrowed)
    assert (packages / "quantlib/_C.so").exists() == (torch and "c++" in compilers)
    assert (packages / "quantlib/_C_cuda.so").exists() == (torch and "nvcc" in compilers)
    code = "import quantlib; from quantlib import backends; print(backends.serving('cpu'), quantlib.__file__)"
    done = subprocess.run(
        [python, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["cpp" if compilers else "composite", str(packages / "quantlib/__init__.py")]
    command = [python.parent / "quantlib", "bits", "3.141592"]
    assert "10010010000111111011000" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
