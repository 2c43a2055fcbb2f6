"""Weights in the format of compressed-tensors: w = (q - z) * s.

int8, uint8 and FP8 E4M3 stay codes of their own (int-quantized, float-quantized); int4 is packed eight to an int32,
q + 8 from the lowest bits (pack-quantized). Scales are float32, as they are, so that the library decodes the same
values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from quantlib import ops
from quantlib.backends.packing import wide_zero_points
from quantlib.checkpoint.files import Batch, Job, Piece, Slot
from quantlib.checkpoint.foreign.found import Found
from quantlib.nn.functional import slabs
from quantlib.report import LayerReport
from quantlib.spec import QuantSpec

PACK, INT, FLOAT = "pack-quantized", "int-quantized", "float-quantized"
FORMATS = {"int8": INT, "uint8": INT, "int4": PACK, "float8_e4m3fn": FLOAT}
WORD = 8  # codes of int4 in an int32


def refuses(weight: Found) -> str:
    """Return why compressed-tensors cannot hold a weight; empty if it can."""
    spec = weight.spec
    assert spec is not None
    if spec.format not in FORMATS:
        return f"compressed-tensors has no {spec.format} with these scales"
    if spec.hadamard:
        return "compressed-tensors has no columns that are rotated in blocks"
    if len(weight.float_shape) != 2:
        return "compressed-tensors holds matrices"
    if spec.format == "int4" and (spec.per == "tensor" or "tile" in str(spec.per)):
        return "compressed-tensors packs int4 with a scale for each row or group"
    if "tile" in str(spec.per) and spec.format != "float8_e4m3fn":
        return "compressed-tensors has blocks of FP8 only"
    if spec.activation is not None and spec.activation.static:
        return "static activations are not written"
    group = spec.block(weight.shape)[1]
    if str(spec.per).startswith("group") and weight.shape[1] % group:
        return f"groups of {group} do not divide {weight.shape[1]} columns"
    return ""


def slots_of(name: str, shape: tuple[int, int], spec: QuantSpec) -> list[Slot]:
    """Codes, scales, zero points, shape: the tensors of a weight."""
    (N, K), (rows, G) = shape, spec.scale_shape(shape)
    scale_shape = (1,) if spec.per == "tensor" else (rows, G)
    scale = Slot(f"{name}_scale", torch.float32, scale_shape)
    if spec.format == "int4":
        codes = Slot(f"{name}_packed", torch.int32, (N, -(-K // WORD)))
        zeros = [] if spec.symmetric else [Slot(f"{name}_zero_point", torch.int32, (-(-N // WORD), G))]
        return [codes, scale, *zeros, Slot(f"{name}_shape", torch.int64, (2,))]
    dtype = torch.float8_e4m3fn if spec.format == "float8_e4m3fn" else torch.int8
    zeros = [] if spec.symmetric else [Slot(f"{name}_zero_point", torch.int8, scale_shape)]
    return [Slot(name, dtype, shape), scale, *zeros]


def batch(weight: Found, cost: int) -> Batch:
    """Return the batch that writes a weight, which `refuses` has accepted."""
    spec, (N, K) = weight.spec, weight.shape
    assert spec is not None
    slots = slots_of(weight.name, weight.shape, spec)
    br = spec.block(weight.shape)[0]
    multiple = br if spec.format != "int4" else WORD  # zero points of eight rows share a word
    half = 128 if spec.format == "uint8" else 0

    def job(rows: slice) -> list[Piece]:
        q, s, z = weight.weight(rows)
        assert s is not None
        z = None if z is None else wide_zero_points(z, spec.row, s.shape[1])
        pieces: list[tuple[Slot, int, Tensor]] = [(slots[1], rows.start // br, s.float())]
        if spec.format == "int4":
            pieces.append((slots[0], rows.start, words_of(ops.unpack(q, "int4", K))))
            if z is not None:
                pieces.append((slots[2], rows.start // WORD, words_of(in_range(weight, z, 8, 0).T).T))
            if rows.start == 0:
                pieces.append((slots[-1], 0, torch.tensor([N, K], device="cpu")))
        else:
            pieces.append((slots[0], rows.start, q if not half else (q.to(torch.int16) - half).to(torch.int8)))
            if z is not None:
                pieces.append((slots[2], rows.start // br, in_range(weight, z, 128, half)))
        return [(slot.name, start * t[:1].numel() * t.element_size(), t.contiguous()) for slot, start, t in pieces]

    def done() -> Any:
        weight.forget()
        size = sum(slot.nbytes for slot in slots)
        return asdict(LayerReport(weight.name, weight.float_shape, str(spec), cost, size, math.inf))

    jobs: list[Job] = [functools.partial(job, rows) for rows in slabs(N, K, multiple if multiple < N else 1)]
    return Batch(slots, jobs, done, cost)


def in_range(weight: Found, zero_point: Tensor, limit: int, half: int) -> Tensor:
    """Zero points as int8, less ``half``.

    Raises
    ------
    ValueError
        For one that is no code of the format: compressed-tensors keeps them as codes.
    """
    z = zero_point - half
    if z.numel() and (int(z.min()) < -limit or int(z.max()) >= limit):
        got = f"{int(zero_point.min())}..{int(zero_point.max())}"
        raise ValueError(f"{weight.name} must have zero points that are codes of {weight.spec}, got {got}")
    return z.to(torch.int8)


def words_of(codes: Tensor) -> Tensor:
    """[R, ceil(K / 8)] int32 of int4 codes [R, K] int8: q + 8, the first in the lowest bits; padding is 0."""
    R, K = codes.shape
    padded = torch.zeros(R, -(-K // WORD) * WORD, dtype=torch.uint8, device="cpu")
    padded[:, :K] = (codes.to(torch.int16) + 8).to(torch.uint8)
    return (padded[:, 0::2] | padded[:, 1::2] << 4).contiguous().view(torch.int32)


def entry(written: Mapping[str, QuantSpec], floats: Sequence[str]) -> dict[str, Any] | None:
    """``quantization_config`` of config.json: a group for each spec, with the names of its modules."""
    if not written:
        return None
    groups: dict[str, Any] = {}
    for number, spec in enumerate(sorted({str(spec) for spec in written.values()})):
        names = [name for name, of in written.items() if str(of) == spec]
        groups[f"group_{number}"] = group_of(QuantSpec.parse(spec), [module_of(name) for name in names])
    formats = sorted({group["format"] for group in groups.values()})
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": [module_of(name) for name in floats],
    }


def module_of(name: str) -> str:
    return name.removesuffix(".weight")


def group_of(spec: QuantSpec, targets: list[str]) -> dict[str, Any]:
    activation = spec.activation
    return {
        "targets": targets,
        "weights": arguments(spec, dynamic=False),
        "input_activations": None if activation is None else arguments(activation, dynamic=True),
        "output_activations": None,
        "format": FORMATS[spec.format],
    }


def arguments(spec: QuantSpec, dynamic: bool) -> dict[str, Any]:
    kind, _, size = str(spec.per).partition(":")
    strategy = {"row": "token" if dynamic else "channel", "tile": "block"}.get(kind, kind)
    return {
        "num_bits": spec.row.bits,
        "type": "float" if spec.row.is_float else "int",
        "symmetric": bool(spec.symmetric),
        "strategy": strategy,
        "group_size": int(size) if kind == "group" else None,
        "block_structure": [int(size), int(size)] if kind == "tile" else None,
        "dynamic": dynamic,
        "actorder": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }
