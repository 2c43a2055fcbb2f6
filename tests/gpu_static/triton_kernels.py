"""The Triton kernels, cross-compiled and read: one process an architecture, for Triton remembers 8-bit floats."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from gpu_static import reductions, sass, warpgroups
from gpu_static.launches import Config, facts
from gpu_static.measured import Measured


def compiled(config: Config, arch: int, *, aligned: bool = True, **options: Any) -> Any:
    """The kernel's binary; without ``aligned`` the compiler does not know what is a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = config.attributes if aligned else {}
    source = ASTSource(fn=config.kernel, signature=config.signature, constexprs=config.constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=config.options | options)


def measure(config: Config, arch: int, **how: Any) -> Measured:
    """Return the compiled kernel of ``config``."""
    import triton

    binary = compiled(config, arch, **how)
    listing = listed(binary)
    code, in_loop = main_path(config, listing)
    threads = 32 * binary.metadata.num_warps
    units = units_of(config, code, in_loop, threads)
    ptx = binary.asm["ptx"]
    return Measured(
        language="triton",
        kernel=config.kernel.__name__,
        op=config.call.op,
        config=str(config.call),
        arch=arch,
        compiler=triton.__version__,
        warps=binary.metadata.num_warps,
        registers=listing.registers,
        spilled=listing.stack + listing.local,
        shared=binary.metadata.shared,
        instructions=len(code) / units,
        read=sum(sass.accesses(code, "LDG")) / units,
        written=sum(sass.accesses(code, "STG")) / units,
        units=units,
        main=sass.count(code),
        names=listing.names,
        inexact=[what for what in ("ftz", "approx", "full") if re.search(rf"\.{what}\.", ptx)]
        + ["contraction"] * binary.metadata.enable_fp_fusion,
        scattered=reductions.scattered(binary.asm["ttgir"]),
        overwritten=warpgroups.overwritten(listing.graph),
        facts=facts(config),
    )


def listed(binary: Any) -> sass.Listing:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        (listing,) = sass.disassemble(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", Path(file.name))
    return listing


def is_product(config: Config) -> bool:
    return getattr(config.tile, "tile_m", 0) > 0


def main_path(config: Config, listing: sass.Listing) -> tuple[list[sass.Instruction], bool]:
    return (listing.graph.around_products(), True) if is_product(config) else listing.graph.streaming()


def units_of(config: Config, code: list[sass.Instruction], in_loop: bool, threads: int) -> float:
    """Elements or weights of a thread on the main path."""
    tile, given = config.tile, config.args
    if hasattr(tile, "tile_n"):
        return float(tile.tile_n * tile.tile_k / threads)
    if in_loop:  # as many as it loads in vectors, of each of the tensors that are read alike
        loaded = sum(width for width in sass.accesses(code, "LDG") if width == 16)
        return float(loaded / given["X"].bits * 8 / (2 if "dy_ptr" in given else 1))
    if "T" in given:
        return float(tile.rows * tile.cols / threads)
    if "B" in given:
        return float(tile.count * tile.rows * tile.cols * max(tile.chunks, 1) / threads)
    if "COLS" in given:
        return float(given["COUNT"] * given["COLS"] / threads)
    if "TILE" in given or "PARTS" in given:
        return float(given["TILE" if "TILE" in given else "PARTS"] / threads)
    return max(sum(sass.accesses(code, "STG")) / (given["X"].bits / 8), 1.0)
