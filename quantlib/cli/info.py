"""Say which backend serves each op on each device here, why the others do not, and the versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import warnings
from typing import Any

from quantlib.cli.parser import checked, count, one_of
from quantlib.cli.plan import read_spec
from quantlib.cli.text import style, table
from quantlib.spec import QuantSpec

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tqdm", "transformers")
VARIABLES = {
    "QUANTLIB_BACKEND": "auto, or the only backend to use",
    "QUANTLIB_ISA": "plain, avx2, avx2_vnni, avx512, avx512_bf16 or amx: the instruction set of the C++ kernels",
    "QUANTLIB_BUILD": "0: never compile the kernels; 1: compile all, a build that fails is an error",
    "QUANTLIB_CACHE": "an absolute path: where compiled kernels are kept",
    "QUANTLIB_LOG": "1: say on stderr which backend, kernel and instruction set a product takes, and why, once a shape",
    "QUANTLIB_SHOW_LAUNCH": "1: print the tile that each Triton launch chose",
    "QUANTLIB_TUNED": "where quantlib tune keeps its tables, and the kernels read them",
    "TRITON_INTERPRET": "1: run Triton kernels in its interpreter, on the CPU",
    "OMP_NUM_THREADS": "threads of the CPU kernels",
    "CXX": "the C++ compiler",
    "CXXFLAGS": "flags for it",
    "MAX_JOBS": "how many compilers run at once",
    "NVCC": "the CUDA compiler",
    "CUDA_HOME": "where CUDA is installed",
    "CUDA_VISIBLE_DEVICES": "the GPUs that may be used",
}


ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
DTYPES = ("bfloat16", "float16", "float32")


def arguments(parser: argparse.ArgumentParser) -> None:
    size = checked("an integer of at least 1", count)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--matmul",
        nargs=2,
        type=size,
        metavar=("N", "K"),
        help="the kernel of a product with a weight [N, K] on this CPU, for some numbers of rows of x",
    )
    parser.add_argument("--to", action="append", metavar="SPEC", help="with --matmul: the spec of the weight (W8A16)")
    parser.add_argument("--dtype", type=one_of(DTYPES), default="bfloat16", help="with --matmul: that of x (bfloat16)")


def run(args: argparse.Namespace) -> int:
    if args.matmul is not None:
        return matmul(args)
    if args.to:
        raise ValueError(f"--to must come with --matmul, got {args.to[0]!r}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this report has a line for missing C++ kernels
        environment = {name: os.environ.get(name) for name in VARIABLES}
        facts = {"versions": versions(), **serving(), "tuning": tuning(), "environment": environment}
    print(json.dumps(facts, indent=2) if args.json else show(facts))
    return 0


def matmul(args: argparse.Namespace) -> int:
    """Print which kernel of the C++ backend serves each number of rows of x, and why."""
    from quantlib.backends.choice import instruction_set

    found: list[tuple[QuantSpec, str, dict[str, dict[str, str]]]] = []
    N, K = args.matmul
    for text in args.to or ["W8A16"]:
        spec = read_spec(text)
        if spec.row.bits > 8 or (spec.activation is not None and spec.activation.format != "int8"):
            raise ValueError(f"--to must be a spec whose codes are multiplied, in floats or times int8, got {text!r}")
        x = args.dtype if spec.activation is None else "int8"
        found.append((spec, x, {str(M): matmul_choice(M, N, K, spec, x) for M in ROWS}))
    if args.json:
        products = [{"spec": str(spec), "x": x, "rows": choices} for spec, x, choices in found]
        print(json.dumps({"instruction set": instruction_set(), "products": products}, indent=2))
        return 0
    for spec, x, choices in found:
        rows = [(M, choice["kernel"], choice["why"]) for M, choice in choices.items()]
        heading = f"{spec} [{N}, {K}], x {x}, {instruction_set()}"
        print(f"{heading}\n{table(('rows of x', 'kernel', 'why'), rows, '><<')}\n")
    return 0


def matmul_choice(M: int, N: int, K: int, spec: QuantSpec, x: str) -> dict[str, str]:
    """Ask the C++ kernels which of them serves a weight of ``spec``."""
    from quantlib.backends import compiled
    from quantlib.backends.choice import kernel_of

    if compiled.path_of("cpu") is None:
        raise ValueError(f"--matmul must be asked where the C++ kernels are: {compiled.load('cpu')}, got {N} {K}")
    return kernel_of((M, N, K), spec.block((N, K)), spec.format, not spec.symmetric, x)


def versions() -> dict[str, str]:
    import torch

    import quantlib
    from quantlib import _build
    from quantlib.backends.choice import instruction_set

    found = {
        "quantlib": f"{quantlib.__version__} in {os.path.dirname(quantlib.__file__)}",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **{name: package_version(name) for name in PACKAGES},
        "c++": said([*cxx(), "--version"]),
        "nvcc": said([_build.nvcc() or "nvcc", "--version"], line=-2),
        "c++ library": library("cpu"),
        "cuda library": library("cuda"),
        "instruction set": instruction_set(),
        "threads": str(torch.get_num_threads()),
    }
    found["torch"] += f" with CUDA {torch.version.cuda}" if torch.version.cuda else " without CUDA"
    return found | {f"cuda:{k}": torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())}


def cxx() -> list[str]:
    """The C++ compiler that the build calls."""
    from quantlib import _build

    try:
        return _build.cxx_command()
    except _build.BuildError:
        return [os.environ["CXX"]]


def package_version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def said(command: list[str], line: int = 0) -> str:
    """One line of what a program prints."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
        return lines[line]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "not installed"


