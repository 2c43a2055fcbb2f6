"""The Triton matmuls without a GPU: cross-compiled as their launchers ask for them, and the SASS of their main loops.

``python tests/test_triton_matmul_static.py 90`` prints the table of one architecture. Instructions are those of one
trip of the longest loop, for each weight that it takes; a kernel without a loop counts whole.
"""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import pytest
import torch
from test_triton_static import BF16, FP16, FP32, SHARED_LIMIT, compiled, integer_division, recording, sass

FORBIDDEN = re.compile(r"(LDL|STL|RED|ATOM\.|ATOMS|.*ATOMG.*\.F)")
TENSOR_CORES = {80: ("HMMA.16816", "IMMA.16832"), 90: ("HGMMA", "IGMMA")}  # where a batch is large
COPY = {80: "LDGSTS.E.BYPASS.128", 90: "UTMALDG"}


@dataclass(frozen=True)
class Case:
    """One call of a launcher; ``recorded`` is what its loop may need for a weight, (sm_80, sm_90)."""

    op: str
    M: int
    format: str
    source: torch.dtype = BF16
    group: int = 0
    tiled: bool = False
    affine: bool = False
    recorded: tuple[float, float] = (7.8, 7.8)
    needs: tuple[str, ...] = ()
    stores: int = 0  # to shared memory, by a thread in a trip: the scales of a group change threads
    shape: tuple[int, int] = (4096, 4096)

    def __str__(self) -> str:
        names = f"{self.op} {self.format} {str(self.source)[6:]} M={self.M} {self.shape[0]}x{self.shape[1]}"
        return f"{names}{f' group {self.group}' * (self.group > 0)}{' tiled' * self.tiled}{' affine' * self.affine}"


DECODE = ("LDGSTS.E.BYPASS.128", "LDS.128", "HMMA.16816")
SLAB = ("LDG.E.128", "STG.E.128")
CASES = (
    *(Case("dequant_matmul", 1, "int8", t, tiled=True, needs=DECODE, recorded=(4.5, 4.0)) for t in (BF16, FP16)),
    *(
        Case("dequant_matmul", 1, "int4", t, 128, True, needs=DECODE, recorded=(3.9, 3.9), stores=2)
        for t in (BF16, FP16)
    ),
    Case("dequant_matmul", 16, "int4", BF16, 128, True, needs=DECODE, recorded=(5.0, 4.6), stores=2),
    Case("dequant_matmul", 16, "int8", BF16, 0, True, True, needs=DECODE, recorded=(7.8, 5.5)),
    Case("dequant_matmul", 4, "int8", needs=("LDGSTS.E.BYPASS.128", "HMMA.16816"), recorded=(4.5, 4.0)),
    Case("dequant_matmul", 256, "int8", tiled=True, needs=("float",), recorded=(17, 7.8)),
    Case("dequant_matmul", 256, "int4", BF16, 128, True, needs=("float",), recorded=(21, 10), stores=32),
    Case("dequant_matmul", 100, "int8", BF16, 32, True, True, recorded=(100, 100), stores=64),
    Case("dequant_matmul", 1, "int8", FP32, tiled=True, recorded=(20, 16), stores=32),
    Case("dequant_matmul", 1024, "int8", tiled=True, needs=SLAB, recorded=(18, 18), stores=12),
    Case(
        "dequant_matmul", 1024, "int4", BF16, 128, True, needs=("LDG.E.128", "STG.E.128"), recorded=(70, 70), stores=12
    ),
    Case("scaled_matmul", 1, "int8", needs=("LDGSTS.E.BYPASS.128", "LDSM", "IMMA.16832"), recorded=(1, 1)),
    Case("scaled_matmul", 4096, "int8", needs=("copy", "int"), recorded=(4, 18), stores=16),  # all of it in a loop
    Case("scaled_matmul", 4096, "int4", BF16, 128, recorded=(16, 10), stores=32),
    Case("dequant_matmul_backward", 4096, "int8", needs=("float",), recorded=(22, 13), stores=8),
    Case("dequant_matmul_backward", 16, "int8", recorded=(40, 30), stores=8),
)


