"""bitsandbytes: int8 rows, w = q * SCB / 127, and 4-bit codebooks in blocks of the flat weight, w = map[q] * absmax.

int8: ``weight`` I8 [N, K], ``SCB`` [N] float32. 4 bits: ``weight`` U8 [N * K / 2, 1], the high nibble first,
``weight.absmax`` a float for each block, ``weight.quant_map`` [16], and ``weight.quant_state.bitsandbytes__nf4``, JSON
as bytes. With double quantization absmax is U8, and nested_quant_map[absmax] * nested_absmax + nested_offset is meant.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlib import formats, ops
from quantlib.checkpoint.foreign.found import FLOATS, Found, Once, Tensors
from quantlib.nn.functional import Weight
from quantlib.spec import QuantSpec

BYTE = (torch.uint8,)


def find(tensors: Tensors) -> Iterator[Found]:
    for prefix in tensors.named("SCB"):
        yield rows_of(tensors, prefix)
    for name in tensors:
        if match := re.fullmatch(r"(.*)\.quant_state\.bitsandbytes__(nf4|fp4)", name):
            yield blocks_of(tensors, match[1], match[2], name)


def rows_of(tensors: Tensors, prefix: str) -> Found:
    """LLM.int8(): a scale for each row."""
    name, scale = f"{prefix}weight", f"{prefix}SCB"
    N, K = tensors.get(name, (torch.int8,), (None, None)).shape
    tensors.get(scale, (torch.float32,), (N,))
    parts = [name, scale]
    if (form := f"{prefix}weight_format") in tensors:
        if tensors.read(form).any():
            raise ValueError(f"{form} must be 0, rows, got {tensors.read(form).tolist()}")
        parts.append(form)

    def codes(rows: slice) -> Weight:
        return Weight(tensors.rows(name, rows), (tensors.rows(scale, rows) / 127)[:, None].contiguous())

    why = "its scale SCB / 127 is rounded to float32: values differ by at most 2^-22 of themselves"
    spec = QuantSpec("int8", "row")
    return Found(name, "bitsandbytes int8", (N, K), torch.float16, tuple(parts), spec, codes, why=why)


def blocks_of(tensors: Tensors, name: str, kind: str, state: str) -> Found:
    """nf4 and fp4."""
    try:
        told: dict[str, Any] = json.loads(bytes(tensors.read(state).tolist()))
        block, shape, dtype = told["blocksize"], told["shape"], getattr(torch, told["dtype"])
        (N, K), nested = shape, "nested_offset" in told
        if not (type(block) is type(N) is type(K) is int and block > 0 and min(N, K) > 0 and N * K % 2 == 0):
            raise ValueError
        if nested and not (type(told["nested_blocksize"]) is int and told["nested_blocksize"] > 0):
            raise ValueError
        float(told.get("nested_offset", 0.0))
        assert dtype in FLOATS
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError, RecursionError):
        raise ValueError(f"{state} must be JSON with blocksize, dtype and a shape [N, K], got something else") from None
    blocks = -(-N * K // block)
    tensors.get(name, BYTE, (N * K // 2, 1))
    tensors.get(f"{name}.absmax", BYTE if nested else (torch.float32,), (blocks,))
    tensors.get(f"{name}.quant_map", (torch.float32,), (16,))
    parts = [name, f"{name}.absmax", f"{name}.quant_map", state]
    if nested:
        tensors.get(f"{name}.nested_absmax", (torch.float32,), (-(-blocks // told["nested_blocksize"]),))
        tensors.get(f"{name}.nested_quant_map", (torch.float32,), (256,))
        parts += [f"{name}.nested_absmax", f"{name}.nested_quant_map"]

    def scales() -> Tensor:
        """A float32 for each block."""
        absmax: Tensor = tensors.read(f"{name}.absmax")
        if not nested:
            return absmax
        outer = torch.arange(blocks, device="cpu") // told["nested_blocksize"]
        of_code: Tensor = tensors.read(f"{name}.nested_quant_map")[absmax.int()]
        y: Tensor = of_code * tensors.read(f"{name}.nested_absmax")[outer] + told["nested_offset"]
        return y

    absmax = Once(scales)

    def nibbles(rows: slice) -> Tensor:
        """Codes [R, K] uint8."""
        first, last = rows.start * K, rows.stop * K
        packed = tensors.rows(name, slice(first // 2, -(-last // 2))).flatten()
        codes = torch.stack((packed >> 4, packed & 15), 1).flatten()
        return codes[first % 2 : first % 2 + last - first].view(-1, K)

    def values(rows: slice) -> Tensor:
        table = tensors.read(f"{name}.quant_map")
        flat = torch.arange(rows.start * K, rows.stop * K, device="cpu") // block
        return (table[nibbles(rows).int()] * absmax()[flat].view(-1, K)).to(dtype)

    def codes(rows: slice) -> Weight:
        return Weight(ops.pack(nibbles(rows), "nf4"), absmax().view(N, -1)[rows].contiguous())

    found = Found(name, f"bitsandbytes {kind}", (N, K), dtype, tuple(parts), forget=absmax.forget, values=values)
    why = "its codebook"
    if tensors.read(f"{name}.quant_map").tolist() == list(formats.NF4):
        if K % block == 0:
            return replace(found, spec=QuantSpec("nf4", f"group:{block}"), codes=codes)
        why = "blocks of the flat weight that no row begins with"
    return replace(found, why=why)
