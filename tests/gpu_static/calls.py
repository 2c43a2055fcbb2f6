"""The calls: op x format x type of x x granularity x shape; the shapes are those of models.

Two calls may start one and the same kernel: launches.py counts what their launchers tell apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from quantlib import formats
from quantlib.spec import QuantSpec

SOURCES = ("float32", "bfloat16", "float16")
PER = ("tensor", "row", "group:128", "group:32", "tile:128")
WEIGHTS = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192), (8192, 28672))
BATCHES = (1, 4, 16, 32, 64, 128, 256, 1024, 4096)
RAGGED = ((4095, 4097), (300, 100001), (3, 45))  # no multiple of anything: these have no budget
CODES = tuple((f.name, affine) for f in formats.TABLE for affine in ((False,) if f.is_float else (False, True)))
BYTES = tuple((name, affine) for name, affine in CODES if formats.get(name).bits <= 8)


@dataclass(frozen=True)
class Call:
    """One call of a launcher. ``shape`` is x's, or the weight's of a matmul, whose x has M rows."""

    op: str
    source: str  # type of x
    format: str
    shape: tuple[int, int] = (4096, 4096)
    per: str = "row"
    affine: bool = False
    lsq: bool = False
    M: int = 0
    tiled: bool = False
    activation: str | None = None  # with a bias
    invariant: bool = False
    device: str = "no device"  # whose table of measurements is asked

    def __str__(self) -> str:
        (rows, columns), M = self.shape, f"M={self.M}" if self.M else ""
        flags = ("affine", "lsq", "tiled", "invariant")
        words = [self.source, self.format, M, f"{rows}x{columns}", "" if self.op == "cast" else self.per]
        words += [flag if getattr(self, flag) else "" for flag in flags] + [self.activation or ""]
        words += [f"[{self.device}]" if self.device != "no device" else ""]
        return " ".join(filter(None, words))

    @property
    def block(self) -> tuple[int, int]:
        """Return the rows and columns that share a scale, of any format; of a column no QuantSpec speaks."""
        return (self.shape[0], 1) if self.per == "column" else QuantSpec("int8", per=self.per).block(self.shape)

    @property
    def ragged(self) -> bool:
        return self.shape[1] % 16 > 0


def calls(devices: tuple[str, ...] = (), everything: bool = False) -> Iterator[Call]:
    """The calls; those of the matmuls also as each of ``devices`` takes them, which have been measured.

    Without ``everything`` no more than what `common` lets through of the product of all that can be chosen.
    """
    yield from FAST
    yield from casts()
    yield from steps()
    chosen = itertools.chain(projections(), fake_quantizations(), *(matmuls(d) for d in ("no device", *devices)))
    yield from chosen if everything else filter(common, chosen)


def common(call: Call) -> bool:
    """bfloat16 with every format; other types of x, granularities, shapes and flags with the formats used most."""
    often = not call.affine and call.format in ("int8", "int4", "float8_e4m3fn")
    plain = often and call.source == "bfloat16"
    usual = call.per == ("group:128" if formats.get(call.format).packed else "row")
    first = usual and call.shape == WEIGHTS[0] and not call.lsq and (often or call.source == "bfloat16")
    if not call.M:
        return first or call.ragged or (plain and (call.shape == WEIGHTS[0] or call.format == "int8"))
    if call.op == "dequant_matmul" and not call.tiled:
        return plain and first and call.M in (1, 256)
    if call.shape != WEIGHTS[0]:
        return plain and usual and call.format != "float8_e4m3fn" and call.M in (1, 64)
    if call.op == "dequant_matmul_backward":
        return first and call.M in (1, 256)
    return (plain and call.M in (1, 256, 1024)) or (first and call.M in (1, 256))


def casts() -> Iterator[Call]:
    floats = [f.name for f in formats.FORMATS.values() if f.is_float and not f.packed]
    for x, y in itertools.product(floats, floats):
        yield Call("cast", x, y)
    for shape in RAGGED:
        yield Call("cast", "bfloat16", "float8_e4m3fn", shape)


def projections() -> Iterator[Call]:
    for op in ("quantize", "dequantize", "compute_scale", "quantize_dynamic"):
        for source, (format, affine), per in itertools.product(SOURCES, CODES, PER):
            yield Call(op, source, format, per=per, affine=affine)
        for shape, per in itertools.product(RAGGED, ("tensor", "row", "group:32")):
            yield (
                Call(op, "bfloat16", "int8", shape, per)
                if per == "row"
                else Call(op, "float32", "int4", shape, per, True)
            )
    for source, (format, affine), K in itertools.product(SOURCES, BYTES, (8192, 11008, 14336, 28672)):
        yield Call("quantize_dynamic", source, format, (64, K), "row", affine)  # rows that stay in registers


def fake_quantizations() -> Iterator[Call]:
    for op in ("fake_quantize", "fake_quantize_backward"):
        for source, (format, affine), per in itertools.product(SOURCES, CODES, PER):
            for lsq in (False, True) if op == "fake_quantize_backward" else (False,):
                if formats.get(format).bits <= 8:
                    yield Call(op, source, format, per=per, affine=affine, lsq=lsq)
        for shape in RAGGED:
            yield Call(op, "bfloat16", "int8", shape, "row")


def steps() -> Iterator[Call]:
    """Return the steps with states in blocks of 128, and in 32 bits; bfloat16 parameters are rounded at random."""
    for source, format, shape in itertools.product(SOURCES, ("int8", "float32"), ((4096, 4096), *RAGGED[:1])):
        yield Call("adamw_step", source, format, shape, "group:128")


def matmuls(device: str) -> Iterator[Call]:
    yield from dequant_matmuls(device)
    yield from scaled_matmuls(device)


def dequant_matmuls(device: str) -> Iterator[Call]:
    for source, (format, affine), tiled in itertools.product(SOURCES, BYTES, (True, False)):
        per = "group:128" if formats.get(format).packed else "row"
        for M, shape in itertools.product(BATCHES, WEIGHTS):
            yield Call("dequant_matmul", source, format, shape, per, affine, M=M, tiled=tiled, device=device)
        for M, per in itertools.product((1, 16, 256, 1024), PER):
            yield Call("dequant_matmul", source, format, per=per, affine=affine, M=M, tiled=tiled, device=device)
    for source, activation in itertools.product(SOURCES, ("relu", "gelu", "gelu_tanh", "silu")):
        yield Call("dequant_matmul", source, "int8", M=1, tiled=True, activation=activation, device=device)
        yield Call("dequant_matmul", source, "int8", M=256, tiled=True, activation=activation, device=device)
    for source in SOURCES:
        yield Call("dequant_matmul", source, "int8", M=7, tiled=True, invariant=True, device=device)
    for source, (format, affine), M in itertools.product(SOURCES, BYTES, BATCHES):
        for per in ("row", "group:128"):
            yield Call("dequant_matmul_backward", source, format, per=per, affine=affine, M=M, device=device)


def scaled_matmuls(device: str) -> Iterator[Call]:
    for source, (format, affine) in itertools.product(SOURCES, (c for c in BYTES if "int" in c[0])):
        per = "group:128" if formats.get(format).packed else "row"
        for M, shape in itertools.product(BATCHES, WEIGHTS):
            yield Call("scaled_matmul", source, format, shape, per, affine, M=M, device=device)
        for M, per in itertools.product((1, 16, 256, 4096), PER):
            yield Call("scaled_matmul", source, format, per=per, affine=affine, M=M, device=device)


# Each kernel at its most used, and the most used formats of each op.
FIRST = (
    Call("cast", "bfloat16", "float8_e4m3fn"),
    Call("hadamard", "bfloat16", "bfloat16", per="group:64"),
    Call("hadamard", "bfloat16", "bfloat16", per="group:1024"),
    Call("hadamard", "float32", "float32", per="group:1024"),
    Call("quantize", "bfloat16", "int8"),
    Call("quantize", "bfloat16", "int8", (4095, 4097)),
    Call("quantize", "float32", "int4", per="group:32", affine=True),
    Call("dequantize", "bfloat16", "int8"),
    Call("dequantize", "bfloat16", "int4", per="group:128"),
    Call("dequantize_rows", "bfloat16", "int8"),
    Call("dequantize_rows", "bfloat16", "int4", per="group:128"),
    Call("compute_scale", "bfloat16", "int8", per="tensor"),
    Call("compute_scale", "float32", "int8", affine=True),
    Call("compute_scale", "float32", "int8", (259, 5), "column", True),
    Call("search_scale", "bfloat16", "nf4_bf16", per="group:128"),
    Call("search_scale", "float32", "int8", affine=True),
    Call("quantize_dynamic", "bfloat16", "int8"),
    Call("quantize_dynamic", "bfloat16", "int8", (64, 28672)),
    Call("quantize_dynamic", "bfloat16", "float8_e4m3fn", per="tile:128"),
    Call("quantize_dynamic", "bfloat16", "int8", (259, 5), "column"),
    Call("fake_quantize", "bfloat16", "int8"),
    Call("fake_quantize_backward", "bfloat16", "int8"),
    Call("fake_quantize_backward", "float32", "int8", per="tensor", affine=True),
    Call("fake_quantize_backward", "float32", "int8", (259, 5), "column", True),
    Call("adamw_step", "bfloat16", "int8", per="group:128"),
    Call("adamw_step", "float32", "int8", per="group:128"),
    Call("adamw_step", "float32", "float32", per="group:128"),
    Call("dequant_matmul", "bfloat16", "int8", M=1, tiled=True),
    Call("dequant_matmul", "bfloat16", "int4", per="group:128", M=16, tiled=True),
    Call("dequant_matmul", "float16", "int4", per="group:128", M=1, tiled=True),
    Call("dequant_matmul", "bfloat16", "int8", M=256, tiled=True),
    Call("dequant_matmul", "bfloat16", "int8", M=1024, tiled=True),
    Call("dequant_matmul_backward", "bfloat16", "int8", M=64),
    Call("dequant_matmul_backward", "bfloat16", "int8", M=256),
    Call("grouped_dequant_matmul", "bfloat16", "int8", M=64),
    Call("grouped_dequant_matmul", "bfloat16", "int4", per="group:128", M=64),
    Call("grouped_dequant_matmul_backward", "bfloat16", "int8", M=64),
    Call("grouped_dynamic_matmul", "bfloat16", "int8", M=64),
    Call("scaled_matmul", "bfloat16", "int8", M=1),
    Call("scaled_matmul", "bfloat16", "int8", M=4096),
)

# The matmuls of models at every size of a batch that has a tile of its own, each type of x.
MATMULS = tuple(
    Call(op, source, format, per=per, M=M, tiled=op == "dequant_matmul")
    for source, M in itertools.product(SOURCES, (1, 4, 16, 32, 64, 128, 256, 1024))
    for op, format, per in (
        ("dequant_matmul", "int8", "row"),
        ("dequant_matmul", "int4", "group:128"),
        ("dequant_matmul_backward", "int8", "row"),
        ("dequant_matmul_backward", "int4", "group:128"),
        ("scaled_matmul", "int8", "row"),
    )
)
# A code book, which the spec W4A16 takes, is looked up.
BOOKS = tuple(
    Call("dequant_matmul", "bfloat16", "nf4_bf16", per="group:128", M=M, tiled=True) for M in (1, 16, 64, 256, 1024)
)
FAST = tuple(dict.fromkeys((*FIRST, *MATMULS, *BOOKS)))
