"""The choice of the backend that runs an op: the kernel table, the order of preference, and the switch.

Kernels stack per dispatch key. At the bottom lies ``composite``, pure torch on any device; the C++ library puts ``cpp``
over it on the CPU and ``cuda`` on CUDA; a Python backend that a device prefers to those lies over them, as ``triton``
does on CUDA. :func:`use_backend` puts kernels over all of them that ask which backend the calling thread wants; a
compiled graph follows without recompiling.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib import _build
from quantlib.backends import choice, compiled
from quantlib.backends.backend import OPS, SCHEMAS, Backend, Kernel, Kernels

__all__ = [
    "BACKENDS",
    "OPS",
    "SCHEMAS",
    "Backend",
    "Kernels",
    "current",
    "library_path",
    "order",
    "refuses",
    "serving",
    "use_backend",
]

DEVICES = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key
LAST = "composite"  # pure torch lies below all others


def _found() -> dict[str, Backend]:
    """The backends of this folder by name, those that some device prefers most first."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/__init__.py"))
    found: list[Backend] = [importlib.import_module(f"{__name__}.{name}").BACKEND for name in folders]
    return {b.name: b for b in sorted(found, key=lambda b: max(b.preference.values(), default=-1))[::-1]}


BACKENDS = _found()

# One more layer of Python kernels for an overload ("quantize.out"), given the launcher of a backend's op.
Binder = Callable[["_Launcher"], Callable[..., Any]]
_binders: dict[str, Binder] = {}
_compiled: set[tuple[str, str]] = set()  # (overload, dispatch key) that a compiled library has a kernel for

_loaded = compiled.load("cpu") is None
_library = torch.library.Library("quantlib", "FRAGMENT" if _loaded else "DEF")
if not _loaded:
    for _schema in SCHEMAS.values():
        _library.define(_schema)
    compiled.warn_without_kernels()


def refuses(backend: str, device: str, overload: str | None = None) -> str | None:
    """Return why ``backend`` cannot serve ``device`` ("cpu", "cuda") or run ``overload`` there; None if it can."""
    found = BACKENDS[backend]
    why = found.refuses(torch.device(device))
    if why is not None or overload is None:
        return why
    has = (overload, DEVICES[device]) in _compiled if found.compiled else _op(overload) in found.kernels
    return None if has else f"has no kernel of {overload}"


@functools.cache
def order(device: str) -> tuple[str, ...]:
    """The backends that may run calls on ``device`` where nothing is forced, in the order in which they are asked."""
    preferred = {name: p for name, b in BACKENDS.items() if (p := b.prefers(torch.device(device).type)) is not None}
    return tuple(sorted(preferred, key=lambda name: -preferred[name]))


def current() -> str:
    """The backend that is forced now, or "auto": see `use_backend`."""
    for blocks in (_own.blocks, _blocks):
        for block in reversed(blocks):
            if block.open:
                return block.name
    return "auto"


def serving(device: str) -> str:
    """The backend that runs a call on ``device`` now."""
    if current() != "auto":
        return current()
    return next(backend for backend in order(device) if refuses(backend, device) is None)


def library_path(device: str = "cpu") -> Path:
    """The file of the compiled kernels that this process has loaded.

    A program without Python opens it with ``dlopen`` before it loads a package of AOTInductor: nothing else tells
    torch what ``quantlib::dequant_matmul`` is. Load "cpu" before "cuda": it has the schemas.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        The device that the kernels run on.

    Raises
    ------
    ValueError
        For another device.
    RuntimeError
        Where no library is loaded, with the reason.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be {' or '.join(DEVICES)}, got {device!r}")
    why = compiled.load(device)  # an import has asked already
    path = compiled.path_of(device)
    if path is None:
        raise RuntimeError(f"library of {device} kernels must be loaded, got none: {why}")
    return path


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run only the backend ``name`` inside the block: a key of ``BACKENDS``, or "auto" for the usual order.

    A call that the backend cannot serve raises NotImplementedError and says why; it never falls back. A thread follows
    the innermost block that it has entered itself. A thread that is in no block, such as those on which torch runs the
    backward pass of a GPU, follows the one that was entered last in the process and is still open.

    Raises
    ------
    ValueError
        For a name that is no backend.
    """
    global _blocks  # noqa: PLW0603
    block = _Block(name)
    with _lock:
        _blocks = (*_blocks, block)
        _install()
    _keep_own(block)
    try:
        yield
    finally:
        block.open = False
        _keep_own()
        with _lock:
            _blocks = tuple(b for b in _blocks if b is not block)
            _uninstall()