@dataclass
class Measured:
    """What one kernel of a case was compiled to."""

    case: str
    kernel: str
    tile: str
    registers: int
    spilled: int
    shared: int
    instructions: float  # a weight
    loop: dict[str, int]
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        numbers = f"{self.registers:9} {self.spilled:7} {self.shared:6} {self.instructions:8.2f}"
        return f"{self.case:66} {self.kernel:30} {self.tile:28} {numbers}  {'; '.join(self.faults) or 'ok'}"


HEADER = f"{'case':66} {'kernel':30} {'tile n, m, k, splits, warps, stages':36} regs spilled shared a weight"


def main(arch: int) -> int:
    """Print the table of ``arch``; the exit status says whether a kernel is at fault."""
    measured = [m for case in CASES for m in measure(case, arch)]
    if "--json" in sys.argv:
        plants = {name: [asdict(m) for m in plant(arch)] for name, plant in PLANTS.items()}
        print(json.dumps({"cases": [asdict(m) for m in measured], "plants": plants}))
        return 0
    print(HEADER, *(m.row() for m in measured), sep="\n")
    return any(m.faults for m in measured)


def measure(case: Case, arch: int, *, aligned: bool = True, **options: Any) -> list[Measured]:
    """Compile each kernel that the launcher of ``case`` starts, on tensors without memory, and read it."""
    from quantlib.backends.triton import launch, slab

    with recording(launch, arch) as recorded, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "device_name", lambda device: "no device")
        patch.setattr(slab, "product", lambda x, w: torch.empty(len(x), len(w), device="meta"))
        call(case)
    kernels = {kernel.__name__: (kernel, args, chosen | options) for kernel, args, chosen in recorded}
    return [read(case, arch, *launched, aligned) for launched in kernels.values()]


def read(case: Case, arch: int, kernel: Any, args: tuple[Any, ...], options: dict[str, Any], aligned: bool) -> Measured:
    binary = compiled(kernel, args, options, arch, aligned)
    text, (registers, stack, local) = sass(binary)
    tile, loop = dict(zip(kernel.arg_names, args, strict=True)).get("T"), longest_loop(text)
    weights = tile.tile_n * tile.tile_k if tile else 4096  # or sums
    measured = Measured(
        case=str(case),
        kernel=kernel.__name__,
        tile=str(astuple(tile)[:6]) if tile else "",
        registers=registers,
        spilled=stack + local,
        shared=binary.metadata.shared,
        instructions=sum(loop.values()) / weights * 32 * binary.metadata.num_warps,
        loop=loop,
    )
    measured.faults = faults(measured, case, text, binary, tile.splits if tile else 1, arch)
    return measured


