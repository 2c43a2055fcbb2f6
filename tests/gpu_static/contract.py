"""The contracts of machine code: a table of kernels, and the faults of one that breaks its contract, in words.

A kernel that is not in the table is at fault: nobody said what it must be.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from gpu_static.measured import Measured
from gpu_static.sass import width

# Bytes that a thread block may have.
SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
STATIC_SHARED = 49152  # without asking for more, as no kernel of csrc/cuda does
# Instructions of a thread for each byte moved, below which memory is what a kernel waits for: lanes a clock over bytes
# a clock of one SM, of an A100 (1.75 TB/s, 108 SMs, 1.41 GHz), an RTX 3090 (0.9 TB/s, 82 SMs, 1.70 GHz), an RTX 4090
# (1.0 TB/s, 128 SMs, 2.52 GHz), an H200 (4.3 TB/s, 132 SMs, 1.98 GHz), a B200 (7.2 TB/s, 148 SMs, 1.97 GHz) and an RTX
# 5090 (1.67 TB/s, 170 SMs, 2.41 GHz).
PER_BYTE = {80: 11.1, 86: 19.8, 89: 41.0, 90: 7.8, 100: 5.2, 120: 31.4}
# REDUX adds up what the lanes of a warp have, ATOMS.OR and ATOMS.AND keep the book of tensor memory.
ATOMIC = re.compile(r"U?(RED(?!UX)|ATOM(?!S\.(OR|AND)))\w*\b")
FLOAT_ATOMIC = re.compile(ATOMIC.pattern + r".*\.(F16|F32|F64|BF16)")
LOCAL = re.compile(r"(LDL|STL)\b")
NEW = "has no recorded budget"
DOUBLE = re.compile(r"D(ADD|MUL|FMA|SETP)\b")


@dataclass(frozen=True)
class Contract:
    """The contract of one kernel. Bytes are those of a unit, without scales; None leaves them open."""

    reads: float | None = None
    writes: float | None = None
    tensors: int = 1  # that are read
    needs: tuple[str, ...] = ()  # on the main path
    without: str | None = None  # on the main path
    stores: int | None = None  # to shared memory, on the main path, at most
    tickets: int = 0  # integer atomics
    ceiling: float | None = None  # instructions a unit


def faults(m: Measured, recorded: tuple[float, int] | None, stale: bool = False) -> list[str]:
    """List the faults of ``m``, in words; ``recorded`` is its budget: (instructions a unit, registers).

    A ``stale`` budget comes of other compilers, and does not count.
    """
    if (m.language, m.kernel) not in CONTRACTS:
        return ["has no contract"]
    contract = CONTRACTS[m.language, m.kernel](m)
    found = everywhere(m, contract)
    if m.facts.get("ragged"):  # every access has a mask, and nobody waits for it
        return found
    found += [f"no {need} on its main path" for need in contract.needs if not any(re.match(need, n) for n in m.main)]
    found += [f"{n} on its main path" for n in m.main if contract.without and re.match(contract.without, n)]
    stores = sum(count for name, count in m.main.items() if name.startswith("STS"))
    if contract.stores is not None and stores > contract.stores:
        found.append(f"{stores} stores to shared memory on its main path > {contract.stores}")
    found += moved(m, contract)
    if contract.ceiling is not None and m.instructions > contract.ceiling:
        found.append(f"above the ceiling of {contract.ceiling:.1f} instructions")
    return found + ([] if stale else beyond(m, recorded))


def everywhere(m: Measured, contract: Contract) -> list[str]:
    """List the faults that no kernel may have, on any path."""
    found = []
    if m.spilled or any(LOCAL.match(name) for name in m.names):
        found.append(f"spills {m.spilled} bytes")
    found += [f"has {name}" for name in m.names if DOUBLE.match(name)]
    found += [f"adds floats with {name}" for name in m.names if FLOAT_ATOMIC.match(name)]
    atomics = sum(n for name, n in m.names.items() if ATOMIC.match(name))
    if atomics > contract.tickets:
        found.append(f"{atomics} atomics > {contract.tickets}")
    limit = STATIC_SHARED if m.language == "cuda" else SHARED[m.arch]
    if m.shared > limit:
        found.append(f"{m.shared} bytes of shared memory > {limit}")
    found += [f"Triton adds up the wrong lanes: {what}" for what in m.scattered]
    found += [f"an operand is overwritten: {what}" for what in m.overwritten[:1]]
    return found + [f"is inexact: {what}" for what in m.inexact]


def moved(m: Measured, contract: Contract) -> list[str]:
    """Bytes other than the model's, and accesses narrower than 16 bytes of the widest tensor permit."""
    if contract.reads is None or contract.writes is None:
        return []
    found, piece = [], 16 / max(contract.reads, contract.writes)  # units
    for verb, kind, size, tensors, have in (
        ("reads", "LDG", contract.reads, contract.tensors, m.read),
        ("writes", "STG", contract.writes, 1, m.written),
    ):
        want, widths = size * tensors, widths_of(m, kind)
        scales = round((have - want) * m.units, 3)  # of a thread, four bytes each
        if scales < 0 or scales % 4 or scales > min(sum(w for w in widths if w == 4), 32):
            found.append(f"{verb} {have:.2f} bytes, want {want:.2f}")
        elif sum(w for w in widths if w >= int(piece * size)) < want * m.units:
            found.append(f"{verb} {min(widths)} bytes at once, want {int(piece * size)}")
    return found


