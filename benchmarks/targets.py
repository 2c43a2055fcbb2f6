"""The promises of this library about its speed, as data, and the check that a run kept them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .case import OURS, PLAIN_COPY, READ_WRITE, Row, seconds
from .matmul import ROWS, SHAPES, cpu_sizes


@dataclass(frozen=True)
class Target:
    """A bound on quantlib's row of a case.

    Parameters
    ----------
    measure : {"speedup", "time", "of_copy", "of_read_write", "above"}
        Time of the fastest of ``against`` / own time; own time / time of the fastest of ``against``; share of a plain
        copy's bytes a second; time of a plain read and write of as many bytes / own time; seconds more than the
        fastest of ``against``.
    bound : float
        The least that is promised; of "time" and "above" the most.
    against : tuple of str
        Names of rows of the case.
    dtype : str, optional
        Of x, where that is not the one of the case.
    """

    case: str
    measure: str
    bound: float
    against: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = ""

    def __str__(self) -> str:
        others = " and ".join(self.against)
        said = {
            "speedup": f"at least {self.bound:g} x the speed of {others}",
            "time": f"at most {self.bound:g} x the time of {others}",
            "of_copy": f"at least {self.bound:g} of the bytes a second of a plain copy",
            "of_read_write": f"at least {self.bound:g} of the speed of a plain read and write",
            "above": f"at most {seconds(self.bound)} above {others}",
        }[self.measure]
        return f"x in {self.dtype}: {said}" if self.dtype else said

    @property
    def least(self) -> bool:
        """True if ``bound`` is the least value, False if it is the largest."""
        return self.measure not in ("time", "above")


COPY, COMPILE, EMPTY = ("torch copy_",), ("torch.compile",), ("torch.empty_like",)
FLOAT, CUBLAS, FLOAT32 = ("torch bfloat16",), ("F.linear bfloat16",), ("F.linear float32",)
OWN, DYNAMIC = ("quantlib cpp",), ("torch quantize_dynamic", "onnxruntime dynamic")
EIGHT, FOUR = "bfloat16 x int8 row", "bfloat16 x int4 group:128"


def weight_only(M: int) -> float:
    """The target for a product with M rows of x and an INT8 weight, as a speedup over F.linear in BF16."""
    return 1.9 if M <= 4 else 1.5 if M <= 16 else 1.0


TARGETS = (
    Target("cast float32 -> float16", "speedup", 0.95, COPY),
    Target("cast float32 -> bfloat16", "speedup", 0.95, COPY),
    Target("cast float32 -> float8_e4m3fn", "speedup", 2, COPY),
    Target("cast float32 -> float8_e5m2", "speedup", 1.3, COMPILE),
    Target("cast float32 -> float8_e5m2", "of_read_write", 0.95),
    Target("quantize float32 -> int8 tensor", "speedup", 1.1, COMPILE),
    Target("quantize float32 -> int8 tensor", "of_read_write", 0.95),
    Target("quantize_dynamic float32 -> int8 row", "speedup", 3, COMPILE),
    Target("quantize_dynamic float32 -> int8 row", "of_copy", 0.6),
    Target("dequantize float8_e4m3fn -> bfloat16 row", "of_copy", 0.9),
    Target("dequantize int4 -> bfloat16 group:128", "of_copy", 0.9),
    Target("fake_quantize float32 -> int8 row", "speedup", 4, ("torch learnable",)),
    Target("fake_quantize float32 -> int8 row", "speedup", 2, ("torch.fake_quantize_per_channel_affine",)),
    Target("fake_quantize float32 -> int8 row", "speedup", 2, COMPILE),
    *(
        target
        for M, N, K in cpu_sizes(ROWS["cpu"])
        for case in [f"dequant_matmul {N}x{K} M={M} {EIGHT}"]
        for target in (
            Target(case, "speedup", weight_only(M), CUBLAS),
            Target(case, "speedup", 1, ("torch._weight_int8pack_mm",)),
            *(
                target
                for dtype in ("float32", "float16")
                for target in (
                    *([] if 1 < M < 16 else [Target(case, "time", 1.15 if M == 1 else 2.2, OWN, dtype=dtype)]),
                    Target(case, "speedup", 1, FLOAT32, dtype=dtype),
                )
            ),
        )
    ),
    *(
        Target(f"dequant_matmul {N}x{K} M={M} {FOUR}", "speedup", *least)
        for M, N, K in [*cpu_sizes(ROWS["cpu"], first=True), *cpu_sizes((1,))[1:]]
        for least in ([(1.7, ("quantlib W8A16",))] if M == 1 else [(0.95, CUBLAS)] if M >= 64 else [])
    ),
    *(
        Target(f"scaled_matmul {N}x{K} M={M} float32 -> int8 x int8 row", "speedup", 1.1, DYNAMIC)
        for M, N, K in cpu_sizes(ROWS["cpu"])
    ),
    *(
        Target(f"scaled_matmul {N}x{K} M={M} float32 -> int8 x int4 group:128", "speedup", *least)
        for M, N, K in cpu_sizes(ROWS["cpu"], first=True)
        for least in (
            (1, ("onnxruntime MatMulNBits 4",)),
            *([(1, ("quantlib W8A8",))] if M == 1 else [(0.9, ("quantlib W8A8",))] if M >= 16 else []),
        )
    ),
    *(
        Target(f"modules linear 4096x4096 M={M} bfloat16 x int8 row", "speedup", weight_only(M), FLOAT)
        for M in (1, 16, 64, 256)
    ),
    Target("modules conv2d 256x256x3x3 28x28 bfloat16 x int8 row", "speedup", 1, FLOAT),
    *(
        Target(f"modules embedding 32000x2048 {format} -> bfloat16 {per}", "speedup", 1, FLOAT)
        for format, per in (("int8", "row"), ("int4", "group:128"))
    ),
    Target("call cast float32 -> bfloat16", "above", 3e-6, EMPTY),
    Target("call compute_scale float32 -> int8", "above", 3e-6, EMPTY),
    Target("call quantize float32 -> int8", "above", 3e-6, EMPTY),
    Target("call quantize_dynamic float32 -> int8", "above", 3e-6, EMPTY),
    Target("call dequantize int8 -> float32", "above", 3e-6, EMPTY),
    Target("startup import", "above", 0.15, ("import torch",)),
)

GPU_TARGETS = tuple(
    Target(case, measure, bound, against, "cuda")
    for case, measure, bound, against in (
        *((f"cast float32 -> {format}", "of_copy", 0.97, ()) for format in ("float16", "bfloat16", "float8_e4m3fn")),
        ("quantize float32 -> int8 tensor", "of_copy", 0.97, ()),
        ("quantize float32 -> int8 tensor", "speedup", 1.05, COMPILE),
        ("quantize_dynamic float32 -> int8 row", "of_copy", 0.97, ()),
        ("quantize_dynamic float32 -> int8 row", "speedup", 1.05, COMPILE),
        ("fake_quantize forward float32 -> int8 row", "of_copy", 0.95, ()),
        ("fake_quantize backward float32 -> int8 row", "of_copy", 0.93, ()),
        ("fake_quantize float32 -> int8 row", "speedup", 2.2, ("torch learnable",)),
        *(
            (f"{family} {N}x{K} M={M} {conversion}", "speedup", square if (N, K) == (4096, 4096) else bound, CUBLAS)
            for N, K in SHAPES["cuda"]
            for family, conversion, rows, square, bound in (
                ("dequant_matmul", "bfloat16 x int8 row", (1, 4, 16), 1.7, 1.9),
                ("dequant_matmul", "bfloat16 x int8 row", (64,), 1.7, 1.7),
                ("dequant_matmul", "bfloat16 x int8 row", (256,), 0.95, 0.95),
                ("dequant_matmul", "bfloat16 x int8 row", (1024, 4096), 0.92, 0.92),
                ("dequant_matmul", "bfloat16 x int4 group:128", (1, 4, 16), 2.2, 3.5),
                ("dequant_matmul", "bfloat16 x int4 group:128", (1024, 4096), 0.92, 0.92),
                ("scaled_matmul", "bfloat16 -> int8 x int8 row", (1, 4, 16), 1.9, 1.9),
                ("scaled_matmul", "bfloat16 -> int8 x int8 row", (1024, 4096), 1.6, 1.6),
            )
            for M in rows
        ),
    )
)  # on an H200; none has been measured yet

LARGE = 1 << 24  # elements
NOISY = 0.1  # on a machine whose noise is larger nothing is judged

MET, MISSED, AMBIGUOUS, UNKNOWN = "met", "MISSED", "AMBIGUOUS", "not measured"


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured.

    Attributes
    ----------
    measured : float, optional
        None where a row that it needs has no time.
    low, high : float
        Between which it is in doubt, by the spreads of the rows that it was computed of.
    noise : float, optional
        Of the machine; above `NOISY` there is no verdict.
    peer_of_copy : float, optional
        The share of a plain copy's bytes a second that the fastest of ``against`` reaches: above 1 / bound the memory,
        not the kernel, decides.
    """

    target: Target
    measured: float | None = None
    low: float = 0.0
    high: float = 0.0
    noise: float | None = None
    peer_of_copy: float | None = None

    @property
    def outcome(self) -> str:
        """ "met", "MISSED", "AMBIGUOUS" where the bound is between ``low`` and ``high``, or why there is none."""
        if self.measured is None:
            return UNKNOWN
        if self.noise is not None and self.noise > NOISY:
            return f"not judged: noise {self.noise:.0%}"
        bound, least = self.target.bound, self.target.least
        if self.low < bound < self.high:
            return AMBIGUOUS
        return MET if (self.measured >= bound if least else self.measured <= bound) else MISSED

    @property
    def met(self) -> bool | None:
        """None where that cannot be said."""
        return {MET: True, MISSED: False}.get(self.outcome)


