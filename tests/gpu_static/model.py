"""The least time that a kernel can take on a GPU of its architecture: what it moves, issues and multiplies, each alone.

A bound from below: no thread waits for another, all multiprocessors are busy, and what follows a loop is free. Where
issue is the largest, no better overlap helps, only fewer instructions. Of what an H200 has measured of products with a
weight of 28672 x 4096 the bound is 0.43 to 0.93, of one of 4096 x 4096, where waits count more, 0.23 to 0.76.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpu_static.measured import Measured

LANES = 128  # threads of a multiprocessor that issue an instruction in a cycle
# Integers, comparisons, selections and permutations of bytes have a pipe of half as many lanes, up to sm_90.
INTEGER = re.compile(r"(PRMT|LOP3|PLOP3|SHF|IADD3|VIADD|ISETP|FSETP|FMNMX|[IV]I?MNMX|SEL|FSEL|LEA|SGXT|BMSK)\b")
HALF = (80, 86, 89, 90)
MATMULS = ("dequant_matmul_kernel", "scaled_matmul_kernel", "described_matmul_kernel", "dequant_matmul_backward_kernel")
PARTS = re.compile(r"(combine|finish|grouped)_")  # kernels whose units are no elements of the shape


@dataclass(frozen=True)
class GPU:
    """Multiprocessors, their clock, and what a device copies and multiplies in a second."""

    name: str
    processors: int
    ghz: float
    tb: float
    tflop: float  # of 16-bit floats into float32
    top: float  # of int8
    cache_tb: float  # TB/s that the L2 cache gives; about


GPUS = {
    80: GPU("A100", 108, 1.41, 1.75, 312, 624, 5.0),
    86: GPU("RTX 3090", 82, 1.70, 0.9, 71, 284, 2.5),
    89: GPU("RTX 4090", 128, 2.52, 1.0, 165, 661, 5.0),
    90: GPU("H200", 132, 1.98, 4.3, 790, 1580, 5.5),
    100: GPU("B200", 148, 1.97, 7.2, 2250, 4500, 10.0),
    120: GPU("RTX 5090", 170, 2.41, 1.67, 210, 838, 6.0),
}


@dataclass(frozen=True)
class Bound:
    """Microseconds, and what takes them: "memory", "cache", "issue", "integers" or "products"."""

    us: float
    by: str

    def __str__(self) -> str:
        return f"{self.us:.1f} us, {self.by}"


def bound(m: Measured, shape: tuple[int, int] | None = None, gpu: GPU | None = None) -> Bound | None:
    """Return the bound of a kernel of a shape, or of another one that it takes as well; None where its name has no
    shape, or where its units are other ones."""
    named = re.search(r"\b(\d+)x(\d+)\b", m.config)
    if named is None or m.facts.get("ragged") or PARTS.match(m.kernel):
        return None
    gpu, (N, K) = gpu or GPUS[m.arch], shape or (int(named[1]), int(named[2]))
    units = N * K
    moved, again, products, passes = units * (m.read + m.written), 0.0, 0.0, 1
    if m.kernel in MATMULS:
        M, bits, tile_m = m.facts["M"], m.facts["bits"], m.facts["tile_m"]
        passes = -(-M // tile_m)  # each decodes the weight
        x = bits.get("X", bits["F"])
        w = x if m.kernel == "described_matmul_kernel" else bits["F"]  # through descriptors both operands are alike
        y = bits.get("Y", x)
        moved = (units * w + M * (K * x + N * y)) / 8
        again = -(-N // m.facts["tile_n"]) * M * K * x / 8  # each tile of the weight reads all of x
        if x < 32:
            products = 2 * M * units / (gpu.top if x == 8 else gpu.tflop) / 1e6
    issue = units * passes * m.instructions / (gpu.processors * gpu.ghz * 1e3 * LANES)
    share = sum(count for name, count in m.main.items() if INTEGER.match(name)) / max(sum(m.main.values()), 1)
    bounds = [
        Bound(moved / gpu.tb / 1e6, "memory"),
        Bound(again / gpu.cache_tb / 1e6, "cache"),
        Bound(issue, "issue"),
        Bound(2 * share * issue if m.arch in HALF else 0.0, "integers"),
        Bound(products, "products"),
    ]
    return max(bounds, key=us_of)


def us_of(bound: Bound) -> float:
    return bound.us
