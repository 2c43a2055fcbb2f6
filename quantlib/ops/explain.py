"""Reword errors of torch so that they name the op and the argument, after a call has failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from quantlib.ops.check import check_dense, described, fail, one_of

# Errors of torch and Python that may say nothing about the call. Others, such as no memory on a GPU, are as clear as
# they can be, or are meant for somebody else.
VAGUE = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError, NotImplementedError)
OWN = re.compile(r"quantlib::\w+: |\w+ must ")  # the beginning of our messages


def _sizes(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(map(_integer, value))


def _integer(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, (bool, Tensor))


def _number(value: Any) -> bool:
    return isinstance(value, (float, torch.SymFloat)) or _integer(value)


def _tensors(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and all(isinstance(v, Tensor) for v in value)


# Annotation in a public function -> its name in a message, and a check that a value is one.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "Tensor": ("a tensor", lambda value: isinstance(value, Tensor)),
    "None": ("None", lambda value: value is None),
    "str": ("a string", lambda value: isinstance(value, str)),
    "torch.dtype": ("a torch.dtype", lambda value: isinstance(value, torch.dtype)),
    "Block": ("two sizes >= 1", _sizes),
    "tuple[int, int]": ("two sizes", lambda value: _sizes(value) and len(value) == 2),
    "tuple[Tensor, Tensor]": ("a tuple of tensors", _tensors),
    "tuple[Tensor, ...]": ("a tuple of tensors", _tensors),
    "int": ("an integer", _integer),
    "float": ("a number", _number),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
}


def explain(op: str, function: Callable[..., Any], given: Mapping[str, Any], error: Exception) -> NoReturn:
    """Raise what is wrong about a call of the public ``function`` that ended in ``error``.

    Parameters
    ----------
    given : mapping
        From the names of the arguments to their values, and of anything else: ``locals()``.
    """
    if _vague(error):
        arguments = {name: given[name] for name in function.__annotations__ if name in given}
        for name, value in arguments.items():
            _check_kind(op, name, value, function.__annotations__[name].split(" | "))
        raise worded(op, arguments, error) from error
    raise error


def worded(op: str, arguments: Mapping[str, Any], error: Exception) -> Exception:
    """Return ``error`` with the op and its tensors in front, unless it names them itself."""
    if not _vague(error):
        return error
    tensors = [f"{n} {described(t.shape, t.dtype, t.device)}" for n, t in arguments.items() if isinstance(t, Tensor)]
    kind = type(error) if type(error) in (TypeError, ValueError, NotImplementedError) else RuntimeError
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "handlers returned NotImplemented" in said:  # `make_fx` knows no parameters but torch's
        found = (n for n, t in arguments.items() if isinstance(t, Tensor) and type(t) not in (Tensor, nn.Parameter))
        said = (
            f"{', '.join(found) or 'arguments'} must be plain tensors for what traces this call: use torch.export, or "
            "trace torch.func.functional_call(model, dict(model.state_dict()), x)"
        )
    return kind(f"quantlib::{op}: {said}, given {', '.join(tensors) or 'no tensor'}")


def unpacked(op: str, out: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Return ``out``, a tuple of as many results as there are ``names``."""
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        got = f"{len(out)} of them" if isinstance(out, (tuple, list)) else type(out).__name__
        fail(op, "out", f"a tuple of {', '.join(names)}", got)
    return dict(zip(names, out, strict=True))


def _vague(error: Exception) -> bool:
    return type(error) in VAGUE and OWN.match(str(error)) is None


def _check_kind(op: str, argument: str, value: Any, kinds: Sequence[str]) -> None:
    if not any(KINDS[kind][1](value) for kind in kinds):
        fail(op, argument, one_of([KINDS[kind][0] for kind in kinds]), type(value).__name__)
    for part in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(part, Tensor):
            check_dense(op, argument, part)
