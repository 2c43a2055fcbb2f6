"""The table of products: every way to call a matmul whose bytes the contract fixes.

The sums of integer codes are exact. Where a product is one of floats, its operands are small integers times powers of
two, so that every partial sum is exact too, in any order.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference
from quantlib.formats import FloatFormat, IntFormat
from quantlib.ops.scaled_matmul import X_FORMATS
from quantlib.reference.activation import ACTIVATIONS
from quantlib.testing.bytes import Array, bits, tensor
from quantlib.testing.call import Block, OneCall
from quantlib.testing.compare import prove
from quantlib.testing.table import DTYPES

SINGLE = ("dequant_matmul", "dequant_matmul_backward", "scaled_matmul", "dynamic_matmul")
GROUPED = ("grouped_dequant_matmul", "grouped_dequant_matmul_backward", "grouped_dynamic_matmul")
OPS = (*SINGLE, *GROUPED)
INTEGERS = ("scaled_matmul", "dynamic_matmul", "grouped_dynamic_matmul")  # whose weights are integers
EXPERTS = 5  # of a grouped product; one of them has no rows
WEIGHTS = tuple(
    (f.name, symmetric) for f in formats.TABLE for symmetric in (True, False) if symmetric or not f.is_float
)
BLOCKS: tuple[Block, ...] = ((1, -1), (-1, -1), (1, 64), (1, 32), (4, 16), (3, 7))

# M, N, K: one row; few rows; tiles of the batch and what lies beyond; K split among programs; a batch for slabs
SHAPES = ((1, 64, 512), (3, 18, 70), (16, 40, 129), (17, 33, 256), (64, 80, 128), (70, 48, 320), (130, 136, 192))
LARGE = ((1, 96, 4096), (4, 64, 2048), (600, 130, 256))


@dataclass(frozen=True)
class Product(OneCall):
    """One call of one matmul, of x [M, K] and a weight [N, K]; the format and the block are the weight's."""

    bias: bool = False
    activation: str | None = None
    tiled: bool = False
    batch_invariant: bool = False
    x_format: str = "int8"  # of scaled_matmul
    x_symmetric: bool = True
    per_row: bool = True  # x_scale
    zero_codes: bool = False  # zero points are kept as codes, not int32
    scale_dtype: str = "float32"

    def __str__(self) -> str:
        words = [self.op, self.format, self.zero_points, self.dtype, "x".join(map(str, self.sizes))]
        words += [self.block_words, self.layout, str(self.activation)] + ["bias"] * self.bias
        words += ["tiled"] * self.tiled + ["invariant"] * self.batch_invariant
        words += ["codes"] * self.zero_codes + [self.scale_dtype] * (self.scale_dtype != "float32")
        if self.op == "scaled_matmul":
            words += [self.x_format, "" if self.x_symmetric else "affine", "rows" if self.per_row else "one"]
        return "-".join(filter(None, words))

    @property
    def grouped(self) -> bool:
        return self.op in GROUPED

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N, K."""
        assert self.shape is not None
        M, N, K = self.shape
        return M, N, K

    @property
    def matrix(self) -> tuple[int, int]:
        return self.sizes[1:]


@functools.lru_cache(64)
def inputs(case: Product) -> dict[str, Array]:
    """The arrays of ``case``, x as float32: what it is called with and what the reference is."""
    (M, N, K), rng = case.sizes, case.random()
    make = _codes if case.op in INTEGERS else _weight
    if case.grouped:
        experts = [make(case, rng) for _ in range(EXPERTS)]
        given = {name: np.stack([one[name] for one in experts]) for name in experts[0]}
        ends = np.sort(rng.integers(0, M + 1, EXPERTS - 1))
        given["offsets"] = np.insert(ends, 2, ends[1]).astype(np.int32)
    else:
        given = make(case, rng)
    if case.bias:
        given["bias"] = rng.integers(-4, 5, (EXPERTS, N) if case.grouped else N).astype(np.float32)
    if case.op == "scaled_matmul":
        given["x_codes"] = rng.integers(0, 256, (M, K), np.uint8).view(case.x_format)
        given["x_scale"] = rng.uniform(0.01, 2, (M if case.per_row else 1, 1)).astype(np.float32)
        given["x_scale"] *= _signs(given["x_scale"].shape, rng)
        if not case.x_symmetric:
            low, high = _int(case.x_format).range(affine=True)
            given["x_zero_point"] = rng.integers(low, high + 1, given["x_scale"].shape, np.int32)
    elif case.op in INTEGERS:
        x = rng.standard_normal((M, K)) * np.exp2(rng.integers(-20, 20, (M, 1)))
        given["x"] = _rounded(x.astype(np.float32), case.dtype)
    else:
        columns = N if case.op.endswith("backward") else K
        given["x"] = rng.integers(-8, 9, (M, columns)).astype(np.float32)
    return given


def _weight(case: Product, rng: np.random.Generator) -> dict[str, Array]:
    """Codes of small integers times a power of two."""
    (N, K), (br, bk), grid = case.matrix, case.resolved, case.grid
    scale = np.exp2(rng.integers(-3, 4, grid)).astype(np.float32)
    if case.scale_dtype != "float8_e8m0fnu":  # which has no sign
        scale *= _signs(grid, rng)
    f = formats.get(case.format)
    z = None if case.symmetric else rng.integers(0, min(4, f.code_range[1] + 1), grid, np.int32)
    w = rng.integers(-3 if f.signed or not case.symmetric else 0, 4, (N, K)).astype(np.float32)
    w *= np.repeat(np.repeat(scale, br, 0)[:N], bk, 1)[:, :K]
    codes = reference.quantize(w, scale, case.format, block=(br, bk), zero_point=z)
    return {"codes": codes, "scale": scale} | ({} if z is None else {"zero_point": z})


def _codes(case: Product, rng: np.random.Generator) -> dict[str, Array]:
    """Any codes, and anything in the nibble past an odd row's end."""
    (N, K), grid, f = case.matrix, case.grid, _int(case.format)
    codes = rng.integers(0, 256, (N, f.columns(K)), np.uint8).view(f.storage)
    scale = rng.uniform(0.5, 2, grid).astype(np.float32) * _signs(grid, rng)
    given: dict[str, Array] = {"codes": codes, "scale": scale}
    low, high = f.range(affine=True)
    return given if case.symmetric else given | {"zero_point": rng.integers(low, high + 1, grid, np.int32)}


