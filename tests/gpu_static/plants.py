"""Faults put in on purpose: the checker that finds nothing wrong with the kernels must find each of these.

Each is compiled for one architecture and read like any other kernel.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu_static.calls import Call
from quantlib import formats

ARCH = 90
LONG_ROW = Call("quantize_dynamic", "bfloat16", "int8", (64, 28672))
DECODE = Call("dequant_matmul", "bfloat16", "int8", M=1, tiled=True)
SUMS = Call("fake_quantize_backward", "float32", "int8", per="tensor", affine=True)
COLUMNS = Call("fake_quantize_backward", "float32", "int8", (259, 5), "column", True)
SUM = "block_sum(dscale)"
MANY = Call("dequant_matmul", "bfloat16", "int8", M=256, tiled=True)
PRODUCT = "multiply(w, x, total, is_right(X, F, SCALES, T, ARCH), T, ARCH)"

# plant -> the call, how it is compiled instead, what the checker must say
TRITON: dict[str, tuple[Call, dict[str, Any], str]] = {
    "lost divisibility": (LONG_ROW, {"aligned": False}, "bytes at once"),
    "lost divisibility of a matmul": (DECODE, {"aligned": False}, r"no LDGSTS"),
    "too few registers": (LONG_ROW, {"maxnreg": 32}, "spills"),
    "too few registers of a matmul": (DECODE, {"maxnreg": 32}, "spills"),
    "contraction": (LONG_ROW, {"enable_fp_fusion": True}, "is inexact: contraction"),
    "too many stages": (DECODE, {"num_stages": 64}, "bytes of shared memory > 232448"),
    "atomic": (SUMS, {"edit": (f"tl.store(at, {SUM})", f"tl.atomic_add(at, {SUM})")}, "adds floats with"),
    "operands that are not waited for": (
        MANY,
        {"edit": (PRODUCT, 'tl.dot(w, x, total, input_precision="ieee")'), "tile": (128, 256, 64, 1, 16, 3)},
        "an operand is overwritten",
    ),
    "lanes that lie apart": (COLUMNS, {"edit": (SUM, "tl.sum(flat(dscale), 1)")}, "adds up the wrong lanes"),
}

Edits = dict[str, tuple[str, str]]  # file of csrc -> what is replaced, by what
CAST_KERNEL = "  constexpr int V = kCastElements<X, Y>;\n  Chunk at"
ATOMIC = "  if (a.saturate) atomicAdd(reinterpret_cast<float*>(a.y), 1.0f);\n"
VECTOR = "  if (vector && first == 0 && last == V) return Vector<T, V>::load(x);\n"
FEW_CASTS = (re.findall(r"  X\(float8_e5m2,.* \\\n", formats.c_header())[0], "")  # compiles in less time
BOUNDS = "__launch_bounds__(kThreads)"
OPERAND = "return fma2(X{}, value, power, minus_zero);"
SLOW = "return both(encode_float<X>(float(value & 15) * float(minus_zero & 15), false));"
CUDA: dict[str, tuple[str, tuple[str, ...], Edits, str]] = {
    "narrow loads": ("cast", (), {"vector.cuh": (VECTOR, ""), "../formats.h": FEW_CASTS}, "bytes at once"),
    "too few registers": (
        "cast",
        ("-maxrregcount=24",),
        {"cast.cu": (BOUNDS, ""), "../formats.h": FEW_CASTS},
        "spills",
    ),
    "atomic": ("cast", (), {"cast.cu": (CAST_KERNEL, ATOMIC + CAST_KERNEL), "../formats.h": FEW_CASTS}, "adds floats"),
    "conversion": ("dequant_matmul", (), {"operand.cuh": (OPERAND, SLOW)}, "I2F.* on its main path"),
}


def triton() -> dict[str, Callable[[], list[dict[str, Any]]]]:
    return {name: lambda plant=plant: plant_triton(*plant[:2]) for name, plant in TRITON.items()}


def cuda() -> dict[str, Callable[[], list[dict[str, Any]]]]:
    return {name: lambda plant=plant: plant_cuda(*plant[:3]) for name, plant in CUDA.items()}


def plant_triton(call: Call, how: dict[str, Any]) -> list[dict[str, Any]]:
    from gpu_static import launches, triton_kernels
    from quantlib.backends.triton.tables import MatmulTile

    edit = how.get("edit")
    instead = edited(call.op, *edit) if edit else None
    if instead and "tile" in how:
        instead = functools.partial(instead, tile=MatmulTile(*how["tile"]))
    configs = launches.configs(ARCH, [call], instead=instead)
    how = {key: value for key, value in how.items() if key not in ("edit", "tile")}
    return [asdict(triton_kernels.measure(config, ARCH, **how)) for config in configs]


def edited(op: str, right: str, wrong: str) -> Any:
    """The launcher of ``op``, from a copy of its file with other words in it."""
    from quantlib.backends import triton as backend

    text = Path(backend.__file__).with_name(f"{op}.py").read_text()
    text = text.replace("import block_at,", "import flat, block_at,")
    assert right in text, f"{op}.py has no {right}"
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:  # Triton reads it when it compiles
        file.write(text.replace(right, wrong))
    spec = importlib.util.spec_from_file_location(f"planted_{op}", file.name)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, op)


def plant_cuda(stem: str, flags: tuple[str, ...], edits: Edits) -> list[dict[str, Any]]:
    from gpu_static import cuda_kernels

    def edit(source: Path) -> None:
        for name, (right, wrong) in edits.items():
            path = source.parent / name
            assert right in path.read_text(), f"{name} has no {right}"
            path.write_text(path.read_text().replace(right, wrong))
        if stem == "dequant_matmul":  # of integers alone
            header = source.parent / "../formats.h"
            header.write_text(re.sub(r"  X\(float8_.* \\\n", "", header.read_text()))

    source = next(path for path in cuda_kernels.sources() if path.stem == stem)
    return cuda_kernels.measure(source, ARCH, *flags, edit=edit)
