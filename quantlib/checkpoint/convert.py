"""From a float model on disk to a quantized one and back, without building the model."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib.api import OnNonfinite, check_on_nonfinite, check_weight, describe
from quantlib.checkpoint import files
from quantlib.checkpoint.files import Batch, Reader, Slot
from quantlib.checkpoint.stored import KEY, Contents, Stored, as_stored
from quantlib.nn.functional import SOURCES, quantize_weight
from quantlib.report import Report
from quantlib.spec import QuantSpec

# Tensors named *.weight that belong to no linear layer: tables that are looked up.
EXCLUDE = ("*embed*", "*wte*", "*wpe*", "*relative_attention_bias*")
# What a copy of a model folder leaves out: the same weights in other containers, and what is no part of the model.
LEFT_OUT = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", ".git", ".cache")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What one safetensors file becomes, known from its header alone."""

    reader: Reader
    batches: list[Batch]
    contents: Contents
    converted: list[str]

    def cost(self, batch: Batch) -> int:
        """Bytes that are read to make ``batch``, its scales aside."""
        return sum(self.reader.slots[slot.name].nbytes for slot in batch.slots if slot.name in self.reader.slots)


def quantize_file(
    src: str | Path,
    dst: str | Path,
    spec: Any,
    *,
    exclude: Sequence[str] = (),
    on_nonfinite: OnNonfinite = "raise",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize the weights of a model on disk without building the model.

    Quantized is every tensor of two axes and a float dtype whose name is ``weight`` or ends in ``.weight``, except
    tables that are looked up (`EXCLUDE`) and what ``exclude`` matches. The bytes are those that `quantize_` makes of
    the same weights.

    Parameters
    ----------
    src : path
        A ``.safetensors`` file, or a model folder: its safetensors files are quantized each on its own, an index is
        brought up to date, everything else is copied except the same weights in other containers (`LEFT_OUT`).
    dst : path
        A ``.safetensors`` file or a folder, as ``src`` is. Appears whole, or not at all.
    spec : QuantSpec or what `QuantSpec.parse` takes
        An activation in it is left out: that is for the module which loads the weight to do.
    exclude : sequence of str
        Shell patterns of tensor names to leave as they are, such as ``lm_head*``.
    on_nonfinite : {"raise", "propagate"}
        As for `quantize_`.
    overwrite : bool
        Whether an existing ``dst`` is replaced, once the new one is complete.
    progress : callable (name, bytes done, bytes in all), optional
        Called after each tensor.

    Returns
    -------
    Report
        Each weight's bytes and signal-to-noise ratio, and the float matrices that were left as they are.

    Raises
    ------
    FileNotFoundError, FileExistsError, OSError
        For a ``src`` that is absent, a ``dst`` that is there, a disk that is full.
    TypeError
        For an ``exclude`` that is a single string.
    ValueError
        For an unknown spec, a file that is truncated, foreign or already quantized, a weight that is not finite
        (naming it and the row), and when there is nothing to quantize.
    """
    spec = QuantSpec.parse(spec).weight_only
    check_on_nonfinite(on_nonfinite)
    if isinstance(exclude, str):
        raise TypeError(f"exclude must be a sequence of patterns, got the string {exclude!r}")
    report = Report()

    def plan(reader: Reader) -> Plan:
        if Contents.of(reader).weights:
            raise ValueError(f"{reader.path} must hold float weights, got weights that are quantized already")
        batches, weights = [], {}
        for name, slot in reader.slots.items():
            why = why_not(slot, (*EXCLUDE, *exclude))
            if why is None:
                weights[name] = Stored(str(spec), slot.shape)
                batches.append(Batch(weights[name].slots(name), lambda name=name: project(reader, name)))  # type: ignore[misc]
            else:
                batches.append(as_it_is(reader, slot))
            if why:
                report.skipped[name] = why
        return Plan(reader, batches, Contents(weights), list(weights))

    def project(reader: Reader, name: str) -> list[Tensor]:
        x = reader.read(name)
        check_weight(f"{reader.path.name}: {name}", x, spec, on_nonfinite)
        weight = quantize_weight(x, spec)
        report.layers.append(describe(name, x, weight, spec))
        return as_stored(weight)

    convert(Path(src), Path(dst), plan, overwrite, progress)
    return report


def dequantize_file(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Any = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """The float model that the codes of ``src`` stand for: the inverse of `quantize_file`, up to rounding.

    Parameters
    ----------
    src, dst, overwrite, progress
        As for `quantize_file`.
    dtype : {"float32", "float16", "bfloat16"} or torch.dtype
        Of the weights that were codes; other tensors are copied.

    Returns
    -------
    list of str
        The names of those weights.

    Raises
    ------
    FileNotFoundError, FileExistsError, OSError, ValueError
        As for `quantize_file`; ValueError also when there are no codes.
    """
    target = getattr(torch, str(dtype).removeprefix("torch."), None)
    if target not in SOURCES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")

    def plan(reader: Reader) -> Plan:
        weights = Contents.of(reader).weights
        parts = {slot.name for name, stored in weights.items() for slot in stored.slots(name)}
        batches = [as_it_is(reader, slot) for name, slot in reader.slots.items() if name not in parts]
        for name, stored in weights.items():
            make = lambda name=name, stored=stored: [stored.values(reader, name, target)]  # noqa: E731
            batches.append(Batch([Slot(name, target, stored.shape)], make))
        return Plan(reader, batches, Contents(), list(weights))

    return convert(Path(src), Path(dst), plan, overwrite, progress)


def convert(
    src: Path, dst: Path, plan: Callable[[Reader], Plan], overwrite: bool, progress: Progress | None
) -> list[str]:
    """Every safetensors file of ``src`` as ``plan`` says into ``dst``; the names of what is converted."""
    sources = files.weights_of(src)
    if not src.is_dir() and (dst.suffix != ".safetensors" or dst.is_dir()):
        raise ValueError(f"dst must be a .safetensors file, as src is, got {dst}")
    here, there = src.resolve(), dst.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ValueError(f"dst must lie outside src, got {dst}")
    with ExitStack() as stack:
        plans = [plan(stack.enter_context(Reader(path))) for path in sources]
        converted = [name for p in plans for name in p.converted]
        if not converted:
            tensors = sum(len(p.reader.slots) for p in plans)
            raise ValueError(f"{src} must hold weights to convert, got none among {tensors} tensors")
        new = stack.enter_context(files.replacing(dst, overwrite))
        if src.is_dir():
            new.mkdir()
        done, total = 0, sum(p.cost(batch) for p in plans for batch in p.batches)
        for p in plans:

            def written(batch: Batch, p: Plan = p) -> None:
                nonlocal done
                done += p.cost(batch)
                if progress is not None:
                    progress(batch.slots[0].name, done, total)

            kept = {key: value for key, value in p.reader.metadata.items() if key != KEY}
            path = new / p.reader.path.name if src.is_dir() else new
            files.write(path, p.batches, {"format": "pt", **kept, **p.contents.metadata()}, written)
        if src.is_dir():
            copy_the_rest(src, new, plans)
    return converted


def copy_the_rest(src: Path, new: Path, plans: list[Plan]) -> None:
    """Everything of a model folder that is no weight, its index for the weights that the files hold now."""
    weight_map = {slot.name: p.reader.path.name for p in plans for batch in p.batches for slot in batch.slots}
    size = sum(batch.nbytes for p in plans for batch in p.batches)
    for path in sorted(src.iterdir()):
        if path.name.endswith(files.INDEX):
            index = files.read_index(path)
            listed = set(index["weight_map"].values())
            index["weight_map"] = {name: file for name, file in sorted(weight_map.items()) if file in listed}
            index["metadata"] = {**index.get("metadata", {}), "total_size": size}
            files.write_json(new / path.name, index)
        elif path.suffix != ".safetensors" and not any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            files.copy(path, new / path.name)


def why_not(slot: Slot, exclude: Sequence[str]) -> str | None:
    """Why a tensor stays as it is: "" for one that is no float matrix, None for one that is quantized."""
    if len(slot.shape) != 2 or slot.dtype not in (*SOURCES, torch.float64):
        return ""
    if slot.name.rpartition(".")[2] != "weight":
        return "not named *.weight"
    if slot.dtype == torch.float64:
        return "float64: float32, float16 or bfloat16 is quantized"
    pattern = next((p for p in exclude if fnmatch.fnmatchcase(slot.name, p)), None)
    return None if pattern is None else f"matches {pattern}"


def as_it_is(reader: Reader, slot: Slot) -> Batch:
    return Batch([slot], lambda: [reader.read(slot.name)])