def _signs(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Signs of scales, one in four of them minus."""
    return np.where(rng.random(shape) < 0.25, np.float32(-1), np.float32(1))


def _rounded(x: Array, dtype: str) -> Array:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return x if f.bits == 32 else reference.decode_float(reference.encode_float(x, f), f)


def _int(name: str) -> IntFormat:
    f = formats.get(name)
    assert isinstance(f, IntFormat)
    return f


@functools.lru_cache(64)
def expected(case: Product) -> Array:
    """Return the result of ``case``, bit for bit."""
    return meaning(case, inputs(case))


def meaning(case: Product, arrays: Mapping[str, Array]) -> Array:
    """Return the result of ``case`` for these arrays in place of :func:`inputs`, by :mod:`quantlib.reference`."""
    given: dict[str, Any] = {**arrays, "block": case.resolved, "format": case.format, "dtype": case.dtype}
    if case.op.endswith("backward"):
        backward: Any = getattr(reference, case.op)
        dx: Array = backward(given.pop("x"), size=case.sizes[2], **given)
        return dx
    function: Any = getattr(reference, case.op)
    result: Array = function(activation=case.activation, **given)
    return result


def tensors(case: Product, device: str = "cpu") -> dict[str, torch.Tensor]:
    """:func:`inputs` as tensors."""
    given = {}
    for name, array in inputs(case).items():
        if name == "x":
            given[name] = torch.from_numpy(array.copy()).to(getattr(torch, case.dtype)).to(device)
        elif name == "codes":
            given[name] = tensor(bits(array), case.format, device)
        elif name == "zero_point" and case.zero_codes:
            f = formats.get(case.format)
            kept = array.astype(f.storage) if f.whole else reference.pack(array, f)
            given[name] = torch.from_numpy(kept).to(device)
        elif name == "scale":
            given[name] = torch.from_numpy(array.copy()).to(getattr(torch, case.scale_dtype)).to(device)
        else:
            given[name] = torch.from_numpy(array.copy()).to(device)
    if case.tiled:
        size = case.sizes[2] if formats.get(case.format).packed else None
        given["codes"] = ops.tile(given["codes"], case.format, size=size)
    if case.layout == "offset":
        name = "x_codes" if case.op == "scaled_matmul" else "x"
        x = given[name]
        given[name] = x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    return given


def call(case: Product, given: dict[str, torch.Tensor], out: torch.Tensor | None = None) -> torch.Tensor:
    """Run ``case``, into ``out`` where there is one."""
    if case.op.endswith("backward"):
        packet = getattr(torch.ops.quantlib, case.op)
        weight = (given["codes"], given["scale"], case.format, case.resolved)
        groups = (given["offsets"],) if case.grouped else ()
        args = (given["x"], *weight, *groups, given.get("zero_point"), case.sizes[2])
        if out is not None:
            packet.out(*args, out=out)
        return packet(*args) if out is None else out
    more: dict[str, Any] = {"format": case.format, "block": case.block, "activation": case.activation, "out": out}
    if case.op.endswith("dequant_matmul"):
        more |= {"batch_invariant": case.batch_invariant}
        if case.tiled:
            more |= {"layout": "tiles", "rows": case.sizes[1]}
    elif case.op == "scaled_matmul":
        more |= {"dtype": getattr(torch, case.dtype)}
    function: Any = getattr(ops, case.op)
    y: torch.Tensor = function(**given, **more)
    return y


def check(case: Product, device: str = "cpu") -> None:
    """Check as :func:`quantlib.testing.check`: the bytes of the reference, twice, and no others written."""
    given = tensors(case, device)

    def run(out: Any) -> tuple[torch.Tensor, ...]:
        return (call(case, given, None if out is None else out[0]),)

    prove(str(case), given, (expected(case),), ("y",), run)


def products(op: str | None = None, format: str | None = None, large: bool = False) -> tuple[Product, ...]:
    """The table; ``large`` adds the shapes for which a GPU has ways of its own."""
    return tuple(c for c in _table(large) if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table(large: bool) -> tuple[Product, ...]:
    cases = (case for op in OPS for case in _cases(op, (*SHAPES, *LARGE) if large else SHAPES))
    return tuple(
        replace(case, zero_codes=not case.symmetric and n % 3 > 0, scale_dtype=_scale_dtype(case, n))
        for n, case in enumerate(cases)
    )


def _scale_dtype(case: Product, n: int) -> str:
    """Scales of a product of floats are powers of two here, which every dtype holds."""
    return "float32" if case.op in INTEGERS else ("float32", "bfloat16", "float8_e8m0fnu", "float16")[n % 4]


def _cases(op: str, shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Product]:
    """Every weight, dtype and block; what else there is takes turns."""
    epilogues = itertools.cycle(
        [(False, None), *((n % 2 == 0, name) for n, name in enumerate(ACTIVATIONS)), (True, None)]
    )
    sides = itertools.cycle(itertools.product(X_FORMATS, (True, False), (True, False)))
    n = 0
    for (format, symmetric), dtype, block in itertools.product(WEIGHTS, DTYPES, BLOCKS):
        f = formats.get(format)
        if f.is_float and op in INTEGERS:
            continue
        turns = (n, n + 3, n + 5, n + 8) if len(shapes) > len(SHAPES) else (n, n + 3)
        for turn in turns:
            shape, layout = shapes[turn % len(shapes)], "offset" if turn % 5 == 4 else "contiguous"
            if op.endswith("backward"):
                yield Product(op, format, dtype, shape, block, layout, symmetric)
                continue
            bias, activation = next(epilogues)
            case = Product(op, format, dtype, shape, block, layout, symmetric, bias, activation)
            if op.endswith("dequant_matmul"):
                tiled, invariant = op == "dequant_matmul" and f.bits <= 8 and turn % 2 == 1, turn % 7 == 3
                yield replace(case, tiled=tiled, batch_invariant=invariant)
            elif op == "scaled_matmul":
                x_format, x_symmetric, per_row = next(sides)
                yield replace(case, x_format=x_format, x_symmetric=x_symmetric, per_row=per_row)
            else:
                yield case
        n += 1
