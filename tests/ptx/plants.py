"""Faults put in on purpose, which the execution must find: ``python -m ptx.plants``.

They are of the kernels' source, where the compiler makes wrong code of it, and of the PTX that it makes, as a faulty
compiler would. It prints what is found of each as JSON, null where nothing is, and of the same cases without a fault.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

from ptx import memory
from quantlib.testing import every
from quantlib.testing.every import AnyCase
from quantlib.testing.learned import Learned
from quantlib.testing.product import Product
from quantlib.testing.table import Case

COLUMNS: dict[str, AnyCase] = {
    "fake_quantize_backward": Learned("fake_quantize_backward", "int8", "float32", (259, 5), (-1, 1), symmetric=False),
    "compute_scale": Case("compute_scale", "int8", "float32", (259, 5), (-1, 1), symmetric=False),
    "quantize_dynamic": Case("quantize_dynamic", "int8", "float32", (259, 5), (-1, 1), symmetric=False),
}
ROW = Case("quantize_dynamic", "int8", "bfloat16", (3, 515), (1, -1))


MANY = Product("dequant_matmul", "int8", "bfloat16", (130, 136, 192), (1, -1), tiled=True)
SUMS = Learned("fake_quantize_backward", "int8", "float32", (2, 515), (1, -1))


# name -> the case, what the PTX has, what stands there instead
PTX: dict[str, tuple[AnyCase, str, str]] = {
    "a barrier is missing": (ROW, r"bar\.sync \t0;", ""),
    "a lane beside it": (SUMS, r"(shfl\.sync\.bfly\.b32 \t\S+ \S+) 16,", r"\1 8,"),
    "a mask is missing": (ROW, r"@%p\d+ (ld\.global)", r"\1"),
    "a product that is not waited for": (MANY, r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    "a copy that is not waited for": (MANY, r"cp\.async\.wait_group (\t*)[1-9];", r"cp.async.wait_group 31;"),
    "not rounded to nearest": (ROW, r"div\.rn\.f32", "div.full.f32"),
}


def planted() -> Iterator[tuple[str, str | None]]:
    for case in (ROW, SUMS, MANY, *COLUMNS.values()):
        yield str(case), wrong(case)
    for name, (case, pattern, by) in PTX.items():
        with edited(pattern, by):
            yield name, wrong(case)
    with lanes_that_lie_apart():
        for op, case in COLUMNS.items():
            yield f"lanes that lie apart, {op}", wrong(case)
        with mock.patch.object(memory, "differ", return_value=False):  # one of them wins, as on a GPU
            for op, case in COLUMNS.items():
                yield f"lanes that lie apart, the bytes of {op}", wrong(case)


def wrong(case: AnyCase) -> str | None:
    try:
        every.check(case, "cpu")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@contextlib.contextmanager
def edited(pattern: str, by: str) -> Iterator[None]:
    """Meanwhile kernels run from PTX in which ``by`` stands wherever ``pattern`` did."""
    from ptx import launches

    changed = []
    ready = launches.ready.__wrapped__

    def other(digest: str, text: str, shared: int) -> Any:
        new = re.sub(pattern, by, text)
        changed.append(new != text)
        return ready(digest, new, shared)

    with mock.patch.object(launches, "ready", other):
        yield
    assert any(changed), f"the PTX has no {pattern}"


@contextlib.contextmanager
def lanes_that_lie_apart() -> Iterator[None]:
    """Meanwhile Triton reduces rows and columns of several blocks at once, of which Triton 3.6 adds the wrong lanes."""
    import triton

    from ptx import launches
    from quantlib.backends.triton import compute_scale, fake_quantize_backward, launch, quantize_dynamic, tile

    modules = (tile, compute_scale, quantize_dynamic, fake_quantize_backward)
    functions = [f for m in modules for f in vars(m).values() if isinstance(f, triton.runtime.jit.JITFunction)]
    cache = tempfile.mkdtemp()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, cache)
        stack.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}))
        stack.enter_context(mock.patch.object(tile, "apart", triton.constexpr_function(never)))
        stack.enter_context(mock.patch.dict(launches._compiled, clear=True))
        stack.enter_context(mock.patch.dict(launch._classes, clear=True))
        for function in functions:
            function.hash = None
            function.used_global_vals.clear()
            function.device_caches.clear()
        yield


def never(shape: Any) -> bool:
    return False


def main() -> None:
    import torch

    from ptx import launches

    torch.set_num_threads(1)
    with launches.served():
        print(json.dumps(dict(planted())))


if __name__ == "__main__":
    main()
