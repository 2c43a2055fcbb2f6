"""Calls of ops past autograd: where no derivative may be asked, and into ready memory, of which it has to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from quantlib.ops.check import fail, may_be_followed


def recorded(*args: Any) -> bool:
    """True if a derivative may be asked of what becomes of ``args``; always while `torch.jit` traces."""
    if may_be_followed() or torch._C._is_tracing():
        return True
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def eager(op: Callable[..., Any]) -> Callable[..., Any]:
    """The function that calls the overload ``op``, and leaves out its autograd kernel where that has nothing to do."""

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or recorded(*args) or torch._C._has_torch_function(args):
            return op(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def into(op: str, overload: Callable[..., Any]) -> Callable[..., None]:
    """The function that calls ``overload``, the out form of ``op``, with torch's rules for memory that it is given.

    A result that requires a gradient is refused, and backward of who has kept one from before raises. A compiler sees
    by itself what is written.
    """

    def call(*args: Any, **outs: Tensor) -> None:
        if torch.compiler.is_compiling():
            overload(*args, **outs)
            return
        for name, out in outs.items():
            if isinstance(out, Tensor) and out.requires_grad and torch.is_grad_enabled():
                fail(op, name, "a tensor that requires no gradient, or a call under torch.no_grad()", "one that does")
        overload(*args, **outs)
        increment_version([out for out in outs.values() if not out.is_inference()])

    return call
