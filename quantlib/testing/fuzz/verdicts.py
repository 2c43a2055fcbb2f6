"""The outcome of a call: nothing, or one of the classes of fault that a caller must never see."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantlib import backends
from quantlib.testing.bytes import Array, assert_same_bytes, bits
from quantlib.testing.compare import Sum
from quantlib.testing.fuzz import draw, faults
from quantlib.testing.fuzz.draw import Call
from quantlib.testing.fuzz.faults import After

CLASSES = ("crash", "hang", "unclear message", "wrong bytes", "written input", "lost gradient", "refused", "accepted")
CLEAR = (RuntimeError, TypeError, ValueError, NotImplementedError)
# Words of torch that say nothing about the call.
UNCLEAR = (
    *("INTERNAL ASSERT", "Internal error", "file an issue", "report a bug", "a call of torch failed"),
    *("unsupported memory format", "Batching rule not implemented", "setup_context", "out of bounds", "Could not run"),
    *("data is not allocated yet", "storage", "data pointer", "not implemented for", "Please", "numpy.ndarray"),
)
LONGEST = 700  # characters of a message that a reader still takes in; a value that is quoted whole may be longer


@dataclass(frozen=True)
class Finding:
    """One call that is at fault, by the numbers that make it again."""

    kind: str
    seed: int
    kept: tuple[int, ...] | None
    backend: str
    op: str | None
    call: str
    said: str

    @property
    def key(self) -> tuple[str, str]:
        """The same for the same fault, as far as its words tell."""
        return self.kind, re.sub(r"[\d.]+|0x\w+|<.*?>|\[.*?\]|'.*?'", "_", self.said.splitlines()[0])[:120]

    def __str__(self) -> str:
        said = self.said if len(self.said) < 2000 else f"{self.said[:2000]}..."
        op = "" if self.op is None else f", op={self.op!r}"
        kept = "" if self.kept is None else f", kept={self.kept!r}"
        return (
            f"{self.kind}, {self.backend}: {self.call}\n    {said.strip().replace(chr(10), chr(10) + '    ')}\n"
            f"  again:\n    import quantlib\n    from quantlib.testing import fuzz\n"
            f"    call, after = fuzz.draw({self.seed}{op}{kept})\n"
            f"    with quantlib.use_backend({self.backend!r}):\n        call()"
        )


def make(seed: int, op: str | None = None, kept: Sequence[int] | None = None) -> tuple[Call, After, bool]:
    """The call of ``seed``: a valid one with 0 to 3 things done to it, or with those of them that are ``kept``.

    A change does not depend on the other changes, so that a finding can be made smaller by leaving some out.
    """
    call = draw.valid(np.random.default_rng([seed, 0]), op)
    worst, typed = After.SERVED, False
    order = list(After)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about the kinds of tensors there are
        for number in range(count_of(seed)) if kept is None else kept:
            after, by_type = faults.inflict(call, np.random.default_rng([seed, 1 + number]))
            worst, typed = max(worst, after, key=order.index), typed or by_type
    if worst is After.ERROR and len(call.faults) > 1:  # a later change may have undone it
        worst = After.ANY
    return call, worst, typed


def count_of(seed: int) -> int:
    """The number of changes to the call of ``seed``."""
    return (0, 1, 1, 2)[seed % 4] if seed % 20 else 3


def judge(
    seed: int,
    backend: str,
    op: str | None = None,
    kept: Sequence[int] | None = None,
    announce: Callable[[str], object] = lambda call: None,
) -> Finding | None:
    """Make the call of ``seed``, ``announce`` it, and run it on ``backend``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call, after, typed = make(seed, op, kept)
        text = str(call)
        announce(text)
        found = verdict(call, after, typed, backend)
    if found is None:
        return None
    return Finding(found[0], seed, None if kept is None else tuple(kept), backend, op, text, found[1])


def smallest(finding: Finding) -> Finding:
    """The same kind of finding with fewer things done to the call."""
    kept = list(range(count_of(finding.seed)) if finding.kept is None else finding.kept)
    for number in list(kept):
        fewer = [k for k in kept if k != number]
        again = judge(finding.seed, finding.backend, finding.op, fewer)
        if again is not None and again.kind == finding.kind:
            kept, finding = fewer, again
    return finding


def verdict(call: Call, after: After, typed: bool, backend: str) -> tuple[str, str] | None:
    """(class, what was seen) of a call that is at fault."""
    before = {name: bits(t).copy() for name, t in _readable(call).items()}
    try:
        with backends.use_backend(backend):
            results = call()
    except AssertionError as error:  # of a fault itself
        if "is lost" in str(error):
            return "lost gradient", str(error)
        return "unclear message", described(error)
    except Exception as error:
        if call.raw and typed:  # before an op is called, its schema refuses what it does not have
            return None
        if not clear(error, call):
            return "unclear message", described(error)
        missing = isinstance(error, NotImplementedError) and f"backend '{backend}' refuses" in str(error)
        return ("refused", described(error)) if after is After.SERVED and not missing else None
    if after is After.ERROR:
        return "accepted", "no error"
    for name, value in before.items():
        if not np.array_equal(bits(call.arguments[name]), value):
            return "written input", f"{name} is not what it was"
    leaves = [v for n, v in call.arguments.items() if isinstance(v, Tensor) and v.requires_grad and n not in call.outs]
    if leaves and not call.outs and not call.contexts and all(_constant(r) for r in results):
        return "lost gradient", "an argument requires a gradient, and no result does"
    return None if after is After.ANY else _wrong(results, call.want)


def _constant(result: Any) -> bool:
    return isinstance(result, Tensor) and not result.requires_grad


def _wrong(results: tuple[Any, ...], want: tuple[Array | Sum, ...]) -> tuple[str, str] | None:
    try:
        if len(results) != len(want):
            raise AssertionError(f"got {len(results)} results, expected {len(want)}")
        for result, right in zip(results, want, strict=True):
            plain = _plain(result)
            if isinstance(right, Sum):
                right.check(plain, "sum")
            else:
                assert_same_bytes(plain, right)
    except (AssertionError, RuntimeError, TypeError) as error:  # or a result that has no bytes to compare
        return "wrong bytes", str(error)
    return None


def _plain(t: Tensor) -> Tensor:
    t = t.detach()
    return t.to_dense() if t.layout is not torch.strided else t


def _readable(call: Call) -> dict[str, Tensor]:
    """The arguments whose bytes can be looked at, and that no result is written over."""
    places = {out.untyped_storage().data_ptr() for _, _, out in faults.outs_of(call) if _ordinary(out)}
    given = {n: v for n, v in call.arguments.items() if isinstance(v, Tensor) and n not in call.outs and _ordinary(v)}
    return {n: v for n, v in given.items() if v.untyped_storage().data_ptr() not in places}


def _ordinary(t: Tensor) -> bool:
    return (
        type(t) in (Tensor, torch.nn.Parameter, faults.Plain)
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and not t.is_quantized
        and not t.is_nested
        and t.dim() < 16
        and all(size < 1 << 16 for size in t.shape)
    )


def clear(error: Exception, call: Call) -> bool:
    """One line or a few of our own, or of Python's, that name an argument or the op."""
    if not isinstance(error, CLEAR):
        return False
    text = re.sub("Value: .*", "", str(error))  # a schema's error quotes a list in full
    if any(word in text for word in UNCLEAR) or (len(text) > LONGEST and "x" * 1000 not in text):
        return False
    names = [*call.arguments, call.op, "out"]
    return any(re.search(rf"\b{re.escape(name)}\b", text) for name in names)


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