def attach(overload: str, bind: Binder, fake: Callable[..., Any]) -> None:
    """Give ``overload`` its Python kernels: pure torch at the bottom, ``fake`` for shapes, a binder for the layers."""
    _binders[overload] = bind
    name = f"quantlib::{overload}"
    _compiled.update(
        (overload, key) for key in DEVICES.values() if torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    )
    _library.impl(overload, bind(_Launcher(LAST, overload)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"quantlib::{overload}", fake, lib=_library)


def implement(overload: str, kernel: Callable[..., Any], key: str, with_keyset: bool = False) -> None:
    """Register the one kernel of ``overload`` that no backend has a part in, under dispatch key ``key``."""
    _library.impl(overload, kernel, key, with_keyset=with_keyset)


def vmap(overload: str, rule: Callable[..., Any]) -> None:
    """Register the batching rule of ``overload``."""
    torch.library.register_vmap(f"quantlib::{overload}", rule, lib=_library)


def start() -> None:
    """Put preferred Python kernels over compiled ones, once every op is attached.

    It heeds ``QUANTLIB_BACKEND`` and ``QUANTLIB_LOG``.
    """
    global _blocks, _logged  # noqa: PLW0603
    if choice.is_logged():
        _logged = choice.PRODUCTS
        choice.start()
    _blocks = (_Block(os.environ.get("QUANTLIB_BACKEND", "auto")),)
    for overload, device in itertools.product(_binders, DEVICES):
        usual = _usual(overload, device)
        over = usual != LAST or (overload, DEVICES[device]) in _compiled  # a library without code for this device
        if over and not BACKENDS[usual].compiled:
            _compiled_kernel(overload, device)  # before it is covered
            _cover(_library, overload, device, _bound(usual, overload, device), with_keyset=False)
    _install()


class _Block:
    """A `use_backend` that is entered."""

    def __init__(self, name: str) -> None:
        if name != "auto" and name not in BACKENDS:
            raise ValueError(f"backend must be auto, {', '.join(reversed(BACKENDS))}, got {name!r}")
        self.name, self.open = name, True


def _keep_own(*entered: _Block) -> None:
    """Remember the blocks that this thread is in, and forget those that are left."""
    _own.blocks = (*(b for b in _own.blocks if b.open), *entered)


def _install() -> None:
    """Cover the ops that log, or for which an open block forces another backend, by kernels that ask `current`."""
    global _switch  # noqa: PLW0603
    for device in DEVICES:
        for overload in _binders:
            if (overload, device) not in _covered and _asks(overload, device):
                if _switch is None:
                    _switch = torch.library.Library("quantlib", "IMPL")
                _compiled_kernel(overload, device)  # before it is covered
                _cover(_switch, overload, device, functools.partial(_ask, overload, device), with_keyset=True)
                _covered.add((overload, device))


def _uninstall() -> None:
    """Uncover everything once no block needs it.

    torch frees a kernel that is taken back even while another thread runs it, so where there are other threads all
    stays as it is, and a call costs some microseconds more.
    """
    global _switch  # noqa: PLW0603
    needed = any(_asks(*pair) for pair in _covered)
    if _switch is not None and not needed and threading.active_count() == 1:
        _switch._destroy()
        _switch = None
        _covered.clear()


def _cover(
    library: torch.library.Library, overload: str, device: str, kernel: Callable[..., Any], with_keyset: bool
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # overriding is what is meant
        library.impl(overload, kernel, DEVICES[device], with_keyset=with_keyset, allow_override=True)


def _asks(overload: str, device: str) -> bool:
    return _op(overload) in _logged or any(_differs(b.name, overload, device) for b in _blocks)


def _ask(overload: str, device: str, keyset: Any, *args: Any, **outs: Tensor) -> Any:
    name = current()
    y = _kernel(name, overload, device)(keyset, *args, **outs)
    if _op(overload) in _logged:
        backend = _usual(overload, device) if name == "auto" else name
        choice.say(overload, backend, functools.partial(_why, name, overload, device), args)
    return y


def _why(name: str, overload: str, device: str) -> str:
    """Say why this backend runs ``overload``, where ``name`` is forced, or "auto"."""
    if name != "auto":
        return "which is forced"
    before = itertools.takewhile(lambda backend: backend != _usual(overload, device), order(device))
    refused = [f"{backend} {refuses(backend, device, overload)}" for backend in before]
    return f"as {'; '.join(refused)}" if refused else f"the first for {device}"


@functools.cache
def _usual(overload: str, device: str) -> str:
    """The backend that serves ``overload`` where nothing is forced."""
    return next(backend for backend in order(device) if refuses(backend, device, overload) is None)


def _differs(name: str, overload: str, device: str) -> bool:
    return name not in ("auto", _usual(overload, device))


@functools.cache
def _kernel(name: str, overload: str, device: str) -> Callable[..., Any]:
    """Return the kernel of ``overload`` on ``device`` when ``name`` is forced; its first argument is the keyset."""
    backend = _usual(overload, device) if name == "auto" else name
    if BACKENDS[backend].compiled and refuses(backend, device, overload) is None:
        kernel: Callable[..., Any] = _compiled_kernel(overload, device).call_boxed
        return kernel
    bound = _bound(backend, overload, device)
    return lambda keyset, *args, **outs: bound(*args, **outs)


@functools.cache
def _bound(backend: str, overload: str, device: str) -> Callable[..., Any]:
    """The kernel of a backend of Python, as torch calls it without a keyset."""
    return _binders[overload](_Launcher(backend, overload, device))


@functools.cache
def _compiled_kernel(overload: str, device: str) -> Any:
    """The kernel of the C++ or CUDA library, asked for before another covers it; None where it has none."""
    key = DEVICES[device]
    return torch.library.get_kernel(f"quantlib::{overload}", key) if (overload, key) in _compiled else None


class _Launcher:
    """The kernel of ``backend`` for the op of ``overload``, found at the first call; a refusal where it has none."""

    def __init__(self, backend: str, overload: str, device: str = "cpu") -> None:
        self.backend, self.overload, self.device = backend, overload, device

    def __call__(self, *args: Any) -> None:
        self.found(*args)

    @functools.cached_property
    def found(self) -> Kernel:
        op, why = _op(self.overload), refuses(self.backend, self.device, self.overload)
        if why is not None:
            refused = f"backend {self.backend!r} refuses {self.device} tensors: {why}"
            raise NotImplementedError(f"quantlib::{op}: {refused}")
        return BACKENDS[self.backend].kernels[op]

    def prepare(self, *args: Any) -> Kernel | None:
        """``prepare`` of the kernel: see `backend.py`."""
        prepare: Callable[..., Kernel | None] | None = getattr(self.found, "prepare", None)
        return None if prepare is None else prepare(*args)


def _op(overload: str) -> str:
    """ "quantize" of "quantize.out": the stem of its files."""
    return overload.partition(".")[0]


def _needs_nvcc() -> bool:
    """True if only a call of nvcc, which takes minutes, gives this GPU kernels that are not pure torch."""
    device = torch.device("cuda")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability(device) < divmod(_build.CUDA_ARCHS[0], 10):
        return False
    return all(BACKENDS[name].compiled or BACKENDS[name].refuses(device) for name in order("cuda") if name != LAST)


compiled.load("cuda", build=_needs_nvcc())


class _Own(threading.local):
    """The blocks that a thread has entered itself, the innermost last."""

    blocks: tuple[_Block, ...] = ()


_own = _Own()
_lock = threading.RLock()
_blocks: tuple[_Block, ...] = ()  # blocks that are open in the process, the one entered last at the end
_switch: torch.library.Library | None = None
_logged: tuple[str, ...] = ()  # ops that say which kernel they take
_covered: set[tuple[str, str]] = set()  # (overload, device) that `_switch` has a kernel for
