"""The cost of a layer's eager call on the host: ``python -m gpu_static.eager`` from ``tests/``, microseconds of a call.

Triton serves tensors of the CPU as it serves those of a GPU, and what starts its kernels does nothing: what is timed is
all of a call but the driver's, the allocation on a device among it as that of the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gpu_static import overhead
from quantlib import ops

DEVICE = {"arch": 90, "shared_memory": 232448, "device_name": "NVIDIA H200", "processors": 132}
SPECS = ("W8A16", "W4A16", "int4:group:128", "W8A8", "FP8")


@contextlib.contextmanager
def served() -> Iterator[None]:
    """Let Triton serve the CPU: covered by the kernels that cover CUDA, which start nothing."""
    from quantlib import backends
    from quantlib.backends.triton import launch
    from quantlib.nn import linear

    caches = backends.order, backends._usual, backends._kernel, backends._bound
    triton = dataclasses.replace(backends.BACKENDS["triton"], refuses=lambda device: None, preference={"cpu": 20})
    for overload in backends._binders:
        backends._compiled_kernel(overload, "cpu")  # before it is covered
    library = torch.library.Library("quantlib", "IMPL")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in DEVICE.items():
            patch.setattr(launch, name, lambda device, value=value: value)
        patch.setattr(linear, "on_gpu", lambda x: True)
        patch.setitem(backends.BACKENDS, "triton", triton)
        if launch.INTERPRETED:
            patch.setattr(launch, "launch", lambda *args, **options: None)
        else:
            stack.enter_context(overhead.driver(lambda *_: None))
        for cache in caches:
            cache.cache_clear()
        for overload in backends._binders:
            backends._cover(library, overload, "cpu", backends._bound("triton", overload, "cpu"), with_keyset=False)
        try:
            yield
        finally:
            library._destroy()
            for cache in caches:
                cache.cache_clear()


def layer_of(spec: str, bias: bool = False, size: int = 1024) -> torch.nn.Module:
    """A quantized layer, and nothing in it: its kernels have not run."""
    import quantlib

    model = torch.nn.Sequential(torch.nn.Linear(size, size, bias)).bfloat16().eval()
    quantlib.quantize_(model, spec)
    return model[0]


def python_calls(call: Callable[[], Any]) -> int:
    """The number of functions of this library that ``call()`` runs; torch's are more or fewer by its version."""
    count, own = 0, os.path.dirname(ops.__file__.removesuffix("/__init__.py"))

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(own)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def main() -> None:
    import quantlib

    torch.set_num_threads(1)
    with served(), torch.no_grad():
        x, w = torch.randn(1, 16).bfloat16(), torch.randn(16, 16).bfloat16()
        print(f"F.linear in bfloat16, 16 x 16: {overhead.fastest(lambda: torch.nn.functional.linear(x, w)):.1f} us")
        for shape in ((1, 1024), (1, 1, 1024)):
            x = torch.randn(shape).bfloat16()
            for spec in SPECS:
                say(f"{spec}, x {list(shape)}", functools.partial(layer_of(spec), x))
        x = torch.randn(1, 1024).bfloat16()
        say("quantize_dynamic", functools.partial(quantlib.quantize_dynamic, x, "int8", block=(1, 1024)))


def say(name: str, call: Callable[[], Any]) -> None:
    for _ in range(2):
        call()
    print(f"{name}: {overhead.fastest(call):.1f} us, {python_calls(call)} calls of Python")


if __name__ == "__main__":
    main()
