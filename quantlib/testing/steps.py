"""The table of steps of an optimizer: states in 8 bits and in 32, rounded at random and to nearest, in place too."""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference
from quantlib.formats import FloatFormat
from quantlib.ops.adamw_step import BLOCKS, NAMES
from quantlib.reference.numerics import encode_float
from quantlib.testing.bytes import Array, assert_same_bytes, bits, tensor
from quantlib.testing.compare import prove
from quantlib.testing.table import DTYPES

OPS = ("adamw_step",)
SHAPES = ((1, 1), (5, 1), (3, 100), (1, 33), (2, 1030), (4, 256), (2, 2049), (70, 36))
STATES = ("m", "v", "m_scale", "v_scale")
SPECIAL = (np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 3e38, 1e-25)


@dataclass(frozen=True)
class Step:
    """One call of adamw_step."""

    dtype: str  # of the parameter
    shape: tuple[int, int]
    block: int
    random: bool = False  # a key
    l2: bool = False
    special: bool = False  # values that are not finite, in every argument
    layout: str = "contiguous"  # or offset
    op: str = "adamw_step"

    @property
    def format(self) -> str:
        """The format of the states."""
        return "int8" if self.block else "float32"

    @property
    def origin(self) -> tuple[int, int] | None:
        return (7, 2**32 - 10) if self.l2 else None

    def __str__(self) -> str:
        flags = [name for name in ("random", "l2", "special") if getattr(self, name)]
        return "-".join(
            [self.op, self.dtype, "x".join(map(str, self.shape)), f"block{self.block}", self.layout, *flags]
        )


@functools.lru_cache(64)
def inputs(case: Step) -> dict[str, Any]:
    """Magnitudes of many sizes, codes of every value, and roots that lie on the border of two codes."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    (M, K), f = case.shape, formats.get(case.dtype)
    J = -(-K // case.block) if case.block else 0
    x = rng.standard_normal((M, K)).astype(np.float32)
    g = (rng.standard_normal((M, K)) * np.exp2(rng.uniform(-30, 10, (M, 1)))).astype(np.float32)
    scales = [np.exp2(rng.uniform(-40, 4, (M, J))).astype(np.float32) for _ in range(2)]
    if case.block:
        m, v = rng.integers(-127, 128, (M, K), np.int8), rng.integers(0, 256, (M, K), np.uint8)
        m[0, 0] = -128  # which no step writes
    else:
        m, v = rng.standard_normal((M, K)).astype(np.float32), rng.random((M, K), np.float32)
    t = int(rng.integers(1, 5))
    constants = [1 - 1e-5, 0.01 * case.l2, 0.9, 0.1, 0.999, 0.001, 1e-3 / (1 - 0.9**t), (1 - 0.999**t) ** -0.5, 1e-8]
    if rng.random() < 0.5:  # the states are the gradient: m on the border between two codes, v where it is rounded
        constants[2:6] = 0.0, 1.0, 0.0, 1.0
        g = (rng.integers(0, 255, (M, K)) + 0.5).astype(np.float32) ** 2 * rng.choice([-1, 1], (M, K))
        g = np.where(rng.random((M, K)) < 0.3, np.nextafter(g, np.float32(0)), g).astype(np.float32)
        g[:, :: case.block or K] = 127**2 if rng.random() < 0.5 else 255**2
    if case.special:
        for a in (x, g, *scales):
            a[rng.random(a.shape) < 0.02] = rng.choice(SPECIAL)
        if not case.block:
            m[rng.random(m.shape) < 0.02] = rng.choice(SPECIAL)
        constants[int(rng.integers(9))] = float(rng.choice(SPECIAL))
    given: dict[str, Any] = {"parameter": _encoded(x, f), "gradient": _encoded(g, f), "m": m, "v": v}
    given |= {"m_scale": scales[0], "v_scale": scales[1], "constants": np.array(constants, np.float32)}
    given["key"] = rng.integers(-(2**31), 2**31, 2, np.int32) if case.random else None
    return given


def _encoded(x: Array, f: Any) -> Array:
    assert isinstance(f, FloatFormat)
    with np.errstate(all="ignore"):
        return bits(x) if f.bits == 32 else encode_float(x, f)


def expected(case: Step) -> tuple[Array, ...]:
    """The parameter and its four states."""
    given, f = dict(inputs(case)), formats.get(case.dtype)
    assert isinstance(f, FloatFormat)
    for name in ("parameter", "gradient"):
        code = given[name]
        given[name] = code.view(np.float32) if f.bits == 32 else reference.decode_float(code, f)
    return tuple(reference.adamw_step(**given, block=case.block, dtype=case.dtype, origin=case.origin or (0, 0)))


def tensors(case: Step, device: str = "cpu") -> dict[str, torch.Tensor | None]:
    """:func:`inputs` as tensors."""
    given: dict[str, torch.Tensor | None] = {}
    for name, array in inputs(case).items():
        t: torch.Tensor | None
        if name in ("parameter", "gradient"):
            t = tensor(array, case.dtype, device)
        else:
            t = None if array is None else torch.from_numpy(array.copy()).to(device)
        if t is not None and case.layout == "offset" and name not in ("key", "constants"):
            t = t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)
        given[name] = t
    return given


def call(case: Step, given: dict[str, Any], out: Any = None) -> tuple[torch.Tensor, ...]:
    """Run ``case``, into ``out`` where there is one."""
    into = None if out is None else tuple(out)
    return ops.adamw_step(**given, block=case.block, origin=case.origin, out=into)


def check(case: Step, device: str = "cpu") -> None:
    """Check the bytes of ``case``, as :func:`quantlib.testing.check` does, and in place."""
    given, want = tensors(case, device), expected(case)
    prove(str(case), given, want, NAMES, functools.partial(call, case, given))
    own = tuple(given[name] for name in ("parameter", *STATES))
    call(case, given, own)
    for name, got, right in zip(("parameter", *STATES), own, want, strict=True):
        assert got is not None
        assert_same_bytes(got, right, f"{case}: {name} in place")


def steps(op: str | None = None, format: str | None = None) -> tuple[Step, ...]:
    """The table, or the part of it for one op, one format of the states."""
    return tuple(c for c in _table() if op in (None, c.op) and format in (None, c.format))


@functools.cache
def _table() -> tuple[Step, ...]:
    cases = []
    for n, (dtype, shape, block) in enumerate(itertools.product(DTYPES, SHAPES, BLOCKS)):
        layout = "offset" if n % 4 == 3 else "contiguous"
        for random in (False, True) if dtype == "bfloat16" else (False,):
            cases.append(Step(dtype, shape, block, random, n % 3 == 0, n % 5 == 0, layout))
    return tuple(cases)
