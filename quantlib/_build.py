"""Compile the kernels: one function for the wheel and for the first import.

Imports neither torch nor quantlib. All it needs of torch is its headers, because the libraries use nothing but torch's
stable ABI and find ``libtorch_cpu.so`` and ``libtorch_cuda.so`` in the process that loads them.

Environment: ``QUANTLIB_BUILD`` (auto; 0: never compile; 1: a build that fails is an error), ``QUANTLIB_CACHE`` (where
first imports keep what they compiled), ``CXX``, ``CXXFLAGS``, ``NVCC``, ``MAX_JOBS``.

``python quantlib/_build.py [cpu] [cuda]`` compiles into that cache and prints the compilers' messages in full.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CSRC = next((d for d in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if d.is_dir()), PACKAGE / "_csrc")
FILES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}
KEEP_SECONDS = 30 * 24 * 3600  # a build deletes what the cache has kept longer

COMMON = ("-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000")  # runs on every libtorch from 2.11
HOST = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off")  # C0: no contraction to FMA
CPU = (*COMMON, "-Wall", "-fno-math-errno", "-fno-trapping-math")
CUDA = (*COMMON, "-DUSE_CUDA", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")  # C0
CUDA_TARGETS = ("arch=compute_80,code=sm_80", "arch=compute_90,code=[sm_90,compute_90]")

# csrc/cpu/<op>.cpp is compiled once for each of these; csrc/cpu/register.cpp picks one when the library is loaded.
ISAS: dict[str, tuple[str, ...]] = {"plain": ()}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISAS["avx512"] = (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c"),
        "-mprefer-vector-width=512",
    )
    ISAS["avx512_bf16"] = (*ISAS["avx512"], "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi")


class BuildError(RuntimeError):
    """Why there is no library; ``log`` is what the compiler said."""

    def __init__(self, why: str, log: str = "") -> None:
        super().__init__(why)
        self.log = log


def mode() -> str:
    """``QUANTLIB_BUILD``: "auto", "0" or "1"."""
    value = os.environ.get("QUANTLIB_BUILD", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"QUANTLIB_BUILD must be auto, 0 or 1, got {value!r}")
    return value


def library(name: str) -> Path:
    """The library "cpu" or "cuda": the one of the wheel, else one compiled from these very sources, now or before.

    Raises
    ------
    BuildError
        Where there is none and none can be made. A plain RuntimeError with ``QUANTLIB_BUILD=1``.
    """
    try:
        return find_or_build(name)
    except BuildError as error:
        if mode() != "1":
            raise
        raise RuntimeError(f"QUANTLIB_BUILD=1 asks for the {name} kernels: {error}") from error


def find_or_build(name: str) -> Path:
    """What `library` gives."""
    shipped = PACKAGE / FILES[name]
    if CSRC.parent == PACKAGE and shipped.exists():
        return shipped
    if mode() == "0":
        raise BuildError("QUANTLIB_BUILD=0 forbids compiling")
    recipe = Recipe(name)
    path = cache() / f"{recipe.key}-{FILES[name]}"
    if path.exists():
        return path
    try:
        with _locked(path.parent):
            if not path.exists():
                logging.getLogger("quantlib").warning("compiling the %s kernels, once for these sources", name)
                recipe.build(path, path.parent / "objects")
                _forget_old(path.parent)
    except OSError as error:
        raise BuildError(f"cannot keep compiled kernels in {path.parent}: {error.strerror}") from error
    return path


def cache() -> Path:
    """Where first imports keep what they compiled."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("QUANTLIB_CACHE") or Path(home, "quantlib")).absolute()


@dataclass(frozen=True)
class Unit:
    """One call of a compiler."""

    source: Path
    compiler: tuple[str, ...]
    flags: tuple[str, ...]

    def key(self, headers: bytes) -> str:
        """Of everything that decides the object file."""
        text = "\0".join((*self.compiler, *self.flags, self.source.name))
        return _digest(headers, text.encode(), self.source.read_bytes())