def verdicts(rows: Iterable[Row], machine: Mapping[str, Any]) -> list[Verdict]:
    """Return the verdict of every target whose case was run, on tensors larger than any cache, except for calls."""
    cases: dict[tuple[str, str], dict[tuple[int, ...], list[Row]]] = {}
    for row in rows:
        cases.setdefault((row.case, row.device), {}).setdefault(row.shape, []).append(row)
    run = (
        (t, shape, own) for t in (*TARGETS, *GPU_TARGETS) for shape, own in cases.get((t.case, t.device), {}).items()
    )
    noise = machine.get("noise")
    return [verdict(t, own, noise) for t, shape, own in run if t.measure == "above" or math.prod(shape) >= LARGE]


def verdict(target: Target, rows: list[Row], noise: float | None = None) -> Verdict:
    """Return the verdict on the rows of the target's case."""
    own = next((r for r in rows if r.role == OURS and (r.dtype == target.dtype or not target.dtype)), None)
    others = [row for row in rows if row.backend in target.against and row.min is not None]
    if own is None or own.min is None or len(others) < len(target.against):
        return Verdict(target)
    if not target.against:  # a share of a limit, which is a row of the case
        share = own.of_copy if target.measure == "of_copy" else own.of_read_write
        name = PLAIN_COPY if target.measure == "of_copy" else READ_WRITE
        limit = next((row for row in rows if row.backend == name), None)
        return Verdict(target, share, *doubt(share, own, limit), noise)
    best = min(others, key=lambda row: row.min or 0.0)
    assert best.min is not None
    if target.measure == "above":
        found = own.min - best.min
        wavers = own.min * (own.spread or 0.0) + best.min * (best.spread or 0.0)
        return Verdict(target, found, found - wavers, found + wavers, noise, best.of_copy)
    found = best.min / own.min if target.measure == "speedup" else own.min / best.min
    return Verdict(target, found, *doubt(found, own, best), noise, best.of_copy)


def doubt(ratio: float | None, *rows: Row | None) -> tuple[float, float]:
    """The least and the most that a ratio of two times may be: their spreads together, as in `compare`."""
    beyond = 1 + sum(row.spread or 0.0 for row in rows if row)
    return (ratio or 0.0) / beyond, (ratio or 0.0) * beyond
