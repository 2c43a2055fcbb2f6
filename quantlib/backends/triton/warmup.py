"""Compile ahead what the products of a model start: every kernel of every class of M, without a GPU, in parallel.

Triton keeps what it compiles in its own cache (``TRITON_CACHE_DIR``, ``~/.triton/cache``), where a later process finds
it in milliseconds. The launchers are called with tensors that have no memory and told of the device that is meant.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch

from quantlib import formats
from quantlib.backends.tiles import TileLayout
from quantlib.backends.triton.launch import Planned
from quantlib.backends.weight import Epilogue, Layout, QuantizedWeight
from quantlib.spec import SCALES, QuantSpec

MOST = 8192  # rows of x: from there on a batch is one of the classes below
# Around every power of two, where tiles change; of each also a size that 16 divides and one that it does not, which the
# compiler tells apart.
ROWS = tuple(
    sorted({m for power in range(14) for m in ((1 << power) - 1, 1 << power, (1 << power) + 1) if 0 < m <= MOST})
)


@dataclass(frozen=True)
class Product:
    """The product of a quantized layer: x [M, K] of ``dtype`` with a weight [N, K], by the op ``kernel``."""

    kernel: str
    spec: str
    shape: tuple[int, int]  # N, K
    dtype: str = "bfloat16"
    bias: bool = False


def target(arch: int) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", arch, 32)


class Driver:
    """The part of a driver that Triton's launch asks before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return target(self.arch)

    def get_device_interface(self) -> Any:
        return torch.cuda


def warm(products: Iterable[Product], rows: Sequence[int], on: Planned, jobs: int) -> Iterator[tuple[Product, int]]:
    """Compile what each product starts for each number of rows of x; each with its compiled kernels, as they are ready.

    Parameters
    ----------
    rows : sequence of int
        The sizes of batches: `ROWS` has one of each class.
    on : Planned
        The device.
    jobs : int
        Processes that compile at once.

    Raises
    ------
    RuntimeError
        Of the first that does not compile; the others are left.
    """
    unique = list(dict.fromkeys(products))
    # Sizes that lie side by side have kernels in common, and are one process's.
    size = -(-len(rows) // jobs)
    parts = [tuple(rows[n : n + size]) for n in range(0, len(rows), size)]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), start, (on,)) as pool:
        futures = {pool.submit(compile_rows, product, part): product for product in unique for part in parts}
        left = {product: len(parts) for product in unique}
        kernels = dict.fromkeys(unique, 0)
        try:
            for future in as_completed(futures):
                product = futures[future]
                left[product] -= 1
                kernels[product] += future.result()
                if not left[product]:
                    yield product, kernels[product]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def start(on: Planned) -> None:
    """Make this process one that compiles for ``on`` and starts nothing."""
    os.environ.pop("TRITON_INTERPRET", None)
    from triton.runtime import driver

    from quantlib.backends.triton import launch, slab

    torch.set_num_threads(1)
    driver.set_active(Driver(on.arch))
    launch.planned = on
    slab.product = lambda x, w: torch.empty(len(x), w.shape[1], device="meta")  # the vendor's


def compile_rows(product: Product, rows: Sequence[int]) -> int:
    """Compile what ``product`` starts for each of ``rows``; how many kernels this process did not have yet."""
    before = compiled()
    for M in rows:
        call(product, M)
    return compiled() - before


def compiled() -> int:
    """The number of this library's kernels that this process has compiled or found compiled."""
    import sys

    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("quantlib.backends.triton.")]
    kernels = {id(k): k for module in modules for k in vars(module).values() if isinstance(k, JITFunction)}
    return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())


def call(product: Product, M: int) -> None:
    """Call the launchers as a layer in evaluation mode does."""
    from quantlib.backends.triton import KERNELS

    spec, (N, K), dtype = QuantSpec.parse(product.spec), product.shape, getattr(torch, product.dtype)
    kernel, f = product.kernel, spec.row
    tiled = kernel == "dequant_matmul" and f.name in TileLayout.FORMATS
    with torch.device("meta"):
        if tiled:
            codes = torch.empty(tuple(TileLayout(f).shape(N, K)), dtype=torch.uint8)
        else:
            codes = torch.empty(N, f.columns(K), dtype=torch.uint8 if f.packed else getattr(torch, f.dtype_name))
        scale = torch.empty(spec.scale_shape((N, K)), dtype=getattr(torch, SCALES[spec.scale]))
        zero_point = None
        if not spec.symmetric:
            zero_point = torch.empty(spec.zero_point_shape((N, K)), dtype=getattr(torch, f.dtype_name))
        x, y = torch.empty(M, K, dtype=dtype), torch.empty(M, N, dtype=dtype)
        bias = torch.empty(N) if product.bias else None
    layout: Layout = "tiles" if tiled else "plain"
    weight, epilogue = QuantizedWeight(codes, scale, f, spec.block((N, K)), zero_point, (N, K), layout), Epilogue(bias)
    if kernel == "dequant_matmul":
        KERNELS["dequant_matmul"](x, weight, epilogue, False, y)
    elif kernel == "dynamic_matmul":
        KERNELS["dynamic_matmul"](x, weight, epilogue, y)
    elif kernel == "scaled_matmul":
        assert spec.activation is not None
        quantize_and_multiply(x, spec.activation, weight, epilogue, y)


def quantize_and_multiply(
    x: torch.Tensor, activation: QuantSpec, weight: QuantizedWeight, epilogue: Epilogue, y: torch.Tensor
) -> None:
    """x becomes codes with a scale that is kept, or with one that is found, and the codes are multiplied."""
    from quantlib.backends.triton import KERNELS

    f, block = formats.get(activation.format), activation.block(x.shape)
    with torch.device("meta"):
        x_codes = torch.empty(x.shape, dtype=getattr(torch, f.dtype_name))
        x_scale = torch.empty(activation.scale_shape(x.shape))
        zero_point = None if activation.symmetric else torch.empty_like(x_scale, dtype=torch.int32)
    if activation.static:
        KERNELS["quantize"](x, x_scale, f, block, zero_point, x_codes)
    else:
        KERNELS["quantize_dynamic"](x, f, block, x_codes, x_scale, zero_point)
    KERNELS["scaled_matmul"](x_codes, x_scale, weight, zero_point, epilogue, y)
