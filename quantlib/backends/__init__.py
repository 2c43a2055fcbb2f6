"""Who runs an op: the kernel table, the order of preference, and the switch.

Kernels stack per dispatch key. At the bottom lies ``composite``, pure torch on any device; the C++ library puts ``cpp``
over it on the CPU and ``cuda`` on CUDA; where Triton and a CUDA torch are there, ``triton`` lies over ``cuda``.
:func:`use_backend` pushes one more layer, which a compiled graph follows without recompiling.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from quantlib.backends import compiled

BACKENDS = ("triton", "cuda", "cpp", "composite")  # the order of preference
DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key
COMPILED = {"cpp": "cpu", "cuda": "cuda"}  # backend -> the device type its library serves

SCHEMAS: dict[str, str] = {
    schema[: schema.index("(")]: schema
    for schema in re.findall(r'^DEF\("(.+)"\)$', (Path(__file__).parent.parent / "ops.def").read_text(), re.MULTILINE)
}

# One more layer of Python kernels for an overload ("quantize.out"), given the launcher of a backend's op.
Binder = Callable[[Callable[..., None]], Callable[..., Any]]
_binders: dict[str, Binder] = {}
_compiled: set[tuple[str, str]] = set()  # (overload, dispatch key) that a compiled library has a kernel for

_loaded = compiled.load("cpu") is None
_library = torch.library.Library("quantlib", "FRAGMENT" if _loaded else "DEF")
if not _loaded:
    for _schema in SCHEMAS.values():
        _library.define(_schema)
    compiled.warn_without_kernels()
compiled.load("cuda")


def refuses(backend: str, device: str, overload: str | None = None) -> str | None:
    """Why ``backend`` cannot serve tensors on ``device`` ("cpu", "cuda"), or run ``overload`` there; None if it can."""
    if backend in COMPILED:
        serves = COMPILED[backend]
        why = f"serves {serves} tensors only" if device != serves else compiled.load(serves)
        lacks = overload is not None and (overload, DEVICES[serves]) not in _compiled
    else:
        why = _python_backend(backend).refuses(torch.device(device))
        lacks = why is None and overload is not None and _op(overload) not in _python_backend(backend).OPS
    return why or (f"has no kernel of {overload}" if lacks else None)


def current() -> str:
    """The backend that is forced now, or "auto"."""
    return _layers[-1].name


def serving(device: str) -> str:
    """The backend that runs a call on ``device`` now."""
    if current() != "auto":
        return current()
    order = BACKENDS if device == "cuda" else ("cpp", "composite")  # the interpreter of Triton is no backend to prefer
    return next(backend for backend in order if refuses(backend, device) is None)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside the block only ``name`` runs: "composite", "cpp", "triton", "cuda", or "auto" for the usual order.

    A call that the backend cannot serve raises NotImplementedError and says why; it never falls back. The switch is
    one of the process, not of the thread.

    Raises
    ------
    ValueError
        For a name that is no backend.
    """
    _layers.append(_Layer(name))
    try:
        yield
    finally:
        _layers.pop().remove()
        _layers[-1].install()


def attach(overload: str, bind: Binder, fake: Callable[..., Any]) -> None:
    """Give ``overload`` its Python kernels: pure torch at the bottom, ``fake`` for shapes, a binder for the layers."""
    _binders[overload] = bind
    name = f"quantlib::{overload}"
    _compiled.update(
        (overload, key) for key in DEVICES.values() if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )
    _library.impl(overload, bind(_launcher("composite", overload)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantlib::{overload}", fake, lib=_library)


def implement(overload: str, kernel: Callable[..., Any], key: str, with_keyset: bool = False) -> None:
    """Register the one kernel of ``overload`` that no backend has a part in, under dispatch key ``key``."""
    _library.impl(overload, kernel, key, with_keyset=with_keyset)


def vmap(overload: str, rule: Callable[..., Any]) -> None:
    """Register the batching rule of ``overload``."""
    torch.library.register_vmap(f"quantlib::{overload}", rule, lib=_library)


def start() -> None:
    """Put the layer of ``QUANTLIB_BACKEND`` in place, once every op is attached."""
    _layers.append(_Layer(os.environ.get("QUANTLIB_BACKEND", "auto")))


class _Layer:
    """The kernels over those of the compiled libraries: none, one backend's, or a refusal for each device."""

    def __init__(self, name: str) -> None:
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"backend must be auto, {', '.join(reversed(BACKENDS))}, got {name!r}")
        self.name = name
        self.library: torch.library.Library | None = None
        self.install()

    def install(self) -> None:
        if _layers and _layers[-1] is not self:
            _layers[-1].remove()
        self.library = torch.library.Library("quantlib", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is what is meant
            for device, key in DEVICES.items():
                for overload, bind in _binders.items():
                    backend = serving_layer(self.name, overload, device)
                    if backend is not None:
                        kernel = bind(_launcher(backend, overload, device))
                        self.library.impl(overload, kernel, key, allow_override=True)

    def remove(self) -> None:
        if self.library is not None:
            self.library._destroy()
            self.library = None


def serving_layer(name: str, overload: str, device: str) -> str | None:
    """The backend whose kernel layer ``name`` puts over the one that lies there already; None where none is due."""
    if name == "auto":
        over = device == "cuda" and torch.version.cuda is not None and refuses("triton", device, overload) is None
        return "triton" if over else None
    return None if COMPILED.get(name) == device and (overload, DEVICES[device]) in _compiled else name


def _launcher(backend: str, overload: str, device: str = "cpu") -> Callable[..., None]:
    """The kernel of ``backend`` for the op of ``overload``, found at the first call; a refusal where it has none."""
    op = _op(overload)

    @functools.cache
    def find() -> Callable[..., None]:
        why = refuses(backend, device, overload)
        if why is not None:
            raise NotImplementedError(f"quantlib::{op}: backend {backend!r} refuses {device} tensors: {why}")
        kernel: Callable[..., None] = _python_backend(backend).KERNELS[op]
        return kernel

    def launch(*args: Any) -> None:
        find()(*args)

    return launch


def _op(overload: str) -> str:
    """ "quantize" of "quantize.out": the stem of its files."""
    return overload.partition(".")[0]


@functools.cache
def _python_backend(backend: str) -> ModuleType:
    return importlib.import_module(f"quantlib.backends.{backend}")


_layers: list[_Layer] = []
