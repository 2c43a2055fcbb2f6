"""dx and dy of an op: reverse and forward mode, under ``torch.func`` too, declared once for each overload.

A kernel under the dispatcher's ``Autograd`` key records one node per level of ``torch.func``, as torch's own ops do;
`torch.library.register_autograd` knows reverse mode at one level only.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from quantlib import backends
from quantlib.ops.declare import Binder
from quantlib.ops.eager import recorded

Gradients = dict[str, Tensor | None]  # by the name of the argument; an argument that is not there has none


def differentiable(overload: str, backward: Callable[..., Gradients], jvp: Callable[..., Tensor]) -> None:
    """Register the derivative of ``overload``, which has one result.

    Parameters
    ----------
    backward : (dy, needs, **arguments) -> gradients
        ``needs`` holds the names of the arguments that require a gradient. The arguments are as `Binder` binds them.
    jvp : (tangents, **arguments) -> the tangent of the result
        ``tangents`` are those that there are, by the names of their arguments.
    """
    bound = Binder(overload)
    op = getattr(getattr(torch.ops.quantlib, overload.partition(".")[0]), overload.partition(".")[2] or "default")
    defaults = tuple(a.default_value for a in bound.schema)
    tensors = [a.name for a in bound.schema if "Tensor" in str(a.type)]  # which autograd itself keeps
    others = [name for name in bound.names if name not in tensors]
    tensors_of, others_of = (picked(list(map(bound.names.index, names))) for names in (tensors, others))
    known = set(bound.names)
    after = torch._C._after_autograd_keyset

    def forward(*args: Any) -> Any:
        *args, keyset = args  # type: ignore[assignment]
        # the levels of torch.func below this one record too, and a Function switches both modes off
        with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return op.redispatch(keyset & after, *args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        kept = tensors_of(inputs)
        ctx.save_for_backward(*kept)
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*kept)
        ctx.others = others_of(inputs)

    def arguments(ctx: Any) -> dict[str, Any]:
        return bound.bound(dict(zip((*tensors, *others), (*ctx.saved_tensors, *ctx.others), strict=True)))

    def vjp(ctx: Any, *dys: Tensor | None) -> Any:
        if dys[0] is None and all(dy is None for dy in dys):
            return (None,) * (len(defaults) + 1)
        needs = set(itertools.compress(bound.names, ctx.needs_input_grad))
        gradients = backward(*dys, needs, **arguments(ctx))
        assert gradients.keys() <= known, f"{overload} has no argument for a gradient in {list(gradients)}"
        return (*map(gradients.get, bound.names), None)

    def tangent(ctx: Any, *tangents: Tensor | None) -> Tensor:
        there = {name: t for name, t in zip(bound.names, tangents, strict=False) if t is not None}
        return jvp(there, **arguments(ctx))

    methods = {"forward": forward, "setup_context": setup_context, "backward": vjp, "jvp": tangent}
    # the name that torch.library gives its own, which profiles show
    name = f"GeneratedBackwardFor_quantlib_{overload.replace('.', '_')}"
    function = type(name, (_SingleLevelFunction,), {k: staticmethod(v) for k, v in methods.items()})
    apply = function.apply  # type: ignore[attr-defined]

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            with enable_single_level_autograd_function():
                return apply(*args, *defaults[len(args) :], keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & after, *args)

    backends.implement(overload, kernel, "Autograd", with_keyset=True)


def picked(places: list[int]) -> Callable[[Any], tuple[Any, ...]]:
    """The function that takes what lies at ``places`` of a sequence."""
    get = operator.itemgetter(*places)
    return get if len(places) > 1 else lambda args: (get(args),)


class StraightThrough(torch.autograd.Function):
    """A projection of x whose derivative is that of the identity; ``forward(x, ...)`` is for a subclass to give."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.dtype, ctx.y_dtype, ctx.others = inputs[0].dtype, output.dtype, len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (dy.to(ctx.dtype), *(None,) * ctx.others)

    @staticmethod
    def tangent(ctx: Any, x_t: Tensor, *_: None) -> Tensor:
        return x_t.to(ctx.y_dtype)


def apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """``function.apply(*args)``, with its ``tangent`` as jvp: a function that has a jvp is one that Dynamo refuses.

    Where nothing is derived it is ``function.forward(*args)``: `torch.autograd.Function` binds the arguments to their
    names at every call, which takes longer than a small convolution.
    """
    if torch.compiler.is_compiling():
        y: Tensor = function.apply(*args)
    elif recorded(*args):
        y = _with_jvp(function).apply(*args)
    else:
        y = function.forward(*args)
    return y


@functools.cache
def _with_jvp(function: Any) -> type[torch.autograd.Function]:
    return type(function.__name__, (function,), {"jvp": staticmethod(function.tangent)})
