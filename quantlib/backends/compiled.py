"""The C++ and CUDA libraries: loading one attaches its kernels to the ops."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from quantlib import _build

_loaded: dict[str, Path] = {}  # not asked of _build again: sources that changed since would give a second library
_reasons: dict[str, str | None] = {}  # of every library that `load` was asked for


def load(name: str, build: bool = True) -> str | None:
    """Load library ``name`` ("cpu" or "cuda"): None, or why it is not there. Only the first call of a name counts.

    Parameters
    ----------
    name : str
        The device type that the library serves.
    build : bool
        Whether it is compiled where it is not there. ``QUANTLIB_BUILD=1`` compiles in any case, and 0 in none.

    Raises
    ------
    RuntimeError
        With ``QUANTLIB_BUILD=1``, where the library cannot be made or does not load.
    """
    if name not in _reasons:
        _reasons[name] = _load(name, build)
    return _reasons[name]


def refuses(name: str) -> Callable[[torch.device], str | None]:
    """``Backend.refuses`` of the backend whose kernels lie in library ``name``."""

    def why(device: torch.device) -> str | None:
        if device.type != name:
            return f"serves {name} tensors only"
        return load(name) or (_no_kernels_for(device) if name == "cuda" else None)

    return why


def _no_kernels_for(device: torch.device) -> str | None:
    """Return why the loaded CUDA library has no kernels for ``device``, or None."""
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    capability, built = torch.cuda.get_device_capability(device), _targets()
    if _build.runs_on(built, capability):
        return None
    return f"is compiled for {', '.join(built)}, got compute capability {'.'.join(map(str, capability))}"


@functools.cache
def _targets() -> tuple[str, ...]:
    return _build.targets(_loaded["cuda"])


def _load(name: str, build: bool) -> str | None:
    if name == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        path = _build.library(name, build)
    except _build.BuildError as error:
        return str(error)
    try:
        torch.ops.load_library(str(path))
        _loaded[name] = path
    except OSError as error:  # built for another platform or a newer libtorch
        why = f"{path} does not load: {error.__cause__ or error}"
        if _build.mode() == "1":
            raise RuntimeError(f"QUANTLIB_BUILD=1 asks for the {name} kernels: {why}") from error
        return why
    return None


def warn_without_kernels() -> None:
    """Say once why the CPU is served by pure torch."""
    reason = load("cpu")
    if reason is not None and _build.mode() != "0":
        warnings.warn(f"quantlib runs without its C++ kernels, slower: {reason}", RuntimeWarning, stacklevel=2)


def path_of(name: str) -> Path | None:
    """The file of a library that is loaded."""
    return _loaded.get(name) if load(name) is None else None
