"""The first minute on a GPU: ``gpu_smoke.py [--device cuda]``, what has never run there, the smallest of each.

A product by slabs, one through tensor descriptors (TMA), a CUDA graph with its refusal to compile, a package of
AOTInductor. Each is compared with pure torch byte for byte; one that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import quantlib
from quantlib import backends

M, N, K = 1024, 384, 256
LONG = 6400  # columns of which the vendor's product is faster


def operands(device: str, M: int = M, K: int = K) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, codes and scale whose sums no order of additions rounds."""
    made = torch.Generator().manual_seed(M)
    x = torch.randint(-7, 8, (M, K), generator=made).to(torch.bfloat16)
    codes = torch.randint(-7, 8, (N, K), generator=made).to(torch.int8)
    scale = torch.exp2(torch.randint(-3, 3, (N, 1), generator=made).float())
    return x.to(device), codes.to(device), scale.to(device)


def same(got: torch.Tensor, call: Callable[[], torch.Tensor]) -> None:
    """Assert that ``got`` has the bytes that ``call`` gives in pure torch."""
    with quantlib.use_backend("composite"):
        want = call()
    differing = int((got.view(torch.uint8) != want.view(torch.uint8)).sum())
    assert not differing, f"{differing} of {got.nbytes} bytes differ"


def slabs(device: str) -> None:
    """dequant_matmul of many rows: a kernel that decodes, and a product through TMA on sm_90, or the vendor's and a
    kernel that finishes. A NaN has its bytes."""
    for columns in (K, LONG):
        x, codes, scale = operands(device, K=columns)
        x[0, 0] = float("nan")
        call = functools.partial(quantlib.dequant_matmul, x, codes, scale, "int8", block=(1, -1))
        same(call(), call)


def descriptors(device: str) -> None:
    """scaled_matmul of many rows: through TMA on sm_90."""
    x, codes, scale = operands(device)
    x_codes, x_scale = x.to(torch.int8), torch.ones(len(x), 1, device=device)

    def call() -> torch.Tensor:
        return quantlib.scaled_matmul(x_codes, x_scale, codes, scale, "int8", block=(1, -1), dtype=torch.bfloat16)

    same(call(), call)


def graph(device: str) -> None:
    """A product with splits of K in a graph, replayed on other values; a class that has not run is refused."""
    x, codes, scale = operands(device, 4)

    def call(x: torch.Tensor = x) -> torch.Tensor:
        return quantlib.dequant_matmul(x, codes, scale, "int8", block=(1, -1))

    y = call()
    if device == "cpu":
        return
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        y = call()
    for _ in range(3):
        x.copy_(x.roll(1, 0))
        captured.replay()
        same(y, call)
    if backends.serving(device) == "triton":
        said = ""
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                call(x.half())
        except RuntimeError as error:
            said = str(error)
        assert "quantlib warmup" in said, f"a kernel was compiled while a graph was captured: {said}"


class Layer(torch.nn.Module):
    """One product, for the compiler."""

    def __init__(self, device: str) -> None:
        super().__init__()
        _, codes, scale = operands(device, 16)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return quantlib.dequant_matmul(x, self.codes, self.scale, "int8", block=(1, -1))


# Torch's headers are read once, so that to compile them ahead, twice, would be most of a minute of this step.
PLAIN = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


def package(device: str) -> None:
    """A package of AOTInductor, compiled, loaded and called."""
    x, layer = operands(device, 16)[0], Layer(device)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(layer, (x,))
        path = str(Path(folder, "layer.pt2"))
        torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=PLAIN)
        same(torch._inductor.aoti_load_package(path)(x), lambda: layer(x))


STEPS = {step.__name__: step for step in (slabs, descriptors, graph, package)}


def main() -> int:
    parser = argparse.ArgumentParser(description="The first minute on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"only these of {', '.join(STEPS)}")
    given = parser.parse_args()
    faulthandler.enable()  # a step that ends the process says where
    device, steps = given.device, given.steps or list(STEPS)
    print(f"torch {torch.__version__}, {backends.serving(device)} serves {device}", flush=True)
    failed = 0
    for step in steps:
        start = time.perf_counter()
        try:
            STEPS[step](device)
            said = "ok"
        except Exception:
            traceback.print_exc()
            said, failed = "FAILED", failed + 1
        print(f"{said:7} {time.perf_counter() - start:5.1f} s  {step}", flush=True)
    print(f"{len(steps) - failed} of {len(steps)} passed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
