"""Compile ahead the Triton kernels of every product of a model, for every size of a batch, in parallel."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantlib.cli.parser import checked, count, one_of
from quantlib.spec import GRAMMAR, QuantSpec

if TYPE_CHECKING:
    from quantlib.backends.triton.launch import Planned
    from quantlib.backends.triton.warmup import Product

DTYPES = ("bfloat16", "float16", "float32")
SIZE, ARCH = "a number >= 1", "a compute capability from 80 on, such as 90"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a quantized model folder or .safetensors file")
    parser.add_argument(
        "--shape",
        action="append",
        nargs=2,
        type=checked(SIZE, count),
        metavar=("N", "K"),
        help="instead of a model: weights [N, K]; may be repeated",
    )
    parser.add_argument(
        "--spec", action="append", type=checked(GRAMMAR, QuantSpec.parse), help="of --shape; may be repeated (W4A16)"
    )
    parser.add_argument("--dtype", type=one_of(DTYPES), default=DTYPES[0], help=f"of x: {', '.join(DTYPES)} (bfloat16)")
    parser.add_argument("--bias", action="store_true", help="--shape is of layers with a bias")
    parser.add_argument(
        "--rows",
        action="append",
        type=checked(SIZE, count),
        metavar="M",
        help="only batches of M rows; may be repeated",
    )
    parser.add_argument("--arch", type=checked(ARCH, arch), help=f"{ARCH}: compile for it, without a GPU (this GPU's)")
    parser.add_argument("--jobs", type=checked(SIZE, count), help="compilers at once (every core)")


def arch(text: str) -> int:
    value = int(text)
    if value < 80:
        raise ValueError
    return value


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.shape is None):
        raise ValueError(f"needs MODEL or --shape, got {'neither' if args.model is None else 'both'}")
    from tqdm import tqdm

    from quantlib.backends import triton

    if not triton.installed():
        raise ValueError("needs the package triton, which is not installed")
    products = list(of_model(args.model, args.dtype) if args.model else of_shapes(args))
    if not products:
        raise ValueError(f"MODEL must have quantized weights of two dimensions, got {args.model}")
    on = device(args.arch)
    from quantlib.backends.triton import warmup

    jobs = args.jobs or len(os.sched_getaffinity(0))
    kernels = 0
    with tqdm(total=len(set(products)), unit="product", disable=None) as bar:
        for product, compiled in warmup.warm(products, args.rows or warmup.ROWS, on, jobs):
            kernels += compiled
            bar.update()
            bar.write("{} {}x{}: {} kernels".format(product.spec, *product.shape, compiled))
    print(f"{len(set(products))} products, {kernels} kernels for sm_{on.arch} are compiled")
    return 0


def of_shapes(args: argparse.Namespace) -> Iterator[Product]:
    """The products of weights of the shapes that were given."""
    for spec in args.spec or [QuantSpec.parse("W4A16")]:
        for N, K in args.shape:
            yield product_of(str(spec), (N, K), args.dtype, args.bias)


def of_model(path: str, dtype: str) -> Iterator[Product]:
    """The products of the quantized matrices of a checkpoint."""
    from quantlib.checkpoint.folder import Model
    from quantlib.checkpoint.stored import Contents

    with Model.open(Path(path)) as model:
        for reader in model.readers:
            for name, stored in Contents.of(reader).weights.items():
                if len(stored.shape) == 2 and stored.scaled and not stored.layout:
                    bias = f"{name.removesuffix('weight')}bias" in reader.slots
                    yield product_of(stored.spec, stored.matrix, dtype, bias)


def product_of(spec: str, shape: tuple[int, int], dtype: str = DTYPES[0], bias: bool = False) -> Product:
    """The product that a layer of that spec and weight [N, K] starts."""
    from quantlib.backends.triton.warmup import Product
    from quantlib.nn.linear import kernel_of

    return Product(kernel_of(QuantSpec.parse(spec), shape[1]), spec, shape, dtype, bias)


def device(arch: int | None) -> Planned:
    """The device that is meant: one of that compute capability, or this machine's."""
    import torch

    from quantlib.backends import refuses
    from quantlib.backends.triton import launch, tuning

    if arch is not None:
        return launch.Planned(arch, tuning.UNTUNED, launch.SHARED.get(arch, launch.LEAST_SHARED))
    why = refuses("triton", "cuda")
    if why is not None:
        raise ValueError(f"needs a CUDA device, or --arch: {why}")
    here = torch.device("cuda", torch.cuda.current_device())
    return launch.Planned(launch.arch(here), launch.device_name(here), launch.shared_memory(here))
