"""Compile the kernels: one function for the wheel and for the first import.

Imports neither torch nor quantlib. All it needs of torch is its headers, because the libraries use nothing but torch's
stable ABI and find ``libtorch_cpu.so`` and ``libtorch_cuda.so`` in the process that loads them.

Environment: ``QUANTLIB_BUILD`` (auto; 0: never compile; 1: compile all there is, a build that fails is an error),
``QUANTLIB_CACHE`` (an absolute path: where first imports keep what they compiled), ``CXX``, ``CXXFLAGS``, ``NVCC``,
``MAX_JOBS``. A value that cannot be used is a BuildError that names the variable.

An import executes what lies in the cache. Its folder is therefore made for this user alone, and a library is loaded
from it only if nobody but this user and root can write it and if its bytes have the SHA-256 that was noted when it was
made. A library that fails either test is compiled again.

``python quantlib/_build.py [cpu] [cuda]`` compiles into the cache and prints the compilers' messages in full.
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
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
CSRC = next((d for d in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if d.is_dir()), PACKAGE / "_csrc")
FILES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}
log = logging.getLogger("quantlib")

KEEP_SECONDS = 30 * 24 * 3600  # a build deletes what the cache has kept longer

COMMON = ("-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000")  # runs on every libtorch from 2.11
HOST = ("-fPIC", "-fvisibility=hidden", "-ffp-contract=off")  # C0: no contraction to FMA
CPU = (*COMMON, "-Wall", "-fno-math-errno", "-fno-trapping-math")
CUDA = (*COMMON, "-DUSE_CUDA", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")  # C0
# Compute capabilities that get machine code of their own, as far as nvcc knows them; the newest also gets PTX, which a
# driver compiles for later devices. Older devices lack bfloat16 products.
CUDA_ARCHS = (80, 86, 89, 90, 100, 120)
TARGETS = "quantlib compiled for "  # in the library, before the names of what it was compiled for

# csrc/cpu/<op>.cpp is compiled once for each of these; csrc/cpu/backend.cpp picks one when an op is first called.
ISAS: dict[str, tuple[str, ...]] = {"plain": ()}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ("-mavx2", "-mfma", "-mf16c")
    ISAS["avx512"] = (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mf16c"),
        "-mprefer-vector-width=512",
    )
    ISAS["avx512_bf16"] = (*ISAS["avx512"], "-mavx512vnni", "-mavx512bf16", "-mavx512vbmi")
# The values of QUANTLIB_ISA: the instruction sets, and the kernels of one where they find more instructions.
LEVELS = {isa: isa for isa in ISAS}
if len(ISAS) > 1:
    LEVELS |= {"avx2_vnni": "avx2", "amx": "avx512_bf16"}


class BuildError(RuntimeError):
    """Raised if there is no library; ``log`` is the output of the compiler."""

    def __init__(self, why: str, log: str = "") -> None:
        super().__init__(why)
        self.log = log


CHANGED = "{} or a header of it changed while it was compiled: build again"


def mode() -> str:
    """``QUANTLIB_BUILD``: "auto", "0" or "1"."""
    value = os.environ.get("QUANTLIB_BUILD", "auto")
    if value not in ("auto", "0", "1"):
        raise ValueError(f"QUANTLIB_BUILD must be auto, 0 or 1, got {value!r}")
    return value


def library(name: str, build: bool = True) -> Path:
    """The library "cpu" or "cuda": the one of the wheel, else one compiled from these very sources, now or before.

    Without ``build`` nothing is compiled unless ``QUANTLIB_BUILD=1`` asks for it.

    Raises
    ------
    BuildError
        Where there is none and none can be made. A plain RuntimeError with ``QUANTLIB_BUILD=1``.
    """
    try:
        return find_or_build(name, build or mode() == "1")
    except BuildError as error:
        more = f"; `quantlib build{' --cuda' * (name == 'cuda')}` shows all of it" if error.log else ""
        if mode() != "1":
            raise BuildError(f"{error}{more}", error.log) from None
        raise RuntimeError(f"QUANTLIB_BUILD=1 asks for the {name} kernels: {error}{more}") from error


def find_or_build(name: str, build: bool = True) -> Path:
    """Return the path that `library` returns."""
    shipped = PACKAGE / FILES[name]
    if CSRC.parent == PACKAGE and shipped.exists():
        return shipped
    if mode() == "0":
        raise BuildError("QUANTLIB_BUILD=0 forbids compiling")
    try:
        recipe, folders = Recipe(name), caches()
    except OSError as error:  # a source that cannot be read
        raise BuildError(f"cannot compile the {name} kernels: {error}") from error
    file = f"{recipe.key}-{FILES[name]}"
    for folder in folders:
        if _sound(folder / file):
            return folder / file
    if not build:
        raise BuildError(f"is not compiled: `quantlib build{' --cuda' * (name == 'cuda')}` compiles it")
    refused: list[str] = []
    for folder in folders:
        try:
            _make_private(folder / "objects")
            with _locked(folder):
                if not _sound(folder / file):
                    why = f" (not into {refused[0]})" if refused else ""
                    log.warning("compiling the %s kernels into %s%s, once for these sources", name, folder, why)
                    recipe.build(folder / file, folder / "objects")
                    _seal(folder / file)
                    _forget_old(folder)
            return folder / file
        except OSError as error:
            refused.append(f"{folder}: {error.strerror or error}")
    why = "QUANTLIB_CACHE must be a folder that this user can write and nobody else"
    raise BuildError(f"cannot keep compiled kernels in {', nor in '.join(refused)}; {why}")


def caches() -> list[Path]:
    """Return the cache folders for compiled kernels, in order; the first that can be used is used.

    ``QUANTLIB_CACHE`` alone if it is set; otherwise ``$XDG_CACHE_HOME/quantlib`` or ``~/.cache/quantlib``, and where
    there is no home or it cannot be written, ``quantlib-<user id>`` in the folder of temporary files.
    """
    asked = os.environ.get("QUANTLIB_CACHE")
    if asked:
        if not os.path.isabs(asked):
            raise BuildError(f"QUANTLIB_CACHE must be an absolute path, got {asked!r}")
        return [Path(asked)]
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # its specification says to ignore such a value
        base = os.path.join(os.path.expanduser("~"), ".cache")
    folders = [Path(base, "quantlib")] if os.path.isabs(base) else []
    with contextlib.suppress(FileNotFoundError):  # there may be no folder for temporary files
        folders.append(Path(tempfile.gettempdir(), f"quantlib-{os.geteuid()}"))
    if not folders:
        raise BuildError("no home, no folder for temporary files: QUANTLIB_CACHE must be a folder that can be written")
    return folders


@dataclass(frozen=True)
class Unit:
    """One call of a compiler."""

    source: Path
    compiler: tuple[str, ...]
    flags: tuple[str, ...]
    folder: Path = CSRC  # searched for headers before the others
    before: tuple[Path, ...] = ()  # sources that are compiled as one with this

    def key(self, platform: bytes, look: Look | None = None) -> str:
        """Return a digest of everything that decides the object file."""
        look = look or Look()
        text = "\0".join((*self.compiler, *self.flags, str(self.source.relative_to(CSRC))))
        files = look.files((*self.before, self.source), self.folder)
        return _digest_of([_hash(platform), _hash(text.encode()), *map(look.sha256, files)])

    def read(self) -> tuple[Path, ...]:
        """Return the sources and every header of ours that they include, directly or through others.

        A header counts even where an ``#if`` leaves it out. Headers of torch and of the compiler are not read.
        """
        return Look().files((*self.before, self.source), self.folder)


class Look:
    """One look at the sources: each file is sought and read once, however many units it is part of."""

    def __init__(self) -> None:
        self.files = functools.cache(self._files)
        self.header = functools.cache(self._header)
        self.sha256 = functools.cache(lambda path: _hash(path.read_bytes()))

    def _files(self, sources: tuple[Path, ...], folder: Path) -> tuple[Path, ...]:
        found = dict.fromkeys(sources)  # in order
        rest = list(sources)
        for path in rest:  # which grows
            for name in _includes(path):
                header = self.header(path.parent, folder, name)
                if header is not None and header not in found:
                    found[header] = None
                    rest.append(header)
        return tuple(found)

    @staticmethod
    def _header(beside: Path, folder: Path, name: str) -> Path | None:
        found = next((h for f in (beside, folder, CSRC, PACKAGE) if (h := f / name).is_file()), None)
        return found and Path(os.path.normpath(found))


class Recipe:
    """The command, the flags and the sources that make one library."""

    def __init__(self, name: str) -> None:
        if not sys.platform.startswith("linux"):
            raise BuildError(f"the kernels are compiled on Linux only, this is {sys.platform}")
        torch = find_torch()
        self.include = ("-I", str(CSRC), "-I", str(PACKAGE), "-isystem", str(torch / "include"))
        machine = (platform.machine(), *platform.libc_ver())  # a home may be shared by several
        version = torch / "include/torch/headeronly/version.h"
        self._platform = _digest("".join(machine).encode(), version.read_bytes()).encode()
        self.units = cuda_units() if name == "cuda" else cpu_units()
        if not self.units:
            raise BuildError(f"{CSRC} holds no sources of the {name} kernels")
        self.linker, self.needs = self.units[0].compiler, ["libtorch_cpu.so"]
        if name == "cuda":
            self.linker, self.needs = (*self.linker, "-cudart", "static"), ["libtorch_cpu.so", "libtorch_cuda.so"]
        else:
            self.linker = (*self.linker, *cxxflags())
        self.key = self._digest_of_units()

    def _digest_of_units(self) -> str:
        look = Look()
        return _digest(" ".join(self.linker).encode(), *(u.key(self._platform, look).encode() for u in self.units))

    def build(self, out: Path, objects: Path) -> None:
        """Compile what ``objects`` does not hold yet and link it into ``out``, which appears whole or not at all."""
        workers = jobs()
        objects.mkdir(0o700, parents=True, exist_ok=True)
        with _locked(objects):
            for left in objects.glob("tmp*"):  # by a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=objects) as scratch, _Compilers(workers) as compilers:
                compile_unit = functools.partial(self._compile, compilers, objects, Path(scratch))
                futures = [compilers.pool.submit(compile_unit, unit) for unit in self.units]
                for future in as_completed(futures):
                    future.result()  # the first that fails ends the others
                made = [future.result() for future in futures]
                stubs = [str(_stub(compilers, Path(scratch), so)) for so in self.needs]
                library = Path(scratch, out.name)
                needed = [word for stub in ("--no-as-needed", *stubs) for word in ("-Xlinker", stub)]  # nvcc keeps them
                command = [*self.linker, "-shared", "-o", str(library), *made, *needed]
                compilers.run(command, f"linking {out.name}")
                if self._digest_of_units() != self.key:
                    raise BuildError(CHANGED.format("a source"))
                _place(library, out)

    def object(self, unit: Unit) -> str:
        """Return the name of the object file of ``unit``."""
        return f"{unit.key(self._platform)}.o"

    def _compile(self, compilers: _Compilers, objects: Path, scratch: Path, unit: Unit) -> str:
        made = objects / self.object(unit)
        if not _whole(made):
            new = scratch / made.name
            include = (
                "-I",
                str(unit.folder),
                *self.include,
                *(w for path in unit.before for w in ("-include", str(path))),
            )
            command = [*unit.compiler, *unit.flags, *include, "-c", str(unit.source), "-o", str(new)]
            compilers.run(command, str(unit.source.relative_to(CSRC)))
            if self.object(unit) != made.name:  # and nobody knows which of its texts the compiler has read
                raise BuildError(CHANGED.format(unit.source.relative_to(CSRC)))
            _place(new, made)
            _seal(made)
        return str(made)


class _Compilers:
    """Runs commands, each in a process group of its own, which is killed when the build ends, however it ends.

    Beside each command a shell waits for the end of a pipe that this process alone holds open, and then kills the
    group: at an exception, Ctrl-C included, and when this process is killed.
    """

    WATCHED = 'exec 3<&0 </dev/null; { read nothing <&3; kill -KILL 0; } >/dev/null 2>&1 & exec "$@" 3<&-'

    def __init__(self, jobs: int) -> None:
        self.pool = ThreadPoolExecutor(jobs)
        self.end, self.held = os.pipe()

    def __enter__(self) -> _Compilers:
        return self

    def __exit__(self, *raised: object) -> None:
        os.close(self.held)
        self.pool.shutdown(cancel_futures=True)
        os.close(self.end)

    def run(self, command: list[str], what: str) -> None:
        """Run ``command``; a BuildError with all it printed where it fails."""
        if shutil.which(command[0]) is None:
            raise BuildError(f"no compiler: {command[0]} is not there")
        process = subprocess.Popen(
            ["/bin/sh", "-c", self.WATCHED, "sh", *command],
            stdin=self.end, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
            start_new_session=True,
        )  # fmt: skip
        try:
            said = "".join(reversed(process.communicate()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            last = (said.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
            first = next((line for line in said.splitlines() if "error" in line), last)
            raise BuildError(f"{what} does not compile: {first}", f"{shlex.join(command)}\n{said}")


def cpu_units() -> list[Unit]:
    """Every file of csrc/cpu once an instruction set, the glue once."""
    cxx, folder = tuple(cxx_command()), CSRC / "cpu"
    flags = (*cxxflags(), *CPU, *HOST)
    kernels = sorted(p for p in folder.glob("*.cpp") if p.stem != "backend")
    each = [Unit(p, cxx, (*flags, f"-DQL_ISA={isa}", *more)) for p in kernels for isa, more in ISAS.items()]
    return [*each, *glue_units(folder, flags), Unit(CSRC / "registration.cpp", cxx, flags)]


def glue_units(folder: Path, flags: tuple[str, ...]) -> list[Unit]:
    """Return the backend of ``folder`` as one with csrc/ops/<op>.cpp of each op that the folder has a kernel file of.

    These are the ops that the library registers. As one they compile in a fifth of the time.
    """
    stems = {p.stem for p in folder.glob("*.c*") if p.suffix in (".cpp", ".cu")}
    ops = sorted(p for p in CSRC.glob("ops/*.cpp") if p.stem in stems)
    backend = folder / "backend.cpp"
    return [Unit(backend, tuple(cxx_command()), flags, folder, tuple(ops))] if backend.exists() else []


def cxxflags() -> list[str]:
    """The user's flags, for compiler and linker; a fast-math among them could also flush every subnormal to zero."""
    return [*_words("CXXFLAGS"), "-fno-fast-math"]