def widths_of(m: Measured, kind: str) -> list[int]:
    return [width(name) for name, count in m.main.items() if name.startswith(kind + ".") for _ in range(count)]


def beyond(m: Measured, recorded: tuple[float, int] | None) -> list[str]:
    """List what exceeds the record, by more than a twentieth or a step of what a multiprocessor hands out."""
    if recorded is None:
        return [NEW]
    found = []
    if m.instructions > recorded[0] * 1.05 + 0.05:
        found.append(f"{m.instructions:.2f} instructions > {recorded[0]:.2f} recorded")
    if m.registers > recorded[1] + 8:
        found.append(f"{m.registers} registers > {recorded[1]} recorded")
    return found


# ---- the kernels -----------------------------------------------------------------------------------------------------

CONVERTS = r"I2F(?!.*RP)|CALL"  # .RP: an integer is divided once, to find a program's tile
NARROW = CONVERTS + r"|LDG\.E\.U16"
TENSOR_CORES = dict.fromkeys(SHARED, ("HMMA.16816", "IMMA.16832"))  # of bfloat16 and float16, and of int8
TENSOR_CORES |= {90: ("HGMMA", "IGMMA"), 100: ("UTCHMMA", "IMMA.16832|UTCIMMA")}
COPIES = r"LDGSTS\.E\.BYPASS\.(LTC128B\.)?128"  # the cache may be told to fetch 128 bytes
FEW = 32  # rows of x up to which two warps share a tile (tuning.py)


def stream(m: Measured, x: float, y: float, *, tensors: int = 1, without: str = CONVERTS) -> Contract:
    """x is read and y is written, once, in vectors; memory is what is waited for."""
    return Contract(x, y, tensors, without=without, ceiling=PER_BYTE[m.arch] * (x * tensors + y))


def size(m: Measured, row: str) -> float:
    """Bytes of an element."""
    return float(m.facts["bits"][row] / 8)


def triton_matmul(m: Measured) -> Contract:
    """A few rows of x meet codes that become operands in registers; many rows, tensor cores that read shared memory."""
    bits, scales, tickets = m.facts["bits"], m.facts["scales"], int(m.facts["splits"] > 1)
    if bits["X"] == 32 or not m.facts["exact"] or bits["F"] > 8 or scales == "element":  # multiplied in float32
        return Contract(tickets=tickets)
    if m.facts["tile_m"] > FEW:  # of fewer warps than a warpgroup has, from registers
        sums = TENSOR_CORES[m.arch][0] if m.warps >= 4 else r"HMMA\.16816"
        return Contract(needs=(sums,), without=CONVERTS + "|SHFL", tickets=tickets)
    needs = (COPIES, r"HMMA\.16816", *([r"LDS\.128"] if m.facts["tiled"] else []))
    ceiling = PER_BYTE[m.arch] * bits["F"] / 8 if m.facts["tiled"] and m.facts["tile_m"] <= 16 else None
    return Contract(
        needs=needs, without=CONVERTS + "|SHFL", stores=0 if scales == "row" else 2, tickets=tickets, ceiling=ceiling
    )


def triton_backward(m: Measured) -> Contract:
    large = m.facts["bits"]["X"] < 32 and m.facts["tile_m"] >= 64
    return Contract(needs=(TENSOR_CORES[m.arch][0],) if large else (), without="SHFL")


def triton_scaled(m: Measured) -> Contract:
    whole = m.facts["bits"]["F"] == 8 and m.facts["per"] == "row"
    sums = TENSOR_CORES[m.arch][1] if whole and m.facts["tile_m"] >= 64 else r"I(MMA\.16832|GMMA)"
    return Contract(needs=(sums, COPIES) if whole else (sums,), tickets=int(m.facts["splits"] > 1))


def triton_described(m: Measured) -> Contract:
    """Tensor cores read what TMA has copied; sums stay in registers."""
    floats = m.facts["bits"]["X"] == 16
    sums = {90: "HGMMA" if floats else "IGMMA", 100: "UTCHMMA" if floats else "UTCIMMA"}[m.arch]
    return Contract(needs=(sums, "UTMALDG"), stores=None if m.arch == 100 else 0)


def cuda_stream(m: Measured, x: int = 0, y: int = 1, tensors: int = 1) -> Contract:
    """Return the contract of kernels whose template arguments are the formats of x and y."""
    formats = m.facts["bits"]
    read, written = (formats[n] / 8 if n < len(formats) else 0.0 for n in (x, y))
    return stream(m, read, written, tensors=tensors, without="CALL")


