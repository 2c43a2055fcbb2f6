"""The promises of this library about its speed, as data, and the check that a run kept them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from .case import OURS, Row, seconds
from .matmul import ROWS, SHAPES


@dataclass(frozen=True)
class Target:
    """A bound on quantlib's row of a case.

    ``measure`` is "speedup" (time of the fastest of ``against`` / own time), "of_copy" (share of a plain copy's bytes
    a second) or "above" (seconds more than the fastest of ``against``).
    """

    case: str
    measure: str
    bound: float
    against: tuple[str, ...] = ()
    device: str = "cpu"

    def __str__(self) -> str:
        others = " and ".join(self.against)
        return {
            "speedup": f"at least {self.bound:g} x the speed of {others}",
            "of_copy": f"at least {self.bound:g} of the bytes a second of a plain copy",
            "above": f"at most {seconds(self.bound)} above {others}",
        }[self.measure]


COPY, COMPILE, EMPTY = ("torch copy_",), ("torch.compile",), ("torch.empty_like",)
FLOAT, CUBLAS = ("torch bfloat16",), ("F.linear bfloat16",)

TARGETS = (
    Target("cast float32 -> float16", "speedup", 0.95, COPY),
    Target("cast float32 -> bfloat16", "speedup", 0.95, COPY),
    Target("cast float32 -> float8_e4m3fn", "speedup", 2, COPY),
    Target("cast float32 -> float8_e5m2", "speedup", 2, COPY),
    Target("quantize float32 -> int8 tensor", "speedup", 2, ("torch.quantize_per_tensor", "torch.compile")),
    Target("quantize_dynamic float32 -> int8 row", "speedup", 3, COMPILE),
    Target("quantize_dynamic float32 -> int8 row", "of_copy", 0.6),
    Target("fake_quantize float32 -> int8 row", "speedup", 4, ("torch learnable",)),
    Target("fake_quantize float32 -> int8 row", "speedup", 2, ("torch.fake_quantize_per_channel_affine",)),
    Target("fake_quantize float32 -> int8 row", "speedup", 2, COMPILE),
    *(
        Target(f"{family} {N}x{K} M={M} {conversion} row", "speedup", bound, (peer,))
        for N, K in SHAPES["cpu"]
        for M in ROWS["cpu"]
        for family, conversion, bound, peer in (
            ("dequant_matmul", "bfloat16 x int8", 1, "torch._weight_int8pack_mm"),
            ("dequant_matmul", "bfloat16 x int8", 1.7 if M == 1 else 1 if M <= 16 else 0.9, "F.linear bfloat16"),
            ("scaled_matmul", "float32 -> int8 x int8", 1, "torch quantize_dynamic"),
            ("scaled_matmul", "float32 -> int8 x int8", 1.2, "torchao compiled"),
        )
    ),
    *(
        Target(f"dequant_matmul {N}x{K} M=1 bfloat16 x int4 group:128", "speedup", 1.5, ("quantlib W8A16",))
        for N, K in SHAPES["cpu"]
    ),
    *(
        Target(f"modules linear 4096x4096 M={M} bfloat16 x int8 row", "speedup", 1 if M <= 16 else 0.9, FLOAT)
        for M in (1, 16, 64, 256)
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


@dataclass(frozen=True)
class Verdict:
    """A target beside what was measured.

    ``measured`` is None where a row that it needs has no time. ``peer_of_copy`` is the share of a plain copy's bytes
    a second that the fastest of ``against`` reaches: above 1 / bound the memory, not the kernel, decides.
    """

    target: Target
    measured: float | None = None
    peer_of_copy: float | None = None

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        least = self.target.measure != "above"
        return self.measured >= self.target.bound if least else self.measured <= self.target.bound


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Return the verdict of every target whose case was run, on tensors larger than any cache, except for calls."""
    cases: dict[tuple[str, str], dict[tuple[int, ...], list[Row]]] = {}
    for row in rows:
        cases.setdefault((row.case, row.device), {}).setdefault(row.shape, []).append(row)
    run = (
        (t, shape, own) for t in (*TARGETS, *GPU_TARGETS) for shape, own in cases.get((t.case, t.device), {}).items()
    )
    return [verdict(t, own) for t, shape, own in run if t.measure == "above" or math.prod(shape) >= LARGE]


def verdict(target: Target, rows: list[Row]) -> Verdict:
    """Return the verdict on the rows of the target's case."""
    own = next((row for row in rows if row.role == OURS), None)
    others = [row for row in rows if row.backend in target.against and row.min is not None]
    if own is None or own.min is None or len(others) < len(target.against):
        return Verdict(target)
    if target.measure == "of_copy":
        return Verdict(target, own.of_copy)
    best = min(others, key=lambda row: row.min or 0.0)
    assert best.min is not None
    return Verdict(target, best.min / own.min if target.measure == "speedup" else own.min - best.min, best.of_copy)
