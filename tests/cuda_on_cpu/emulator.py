"""Compile csrc/cuda with g++ and run its kernels on this machine's CPU; cuda_runtime.h beside this file says how."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import re
import shlex
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quantlib import formats
from quantlib.reference.activation import ACTIVATIONS
from quantlib.testing import Case, bits, expected, inputs
from quantlib.testing.bytes import Array
from quantlib.testing.table import OPS

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = (*shlex.split(os.environ.get("CXX", "g++")), "-std=c++20")
FLAGS = ("-O1", "-g1", "-fno-pie", "-Wall", "-Werror", "-Wno-unknown-pragmas")
FLAGS += ("-fno-strict-aliasing", "-ffp-contract=off")
RUNTIME = tuple(HERE / f"{name}.cpp" for name in ("block", "image", "intrinsics", "memory"))
OF_CUDA_ALONE = ("block", "image", "memory", "tsan")  # they see nothing of csrc: a change there does not compile them
# Of the checks for undefined behaviour those that a kernel can meet.
UNDEFINED = ("-fsanitize=bounds,shift,signed-integer-overflow", "-fno-sanitize-recover=all")
ADDRESS = ("-fsanitize=address,alignment", *UNDEFINED)
# How kernels are compiled, the rest, and all linked. watched: each access is told to memory.cpp as the source has it.
MODES = {
    "watched": ((*UNDEFINED, "-fsanitize=thread", "-fno-tree-sra"), ("-O2",), UNDEFINED),
    "address": (ADDRESS, ("-fsanitize=address",), ADDRESS),
}
MATMULS = ("dequant_matmul", "dequant_matmul_backward", "scaled_matmul")
SLAB = "slab"  # not an op: what serves dequant_matmul of many rows
SMALLER = (
    ("int64_t(1) << 23;", "int64_t(1) << 13;"),
    ("int64_t(1) << 22;", "int64_t(1) << 13;"),
    ("int64_t(1) << 13;  // of x", "int64_t(1) << 8;  // of x"),
)
FAKE = ("fake_quantize", "fake_quantize_backward")
STEP = ("adamw_step",)
GROUPED = ("grouped_dequant_matmul",)
TYPES = {name: index for index, name in enumerate(formats.FORMATS)}  # enum class Type of csrc/problem.h


class KernelError(RuntimeError):
    """An error of the emulator, a launcher or a sanitizer."""


@dataclass(frozen=True)
class Emulator:
    """An executable of main.cpp and some of the ops."""

    path: Path
    watched: bool = True  # whether memory.cpp judges every access

    def run(self, calls: Sequence[Call], launched: set[str] | None = None) -> list[tuple[Array, ...]]:
        """Every buffer of every call, as it is afterwards; adds the kernels that ran to ``launched``.

        Raises
        ------
        KernelError
            Where a kernel or a launch failed; calls after it were not made.
        """
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder, "calls"), Path(folder, "buffers")
            given.write_bytes(b"".join(call.packed() for call in calls))
            options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
            options["CUDA_ON_CPU_UNWATCHED"] = "" if self.watched else "1"
            command = [str(self.path), str(given), str(made)]
            done = subprocess.run(command, env=os.environ | options, capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelError(self.with_lines(done.stderr))
            memory = made.read_bytes()
        if launched is not None:
            names = self.kernels()
            launched |= {names[int(address)] for address in done.stdout.split()}
        start, results = 0, []
        for call in calls:
            buffers = []
            for buffer in call.buffers:
                size = 0 if buffer is None else buffer.values.nbytes
                if buffer is not None:
                    dtype, shape = buffer.values.dtype, buffer.values.shape
                    buffers.append(np.frombuffer(memory[start : start + size], dtype).reshape(shape))
                start += size
            results.append(tuple(buffers))
        return results

    def kernels(self) -> dict[int, str]:
        """Address and name of every instance of every kernel in the executable."""
        name = "|".join(kernel for source in CSRC.glob("cuda/*.cu*") for kernel in kernels(source))
        table = subprocess.run(["nm", "-C", str(self.path)], capture_output=True, text=True, check=True).stdout
        found = re.findall(rf"^(\w+) \w .*?\b((?:{name})(?:<.*>)?)\(", table.replace("quantlib::", ""), re.M)
        return {int(address, 16): kernel for address, kernel in found}

    def with_lines(self, text: str) -> str:
        """``text`` with lines of the sources for "from 0x...", and those that call them where functions are inlined."""
        for address in set(re.findall(r"(?<=from )0x\w+", text)):
            call = hex(int(address, 16) - 1)  # the address is where it returns to
            command = ["addr2line", "-i", "-s", "-e", str(self.path), call]
            lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
            text = text.replace(f"from {address}", " in ".join(line.split(" ")[0] for line in lines if line))
        return text


@dataclass(frozen=True)
class Buffer:
    """``values`` to read, or of the shape and type to write, ``shift`` bytes past an aligned address."""

    values: Array
    given: bool
    shift: int = 0

    def packed(self) -> bytes:
        header = struct.pack("<qqq", self.values.nbytes, self.shift, self.given)
        return header + self.values.tobytes() if self.given else header


@dataclass(frozen=True)
class Call:
    """One call of an op, as main.cpp reads it."""

    op: str
    source: str
    target: str
    flag: bool  # saturate, tiled, x_per_row or lsq_mask
    seed: int  # of the order in which threads run
    grid: tuple[int, int, int, int]
    buffers: tuple[Buffer | None, ...]
    result: str = "float32"
    activation: str | None = None
    M: int = 0  # of a matmul

    def packed(self) -> bytes:
        families = ((0, OPS), (16, MATMULS), (32, FAKE), (48, STEP), (64, GROUPED))
        first, ops = next(known for known in families if self.op in known[1])
        op = first + ops.index(self.op)
        types = (TYPES[self.source], TYPES[self.target], TYPES[self.result])
        activation = (None, *ACTIVATIONS).index(self.activation)
        counts = (self.seed, len(self.buffers), *self.grid, self.M)
        call = struct.pack("<iBBBBB3xII4x5q", op, *types, self.flag, activation, *counts)
        return call + b"".join(struct.pack("<qqq", -1, 0, 0) if b is None else b.packed() for b in self.buffers)


def kernels(source: Path) -> list[str]:
    """The names of what is ``__global__`` in a file."""
    text = source.read_text()
    names = re.findall(r"__global__.*?(\w+_kernel)\(", text, re.DOTALL)
    assert len(names) == text.count("__global__"), f"{source}: a kernel is not named so"
    return names


def call_of(case: Case, seed: int = 0, shift: int = 0) -> Call:
    """``case`` as a call; every buffer begins ``shift`` of its elements past an aligned address."""
    given = {name: bits(values) for name, values in inputs(case).items()}
    made = [bits(values) for values in expected(case)]
    read = {name: Buffer(values, True, shift * values.itemsize) for name, values in given.items()}
    written = [Buffer(np.empty_like(values), False, shift * values.itemsize) for values in made]
    source, target, saturate = case.dtype, case.format, False
    if case.op == "cast":
        n = given["x"].size
        saturate = formats.get(case.format).bits <= 8 if case.saturate is None else case.saturate
        return Call(case.op, source, target, saturate, seed, (1, n, 1, n), (read["x"], *written))
    if case.op == "dequantize":
        source, target = target, source
    if case.op in ("quantize", "dequantize"):
        first = read["x" if case.op == "quantize" else "codes"]
        buffers = (first, read["scale"], read.get("zero_point"), *written)
    else:
        buffers = (read["x"], *written) if not case.symmetric else (read["x"], *written, None)
    return Call(case.op, source, target, saturate, seed, (*case.matrix, *case.resolved), buffers)


def expected_buffers(case: Case, call: Call) -> list[Array]:
    """Return the result of :meth:`Emulator.run` for a call of ``case`` when every byte is right."""
    written = iter(expected(case))
    return [b.values if b.given else bits(next(written)) for b in call.buffers if b is not None]


def build(cache: Path, ops: Sequence[str] = OPS, csrc: Path = CSRC, mode: str = "watched") -> Emulator:
    """The executable of these sources, made now or before."""
    made = link(cache, [HERE / "main.cpp", *(csrc / f"cuda/{op}.cu" for op in ops)], csrc, mode)
    return Emulator(made)


def keep_formats(csrc: Path, *kept: str) -> None:
    """Leave only these rows in the header of formats of a copy of csrc, so that its kernels compile in less time."""
    header = csrc / "formats.h"
    others = rf" \\\n  X\((?!(?:{'|'.join(kept)}),).*?\)(?= \\$|$)"
    text, n = re.subn(others, "", header.read_text(), flags=re.MULTILINE)
    assert n
    assert set(re.findall(r"\n  X\((\w+)", text)) == set(kept), "the formats stand elsewhere"
    header.write_text(text)


def with_small_slabs(folder: Path) -> Path:
    """A copy of csrc in ``folder`` whose slabs have few values and take few rows of x at a time."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    source = csrc / "cuda/slab.cu"
    for right, smaller in SMALLER:
        assert source.read_text().count(right) == 1
        source.write_text(source.read_text().replace(right, smaller))
    return csrc