def cxx_command() -> list[str]:
    """The C++ compiler."""
    return _words("CXX") or ["c++"]


def _words(variable: str) -> list[str]:
    """Split an environment variable into words, as a shell does."""
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BuildError(f"{variable} must be words that a shell can split, got {text!r}: {error}") from None


def cuda_units() -> list[Unit]:
    """Every kernel for all of `cuda_archs`, and the glue, which is plain C++ and names them."""
    compiler, folder = nvcc(), CSRC / "cuda"
    if compiler is None:
        raise BuildError("no nvcc on PATH, in $CUDA_HOME/bin or in /usr/local/cuda/bin")
    archs = cuda_archs(compiler)
    targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in archs]
    targets.append(f"arch=compute_{archs[-1]},code=compute_{archs[-1]}")
    flags = (*CUDA, "-Xcompiler", ",".join(HOST), *(word for target in targets for word in ("-gencode", target)))
    kernels = [Unit(p, (compiler,), flags) for p in sorted(folder.glob("*.cu"))]
    names = " ".join([*(f"sm_{arch}" for arch in archs), f"compute_{archs[-1]}"])
    glue = (*cxxflags(), *COMMON, "-DUSE_CUDA", f'-DQL_TARGETS="{TARGETS}{names}"', *HOST)
    return [*kernels, *glue_units(folder, glue)]


