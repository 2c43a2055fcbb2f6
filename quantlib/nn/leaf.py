"""Modules that torch.fx treats as leaves: a call of one is one node of the graph."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.fx import Proxy


class Leaf(nn.Module):
    """A module that every ``torch.fx.Tracer`` records as a ``call_module`` node instead of tracing through it.

    Its result depends on the dtype and the shape of its input, which a tracer does not know. By default a tracer
    does the same with the modules of ``torch.nn``, which it tells by their package.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for a in (*args, *kwargs.values()):
            if isinstance(a, Proxy):
                return self._traced(a.tracer, args, kwargs)
        return super().__call__(*args, **kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this of every module of a model."""
        raise TypeError(
            f"model must be scripted without quantized layers, got a {type(self).__name__}: "
            "use torch.export.export, or torch.jit.trace once it is converted"
        )

    def _traced(self, tracer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The node. A tracer that takes this module for a leaf itself never calls ``leaf``; others may with values."""

        def leaf(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(a, Proxy) for a in (*args, *kwargs.values())):
                return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
            return self._wrapped_call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        return tracer.call_module(self, leaf, args, kwargs)


def check_inside(input: Any) -> None:
    """Check that ``input`` of a forward is not a proxy, as it is if a tracer was given the layer itself."""
    if isinstance(input, Proxy):
        raise TypeError(
            "layer must be inside of the model that is traced, got the layer alone: trace nn.Sequential(layer)"
        )


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_input(x: Tensor, size: int, axis: int = -1) -> None:
    """Check that ``x`` holds floats, and ``size`` of them along ``axis``: the layer knows it, its codes do not.

    Codes of 4 bits take as many bytes for K = 63 as for 64, and a convolution would leave out surplus channels. Not
    while `torch.jit` traces, to which sizes are tensors.

    Raises
    ------
    RuntimeError
        As ``torch.nn`` does.
    """
    if not torch.compiler.is_compiling() and torch._C._is_tracing():
        return
    if x.dim() < -axis or x.size(axis) != size or x.dtype not in FLOATS:
        expected = ", ".join(["...", str(size), *"_" * (-1 - axis)])
        got = f"{str(x.dtype).removeprefix('torch.')} {[x.size(n) for n in range(x.dim())]}"
        raise RuntimeError(f"input must be float32, bfloat16, float16 or float64 [{expected}], got {got}")
