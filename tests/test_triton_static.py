"""The compiled Triton kernels without a GPU: cross-compiled as their launchers ask for them, and their SASS read.

``python tests/test_triton_static.py 90`` prints the table of one architecture. Bytes and instructions are those of
one program that lies inside x: everything up to the first EXIT that is taken by all.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

SHARED_LIMIT = {80: 166912, 90: 232448}
# Instructions of a thread for each byte moved, below which memory is what a kernel waits for: lanes a clock over bytes
# a clock of one SM, of an A100 (1.75 TB/s, 108 SMs, 1.41 GHz) and an H200 (4.3 TB/s, 132 SMs, 1.98 GHz).
PER_BYTE = {80: 11.1, 90: 7.8}
WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes of a load or store; 4 where it names none
FORBIDDEN = re.compile(r"(LDL|STL|RED|ATOM|ATOMG|I2F|I2FP)(\.|$)")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One call of a launcher. ``recorded`` stands in for the budget of PER_BYTE where a kernel needs more."""

    op: str
    source: torch.dtype
    format: str
    shape: tuple[int, int] = (4096, 4096)
    block: tuple[int, int] = (4096, 4096)
    affine: bool = False
    registers: int = 64
    recorded: float = 0  # instructions an element
    ragged: bool = False  # or tiny: it has no budget

    def __str__(self) -> str:
        M, K = self.shape
        names = f"{self.op} {str(self.source)[6:]} {self.format} {M}x{K}"
        return names if self.op == "cast" else f"{names} block {self.block}" + " affine" * self.affine


