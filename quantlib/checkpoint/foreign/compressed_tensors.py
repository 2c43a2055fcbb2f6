"""compressed-tensors (llm-compressor, vLLM): w = (q - z) * s, a scale for a tensor, a row, a group or a block.

naive, int-quantized and float-quantized: ``weight`` I8 or F8_E4M3 [N, K], ``weight_scale``, ``weight_zero_point`` I8.
pack-quantized: ``weight_packed`` [N, ceil(K * bits / 32)] int32 of q + 2^(bits - 1) from the lowest bits,
``weight_shape``, and ``weight_zero_point`` packed along N. ``weight_g_idx`` [K] says the group of each column where
act-order changed it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.foreign.found import FLOATS, Found, Tensors, bits_of, integer_weight, per
from quantlib.nn.functional import Weight
from quantlib.ops.check import dtype_name
from quantlib.spec import QuantSpec

METHOD = "compressed-tensors"
CODES = (torch.int8, torch.float8_e4m3fn)
LEFT = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")  # static activations


def find(tensors: Tensors) -> Iterator[Found]:
    said = tensors.quantization(METHOD)
    for prefix in tensors.named("weight_packed"):
        if tensors.slot(f"{prefix}weight_packed").dtype == torch.int32:
            yield packed(tensors, prefix, scheme_of(said, prefix))
    for prefix in tensors.named("weight_scale"):
        name = f"{prefix}weight"
        if name in tensors and tensors.slot(name).dtype in CODES:
            yield plain(tensors, prefix, scheme_of(said, prefix))


def scheme_of(said: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
    """The group of config.json that a module belongs to; empty where it is not known."""
    module = prefix.removesuffix(".")
    groups = said.get("config_groups")
    found: Mapping[str, Any] = {}
    for group in groups.values() if isinstance(groups, dict) else ():
        targets = group.get("targets") if isinstance(group, dict) else None
        for target in targets if isinstance(targets, list) else ():
            text = str(target)
            try:
                named = re.match(text[3:], module) if text.startswith("re:") else text == module
            except re.error:
                named = False
            if named:  # a name counts more than a class
                return group  # type: ignore[no-any-return]
            if text == "Linear":
                found = found or group
    return found


def part_of(scheme: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = scheme.get(key)
    return part if isinstance(part, dict) else {}


def activation_of(scheme: Mapping[str, Any]) -> str | None:
    """Dynamic activations with a scale for each token; None for any other."""
    told = part_of(scheme, "input_activations")
    if told.get("dynamic") is not True or told.get("strategy") != "token" or told.get("num_bits") != 8:
        return None
    if told.get("type") == "float":
        return "float8_e4m3fn:row"
    return "int8:row" if told.get("symmetric", True) else None


class Scales:
    """``weight_scale`` and the shape of the blocks that share one."""

    def __init__(self, tensors: Tensors, prefix: str, shape: tuple[int, int], scheme: Mapping[str, Any]) -> None:
        self.tensors, self.name, self.shape = tensors, f"{prefix}weight_scale", shape
        slot, (N, K) = tensors.slot(self.name), shape
        weights = part_of(scheme, "weights")
        block = weights.get("block_structure")
        size = 1
        for axis in slot.shape:
            size *= axis
        self.dtype = slot.dtype
        if slot.dtype not in FLOATS:
            raise ValueError(f"{self.name} must be a float, got {slot.dtype}")
        if size == 1 and (N != 1 or weights.get("strategy") == "tensor"):
            self.per, self.rows, self.columns = "tensor", 1, 1
        elif slot.shape in ((N,), (N, 1)):
            self.per, self.rows, self.columns = "row", N, 1
        elif len(slot.shape) == 2 and slot.shape[0] == N and weights.get("strategy") != "block":
            self.rows, self.columns = slot.shape
            group = weights.get("group_size")
            self.per = per(group if type(group) is int and group > 0 else -(-K // max(self.columns, 1)), K)
        elif isinstance(block, list) and len(block) == 2 and block[0] == block[1] and len(slot.shape) == 2:
            self.rows, self.columns = slot.shape
            self.per = f"tile:{block[0]}"
        else:
            raise ValueError(
                f"{self.name} must have a scale for a tensor, a row, a group or a square block, got {list(slot.shape)} "
                f"for {list(shape)}"
            )
        self.br = QuantSpec("int8", self.per).block(shape)[0]
        if (self.rows, self.columns) != QuantSpec("int8", self.per).scale_shape(shape):
            raise ValueError(f"{self.name} must fit {self.per} of {list(shape)}, got {list(slot.shape)}")

    def __call__(self, rows: slice, whole: Tensor | None = None) -> Tensor:
        """[R / br, G] of ``rows``, or the same of another tensor of this shape."""
        t = self.tensors.read(self.name) if whole is None else whole
        t = t.reshape(self.rows, self.columns)
        return t if self.per == "tensor" else t[rows.start // self.br : -(-rows.stop // self.br)]


def check_zero_point(tensors: Tensors, zero: str, scheme: Mapping[str, Any]) -> None:
    """Check that integers have the zero points that ``scheme`` tells of."""
    if zero not in tensors and part_of(scheme, "weights").get("symmetric") is False:
        raise ValueError(f"{zero} must be there for weights that config.json calls not symmetric, got no such tensor")


def plain(tensors: Tensors, prefix: str, scheme: Mapping[str, Any]) -> Found:
    name, zero = f"{prefix}weight", f"{prefix}weight_zero_point"
    N, K = tensors.get(name, CODES, (None, None)).shape
    scales = Scales(tensors, prefix, (N, K), scheme)
    is_float = tensors.slot(name).dtype == torch.float8_e4m3fn
    parts = [name, scales.name]
    affine = False
    if not is_float:
        check_zero_point(tensors, zero, scheme)
    if zero in tensors:
        parts.append(zero)
        affine = not is_float and bool(tensors.read(zero).any())
    bits = 4 if not is_float and part_of(scheme, "weights").get("num_bits") == 4 else 8

    def codes(rows: slice) -> Weight:
        q, s = tensors.rows(name, rows), scales(rows)
        if is_float:
            return Weight(q, s.contiguous())
        z = scales(rows, tensors.read(zero)) if affine else torch.zeros_like(s)
        return integer_weight(q, s, z, bits, not affine, unsigned=False)

    format, symmetric = ("float8_e4m3fn", None) if is_float else (f"int{bits}", not affine)
    spec = QuantSpec(format, scales.per, symmetric, scale=dtype_name(scales.dtype))
    return described(tensors, prefix, scheme, Found(name, METHOD, (N, K), scales.dtype, tuple(parts), spec, codes))


def packed(tensors: Tensors, prefix: str, scheme: Mapping[str, Any]) -> Found:
    name, zero, g_idx = (f"{prefix}weight_{part}" for part in ("packed", "zero_point", "g_idx"))
    of_shape = f"{prefix}weight_shape"
    tensors.get(of_shape, (torch.int64, torch.int32), (2,))
    N, K = (int(size) for size in tensors.read(of_shape))
    words = tensors.get(name, (torch.int32,), (None, None)).shape[1]
    told = part_of(scheme, "weights").get("num_bits")
    bits = told if type(told) is int else next((b for b in (4, 8, 2) if -(-K * b // 32) == words), 0)
    if bits not in (2, 4, 8) or N < 1 or K < 1:
        raise ValueError(f"{name} must be of 2, 4 or 8 bits, got {bits} for [{N}, {K}]")
    tensors.get(name, (torch.int32,), (N, -(-K * bits // 32)))
    scales = Scales(tensors, prefix, (N, K), scheme)
    parts = [name, scales.name, of_shape]
    half, affine = 1 << (bits - 1), False
    check_zero_point(tensors, zero, scheme)
    if zero in tensors:
        parts.append(zero)
        affine = True

    def zero_points() -> Tensor:
        """[N, G] as they are, of either sign."""
        if tensors.slot(zero).dtype == torch.int8:
            return tensors.read(zero)
        if tensors.slot(zero).shape != (-(-N * bits // 32), scales.columns):
            raise ValueError(f"{zero} must be packed along N = {N}, got {list(tensors.slot(zero).shape)}")
        return bits_of(tensors.read(zero).T, bits).flatten(1)[:, :N].T.to(torch.int16) - half

    affine = affine and bool(zero_points().any())

    def integers(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        q = bits_of(tensors.rows(name, rows), bits).flatten(1)[:, :K].to(torch.int16) - half
        s = scales(rows)
        return q, s, scales(rows, zero_points().contiguous()) if affine else torch.zeros_like(s)

    def codes(rows: slice) -> Weight:
        q, s, z = integers(rows)
        return integer_weight(q, s, z, bits, not affine, unsigned=False)

    dtype = scales.dtype
    spec: QuantSpec | None = QuantSpec(
        "int4" if bits <= 4 else "int8", scales.per, not affine, scale=dtype_name(scales.dtype)
    )
    weight = f"{prefix}weight"
    if g_idx in tensors:
        parts.append(g_idx)
        tensors.get(g_idx, (torch.int32, torch.int64), (K,))
        columns, group = tensors.read(g_idx).long(), QuantSpec("int8", scales.per).block((N, K))[1]
        if not torch.equal(columns, torch.arange(K, device="cpu") // group) and bool((columns >= 0).all()):
            if bool((columns >= scales.columns).any()):
                raise ValueError(f"{g_idx} must be of 0..{scales.columns - 1}, got {int(columns.max())}")

            def values(rows: slice) -> Tensor:
                q, s, z = integers(rows)
                return (q - z.to(torch.int16)[:, columns]).to(dtype) * s[:, columns]

            why = "act-order: g_idx gives neighbouring columns scales of different groups"
            return Found(weight, f"{METHOD}, act-order", (N, K), dtype, tuple(parts), values=values, why=why)
    return described(tensors, prefix, scheme, Found(weight, METHOD, (N, K), dtype, tuple(parts), spec, codes))


def described(tensors: Tensors, prefix: str, scheme: Mapping[str, Any], found: Found) -> Found:
    """Return ``found`` with the activation of its scheme, or with a note on what is lost of it."""
    static = [f"{prefix}{part}" for part in LEFT if f"{prefix}{part}" in tensors]
    activation, why = activation_of(scheme), ""
    assert found.spec is not None
    spec = found.spec if activation is None else QuantSpec.parse(f"{found.spec}@{activation}")
    if static or (part_of(scheme, "input_activations") and activation is None):
        spec, why = found.spec, "its activations are not quantized any more: only dynamic ones a token are kept"
    return replace(found, spec=spec, why=why, parts=(*found.parts, *static))