class Recipe:
    """How one library is made of its sources."""

    def __init__(self, name: str) -> None:
        if not sys.platform.startswith("linux"):
            raise BuildError(f"the kernels are compiled on Linux only, this is {sys.platform}")
        torch = find_torch()
        self.include = ("-I", str(CSRC), "-I", str(PACKAGE), "-isystem", str(torch / "include"))
        version = torch / "include/torch/headeronly/version.h"
        headers = [PACKAGE / "ops.def", version, *sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cuh"))]
        self._headers = _digest(platform.machine().encode(), *(h.read_bytes() for h in headers)).encode()
        self.units = cuda_units() if name == "cuda" else cpu_units()
        if not self.units:
            raise BuildError(f"{CSRC} holds no sources of the {name} kernels")
        self.linker, self.needs = self.units[0].compiler, ["libtorch_cpu.so"]
        if name == "cuda":
            self.linker, self.needs = (*self.linker, "-cudart", "static"), ["libtorch_cpu.so", "libtorch_cuda.so"]
        else:
            self.linker = (*self.linker, *cxxflags())
        self.key = _digest(" ".join(self.linker).encode(), *(u.key(self._headers).encode() for u in self.units))

    def build(self, out: Path, objects: Path) -> None:
        """Compile what ``objects`` does not hold yet and link it into ``out``, which appears whole or not at all."""
        if shutil.which(self.linker[0]) is None:
            raise BuildError(f"no compiler: {self.linker[0]} is not there")
        objects.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=objects) as scratch, ThreadPoolExecutor(jobs()) as pool:
            made = list(pool.map(functools.partial(self._compile, objects, Path(scratch)), self.units))
            stubs = [str(_stub(Path(scratch), so)) for so in self.needs]
            library = Path(scratch, out.name)
            needed = [word for stub in ("--no-as-needed", *stubs) for word in ("-Xlinker", stub)]  # an order nvcc keeps
            _run([*self.linker, "-shared", "-o", str(library), *made, *needed], f"linking {out.name}")
            os.replace(library, out)

    def _compile(self, objects: Path, scratch: Path, unit: Unit) -> str:
        made = objects / f"{unit.key(self._headers)}.o"
        if not made.exists():
            new = scratch / made.name
            command = [*unit.compiler, *unit.flags, *self.include, "-c", str(unit.source), "-o", str(new)]
            _run(command, str(unit.source.relative_to(CSRC)))
            os.replace(new, made)
        return str(made)


def cpu_units() -> list[Unit]:
    """Every op once an ISA, the glue once."""
    cxx = tuple(shlex.split(os.environ.get("CXX", "c++")))
    flags = (*cxxflags(), *CPU, *HOST)
    glue = [p for p in (CSRC / "registration.cpp", CSRC / "cpu/register.cpp") if p.exists()]
    ops = sorted(p for p in CSRC.glob("cpu/*.cpp") if p not in glue)
    each = [Unit(p, cxx, (*flags, f"-DQL_ISA={isa}", *more)) for p in ops for isa, more in ISAS.items()]
    return [*each, *(Unit(p, cxx, flags) for p in glue)]


def cxxflags() -> list[str]:
    """The user's flags, for compiler and linker; a fast-math among them could also flush every subnormal to zero."""
    return [*shlex.split(os.environ.get("CXXFLAGS", "")), "-fno-fast-math"]


def cuda_units() -> list[Unit]:
    """Every kernel and the glue, each for all of CUDA_TARGETS."""
    compiler = nvcc()
    if compiler is None:
        raise BuildError("no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    targets = (flag for target in CUDA_TARGETS for flag in ("-gencode", target))
    flags = (*CUDA, "-Xcompiler", ",".join(HOST), *targets)
    return [Unit(p, (compiler,), flags) for p in sorted(CSRC.glob("cuda/*.c*")) if p.suffix in (".cu", ".cpp")]


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=Path(home, "bin")) for home in homes if home)
    return os.environ.get("NVCC") or shutil.which("nvcc") or next(filter(None, found), None)


def find_torch() -> Path:
    """torch's folder: of this interpreter, or of the environment that pip's build isolation hides."""
    spec = importlib.util.find_spec("torch")
    origin = spec.origin if spec else None
    if origin is None:
        ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"
        outside = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}  # the isolation is a PYTHONPATH
        asked = subprocess.run([sys.executable, "-c", ask], env=outside, capture_output=True, text=True, check=False)
        origin = asked.stdout.strip()
    torch = Path(origin or "no-torch").parent
    if not (torch / "include/torch/csrc/stable/library.h").exists():
        raise BuildError("torch >= 2.11 with its headers is not in reach of the build")
    return torch


def jobs() -> int:
    """How many compilers run at once."""
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def _stub(folder: Path, soname: str) -> Path:
    """An empty library that stands for ``soname`` at link time: the real one need not be here."""
    stub = folder / soname
    cxx = shlex.split(os.environ.get("CXX", "c++"))
    _run([*cxx, "-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-x", "c++", os.devnull, "-o", str(stub)], soname)
    return stub


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except FileNotFoundError:
        raise BuildError(f"no compiler: {command[0]} is not there") from None
    if done.returncode:
        said = done.stderr + done.stdout
        first = next((line for line in said.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise BuildError(f"{what} does not compile: {first}", f"{shlex.join(command)}\n{said}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Several processes may import at once: one compiles, the others wait for it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_old(folder: Path) -> None:
    for path in (*folder.glob("*.so"), *folder.glob("objects/*.o")):
        if path.stat().st_mtime < time.time() - KEEP_SECONDS:
            path.unlink(missing_ok=True)


def _digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(hashlib.sha256(part).digest())
    return sha.hexdigest()[:16]


def main(names: list[str]) -> int:
    """Compile each of ``names`` into the cache and say where it lies."""
    for name in names or ["cpu"]:
        if name not in FILES:
            print(f"usage: python quantlib/_build.py [cpu] [cuda]; got {name!r}", file=sys.stderr)
            return 2
        start = time.perf_counter()
        try:
            path = find_or_build(name)
        except BuildError as error:
            print(*filter(None, (error.log, f"{name}: {error}")), sep="\n", file=sys.stderr)
            if error.log or mode() == "1":  # a machine without a compiler is no failure unless a build was asked for
                return 1
            continue
        print(f"{name}: {path} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
