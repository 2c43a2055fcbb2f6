"""The launches of the launchers, which are called with tensors that have no memory and are told of a GPU.

Triton itself says what it would tell its compiler, so that a configuration in use is neither forgotten nor made up.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from gpu_static.calls import Call, calls


@dataclass(frozen=True)
class Config:
    """A kernel as its launcher asks for it, and the first call that starts it."""

    call: Call
    kernel: Any
    args: dict[str, Any]
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Return the hash of all that the compiler is told."""
        import triton

        told = (self.kernel.cache_key, self.signature, self.constants, self.attributes, self.options)
        return hashlib.sha256(repr((triton.__version__, *told)).encode()).hexdigest()[:20]

    @property
    def tile(self) -> Any:
        """The one dataclass that its launcher chose, or None."""
        return self.args.get("T") or self.args.get("B")


def configs(
    arch: int, chosen: Iterable[Call] | None = None, everything: bool = False, instead: Any = None
) -> list[Config]:
    """Every configuration in use on ``arch``, once; ``instead``: the launcher that is called for each."""
    found: dict[str, Config] = {}
    with recording(arch) as launched:
        for call in chosen or calls(devices(arch), everything):
            start(call, instead)
            for config in (Config(call, *told(launch, arch)) for launch in launched):
                found.setdefault(config.key, config)
            launched.clear()
    return list(found.values())


def devices(arch: int) -> tuple[str, ...]:
    """Name the devices of ``arch`` whose tables of measurements are part of the package."""
    from quantlib.backends.triton import tables

    return tuple(name for name in tables.shipped() if ARCHS[name] == arch)


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Any]]:
    """(kernel, arguments, options) of what is launched meanwhile, by launchers that believe to be on ``arch``."""
    from triton.runtime.jit import JITFunction

    from quantlib.backends.triton import launch, slab

    launched: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "arch", lambda device: arch)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(launch, "context", lambda device: contextlib.nullcontext())
        patch.setattr(launch, "device_name", lambda device: ON[0])
        patch.setattr(slab, "product", lambda x, w: torch.empty(len(x), w.shape[1], device="meta"))
        patch.setattr(
            JITFunction, "run", lambda self, *args, grid, warmup, **options: launched.append((self, args, options))
        )
        yield launched


ARCHS = {"NVIDIA H200": 90}  # of the devices whose tables are part of the package
EXPERTS = 8
ON = ["no device"]  # what a launcher is told of its device


def start(call: Call, instead: Any = None) -> None:
    """Call the launcher of ``call`` with tensors that have no memory."""
    from quantlib import formats
    from quantlib.backends import triton as backend
    from quantlib.backends.tiles import TileLayout
    from quantlib.backends.weight import Epilogue, Layout, QuantizedWeight
    from quantlib.ops.adamw_step import states_of

    ON[0] = call.device
    f, (M, K), block, source = formats.get(call.format), call.shape, call.block, getattr(torch, call.source)
    with torch.device("meta"):
        wide = TileLayout(f).shape(M, K) if call.tiled else (M, (K + 1) // 2 if f.packed else K)
        codes = torch.empty(wide, dtype=torch.uint8 if call.tiled else getattr(torch, f.dtype_name))
        scale, dscale = (torch.empty(-(-M // block[0]), -(-K // block[1])) for _ in range(2))
        zero_point = torch.empty_like(scale, dtype=torch.int32) if call.affine else None
        x, dy, dx = (torch.empty(M, K, dtype=source) for _ in range(3))
        batch, y = torch.empty(call.M, K, dtype=source), torch.empty(call.M, M, dtype=source)
        x_codes, x_scale = torch.empty(call.M, K, dtype=torch.int8), torch.empty(call.M, 1)
        bias = torch.empty(M) if call.activation else None
        states_block = block[1] if call.format == "int8" else 0
        shapes = states_of(M, K, states_block).values() if call.op == "adamw_step" else ()
        states, key = [torch.empty(s, dtype=d) for s, d in shapes], torch.empty(2, dtype=torch.int32)
        offsets = torch.empty(1, EXPERTS, dtype=torch.int32)
    layout: Layout = "tiles" if call.tiled else "plain"
    weight, epilogue = (
        QuantizedWeight(codes, scale, f, block, zero_point, (M, K), layout),
        Epilogue(bias, call.activation),
    )
    stacks = (None if t is None else t.expand(EXPERTS, *t.shape).contiguous() for t in (codes, scale, zero_point, bias))
    of_experts = dict(zip(("codes", "scale", "zero_point", "bias"), stacks, strict=True))
    biases = Epilogue(of_experts.pop("bias"), call.activation)
    shared = zero_point if zero_point is None else zero_point.float()
    limits = (0, 0) if f.is_float else f.range(call.affine)
    arguments = {
        "cast": lambda: (x.view(-1), formats.get(source), f, f.saturates, codes.view(-1)),
        "compute_scale": lambda: (x, f, block, scale, zero_point),
        "search_scale": lambda: (x, scale, f, block, "magnitude", "bfloat16", zero_point, None, dscale),
        "quantize": lambda: (x, scale, f, block, zero_point, codes),
        "dequantize": lambda: (weight, x),
        "dequantize_rows": lambda: (torch.empty(M, dtype=torch.int64, device="meta"), weight, x),
        "quantize_dynamic": lambda: (x, f, block, codes, scale, zero_point),
        "fake_quantize": lambda: (x, scale, f, block, shared, limits, dx),
        "fake_quantize_backward": lambda: (
            *(dy, x, scale, f, block, shared, limits, call.lsq, 1.0),
            *(dx, dscale, dscale if call.affine else None),
        ),
        "hadamard": lambda: (x, block[1], dx),
        "adamw_step": lambda: (
            *(x, dy, *states, torch.empty(9, device="meta"), states_block),
            *(key if call.source == "bfloat16" else None, (0, 0), dx, *states),
        ),
        "dequant_matmul": lambda: (batch, weight, epilogue, call.invariant, y),
        "dequant_matmul_backward": lambda: (y, weight, batch),
        "grouped_dequant_matmul": lambda: (batch, weight._replace(**of_experts), offsets, biases, call.invariant, y),
        "grouped_dequant_matmul_backward": lambda: (y, weight._replace(**of_experts), offsets, batch),
        "grouped_dynamic_matmul": lambda: (batch, weight._replace(**of_experts), offsets, biases, y),
        "scaled_matmul": lambda: (x_codes, x_scale, weight, None, epilogue, y),
    }[call.op]()
    (instead or backend.KERNELS[call.op])(*arguments)


def told(launch: Any, arch: int) -> tuple[Any, ...]:
    """Return what the compiler is told of a launch: types, constants, and multiples of 16, as Triton finds them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, args, options = launch
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bound, specialization, rest = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *args, debug=False, **options
    )
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    return kernel, dict(bound), signature, constants, attributes, options


def facts(config: Config) -> dict[str, Any]:
    """Return the facts of a configuration that a contract asks for."""
    given, tile, call = config.args, config.tile, config.call
    x, f = given.get("X"), given.get("F")
    return {
        "bits": {name: given[name].bits for name in ("X", "Y", "F") if hasattr(given.get(name), "bits")},
        "exact": x.holds(f) if x and f and x.is_float else True,  # x's type holds every value of the codes
        "ragged": call.ragged,
        "M": call.M,
        "tiled": call.tiled,
        "per": call.per,
        "scales": given.get("SCALES"),
        "tile": str(tile),
        "tile_m": getattr(tile, "tile_m", 0),
        "tile_n": getattr(tile, "tile_n", 0),
        "splits": getattr(tile, "splits", 1),
    }