CASES = (
    *(Case("cast", FP32, f) for f in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")),
    *(Case("cast", BF16, f) for f in ("float16", "float32", "float8_e4m3fn", "float8_e5m2")),
    *(Case("cast", t, f) for t in (torch.float8_e4m3fn, torch.float8_e5m2) for f in ("float32", "bfloat16")),
    Case("cast", BF16, "float8_e4m3fn", (4095, 4097)),
    *(Case("quantize", t, "int8") for t in (FP32, BF16, FP16)),
    *(Case("quantize", BF16, f, block=(1, 4096)) for f in ("int8", "float8_e4m3fn", "float8_e5m2", "float16")),
    Case("quantize", BF16, "int8", (4095, 4097), (4095, 4097)),
    Case("quantize", BF16, "int8", (4096, 4095), (1, 4095)),
    Case("quantize", BF16, "uint8", block=(1, 128), affine=True),
    Case("quantize", BF16, "int8", block=(128, 128)),
    Case("quantize", BF16, "int4", block=(1, 128)),
    Case("quantize", FP32, "int4", block=(1, 32), affine=True),
    Case("quantize", BF16, "float4_e2m1fn", block=(1, 32), recorded=27),
    *(Case("dequantize", t, "int8", block=(1, 4096)) for t in (FP32, BF16, FP16)),
    Case("dequantize", BF16, "int8", block=(1, 128), affine=True),
    Case("dequantize", BF16, "float8_e4m3fn", block=(128, 128)),
    Case("dequantize", BF16, "float8_e5m2", block=(1, 4096)),
    Case("dequantize", BF16, "int4", block=(1, 128)),
    Case("dequantize", FP32, "int4", block=(1, 128)),
    Case("dequantize", BF16, "float4_e2m1fn", block=(1, 32), recorded=24),
    Case("compute_scale", BF16, "int8", block=(1, 4096)),
    Case("compute_scale", FP32, "int8", block=(1, 128), affine=True),
    *(Case("quantize_dynamic", t, "int8", block=(1, 4096)) for t in (FP32, BF16, FP16)),
    Case("quantize_dynamic", BF16, "int8", (64, 28672), (1, 28672), registers=128),
    Case("quantize_dynamic", FP32, "int8", (64, 28672), (1, 28672), registers=128),
    Case("quantize_dynamic", BF16, "uint8", (64, 8192), (1, 8192), affine=True, registers=96),
    Case("quantize_dynamic", BF16, "int8", (64, 11008), (1, 11008)),
    Case("quantize_dynamic", BF16, "int8", block=(1, 128)),
    Case("quantize_dynamic", BF16, "int4", block=(1, 128), recorded=22),
    Case("quantize_dynamic", BF16, "float8_e4m3fn", block=(1, 4096)),
    Case("quantize_dynamic", BF16, "float8_e4m3fn", block=(128, 128), registers=128),
    Case("quantize_dynamic", FP32, "int8"),
    Case("quantize_dynamic", BF16, "int8", (4095, 4097), (4095, 4097)),
    Case("quantize_dynamic", FP32, "float8_e4m3fn", (1, 1), (1, 1), ragged=True),
    Case("quantize_dynamic", BF16, "int4", (7, 1), (2, 1), affine=True, ragged=True),
    Case("quantize_dynamic", BF16, "int4", (3, 45), (3, 5), affine=True, ragged=True, registers=128),
    Case("quantize_dynamic", FP32, "float8_e5m2", (300, 100001), (1, 100001), ragged=True, registers=96),
    Case("quantize_dynamic", BF16, "uint8", (300, 4099), (300, 2000), affine=True, ragged=True, registers=255),
    Case("quantize", BF16, "int8", (4096, 100), (1, 32), ragged=True, registers=128),
    Case("dequantize", FP16, "float4_e2m1fn", (3, 7), (1, 3), ragged=True, registers=128),
)


@dataclass(frozen=True)
class Measured:
    """What one kernel of a case was compiled to."""

    case: str
    kernel: str
    warps: int
    registers: int
    spilled: int
    shared: int
    elements: int  # of x that one program takes
    loaded: int  # bytes one program reads and writes
    stored: int
    instructions: float  # an element
    widest: int  # bytes of the widest load of global memory
    divisions: int
    calls: int
    forbidden: list[str]
    faults: list[str]

    def row(self) -> str:
        numbers = f"{self.warps:5} {self.registers:9} {self.shared:6} {self.loaded:6} {self.stored:6}"
        return f"{self.case:66} {self.kernel:24} {numbers} {self.instructions:7.1f}  {'; '.join(self.faults) or 'ok'}"


HEADER = f"{'case':66} {'kernel':24} warps registers shared loaded stored an element"


def main(arch: int) -> int:
    """Print the table of ``arch``; the exit status says whether a kernel is at fault."""
    if "--json" in sys.argv:
        faults = {name: [asdict(m) for m in plant(arch)] for name, plant in PLANTS.items()}
        print(json.dumps({"cases": [asdict(m) for case in CASES for m in measure(case, arch)], "plants": faults}))
        return 0
    measured = [m for case in CASES for m in measure(case, arch)]
    print(HEADER, *(m.row() for m in measured), sep="\n")
    return any(m.faults for m in measured)


# ---- a case, compiled ----------------------------------------------------------------------------------------------


def measure(case: Case, arch: int, *, aligned: bool = True, **options: Any) -> list[Measured]:
    """Compile every kernel that the launcher of ``case`` starts and read it."""
    return [read(case, arch, *launched, aligned, options) for launched in launches(case, arch)]


def launches(case: Case, arch: int) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """(kernel, arguments, options) of every launch of ``case``, from the launcher itself on tensors without memory."""
    from quantlib import formats
    from quantlib.backends import triton as backend
    from quantlib.backends.triton import launch

    f = formats.get(case.format)
    (M, K), (br, bk) = case.shape, case.block
    dtype = getattr(torch, f.dtype_name)
    x = torch.empty(M, K, dtype=case.source, device="meta")
    codes = torch.empty(M, (K + 1) // 2 if f.packed else K, dtype=dtype, device="meta")
    scale = torch.empty(-(-M // br), -(-K // bk), device="meta")
    zero_point = torch.empty_like(scale, dtype=torch.int32) if case.affine else None
    arguments = {
        "cast": lambda: (x.view(-1), formats.get(case.source), codes.view(-1), f, f.saturates),
        "compute_scale": lambda: (x, f, case.block, scale, zero_point),
        "quantize": lambda: (x, scale, f, case.block, zero_point, codes),
        "dequantize": lambda: (codes, scale, f, case.block, zero_point, x),
        "quantize_dynamic": lambda: (x, f, case.block, codes, scale, zero_point),
    }[case.op]()
    with recording(launch, arch) as recorded:
        backend.KERNELS[case.op](*arguments)
    return recorded


@contextlib.contextmanager
def recording(launch: Any, arch: int) -> Iterator[list[Any]]:
    from triton.runtime.jit import JITFunction

    recorded: list[Any] = []
    patch = pytest.MonkeyPatch()
    patch.setattr(launch, "arch", lambda device: arch)
    patch.setattr(launch, "context", lambda device: contextlib.nullcontext())
    patch.setattr(
        JITFunction, "run", lambda self, *args, grid, warmup, **options: recorded.append((self, args, options))
    )
    try:
        yield recorded
    finally:
        patch.undo()


def compiled(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], arch: int, aligned: bool) -> Any:
    """What Triton makes of a launch: pointers and sizes are known to be multiples of 16 where they are."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import type_canonicalisation_dict as type_names

    signature, constants, attributes = {}, {}, {}
    for index, (parameter, arg) in enumerate(zip(kernel.params, args, strict=True)):
        is_int = isinstance(arg, int) and not isinstance(arg, bool)
        if isinstance(arg, torch.Tensor):
            signature[parameter.name] = "*" + type_names[str(arg.dtype)[6:]]
        elif hasattr(arg, "block_shape"):  # a tensor descriptor
            signature[parameter.name] = f"tensordesc<{type_names[str(arg.base.dtype)[6:]]}{arg.block_shape}>"
            continue
        elif parameter.is_constexpr or arg is None or (is_int and arg == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", arg
            continue
        elif isinstance(arg, float):
            signature[parameter.name] = "fp32"
            continue
        else:
            signature[parameter.name] = "i32" if arg < 2**31 else "i64"
        if aligned and (isinstance(arg, torch.Tensor) or arg % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def read(
    case: Case,
    arch: int,
    kernel: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    aligned: bool,
    plant: dict[str, Any],
) -> Measured:
    binary = compiled(kernel, args, options | plant, arch, aligned)
    text, (registers, stack, local) = sass(binary)
    operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+ )?)([A-Z][A-Z0-9_.]*)", text)
    inside = operations[: operations.index(("", "EXIT"))]
    threads = 32 * binary.metadata.num_warps
    loads = [width(name) for _, name in inside if name.startswith("LDG")]
    stores = [width(name) for _, name in inside if name.startswith("STG")]
    elements = program_elements(kernel, args)
    counts = collections.Counter(name.split(".")[0] for _, name in inside)
    names = {name for _, name in operations}
    measured = Measured(
        case=str(case),
        kernel=kernel.__name__,
        warps=binary.metadata.num_warps,
        registers=registers,
        spilled=stack + local,
        shared=binary.metadata.shared,
        elements=elements,
        loaded=sum(loads) * threads,
        stored=sum(stores) * threads,
        instructions=len(inside) / elements * threads,
        widest=max(loads),
        divisions=counts["FCHK"],
        calls=counts["CALL"],
        forbidden=sorted(name for name in names if FORBIDDEN.match(name) and not integer_division(name)),
        faults=[],
    )
    return replace(measured, faults=faults(measured, case, binary, arch))


def integer_division(name: str) -> bool:
    """A program's number divided once, to find its tile: the only integers that are converted."""
    return name.startswith("I2F.") and name.endswith("RP")


def sass(binary: Any) -> tuple[str, tuple[int, int, int]]:
    """The listing of a kernel, and (registers, stack, local memory)."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert usage, text[:500]
    registers, stack, local = map(int, usage.groups())
    return text, (registers, stack, local)


def width(name: str) -> int:
    return next((WIDTH[part] for part in name.split(".") if part in WIDTH), 4)


def program_elements(kernel: Any, args: tuple[Any, ...]) -> int:
    """Elements of x that one program takes, from the tile that its launcher chose."""
    given = dict(zip(kernel.arg_names, args, strict=True))
    if "T" in given:
        return int(given["T"].rows * given["T"].cols)
    if "B" in given:
        held = given["B"].count * given["B"].rows * given["B"].cols * max(given["B"].chunks, 1)
        return min(int(held), int(given["br"] * given["bk"])) if given["B"].chunks > 1 else int(held)
    return int(given["TILE" if "TILE" in given else "PARTS"])


# ---- what a kernel must be -------------------------------------------------------------------------------------------


def faults(m: Measured, case: Case, binary: Any, arch: int) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    found = []
    if m.spilled:
        found.append(f"spills {m.spilled} bytes")
    if m.registers > case.registers:
        found.append(f"{m.registers} registers > {case.registers}")
    if m.shared > SHARED_LIMIT[arch]:
        found.append(f"{m.shared} bytes of shared memory > {SHARED_LIMIT[arch]}")
    if m.forbidden:
        found.append("has " + ", ".join(m.forbidden))
    if not case.ragged and m.calls > m.divisions + (m.kernel == "quantize_kernel" and case.shape[1] % 16 > 0):
        found.append(f"{m.calls} calls > {m.divisions} divisions of a scale")
    if binary.metadata.enable_fp_fusion:
        found.append("contracts products into sums")
    if re.search(r"\.(ftz|approx|full)\.", binary.asm["ptx"]):
        found.append("approximates, or flushes subnormals")
    if case.ragged or m.kernel == "combine_range_kernel":
        return found
    read, written = model(m, case)
    scales = 8 * 32 * m.warps * 2  # every thread may load and store a scale and a zero point of its own
    if m.kernel != "partial_range_kernel":
        if not read <= m.loaded <= read + scales:
            found.append(f"loads {m.loaded} bytes, want {read}")
        if not written <= m.stored <= written + scales:
            found.append(f"stores {m.stored} bytes, want {written}")
        budget = max(case.recorded, PER_BYTE[arch] * (read + written) / m.elements)
        if m.instructions > budget:
            found.append(f"{m.instructions:.1f} instructions an element > {budget:.1f}")
    if m.widest < min(16, read // (32 * m.warps)):
        found.append(f"loads {m.widest} bytes at most at once")
    return found


def model(m: Measured, case: Case) -> tuple[int, int]:
    """Bytes of x and of codes that one program must read and write."""
    from quantlib import formats

    x = m.elements * case.source.itemsize
    codes = int(m.elements * formats.get(case.format).bytes_per_element)
    if m.kernel == "dequantize_kernel":
        return codes, x
    return x, 0 if m.kernel in ("compute_scale_kernel", "partial_range_kernel") else codes


LONG_ROW = Case("quantize_dynamic", BF16, "int8", (64, 28672), (1, 28672), registers=128)
PLANTS: dict[str, Callable[[int], list[Measured]]] = {
    "lost divisibility": lambda arch: measure(LONG_ROW, arch, aligned=False),
    "too few registers": lambda arch: measure(LONG_ROW, arch, maxnreg=32),
    "contraction": lambda arch: measure(LONG_ROW, arch, enable_fp_fusion=True),
}


@pytest.fixture(scope="module")
def listings() -> dict[int, Any]:
    """What this file prints for each architecture, at once, in a process of its own: Triton keeps state."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    running = {
        arch: subprocess.Popen(
            [sys.executable, __file__, str(arch), "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for arch in SHARED_LIMIT
    }
    found = {}
    for arch, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        found[arch] = json.loads(out)
    return found


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_compiles_to_what_it_should(listings: dict[int, Any], arch: int) -> None:
    measured = listings[arch]["cases"]
    assert len(measured) >= len(CASES)
    wrong = [Measured(**m).row() for m in measured if m["faults"]]
    assert not wrong, "\n".join((HEADER, *wrong))


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("lost divisibility", "bytes at most at once"),
        ("too few registers", "spills"),
        ("contraction", "contracts products"),
    ],
)
def test_a_planted_fault_is_caught(listings: dict[int, Any], arch: int, plant: str, says: str) -> None:
    assert any(says in fault for m in listings[arch]["plants"][plant] for fault in m["faults"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
