"""Measure the fastest Triton tiles for the matmuls of this GPU, and keep them in a table that the kernels read."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlib.cli.parser import checked, count, one_of
from quantlib.cli.text import table

if TYPE_CHECKING:
    from quantlib.backends.triton.search import Compile, Machine
    from quantlib.backends.triton.tables import Entry, Key, Table

FAMILIES = ("W8A16", "W4A16", "int4", "FP8", "W8A8", "backward")
# [N, K] of the linear layers of Llama 3 8B and 70B, those that read the same x as one
SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
SIZE = "a number >= 1"
ROWS = "a power of two up to 4096"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", metavar="CUDA", help="cuda, or cuda:1 for the second GPU (cuda)")
    parser.add_argument(
        "--shape",
        action="append",
        nargs=2,
        type=checked(SIZE, count),
        metavar=("N", "K"),
        help="only weights [N, K]; may be repeated (those of Llama 3 8B and 70B)",
    )
    parser.add_argument(
        "--rows",
        action="append",
        type=checked(ROWS, rows),
        metavar="M",
        help=f"only batches of up to M rows, {ROWS}; may be repeated (all)",
    )
    parser.add_argument(
        "--only",
        action="append",
        type=one_of(FAMILIES),
        metavar="FAMILY",
        help=f"only this family, of {', '.join(FAMILIES)}; may be repeated",
    )
    parser.add_argument("--out", metavar="FILE", help="the table (the user's own, which the kernels read)")
    parser.add_argument("--jobs", type=checked(SIZE, count), help="compilers at once (every core)")
    parser.add_argument("--again", action="store_true", help="measure the entries of the table again")


def rows(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096 or value & (value - 1):
        raise ValueError
    return value


def run(args: argparse.Namespace) -> int:
    on = machine(args.device)
    from quantlib.backends.triton import search, tables

    path = Path(args.out) if args.out else tables.users(on.name)
    kept = tables.Table(on.name, on.shared, software())
    if path.exists():
        found, wrong = tables.read(path, on.name)
        if found is None:
            raise ValueError(f"--out must be a table of {on.name} or no file yet, got {path}: {wrong[0]}")
        kept.entries = found.entries
    families = args.only or FAMILIES
    keys = list(search.keys(families, map(tuple, args.shape or SHAPES), args.rows or search.ROWS))
    todo = [key for key in dict.fromkeys(keys) if args.again or key not in kept.entries]
    done: list[Key] = []
    try:
        with compilers(on, args.jobs or len(os.sched_getaffinity(0))) as compile:
            measure(todo, on, kept, path, done, compile)
    finally:
        report(kept, done, path)
        tables.of_device.cache_clear()
    return 0


def machine(device: str) -> Machine:
    """The GPU of that name."""
    import torch

    from quantlib import backends

    try:
        index = torch.device(device)
    except RuntimeError:
        raise ValueError(f"needs a CUDA device: --device must be cuda or cuda:N, got {device!r}") from None
    if index.type != "cuda":
        raise ValueError(f"needs a CUDA device: --device must be cuda or cuda:N, got {device!r}")
    why = backends.refuses("triton", index.type)
    if why is not None:
        raise ValueError(f"needs a CUDA device: {why}")
    if (index.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"needs a CUDA device: --device must be one of {torch.cuda.device_count()}, got {device!r}")
    from quantlib.backends.triton import search

    torch.cuda.set_device(index)
    return search.machine(torch.device("cuda", torch.cuda.current_device()))


def software() -> dict[str, str]:
    """The versions with which a table is written."""
    import torch

    import quantlib
    from quantlib.cli.info import package_version

    return {"quantlib": quantlib.__version__, "torch": torch.__version__, "triton": package_version("triton")}


def compilers(on: Machine, jobs: int) -> contextlib.AbstractContextManager[Compile]:
    """Return what compiles the tiles that are timed next; nothing does in the interpreter."""
    from quantlib.backends.triton import launch, search

    if launch.INTERPRETED:
        return contextlib.nullcontext(lambda key, tiles: None)
    return search.Compilers(launch.Planned(launch.arch(on.device), on.name, on.shared), jobs)


def measure(todo: Iterable[Key], on: Machine, kept: Table, path: Path, done: list[Key], compile: Compile) -> None:
    """Add each key to the table, which is written after every one of them."""
    from tqdm import tqdm

    from quantlib.backends.triton import search

    with tqdm(list(todo), unit="matmul", disable=None) as bar:  # None: only on a terminal
        for key in bar:
            bar.set_postfix_str(str(key), refresh=True)
            kept.entries[key] = search.search(key, on, search.graph_timer, compile)
            kept.write(path)
            done.append(key)


def report(kept: Table, done: list[Key], path: Path) -> None:
    """Print the measurements and the path of the table."""
    if done:
        header = ("matmul", "tile", "us", "default us", "faster")
        print(table(header, [line(key, kept.entries[key]) for key in done], "<<>>>"), file=sys.stdout)
    print(f"{path}: {len(kept.entries)} entries for {kept.device}, {len(done)} of them new")


def line(key: Key, entry: Entry) -> tuple[str, ...]:
    tile: Any = entry.tile
    sizes = (
        f"{tile.tile_n} x {tile.tile_m} x {tile.tile_k}, {tile.splits} splits, {tile.warps} warps, {tile.stages} stages"
    )
    words = (
        [sizes]
        + [f"slabs of {tile.slab}"] * bool(tile.slab)
        + ["descriptors"] * tile.described
        + ["weight right"] * tile.right
        + ["paired"] * tile.paired
    )
    return (
        str(key),
        ", ".join(words),
        f"{entry.us:.1f}",
        f"{entry.default_us:.1f}",
        f"{entry.default_us / entry.us:.2f}",
    )