def call(case: Case) -> None:
    from quantlib import formats
    from quantlib.backends import triton as backend
    from quantlib.backends.tiles import TileLayout

    f, (N, K), M = formats.get(case.format), case.shape, case.M
    block = (1, case.group or K)
    shape = TileLayout(f).shape(N, K) if case.tiled else (N, (K + 1) // 2 if f.packed else K)
    with torch.device("meta"):
        codes = torch.empty(shape, dtype=torch.uint8 if case.tiled else getattr(torch, f.dtype_name))
        scale = torch.empty(N, -(-K // block[1]))
        zero_point = torch.empty_like(scale, dtype=torch.int32) if case.affine else None
        x, y = torch.empty(M, K, dtype=case.source), torch.empty(M, N, dtype=case.source)
        weight = (codes, scale, f, block)
        arguments: tuple[Any, ...]
        if case.op == "dequant_matmul":
            arguments = (x, *weight, zero_point, None, None, False, case.tiled, y)
        elif case.op == "dequant_matmul_backward":
            arguments = (y, *weight, zero_point, x)
        else:
            arguments = (x.to(torch.int8), torch.empty(M, 1), *weight, None, zero_point, None, None, y)
    backend.KERNELS[case.op](*arguments)


def longest_loop(text: str) -> dict[str, int]:
    """How often each instruction stands between the target of a backward branch and the branch, or in all."""
    listing = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", text)
    found = [(int(at, 16), operation) for at, operation in listing]
    longest, none = (0, 0), (0, 1 << 62)
    for at, operation in found:
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", operation)
        if target and int(target[1], 16) < at and longest[1] - longest[0] < at - int(target[1], 16):
            longest = int(target[1], 16), at
    first, last = longest if longest[1] else none
    inside = (operation.split()[0] for at, operation in found if first <= at <= last)
    return dict(collections.Counter(inside))


def faults(m: Measured, case: Case, text: str, binary: Any, splits: int, arch: int) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    found, sums = [], TENSOR_CORES[arch]
    names = set(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", text))
    if m.spilled:
        found.append(f"spills {m.spilled} bytes")
    if m.shared > SHARED_LIMIT[arch]:
        found.append(f"{m.shared} bytes of shared memory > {SHARED_LIMIT[arch]}")
    found += [f"has {name}" for name in sorted(names) if FORBIDDEN.match(name)]
    tickets = len(re.findall(r"\bATOMG\.", text))
    if tickets != (splits > 1):
        found.append(f"{tickets} atomics > the ticket of a split")
    for need in case.needs:
        name = {"float": sums[0], "int": sums[1], "copy": COPY[arch]}.get(need, need)
        if not any(operation.startswith(name) for operation in m.loop):
            found.append(f"no {name} in its loop")
    stores = sum(count for name, count in m.loop.items() if name.startswith("STS"))
    if stores > case.stores:
        found.append(f"{stores} stores to shared memory in its loop > {case.stores}")
    moved = [name for name in m.loop if name.startswith("SHFL") or is_conversion(name)]
    if moved and case.op == "dequant_matmul":
        found.append("has " + ", ".join(moved) + " in its loop")
    budget = case.recorded[arch == 90]
    if m.instructions > budget:
        found.append(f"{m.instructions:.2f} instructions a weight > {budget}")
    if binary.metadata.enable_fp_fusion:
        found.append("contracts products into sums")
    if re.search(r"\.(ftz|approx|full)\.", binary.asm["ptx"]):
        found.append("approximates, or flushes subnormals")
    return found


def is_conversion(name: str) -> bool:
    return name.startswith("I2F") and not integer_division(name)


PLANTED = CASES[0]
PLANTS: dict[str, Callable[[int], list[Measured]]] = {
    "lost divisibility": lambda arch: measure(PLANTED, arch, aligned=False),
    "too few registers": lambda arch: measure(PLANTED, arch, maxnreg=32),
    "contraction": lambda arch: measure(PLANTED, arch, enable_fp_fusion=True),
}


@pytest.fixture(scope="module")
def listings() -> dict[int, Any]:
    """What this file prints for each architecture, at once, in a process of its own: Triton keeps state."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    running = {
        arch: subprocess.Popen([sys.executable, __file__, str(arch), "--json"], **pipes) for arch in SHARED_LIMIT
    }
    found = {}
    for arch, process in running.items():
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        found[arch] = json.loads(out)
    return found


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_every_kernel_compiles_to_what_it_should(listings: dict[int, Any], arch: int) -> None:
    wrong = [Measured(**m).row() for m in listings[arch]["cases"] if m["faults"]]
    assert not wrong, "\n".join((HEADER, *wrong))


@pytest.mark.parametrize("arch", SHARED_LIMIT)
@pytest.mark.parametrize(
    ("plant", "says"),
    [
        ("lost divisibility", "no LDGSTS.E.BYPASS.128 in its loop"),
        ("too few registers", "spills"),
        ("contraction", "contracts products"),
    ],
)
def test_a_planted_fault_is_caught(listings: dict[int, Any], arch: int, plant: str, says: str) -> None:
    assert any(says in fault for m in listings[arch]["plants"][plant] for fault in m["faults"])


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
