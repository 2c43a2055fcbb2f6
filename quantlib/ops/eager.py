"""op(*args) of tensors of which no derivative may be asked: without the op's autograd kernel, which is Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantlib.ops.check import may_be_followed


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
