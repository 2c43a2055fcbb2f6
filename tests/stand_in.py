"""A device that is not there: its tensors lie on the CPU and refuse to meet the CPU's, as those of a GPU would.

What forgets a ``device=``, draws with the CPU's generator or asks a tensor of a GPU for its array fails on it. Ops of
this library run in pure torch, whose every step is watched likewise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "lazy"  # a device type that torch knows, and that nothing in this build serves
BETWEEN = ("aten::copy_", "aten::_to_copy")  # what takes tensors from one device to another


class Away(Tensor):
    """A tensor of the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Away:
        made: Away = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=NAME,
        )
        made.inner = inner
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.inner!r})"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """A tensor made with ``device="lazy"`` lies on it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def present() -> Iterator[None]:
    """Inside, the device is there, and autocast takes its name for the CPU's."""
    with contextlib.ExitStack() as stack:
        for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, _either(getattr(torch, name))))
        import quantlib.api

        kind = {"type": lambda t: torch.nn.Parameter if isinstance(t, Away) else type(t)}
        stack.enter_context(mock.patch.dict(vars(quantlib.api), kind))  # which takes none but plain parameters
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # what a wrapper holds cannot be exchanged
        stack.enter_context(StandIn())
        yield


def _either(function: Any) -> Any:
    return lambda *args, **kwargs: function(*("cpu" if a == NAME else a for a in args), **kwargs)


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One op, where its arguments lie."""
    name, given = func._schema.name, [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    away = [a for a in given if isinstance(a, Away)]
    here = [a for a in given if not isinstance(a, Away) and a.dim() > 0]
    if away and here and name not in BETWEEN:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found two")
    asked = kwargs.get("device")
    generator = kwargs.get("generator")
    if generator is not None and (away or (asked is not None and torch.device(asked).type == NAME)):
        raise RuntimeError(f"{name}: expected a generator of {NAME}, found one of {generator.device}")
    if away and name.startswith("quantlib::"):
        with StandIn():
            return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
    own = {id(a.inner): a for a in away}
    inner_args, inner_kwargs = tree_map(lambda a: a.inner if isinstance(a, Away) else a, (args, kwargs))
    if asked is not None and torch.device(asked).type == NAME:
        inner_kwargs["device"] = torch.device("cpu")
    out = func(*inner_args, **inner_kwargs)
    if name == "aten::copy_":
        return args[0]
    there = torch.device(asked).type == NAME if asked is not None else bool(away)
    return tree_map(lambda t: own.get(id(t), Away(t)) if there and isinstance(t, Tensor) else t, out)
