"""A call like an earlier one is neither checked nor bound again: its kernel's arguments are put together at once.

Two calls are alike if they differ in nothing but the memory of their tensors: shapes, dtypes, devices, contiguity and
every other argument are equal. What checks look at besides is the values of some tensors of the CPU: calls for which
they have done so are checked every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantlib.backends.backend import Kernel
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.formats import Stored

MOST = 4096  # calls that differ are remembered of a kernel; then all are forgotten
CONSTANTS = (int, float, str, torch.dtype, Stored)  # what kernels are given besides tensors, and tuples of these
RECORDS = {record.__name__: record for record in (QuantizedWeight, Epilogue)}


class Prepared(NamedTuple):
    """The facts that calls have in common that are alike."""

    results: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # shape, strides, dtype
    kernel: Kernel
    arguments: Callable[..., tuple[Any, ...]]  # the results, then the arguments of the op -> those of the kernel


def likeness_function(schema: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
    """Make the function of the arguments of ``schema`` that is equal for calls that are alike."""
    words = [_words(a.name, str(a.type)) for a in schema]
    made: Callable[..., tuple[Any, ...]] = eval(f"lambda {_parameters(schema)}: ({', '.join(words)},)")
    return made


def _words(name: str, kind: str) -> str:
    of_optional = kind.startswith("Optional[")
    kind = kind.removeprefix("Optional[").removesuffix("]") if of_optional else kind
    if kind == "Tensor":
        words = ", ".join(f"{name}.{of}" for of in ("shape", "dtype", "device", "layout", "is_contiguous()"))
    elif kind.startswith("List["):
        words = f"tuple({name})"
    elif kind == "float":
        words = f"repr({name})"  # 0.0 equals -0.0
    else:
        return name
    return f"None if {name} is None else ({words})" if of_optional else words


def _parameters(schema: Sequence[Any]) -> str:
    return ", ".join(a.name + (f"={a.default_value!r}" if a.has_default_value() else "") for a in schema)


def prepare(
    schema: Sequence[Any], args: Sequence[Any], outs: Sequence[Tensor], kernel: Any, given: Sequence[Any]
) -> Prepared | None:
    """Return what calls like this one have in common.

    Parameters
    ----------
    schema : sequence of the arguments of the op
    args, outs : sequences
        The arguments and the results of a call.
    kernel : kernel
        With `backend.py`'s ``prepare``.
    given : sequence
        What it was given.

    Returns
    -------
    Prepared or None
        None where the kernel reads tensors that the call has made, or it cannot be told which argument is which.
    """
    names = [f"out{n}" for n in range(len(outs))]
    tensors = dict(zip(names, outs, strict=True))
    tensors |= {a.name: t for a, t in zip(schema, args, strict=False) if isinstance(t, Tensor)}
    if len({t.data_ptr() for t in tensors.values()}) < len(tensors):  # nothing, too, has an address: 0
        return None
    constants: list[Any] = []
    own = kernel.prepare(*given)
    words = [_source(value, tensors, constants, own is None) for value in given]
    if None in words:
        return None
    text = f"lambda {', '.join([*names, _parameters(schema)])}: ({', '.join(map(str, words))},)"
    results = tuple((tuple(out.shape), out.stride(), out.dtype) for out in outs)
    return Prepared(results, kernel if own is None else own, _maker(text, len(constants))(*constants))


def _source(value: Any, tensors: dict[str, Tensor], constants: list[Any], shaped: bool) -> str | None:
    """The expression that gives ``value`` of ``tensors``, those of a call by name, and ``constants``; None for none.

    Where it is not to be ``shaped``, it may be a tensor of another shape.
    """
    if isinstance(value, Tensor):
        for name, t in tensors.items():
            if t is value:
                return name
            same = t.data_ptr() == value.data_ptr() and t.dtype == value.dtype and t.numel() == value.numel()
            if same and t.is_contiguous() and value.is_contiguous():
                if not shaped:
                    return name
                constants.append(tuple(value.shape))
                return f"{name}.view(c{len(constants) - 1})"
        return None
    if type(value).__name__ in RECORDS and isinstance(value, tuple):
        fields = [_source(field, tensors, constants, shaped) for field in value]
        if isinstance(value, Epilogue) and fields[0] is None and "bias" in tensors:  # converted, as `for_kernel` does
            fields[0] = "bias.to(float32).contiguous()"
        return None if None in fields else f"new({type(value).__name__}, ({', '.join(map(str, fields))},))"
    if value is None:
        return "None"
    if not all(isinstance(v, CONSTANTS) for v in (value if isinstance(value, (tuple, list)) else (value,))):
        return None
    constants.append(value)
    return f"c{len(constants) - 1}"


@functools.lru_cache(MOST)
def _maker(text: str, constants: int) -> Callable[..., Callable[..., tuple[Any, ...]]]:
    """The function of constants c0, c1 and so on that gives the one that ``text`` spells."""
    known = RECORDS | {"new": tuple.__new__, "float32": torch.float32}  # the records' own __new__ is Python
    made: Callable[..., Any] = eval(f"lambda {', '.join(f'c{n}' for n in range(constants))}: {text}", known)
    return made
