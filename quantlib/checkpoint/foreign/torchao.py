"""torchao's safetensors: a tensor subclass ``P.weight`` is ``P._weight_qdata``, ``P._weight_scale`` and so on.

The metadata of the file says its class and attributes: Int8Tensor and IntxUnpackedToInt8Tensor, w = (q - z) * s, and
Float8Tensor, w = q * s, each with the blocks of ``block_size``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import torch

from quantlib.checkpoint.foreign.found import FLOATS, Found, Tensors, integer_weight, per
from quantlib.nn.functional import Weight
from quantlib.ops.check import dtype_name
from quantlib.spec import QuantSpec

INTEGERS = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
FLOAT = "Float8Tensor"


def find(tensors: Tensors) -> Iterator[Found]:
    for reader in tensors.readers:
        for name, text in reader.metadata.items():
            if f"{parts_of(name)}qdata" in tensors:
                yield weight_of(tensors, name, text)


def parts_of(name: str) -> str:
    """Return the prefix of the names of the parts of a tensor."""
    owner, _, last = name.rpartition(".")
    return f"{owner}._{last}_" if owner else f"_{last}_"


def weight_of(tensors: Tensors, name: str, text: str) -> Found:
    prefix = parts_of(name)
    try:
        told: dict[str, Any] = json.loads(text)
        kind, data, parts = told["_type"], told["_data"], told["_tensor_data_names"]
        block = data.get("block_size")
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"metadata {name} must describe a tensor of torchao, got {text[:80]!r}") from None
    if kind not in (*INTEGERS, FLOAT):
        raise ValueError(f"{name} must be {', '.join((*INTEGERS, FLOAT))} of torchao, got {kind}")
    if unknown := set(parts) - {"qdata", "scale", "zero_point"}:
        raise ValueError(f"{name} must have qdata, scale and zero_point, got {', '.join(sorted(unknown))}")
    qdata, scale, zero = (f"{prefix}{part}" for part in ("qdata", "scale", "zero_point"))
    codes_dtype = torch.float8_e4m3fn if kind == FLOAT else torch.int8
    N, K = tensors.get(qdata, (codes_dtype,), (None, None)).shape
    slot = tensors.slot(scale)
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(type(size) is int and size > 0 for size in block)
        or block[0] not in (1, N)
        or (block[0] == N > 1 and block[1] != K)
    ):
        raise ValueError(f"{name} must have a block_size of [1, group] or the whole, got {block!r}")
    whole = block[0] == N and block[1] == K and slot.shape.count(1) == len(slot.shape)
    G = 1 if whole else -(-K // block[1])
    rows_of_scale = 1 if whole else N
    if slot.dtype not in FLOATS or slot.nbytes // slot.dtype.itemsize != rows_of_scale * G:
        raise ValueError(f"{scale} must have {rows_of_scale} x {G} floats, got {list(slot.shape)}")
    has_zero = zero in tensors and bool(tensors.read(zero).any())
    granularity = "tensor" if whole else per(block[1], K)
    narrow = kind == INTEGERS[1] and str(data.get("target_dtype", {})).find("int8") < 0
    bits = 4 if narrow and bool(str(data.get("target_dtype", "")).find("int4") >= 0) else 8
    symmetric, scales = None if kind == FLOAT else not has_zero, dtype_name(slot.dtype)
    spec = QuantSpec("float8_e4m3fn" if kind == FLOAT else f"int{bits}", granularity, symmetric, scale=scales)

    def codes(rows: slice) -> Weight:
        q = tensors.rows(qdata, rows)
        s = tensors.read(scale).reshape(rows_of_scale, G)
        s = s if whole else s[rows]
        if kind == FLOAT:
            return Weight(q, s.contiguous())
        z = tensors.read(zero).reshape(rows_of_scale, G) if has_zero else torch.zeros_like(s)
        z = z if whole or not has_zero else z[rows]
        return integer_weight(q, s, z, bits, not has_zero, unsigned=False)

    dtype = slot.dtype
    named = tuple(f"{prefix}{part}" for part in parts)
    return Found(name, f"torchao {kind}", (N, K), dtype, named, spec, codes)
