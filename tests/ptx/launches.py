"""The launchers of quantlib on CPU tensors: what they launch is compiled for sm_90, and its PTX runs here."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import struct
from collections.abc import Iterator
from typing import Any

import torch

from ptx.machine import Program
from ptx.memory import Global
from ptx.parse import PtxError, parse

ARCH = 90
PROCESSORS, NAME = 132, "NVIDIA H200"
ran: dict[str, int] = {}  # kernel -> launches


@contextlib.contextmanager
def served(arch: int = ARCH) -> Iterator[None]:
    """Meanwhile the Triton backend serves the CPU, as if it were a GPU of ``arch``.

    Triton must not have been imported with TRITON_INTERPRET set.
    """
    from unittest.mock import patch

    from triton.runtime import driver

    from quantlib import backends
    from quantlib.backends.triton import launch, slab, warmup

    assert not launch.INTERPRETED
    driver.set_active(warmup.Driver(arch))
    accepting = dataclasses.replace(backends.BACKENDS["triton"], refuses=lambda device: None)
    instead: dict[str, Any] = {
        "launch": execute,
        "arch": lambda device: arch,
        "shared_memory": lambda device: launch.SHARED.get(arch, launch.LEAST_SHARED),
        "device_name": lambda device: NAME,
        "processors": lambda device: PROCESSORS,
    }
    with contextlib.ExitStack() as patched:
        patched.enter_context(patch.dict(backends.BACKENDS, {"triton": accepting}))
        for name, value in instead.items():
            patched.enter_context(patch.object(launch, name, value))
        patched.enter_context(patch.object(slab, "product", product))
        patched.enter_context(backends.use_backend("triton"))
        yield


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Do what the vendor's product does."""
    return (x.double() @ w.double()).float()


def execute(kernel: Any, programs: int, device: torch.device, *args: Any, warps: int, **options: int) -> None:
    """Do what ``launch.launch`` does, on the memory of CPU tensors."""
    compiled = compile(kernel, programs, warps, args, options)
    name = kernel.__name__
    program = ready(compiled.hash, compiled.asm["ptx"], compiled.metadata.shared)
    given = [
        (parameter, value, type)
        for (parameter, type), value in zip(compiled.src.signature.items(), args, strict=True)
        if type != "constexpr"
    ]
    scratch = len(program.kernel.params) - len(given)
    if scratch != 2:  # memory of a launch and of the profiler, which none of these kernels uses: no address
        raise PtxError(f"{name}: {len(program.kernel.params)} parameters for {len(given)} arguments")
    words = [bits(value, type) for _, value, type in given] + [0, 0]
    regions = [(*extent(value), parameter) for parameter, value, _ in given if isinstance(value, torch.Tensor)]
    if any(value.device.type != "cpu" for _, value, _ in given if isinstance(value, torch.Tensor)):
        raise PtxError(f"{name}: a tensor that is not the CPU's")
    ran[name] = ran.get(name, 0) + 1
    try:
        program.run(programs, dict(zip((p for p, _ in program.kernel.params), words, strict=True)), Global(regions))
    except PtxError as error:
        raise PtxError(f"{name}: {error}") from None


KEPT = 64  # kernels: a case starts few, more than once
_compiled: dict[Any, Any] = {}


def compile(kernel: Any, programs: int, warps: int, args: tuple[Any, ...], options: dict[str, int]) -> Any:
    """Compile as the launch does, from what Triton finds in the arguments; found again as the launch finds it."""
    from quantlib.backends.triton import launch

    types = (id(kernel), *map(type, args))
    found = launch._classes.get(types)
    if found is None:
        found = launch._classes[types] = launch.Class(launch.key_function(kernel, args), {})
    key = (id(kernel), found.key(None, warps, tuple(options.items()), *args))
    if key not in _compiled:
        if len(_compiled) == KEPT:
            _compiled.pop(next(iter(_compiled)))
            kernel.device_caches.clear()  # Triton would keep all
        made = kernel.warmup(*args, grid=(programs,), num_warps=warps, enable_fp_fusion=False, **options)
        _compiled[key] = made, kernel, args  # whose addresses are in the key
    return _compiled[key][0]


@functools.lru_cache(KEPT)
def ready(digest: str, text: str, shared: int) -> Program:
    return Program(parse(text), shared)


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The first byte of a tensor, and how many there are up to its last."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def bits(value: Any, type: str) -> int:
    """The bits of an argument, as the driver gets it."""
    if type.startswith("*"):
        return int(value.data_ptr())
    if type == "fp32":
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    if type[0] in "iu" and type[1:] in ("1", "8", "16", "32", "64"):
        return int(value) & ((1 << int(type[1:])) - 1)
    raise PtxError(f"an argument of type {type}")