@functools.cache
def cuda_archs(compiler: str) -> tuple[int, ...]:
    """Return the CUDA_ARCHS that ``compiler`` knows; 80 and 90 if it does not say."""
    try:
        asked = subprocess.run([compiler, "--list-gpu-code"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):  # the build then says why
        return (80, 90)
    known = set(asked.stdout.split())
    return tuple(arch for arch in CUDA_ARCHS if f"sm_{arch}" in known) or (80, 90)


def targets(library: Path) -> tuple[str, ...]:
    """Return what a CUDA library was compiled for: "sm_90", and "compute_120" for PTX."""
    found = re.search(TARGETS.encode() + rb"([\w ]+)", library.read_bytes())
    return tuple(found[1].decode().split()) if found else ()


def runs_on(targets: Iterable[str], capability: tuple[int, int]) -> bool:
    """Return whether one of ``targets`` runs on a device of that compute capability.

    Machine code runs on its own major version from its minor version on; PTX on whatever is not older.
    """
    device = 10 * capability[0] + capability[1]
    for kind, arch in (target.split("_") for target in targets):
        if int(arch) <= device and (kind == "compute" or int(arch) // 10 == capability[0]):
            return True
    return False


def nvcc() -> str | None:
    """The CUDA compiler, if there is one."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=Path(home, "bin")) for home in homes if home)
    return os.environ.get("NVCC") or shutil.which("nvcc") or next(filter(None, found), None)


def find_torch() -> Path:
    """Return torch's folder: that of this interpreter, or of the environment that pip's build isolation hides."""
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
    """Return the number of compilers that run at once: MAX_JOBS, or one a core."""
    text = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise BuildError(f"MAX_JOBS must be a positive integer, got {text!r}")
    return count


@functools.cache
def _includes(path: Path) -> tuple[str, ...]:
    """Return the names that a source includes. One that is a macro could be any header: that is an error."""
    names = re.findall(
        r"^[ \t]*#[ \t]*include[ \t]*(.*?)[ \t]*(?://.*)?$", path.read_text(errors="replace"), re.MULTILINE
    )
    for name in names:
        if not re.fullmatch(r'"[^"]+"|<[^>]+>', name):
            raise BuildError(f"{path} must include headers by name, got {name}")
    return tuple(name[1:-1] for name in names)


def _stub(compilers: _Compilers, folder: Path, soname: str) -> Path:
    """An empty library that stands for ``soname`` at link time: the real one need not be here."""
    stub = folder / soname
    flags = ["-shared", "-nostdlib", f"-Wl,-soname,{soname}", "-x", "c++", os.devnull, "-o", str(stub)]
    compilers.run([*cxx_command(), *flags], soname)
    return stub


def _sound(library: Path) -> bool:
    """Return True if a cached library exists, is whole, and only this user or root could have written it."""
    try:
        why = _stranger(library.parent) or _stranger(library)
    except OSError:
        return False
    if why is None and not _whole(library):
        why = "it is damaged, or was not finished"
    if why is not None:
        log.warning("%s is not loaded: %s", library, why)
    return why is None


def _stranger(path: Path) -> str | None:
    """Name who else, beside this user and root, could have written ``path``; None if nobody could."""
    for found in (path.lstat(), path.stat()):  # a link too is somebody's
        if found.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user, {found.st_uid}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write {path}, its mode is {stat.S_IMODE(found.st_mode):04o} (chmod go-w)"
    return None


def _seal(path: Path) -> None:
    """Note the SHA-256 of what lies at ``path`` beside it."""
    noted = path.with_name(f".{path.name}.sha256")
    noted.write_bytes(_sha256(path))
    _place(noted, path.with_name(f"{path.name}.sha256"))


def _whole(path: Path) -> bool:
    """Return True if ``path`` has the bytes that `_seal` saw: 2 ms for 2.6 MB, of an import's 2 s."""
    try:
        return path.with_name(f"{path.name}.sha256").read_bytes() == _sha256(path)
    except OSError:
        return False


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).hexdigest().encode()


def _place(made: Path, path: Path) -> None:
    """Move ``made`` to ``path``, which is complete or absent even after a power cut."""
    made.chmod(made.stat().st_mode & ~0o022)
    _sync(made)
    os.replace(made, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _make_private(folder: Path) -> None:
    """Make ``folder`` and what is missing above it, for this user alone; an OSError where it or its parent is not."""
    for path in reversed((folder, *folder.parents)):
        if not os.path.exists(path):
            path.mkdir(0o700, exist_ok=True)
    if why := _stranger(folder.parent) or _stranger(folder):
        raise OSError(why)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lock a folder: of several processes that import at once, one compiles and the others wait for it."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _forget_old(folder: Path) -> None:
    for path in (*folder.glob("*.so*"), *folder.glob("objects/*.o*")):
        if path.stat().st_mtime < time.time() - KEEP_SECONDS:
            path.unlink(missing_ok=True)


def _digest(*parts: bytes) -> str:
    return _digest_of(map(_hash, parts))


def _digest_of(digests: Iterable[bytes]) -> str:
    return _hash(b"".join(digests)).hex()[:16]


def _hash(part: bytes) -> bytes:
    return hashlib.sha256(part).digest()


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
