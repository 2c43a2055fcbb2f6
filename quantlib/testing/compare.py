"""The expected results of a case, bit for bit, and the run that compares them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from quantlib import formats, ops, reference
from quantlib.formats import FloatFormat
from quantlib.testing.bytes import Array, assert_same_bytes, bits, poisoned, tensor
from quantlib.testing.generate import inputs
from quantlib.testing.table import Case

Tensors = dict[str, torch.Tensor | None]
GUARD = 64  # elements before and after an out, which a kernel must leave alone


@functools.lru_cache(64)
def expected(case: Case) -> tuple[Array, ...]:
    """Return the results of ``case``, bit for bit, by :mod:`quantlib.reference`."""
    given = inputs(case)
    if case.op == "cast":
        return (reference.cast(_widened(given["x"], case.dtype), case.format, saturate=case.saturate),)
    scaled: dict[str, Any] = {"block": case.resolved, "zero_point": given.get("zero_point")}
    if case.op == "dequantize":
        scaled |= {"dtype": case.dtype, "size": case.matrix[1]}
        return (reference.dequantize(given["codes"], given["scale"], case.format, **scaled),)
    x = _widened(given["x"], case.dtype)
    if case.op == "quantize":
        return (reference.quantize(x, given["scale"], case.format, **scaled),)
    function: Any = getattr(reference, case.op)
    result = function(x, case.format, block=case.resolved, symmetric=case.symmetric)
    return result if isinstance(result, tuple) else (result,)


def tensors(case: Case, device: str = "cpu") -> Tensors:
    """:func:`inputs` as tensors that lie in memory as ``case`` wants."""
    given: Tensors = {"scale": None, "zero_point": None}
    for name, array in inputs(case).items():
        holds = {"x": case.dtype, "codes": case.format, "scale": "float32", "zero_point": "int32"}[name]
        if name == "zero_point":
            given[name] = _laid(torch.from_numpy(array.copy()).to(device), case.layout)
        else:
            given[name] = _laid(tensor(bits(array), holds, device), case.layout)
    return given


def call(case: Case, given: Tensors, out: Sequence[torch.Tensor] | None = None) -> tuple[torch.Tensor, ...]:
    """Run ``case`` through the public function, into ``out`` where there is one."""
    into: Any = None if out is None else out[0] if len(out) == 1 else tuple(out)
    function: Any = getattr(ops, case.op)
    if case.op == "cast":
        result = function(given["x"], case.format, saturate=case.saturate, out=into)
    elif case.op in ("compute_scale", "quantize_dynamic"):
        result = function(given["x"], case.format, block=case.block, symmetric=case.symmetric, out=into)
    else:
        source = given["x" if case.op == "quantize" else "codes"]
        more: dict[str, Any] = {"block": case.block, "zero_point": given["zero_point"], "out": into}
        if case.op == "dequantize":
            K = case.matrix[1]
            ragged = K % formats.get(case.format).per_byte > 0
            more |= {"dtype": getattr(torch, case.dtype), "size": K if ragged else None}
        result = function(source, given["scale"], case.format, **more)
    return result if isinstance(result, tuple) else (result,)


def check(case: Case, device: str = "cpu", *, where: str = "") -> None:
    """Run ``case`` as a function, again, and into tensors full of other bytes: always the bytes of :func:`expected`.

    Raises
    ------
    AssertionError
        For a byte that differs, a result of another run that differs, or an argument that was written to.
    """
    given = tensors(case, device)
    want = expected(case)
    names = _result_names(case, len(want))
    prove(f"{where}{case}", given, want, names, functools.partial(call, case, given), case.layout)


def prove(
    where: str,
    given: Mapping[str, torch.Tensor | None],
    want: Sequence[Array | Sum],
    names: Sequence[str],
    run: Callable[[Sequence[torch.Tensor] | None], tuple[torch.Tensor, ...]],
    layout: str = "contiguous",
) -> None:
    """Check that ``run`` gives ``want`` from ``given``, also into tensors full of other bytes in ``layout``.

    Raises
    ------
    AssertionError
        As :func:`check`.
    """
    x = given.get("x")
    before = {name: bits(t).copy() for name, t in given.items() if t is not None}
    got = run(None)
    if len(got) != len(want):
        raise AssertionError(f"{where}: got {len(got)} results, expected {len(want)}")
    for name, result, right in zip(names, got, want, strict=True):
        if isinstance(right, Sum):
            right.check(result, f"{where} {name}")
        else:
            assert_same_bytes(result, right, f"{where} {name}", x)
    guarded = [_guarded(result, layout) for result in got]
    returned = run([out for out, _ in guarded])
    for name, result, first, (out, memory) in zip(names, returned, got, guarded, strict=True):
        if result is not out:
            raise AssertionError(f"{where}: out of {name} was not returned")
        assert_same_bytes(out, first, f"{where} {name} into out", x)
        out.copy_(poisoned(out.shape, out.dtype, str(out.device)))
        assert_same_bytes(memory, poisoned(memory.shape, memory.dtype), f"{where}: memory around {name}")
    for name, value in before.items():
        argument = given[name]
        assert argument is not None
        assert_same_bytes(argument, value, f"{where}: argument {name} afterwards")


@dataclass(frozen=True)
class Sum:
    """Float32 sums that backends take in orders of their own: within ``allowed`` of ``exact``, where that is finite."""

    exact: Array  # float64
    allowed: Array

    def check(self, got: torch.Tensor, where: str) -> None:
        finite = np.abs(self.exact) + self.allowed < np.finfo(np.float32).max
        error = np.abs(got.detach().double().cpu().numpy()[finite] - self.exact[finite])
        if (error > self.allowed[finite]).any():
            raise AssertionError(f"{where}: off by {error.max()}, at most {self.allowed[finite].max()} is allowed")


def _widened(x: Array, dtype: str) -> Array:
    f = formats.get(dtype)
    assert isinstance(f, FloatFormat)
    return x.view(np.float32) if f.bits == 32 else reference.decode_float(x, f)


def _guarded(like: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor to write to, of the shape of ``like``, and the memory it is a part of, all of it poisoned."""
    memory = poisoned((2 * like.numel() + 2 * GUARD,), like.dtype, str(like.device))
    step = 2 if layout == "strided" else 1
    stride = [step * size for size in torch.empty(like.shape, device="meta").stride()]
    if layout == "transposed" and like.dim() > 1:
        stride = list(torch.empty(like.mT.shape, device="meta").mT.stride())
    return memory.as_strided(like.shape, stride, GUARD + (layout == "offset")), memory


def _laid(t: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of ``t``, lying in memory as ``layout`` says."""
    if layout == "contiguous" or t.dim() == 0:
        return t
    if layout == "offset":  # contiguous, but at no address that a vector load likes
        memory = t.new_empty(t.numel() + 1)
        return memory[1:].view(t.shape).copy_(t)
    if layout == "strided":
        memory = t.new_empty((*t.shape[:-1], 2 * t.shape[-1]))
        return memory[..., ::2].copy_(t)
    if layout == "transposed":
        return t.mT.contiguous().mT if t.dim() > 1 else t
    return t[:1].expand(t.shape) if t.dim() > 1 and bool((bits(t) == bits(t[:1])).all()) else t


def _result_names(case: Case, count: int) -> tuple[str, ...]:
    if case.op == "compute_scale":
        return ("scale", "zero_point")[:count]
    return ("codes", "scale", "zero_point")[:count] if case.op == "quantize_dynamic" else ("result",)