def cuda_matmul(m: Measured) -> Contract:
    """Operands come from registers only: neither a conversion nor a trip through other memory or lanes."""
    without = r"(I2F\w*|F2F|F2I|LDS|STS|SHFL|BAR|MUFU)\b"
    ceiling = PER_BYTE[m.arch] * m.facts["bits"][0] / 8 if m.facts["arguments"][-1] == "true" else None  # tiled
    return Contract(needs=(r"LDG\.E\.\S*128", r"HMMA\.16816"), without=without, ceiling=ceiling)


CONTRACTS: dict[tuple[str, str], Callable[[Measured], Contract]] = {
    ("triton", "cast_kernel"): lambda m: stream(m, size(m, "X"), size(m, "Y")),
    ("triton", "hadamard_kernel"): lambda m: Contract(needs=(r"LDG\.E\.(64|128)", r"STG\.E\.(64|128)")),
    ("triton", "quantize_kernel"): lambda m: stream(m, size(m, "X"), size(m, "F"), without=NARROW),
    ("triton", "dequantize_kernel"): lambda m: stream(m, size(m, "F"), size(m, "Y")),
    # an index of 8 bytes for each row too
    ("triton", "dequantize_rows_kernel"): lambda m: Contract(
        needs=(r"LDG\.E\.(64|128)", r"STG\.E\.128"), without=CONVERTS
    ),
    ("triton", "compute_scale_kernel"): lambda m: stream(m, size(m, "X"), 0, without=NARROW),
    ("triton", "partial_range_kernel"): lambda m: stream(m, size(m, "X"), 0, without=NARROW),
    ("triton", "combine_range_kernel"): lambda m: Contract(),
    ("triton", "search_scale_kernel"): lambda m: Contract(),
    ("triton", "quantize_dynamic_kernel"): lambda m: stream(m, size(m, "X"), size(m, "F"), without=NARROW),
    ("triton", "fake_quantize_kernel"): lambda m: stream(m, size(m, "X"), size(m, "X")),
    ("triton", "fake_quantize_backward_kernel"): lambda m: stream(m, size(m, "X"), size(m, "X"), tensors=2),
    ("triton", "partial_gradients_kernel"): lambda m: stream(m, size(m, "X"), size(m, "X"), tensors=2),
    ("triton", "combine_gradients_kernel"): lambda m: Contract(),
    ("triton", "adamw_step_kernel"): lambda m: Contract(needs=(r"LDG\.E\.(64|128)", r"STG\.E\.(64|128)")),
    ("cuda", "adamw_step_kernel"): lambda m: Contract(needs=(r"LDG\.E\.\S*(64|128)", r"STG\.E\.(64|128)")),
    ("triton", "slab_kernel"): lambda m: Contract(needs=(r"LDG\.E\.128", r"STG\.E\.128"), without="SHFL"),
    ("triton", "finish_kernel"): lambda m: Contract(needs=(r"LDG\.E\.128", r"STG\.E\.(64|128)"), without="SHFL"),
    ("triton", "dequant_matmul_kernel"): triton_matmul,
    ("triton", "grouped_dequant_matmul_kernel"): lambda m: replace(triton_matmul(m), tickets=0),
    ("triton", "dequant_matmul_backward_kernel"): triton_backward,
    ("triton", "grouped_dequant_matmul_backward_kernel"): triton_backward,
    ("triton", "scaled_matmul_kernel"): triton_scaled,
    ("triton", "grouped_scaled_matmul_kernel"): triton_scaled,
    ("triton", "described_matmul_kernel"): triton_described,
    ("cuda", "cast_kernel"): cuda_stream,
    ("cuda", "quantize_kernel"): cuda_stream,
    ("cuda", "dequantize_kernel"): cuda_stream,
    ("cuda", "compute_scale_kernel"): lambda m: replace(cuda_stream(m, 0, 9), tickets=2),  # of integers
    ("cuda", "quantize_dynamic_kernel"): cuda_stream,
    ("cuda", "fake_quantize_kernel"): lambda m: cuda_stream(m, 0, 0),
    ("cuda", "fake_quantize_backward_kernel"): lambda m: cuda_stream(m, 0, 0, 2),
    ("cuda", "finish_kernel"): lambda m: Contract(),
    ("cuda", "decode_slab_kernel"): lambda m: Contract(needs=(r"STG\.E\.64",)),
    ("cuda", "finish_slab_kernel"): lambda m: Contract(needs=(r"LDG\.E\.128", r"STG\.E\.64")),
    ("cuda", "product_kernel"): lambda m: Contract(),
    ("cuda", "widen_kernel"): lambda m: Contract(),
    ("cuda", "dequant_matmul_kernel"): cuda_matmul,
    ("cuda", "grouped_dequant_matmul_kernel"): cuda_matmul,
    ("cuda", "grouped_product_kernel"): lambda m: Contract(),
    ("cuda", "scaled_rows_kernel"): lambda m: Contract(needs=(r"IMMA\.16832\.S8\.S8", r"LDG\.E\.\S*128")),
    ("cuda", "scaled_matmul_kernel"): lambda m: Contract(needs=(r"IMMA\.16832\.S8\.S8", r"LDG\.E\.128", "LDS")),
}