def link(cache: Path, sources: Sequence[Path], csrc: Path = CSRC, mode: str = "watched") -> Path:
    """The executable of ``sources``, kernels (.cu) and others, with what runs them. Only kernels are of ``csrc``."""
    objects = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Templates that several objects have: the linker takes those of the first, which are not watched.
        for source in (*RUNTIME, HERE / "tsan.cpp", *sources):
            is_kernel = source.suffix == ".cu"
            include = (HERE,) if source.stem in OF_CUDA_ALONE else (HERE, csrc if is_kernel else CSRC)
            flags = (*FLAGS, *MODES[mode][not is_kernel])
            key = hashlib.sha256(repr((COMPILER, flags, digest(include))).encode() + source.read_bytes())
            command = [*COMPILER, *flags, *(f"-I{folder}" for folder in include), "-x", "c++", "-c", str(source)]
            objects.append(pool.submit(make, cache / f"{source.stem}-{key.hexdigest()[:16]}.o", command))
        paths = [str(made.result()) for made in objects]
    key = hashlib.sha256(repr(paths).encode())
    return make(cache / f"run-{key.hexdigest()[:16]}", [*COMPILER, "-no-pie", *MODES[mode][2], *paths])


@functools.cache
def digest(folders: tuple[Path, ...]) -> str:
    """Return the hash of the headers in ``folders``."""
    found = hashlib.sha256()
    for path in sorted(p for folder in folders for p in folder.rglob("*.*h")):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def make(path: Path, command: list[str]) -> Path:
    """``path``, which ``command`` makes; the workers of pytest-xdist share what one of them makes."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            scratch = path.with_suffix(".part")
            done = subprocess.run([*command, "-o", str(scratch)], capture_output=True, text=True, check=False)
            if done.returncode:
                raise KernelError(f"{shlex.join(command)}\n{done.stderr}")
            os.replace(scratch, path)
    return path
