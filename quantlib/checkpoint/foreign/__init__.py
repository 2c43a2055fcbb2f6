"""Weights that other libraries quantized, read as codes and scales of quantlib where its formats hold them.

One file a format; its ``find(tensors)`` gives a `Found` for each of its weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantlib.checkpoint.files import Reader
from quantlib.checkpoint.foreign import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, mxfp4, own, torchao
from quantlib.checkpoint.foreign.found import Found, Tensors

__all__ = ["FORMATS", "Found", "Tensors", "find"]

FORMATS = {
    "GPTQ": gptq,
    "AWQ": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "FP8": fp8,
    "MXFP4": mxfp4,
    "torchao": torchao,
    "HQQ": hqq,
}


def find(readers: list[Reader], config: Mapping[str, Any]) -> list[Found]:
    """Every weight of a model that quantlib or one of `FORMATS` quantized.

    Raises
    ------
    ValueError
        For tensors that are not as their format has them, and where two formats claim the same tensor.
    """
    tensors = Tensors(readers, config)
    found = list(own.find(tensors))
    owner = {part: weight.name for weight in found for part in weight.parts}
    tensors = Tensors(readers, config, hidden=owner)
    for module in FORMATS.values():
        for weight in module.find(tensors):
            for part in weight.parts:
                if part in owner:
                    raise ValueError(f"{part} must belong to one weight, got {owner[part]} and {weight.name}")
                owner[part] = weight.name
            found.append(weight)
    return found
