"""The cost of a launch on the host: ``python -m gpu_static.overhead`` from ``tests/``, microseconds of a launch.

The driver is a function that does nothing, so that what is timed is all of `launch.launch` but the driver's call; and
what Triton's own launch takes to find the kernel of the same arguments, for comparison.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpu_static import launches
from gpu_static.calls import Call

CALLS = (
    Call("cast", "bfloat16", "float8_e4m3fn"),
    Call("quantize_dynamic", "bfloat16", "int8"),
    Call("dequant_matmul", "bfloat16", "int4", per="group:128", M=1, tiled=True),
    Call("scaled_matmul", "bfloat16", "int8", M=4096),
)


@contextlib.contextmanager
def driver(run: Callable[..., None]) -> Iterator[None]:
    """A device of CUDA that is there: a compiled kernel is started by ``run``."""
    from triton.runtime.jit import JITFunction

    from quantlib.backends.triton import launch

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return SimpleNamespace(run=run, function=1, packed_metadata=2)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "context", lambda device: contextlib.nullcontext())
        patch.setattr(launch, "current_device", lambda: None)  # tensors without memory are on device None
        patch.setattr(launch, "current_stream", lambda index: 7)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(JITFunction, "run", compiled)
        yield


def calls_of(call: Call, arch: int = 90) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return the arguments that the launcher of ``call`` gives `launch.launch`."""
    from quantlib.backends.triton import launch

    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with pytest.MonkeyPatch.context() as patch, launches.recording(arch):
        patch.setattr(launch, "launch", lambda *args, **options: given.append((args, options)))
        launches.start(call)
    return given


def triton_key(args: tuple[Any, ...], options: dict[str, Any], arch: int = 90) -> Callable[[], Any]:
    """Triton's own key of a call, as a function that finds it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, _, _, *given = args
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", arch, 32)))
    named = {"num_warps": options["warps"], **{name: v for name, v in options.items() if name != "warps"}}
    return lambda: repr(bind(*given, debug=False, enable_fp_fusion=False, **named)[1:])


def fastest(function: Callable[[], Any], calls: int = 100, times: int = 200) -> float:
    best = float("inf")
    for _ in range(times):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def main() -> None:
    from quantlib.backends.triton import launch

    for call in CALLS:
        for args, options in calls_of(call):
            with driver(lambda *_: None):
                own = fastest(lambda args=args, options=options: launch.launch(*args, **options))
            triton = fastest(triton_key(args, options), 20, 50)
            print(f"{args[0].__name__}, {len(args) - 3} arguments: {own:.1f} us, Triton's key {triton:.1f} us")


if __name__ == "__main__":
    main()
