"""The kernels of csrc/cuda: every file compiled for one architecture with the flags of the build, every kernel read."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_static import sass
from gpu_static.measured import Measured
from quantlib import _build, formats

# What it takes for a template argument to be a format, and which of a kernel's arguments x, y or codes are.
BITS = {f.name: int(8 * f.bytes_per_element) for f in formats.FORMATS.values()}
FAST = ("cast",)  # what `make test` compiles for more than one architecture
Edit = Callable[[Path], None]  # plants a fault in a copy of csrc


def cuobjdump() -> str | None:
    """CUDA's disassembler: beside nvcc, or in the Triton package."""
    nvcc, triton = _build.nvcc(), importlib.util.find_spec("triton")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    folders += [Path(triton.origin).parent / "backends/nvidia/bin"] if triton and triton.origin else []
    return next((found for f in folders if (found := shutil.which("cuobjdump", path=f))), shutil.which("cuobjdump"))


def missing() -> str | None:
    """Why nothing can be read here, or None."""
    if _build.nvcc() is None:
        return "there is no nvcc"
    return None if cuobjdump() else "there is no cuobjdump beside nvcc or in Triton"


def sources() -> list[Path]:
    return sorted(_build.CSRC.glob("cuda/*.cu"))


def key(source: Path, arch: int) -> str:
    """Return the hash of all that a file of kernels is compiled from."""
    headers = sorted(p for p in source.parent.parent.rglob("*") if p.suffix in (".h", ".cuh"))
    parts = [compiler(), *command(source, arch)[1:-1], source.name, *(p.read_text() for p in (source, *headers))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


@functools.cache
def compiler() -> str:
    """nvcc's version."""
    nvcc = _build.nvcc()
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release [\d.]+", said)[0].split()[1]


def command(source: Path, arch: int) -> list[str]:
    flags = [flag for flag in _build.CUDA if not flag.startswith("-DTORCH")]
    return [str(_build.nvcc()), *flags, f"-arch=sm_{arch}", "-cubin", str(source)]


def measure(source: Path, arch: int, *flags: str, edit: Edit | None = None) -> list[dict[str, Any]]:
    """Every kernel of ``source``, compiled with more ``flags`` or from what ``edit`` makes of it."""
    with tempfile.TemporaryDirectory() as scratch:
        if edit:
            csrc = Path(shutil.copytree(_build.CSRC, Path(scratch, "csrc")))
            source = csrc / source.relative_to(_build.CSRC)
            edit(source)
        cubin = Path(scratch, "kernels.cubin")
        made = subprocess.run(
            [*command(source, arch), *flags, "-o", str(cubin)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            raise RuntimeError(f"{source.name} does not compile for sm_{arch}:\n{made.stderr}")
        listings = sass.disassemble(str(cuobjdump()), cubin)
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(x.name for x in listings), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [asdict(read(x, name, source.stem, arch)) for x, name in zip(listings, names, strict=True)]


def read(listing: sass.Listing, name: str, op: str, arch: int) -> Measured:
    name = re.sub(r"(quantlib|cuda|\(anonymous namespace\))::", "", name)
    kernel, given = re.fullmatch(r"(\w+)(?:<(.*)>)?", name).groups()  # type: ignore[union-attr]
    arguments = re.split(r", ", given) if given else []
    formats = [a for a in arguments if a in BITS]
    product = any(sass.PRODUCTS.match(name) for name in listing.names) or kernel.endswith("product_kernel")
    code, in_loop = (listing.graph.around_products(), True) if product else listing.graph.streaming()
    units = units_of(kernel, code, formats)
    return Measured(
        language="cuda",
        kernel=kernel,
        op=op,
        config=" ".join([op, *arguments]) if kernel in ("finish_kernel", "product_kernel") else " ".join(arguments),
        arch=arch,
        compiler=compiler(),
        warps=0,
        registers=listing.registers,
        spilled=listing.stack + listing.local,
        shared=listing.shared,
        instructions=len(code) / units,
        read=sum(sass.accesses(code, "LDG")) / units,
        written=sum(sass.accesses(code, "STG")) / units,
        units=units,
        main=sass.count(code),
        names=listing.names,
        inexact=[],
        scattered=[],
        facts={"arguments": arguments, "bits": [BITS[f] for f in formats], "in_loop": in_loop},
    )


def units_of(kernel: str, code: list[sass.Instruction], formats: list[str]) -> float:
    """Elements or codes of a thread on the main path.

    A matrix instruction takes 8 codes of a lane, or 16 of int8, with 8 rows of x; and there are two of it for 16.
    """
    products = sum(i.name.startswith("HMMA.16816") + 2 * i.name.startswith("IMMA.16832") for i in code)
    if products:
        return float(4 * products)
    if kernel == "finish_slab_kernel":
        return sum(sass.accesses(code, "STG")) / 2
    if not formats:
        return 1.0
    if kernel in ("dequantize_kernel", "decode_slab_kernel") or (
        kernel == "cast_kernel" and BITS[formats[0]] < BITS[formats[1]]
    ):
        return sum(sass.accesses(code, "STG")) * 8 / BITS[formats[1]]
    tensors = 2 if kernel == "fake_quantize_backward_kernel" else 1
    loaded = sum(width for width in sass.accesses(code, "LDG") if width == 16)
    return max(loaded * 8 / BITS[formats[0]] / tensors, 1.0)
