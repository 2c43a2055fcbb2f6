"""The C++ and CUDA libraries: loading one attaches its kernels to the ops."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import torch

from quantlib import _build

_loaded: dict[str, Path] = {}  # not asked of _build again: sources that changed since would give a second library


@functools.cache
def load(name: str) -> str | None:
    """Load library ``name`` ("cpu" or "cuda"), compiling it first where that is due: None, or why it is not there."""
    if name == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        path = _build.library(name)
    except _build.BuildError as error:
        return str(error)
    try:
        torch.ops.load_library(str(path))
        _loaded[name] = path
    except OSError as error:  # built for another platform or a newer libtorch
        return f"{path} does not load: {error.__cause__ or error}"
    return None


def warn_without_kernels() -> None:
    """Say once why the CPU is served by pure torch."""
    reason = load("cpu")
    if reason is not None and _build.mode() != "0":
        warnings.warn(f"quantlib runs without its C++ kernels, slower: {reason}", RuntimeWarning, stacklevel=2)


def path_of(name: str) -> Path | None:
    """The file of a library that is loaded."""
    return _loaded.get(name) if load(name) is None else None
