"""Bytes of a model in a format, exactly as `quantize_file` or `save_quantized` write them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlib.api import quantize_
from quantlib.checkpoint import choose
from quantlib.checkpoint.files import Slot, header_of
from quantlib.checkpoint.model import cut, state_of
from quantlib.checkpoint.stored import KEY, Contents, Stored
from quantlib.plan.lines import Line, Section
from quantlib.plan.parameters import KINDS, Parameters, kind_of
from quantlib.plan.source import Source, on_meta
from quantlib.report import unwarned
from quantlib.spec import QuantSpec

SHARD = 5_000_000_000  # bytes of a file that `save_quantized` writes, unless told otherwise


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model.

    Attributes
    ----------
    codes, scales, zero_points : int
        Bytes of the weights that are quantized.
    floats : int
        Bytes of everything else.
    headers : int
        Bytes of the files beside the tensors.
    quantized, parameters : int
        The number of quantized parameters, and of all.
    """

    codes: int = 0
    scales: int = 0
    zero_points: int = 0
    floats: int = 0
    headers: int = 0
    quantized: int = 0
    parameters: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)  # bytes of each of `KINDS`, where they are known

    @property
    def weights(self) -> int:
        """Bytes of the tensors, which a loaded model takes."""
        return self.codes + self.scales + self.zero_points + self.floats

    @property
    def files(self) -> int:
        """Bytes of the safetensors files."""
        return self.weights + self.headers

    def read_a_step(self, found: Parameters) -> int:
        """Bytes that one step of decoding reads: all but tables that are looked up, and experts that are not chosen."""
        if not self.kinds:
            return self.weights * found.multiplied // max(found.total, 1)
        idle = self.kinds.get("experts", 0) * (found.experts - found.chosen) // found.experts
        return self.weights - idle - (0 if found.tied else self.kinds.get("embedding", 0))

    @property
    def coverage(self) -> float:
        """The share of the parameters that are quantized."""
        return self.quantized / self.parameters if self.parameters else math.nan


def add(contents: Contents, slots: Iterable[Slot], headers: int, parameters: int) -> Sizes:
    """`Sizes` of the tensors of files."""
    parts: dict[str, str] = {}  # name of a tensor -> what it is
    for name, stored in contents.weights.items():
        for slot, part in zip(stored.slots(name), ("codes", "scales", "zero_points"), strict=False):
            parts[slot.name] = part
    total = dict.fromkeys(("codes", "scales", "zero_points", "floats"), 0)
    kinds = dict.fromkeys(KINDS, 0)
    for slot in slots:
        total[parts.get(slot.name, "floats")] += slot.nbytes
        kinds[kind_of(re.sub(r"_(codes|scale|zero_point)$", "", slot.name), slot.shape)] += slot.nbytes
    quantized = sum(math.prod(stored.shape) for stored in contents.weights.values())
    return Sizes(**total, headers=headers, quantized=quantized, parameters=parameters, kinds=kinds)


def of_files(source: Source, spec: QuantSpec, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Sizes:
    """Return the sizes of what `quantize_file` makes of the files of ``source``.

    Raises
    ------
    ValueError
        For files that hold codes already, and where no tensor would be quantized.
    """
    if source.quantized:
        raise ValueError(f"model must hold float weights to be planned as {spec}, got {source.quantized}")
    everything = {name: slot for file in source.files for name, slot in file.slots.items()}
    layouts = choose.layouts_of(everything, source.config)
    reasons = choose.reasons(everything, source.config, include, exclude, layouts)
    if None not in reasons.values():
        raise ValueError(f"model must hold weights to quantize, got none among {len(reasons)} tensors")
    headers, weights, slots = 0, dict[str, Stored](), list[Slot]()
    for file in source.files:
        found = {n: slot for n, slot in file.slots.items() if reasons.get(n, "no float") is None}
        chosen = {n: choose.stored_as(slot, spec, layouts) for n, slot in found.items()}
        made = [part for n, slot in file.slots.items() for part in (chosen[n].slots(n) if n in chosen else [slot])]
        kept = {key: value for key, value in file.metadata.items() if key != KEY}
        headers += len(header_of(made, {"format": "pt", **kept, **Contents(chosen).metadata()}, file.name)[0])
        weights |= chosen
        slots += made
    return add(Contents(weights), slots, headers, sum(math.prod(shape) for shape in source.shapes.values()))


def quantized_skeleton(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of a model on meta with modules of codes."""
    new = on_meta(model)
    with unwarned():  # the plan has the share of the parameters that are quantized
        quantize_(new, spec)
    return new


def of_state(skeleton: nn.Module, parameters: int) -> Sizes:
    """Return the sizes of what `save_quantized` writes for a `faked` model with modules of codes."""
    batches, contents = state_of(skeleton)
    headers = 0
    for shard in cut(batches, SHARD):
        slots = [slot for batch in shard for slot in batch.slots]
        names = {slot.name for slot in slots}
        part = Contents(
            {name: stored for name, stored in contents.weights.items() if name in names},
            {alias: name for alias, name in contents.tied.items() if name in names},
        )
        headers += len(header_of(slots, {"format": "pt", **part.metadata()}, "the model")[0])
    return add(contents, [slot for batch in batches for slot in batch.slots], headers, parameters)


def of_count(parameters: int, spec: QuantSpec) -> Sizes:
    """Sizes of so many parameters, all quantized, whose shapes are not known: rows of one group each."""
    kind, _, size = (spec.per or "").partition(":")
    columns = int(size) ** (2 if kind == "tile" else 1) if kind in ("group", "tile") else 0
    codes = parameters * max(spec.row.bits, 8) // 8 // spec.row.per_byte
    if not columns:
        return Sizes(codes, quantized=parameters, parameters=parameters)
    blocks = -(-parameters // columns)
    zero_points = 0 if spec.symmetric else spec.row.columns(blocks) * max(spec.row.bits, 8) // 8
    return Sizes(codes, blocks * spec.scale_bytes, zero_points, quantized=parameters, parameters=parameters)


def cast(parameters: int, dtype: torch.dtype) -> Sizes:
    """Sizes of so many parameters of ``dtype``, none of them quantized."""
    return Sizes(floats=parameters * dtype.itemsize, parameters=parameters)


def section(sizes: Mapping[str, Sizes], of_files: bool, shapeless: bool) -> Section:
    """The bytes in each format."""
    where = "quantize_file writes of these headers" if of_files else "save_quantized writes after quantize_"
    lines = []
    for name, s in sizes.items():
        if not s.quantized:
            formula = "parameters x bytes of one, buffers and headers aside"
        elif shapeless:
            formula = "parameters x bits / 8, and the scales of groups; scales of rows need shapes and are left out"
        else:
            formula = f"codes, scales, zero points and floats exactly as {where}; headers are {s.headers:,} bytes more"
        parts = {"codes": s.codes, "scales": s.scales, "zero points": s.zero_points, "floats": s.floats}
        covered = f"{name} ({s.coverage:.1%})" if s.quantized and not shapeless else name
        lines.append(Line(covered, s.weights, "bytes", formula, {k: v for k, v in parts.items() if s.quantized}))
    return Section("weights", lines)
