"""The kernel that a product takes: ``quantlib info --matmul`` prints it, and ``QUANTLIB_LOG=1`` at the call.

``QUANTLIB_LOG=1`` covers the products by kernels that ask which backend serves them, as `use_backend` does, and the
logger ``quantlib.kernels`` says so on stderr, once for each weight's shape and each answer. Without it there is nothing
to ask, and a call costs nothing more.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends import compiled

PRODUCTS = ("dequant_matmul", "scaled_matmul", "dynamic_matmul", "grouped_dequant_matmul", "grouped_dynamic_matmul")
log = logging.getLogger("quantlib.kernels")
_said: set[str] = set()


def is_logged() -> bool:
    """True if ``QUANTLIB_LOG`` asks products to say which kernel they take.

    Raises
    ------
    ValueError
        For a value that is neither 0 nor 1.
    """
    value = os.environ.get("QUANTLIB_LOG") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"QUANTLIB_LOG must be 0 or 1, got {value!r}")
    return value == "1"


def start() -> None:
    """Send what `say` logs to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("quantlib: %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def instruction_set() -> str:
    """Return the instruction set that the C++ library chose on this machine."""
    path = compiled.path_of("cpu")
    if path is None:
        return "-"
    ask = ctypes.CDLL(str(path)).quantlib_isa
    ask.restype = ctypes.c_char_p
    name: bytes = ask()
    return name.decode() or f"QUANTLIB_ISA={os.environ.get('QUANTLIB_ISA')} is none of this machine's"


def kernel_of(shape: tuple[int, int, int], block: tuple[int, int], format: str, affine: bool, x: str) -> dict[str, str]:
    """Ask the C++ kernels of the CPU: ``choose`` of csrc/cpu/dequant_matmul.cpp or csrc/cpu/scaled_matmul.cpp.

    Parameters
    ----------
    shape : (M, N, K)
        The sizes of x [M, K] and of the weight [N, K].
    block : (br, bk)
        Rows and columns of the weight that share a scale.
    format : str
        The format of the weight.
    affine : bool
        True if it has zero points.
    x : str
        The dtype of x; int8 for products of codes.

    Returns
    -------
    dict
        The kernel, and why it is this one.
    """
    path = compiled.path_of("cpu")
    assert path is not None
    kernel, why = ctypes.c_char_p(), ctypes.c_char_p()
    types = list(formats.FORMATS)  # as `enum class Type` of csrc/formats.h numbers them
    ask = ctypes.CDLL(str(path)).quantlib_matmul_choice
    ask.restype = None
    sizes = [ctypes.c_int64(size) for size in (*shape, *block)]
    ask(*sizes, types.index(format), affine, types.index(x), ctypes.byref(kernel), ctypes.byref(why))
    return {"kernel": (kernel.value or b"").decode(), "why": (why.value or b"").decode()}


def say(overload: str, backend: str, why: Callable[[], str], args: Sequence[Any]) -> None:
    """Log which kernel of ``backend`` has run ``overload``, unless the same has been said of this weight's shape.

    Parameters
    ----------
    why : () -> str
        The reason for this backend.
    args : sequence
        The arguments of the call.
    """
    given = dict(zip(_names(overload), args, strict=False))
    x: Tensor = given["x_codes"] if "x_codes" in given else given["x"]
    format, K = given["format"], x.shape[-1]
    N = given["size"] if "tiles" in given else given["codes"].shape[-2]
    block = tuple(
        axis if size < 0 else min(size, max(axis, 1)) for size, axis in zip(given["block"], (N, K), strict=True)
    )
    affine = given.get("zero_point") is not None
    dtype = str(x.dtype).removeprefix("torch.")
    of = f"{overload}, x {dtype}, weight [{N}, {K}] {format}{' affine' if affine else ''} in blocks of {list(block)}"
    answer = f"{backend}, {why()}"
    if backend == "cpp" and "offsets" not in given and formats.get(format).bits <= 8:
        M, meets = x.numel() // max(K, 1), "int8" if "dequant" not in overload else dtype
        found = kernel_of((M, N, K), block, format, affine, meets)
        answer += f"; {instruction_set()}, {found['kernel']}, {found['why']}"
    if (line := f"{of}: {answer}") not in _said:
        _said.add(line)
        log.info("%s (rows of x: %d)", line, x.numel() // max(K, 1))


@functools.cache
def _names(overload: str) -> tuple[str, ...]:
    op, _, kind = overload.partition(".")
    return tuple(a.name for a in getattr(getattr(torch.ops.quantlib, op), kind or "default")._schema.arguments)
