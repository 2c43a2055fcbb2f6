"""Products beside one of 16 bits of the same shape, both by the model: how often as fast, and what that should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from gpu_static.measured import Measured
from gpu_static.model import GPU, GPUS, bound

SHAPES = ((4096, 4096), (28672, 4096))
BATCHES = (1, 16, 64, 256, 1024)
DEVICES = (GPUS[80], replace(GPUS[90], name="H100", tb=3.0), GPUS[90])
ARCHS = (80, 90, 90)
# What a product is called -> its op, and its configuration but for M.
PRODUCTS = {
    "W8A16": ("dequant_matmul", "bfloat16 int8 M={} 4096x4096 row tiled"),
    "W4A16 (nf4)": ("dequant_matmul", "bfloat16 nf4_bf16 M={} 4096x4096 group:128 tiled"),
    "W4A16 (int4)": ("dequant_matmul", "bfloat16 int4 M={} 4096x4096 group:128 tiled"),
    "W8A8": ("scaled_matmul", "bfloat16 int8 M={} 4096x4096 row"),
}


def target(product: str, M: int, shape: tuple[int, int]) -> float:
    """Return the ratio to aim at: the time of a 16-bit product over that of this one."""
    small = shape == SHAPES[0]
    if product == "W8A8":
        return 1.9 if M <= 16 else 1.6 if M >= 1024 else 1.0
    if M <= 16:
        return (1.7 if small else 1.9) if product == "W8A16" else (2.2 if small else 3.5)
    return (1.7 if product == "W8A16" else 1.0) if M == 64 else 0.95 if M < 1024 else 0.92


def vendor(gpu: GPU, M: int, N: int, K: int) -> float:
    """Microseconds of a 16-bit product: what it moves, or multiplies."""
    return max(2 * (N * K + M * K + M * N) / gpu.tb / 1e6, 2 * M * N * K / gpu.tflop / 1e6)


def modelled(
    product: str, main: Measured, described: Measured | None, gpu: GPU, M: int, N: int, K: int
) -> tuple[float, str]:
    """Microseconds of a product whose first kernel is ``main``, and what takes most of them."""
    least = bound(main, (N, K), gpu)
    assert least is not None
    if main.kernel == "slab_kernel":  # then `described`, or the vendor's product, whose sums are read and y is written
        by = bound(described, (N, K), gpu) if described else None
        product_us = by.us if by else vendor(gpu, M, N, K) + 6 * M * N / gpu.tb / 1e6
        return least.us + product_us, "the weight in 16 bits too"
    quantization = 3 * M * K / gpu.tb / 1e6 if product == "W8A8" else 0.0
    return least.us + quantization, least.by


Found = dict[tuple[str, str, int], Measured]  # op, configuration, architecture


def of_more_rows(found: Found, op: str, config: str, M: int, arch: int) -> Measured | None:
    """The kernel of 4096 rows, which is that of M rows where a call with these has started no other."""
    main = found.get((op, config.format(4096), arch)) if M >= 1024 else None
    return replace(main, facts=main.facts | {"M": M}) if main else None


def table(measured: Iterable[Measured]) -> str:
    """Return the table; a cell is the ratio, in bold where it is below the target, and what takes the time then."""
    measured = [m for m in measured if m.kernel != "finish_kernel"]
    last = sorted(measured, key=lambda m: m.kernel)  # slabs after described
    found: Found = {(m.op, m.config, m.arch): m for m in last}
    described = {(m.op, m.config, m.arch): m for m in measured if m.kernel == "described_matmul_kernel"}
    lines = [
        f"| product | shape of the weight | M | target | {' | '.join(gpu.name for gpu in DEVICES)} |",
        f"|---|---|--:|--:|{'--:|' * len(DEVICES)}",
    ]
    for product, (op, config) in PRODUCTS.items():
        for N, K in SHAPES:
            for M in BATCHES:
                cells = []
                for gpu, arch in zip(DEVICES, ARCHS, strict=True):
                    key = op, config.format(M), arch
                    if main := found.get(key) or of_more_rows(found, op, config, M, arch):
                        us, by = modelled(product, main, described.get(key), gpu, M, N, K)
                        ratio = vendor(gpu, M, N, K) / us
                        missed = ratio < target(product, M, (N, K)) - 0.005
                        cells.append(f"**{ratio:.2f}** {by}" if missed else f"{ratio:.2f}")
                    else:
                        cells.append("-")
                if set(cells) != {"-"}:
                    lines.append(
                        f"| {product} | {N} x {K} | {M} | {target(product, M, (N, K))} | {' | '.join(cells)} |"
                    )
    return "\n".join(lines)