def library(device: str) -> str:
    """The file of the kernels of ``device``; why there is none is told beside the backend."""
    from quantlib.backends import compiled

    return str(compiled.path_of(device) or "-")


def serving() -> dict[str, Any]:
    """The backend of each op on each device, and why the others do not serve: None where one could."""
    import torch

    from quantlib import backends, ops  # noqa: F401  importing ops registers them

    forced = backends.current()
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = [overload for overload in backends.SCHEMAS if "." not in overload]
    no_cuda = "there is no device" if torch.version.cuda else f"torch {torch.__version__} is built without CUDA"
    return {
        "forced": None if forced == "auto" else forced,
        "ops": {op: {device: server(op, device) for device in devices} for op in names},
        "devices": {"cpu": None, "cuda": None if "cuda" in devices else no_cuda},
        "refusals": {
            device: {
                backend: {
                    "device": backends.refuses(backend, device),
                    "ops": {op: why for op in names if (why := lacks(backend, device, op)) is not None},
                }
                for backend in backends.BACKENDS
            }
            for device in devices
        },
    }


def lacks(backend: str, device: str, op: str) -> str | None:
    """Return why ``backend``, which serves ``device``, does not run ``op`` there, or None."""
    from quantlib import backends

    return None if backends.refuses(backend, device) else backends.refuses(backend, device, op)


def server(op: str, device: str) -> str:
    """The backend that runs ``op``: the first in order that does not refuse, or the forced one if that does not."""
    from quantlib import backends

    first = backends.serving(device)
    if backends.current() != "auto":
        return f"none: {first} refuses" if backends.refuses(first, device, op) else first
    return next(backend for backend in backends.order(device) if backends.refuses(backend, device, op) is None)


def tuning() -> dict[str, Any]:
    """Return, for each GPU here, the files whose tiles its matmuls take, and what was read or is wrong in each."""
    import torch

    from quantlib.backends.triton import tables

    found: dict[str, dict[str, str]] = {}
    for name in {torch.cuda.get_device_name(k): None for k in range(torch.cuda.device_count())}:
        found[name] = {}
        for path in tables.paths(name):
            table_of, wrong = tables.read(path, name)
            read = f"{len(table_of.entries) if table_of else 0} matmuls"
            found[name][str(path)] = "; ".join([read, *wrong])
    return {"devices": found, "shipped": tables.shipped()}


def tuning_rows(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    rows = [(device, path, read) for device, files in facts["devices"].items() for path, read in files.items()]
    rows += [
        (device, "no table", "the default tiles; quantlib tune measures faster ones")
        for device, files in facts["devices"].items()
        if not files
    ]
    shipped = ", ".join(facts["shipped"]) or "none: no GPU has been measured yet"
    return [*(rows or [("no GPU", "-", "no table is read")]), ("in the package", "-", shipped)]


def show(facts: dict[str, Any]) -> str:
    devices = list(facts["refusals"])
    served = [(op, *backends.values()) for op, backends in facts["ops"].items()]
    blocks = [
        table(("version", ""), list(facts["versions"].items()), "<<"),
        table(("op", *devices), served, "<" * (1 + len(devices))),
    ]
    if facts["forced"] is not None:
        blocks.append(f"{style(facts['forced'], 'bold')} is forced by QUANTLIB_BACKEND; the others are not asked")
    reasons = [(device, "-", why) for device, why in facts["devices"].items() if why is not None]
    reasons += [
        (device, name, " ".join((why["device"] or "; ".join(["ready", *why["ops"].values()])).split()))
        for device, refusals in facts["refusals"].items()
        for name, why in refusals.items()
    ]
    blocks.append(table(("device", "backend", "by order of preference"), reasons, "<<<"))
    blocks.append(table(("tiles of the Triton matmuls", "table", ""), tuning_rows(facts["tuning"]), "<<<"))
    environment = [(name, value or "-", VARIABLES[name]) for name, value in facts["environment"].items()]
    blocks.append(table(("environment", "value", "meaning"), environment, "<<<"))
    return "\n\n".join(blocks)
