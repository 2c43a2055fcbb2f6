"""Convert a float model on disk to a quantized one and back, without building the model."""

from __future__ import annotations

import fnmatch
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlib import __version__, ops
from quantlib.api import check_on_nonfinite
from quantlib.checkpoint import choose, files
from quantlib.checkpoint.card import Card, base_of
from quantlib.checkpoint.files import Batch, Job, Piece, Reader, Slot
from quantlib.checkpoint.folder import CONFIG, Model
from quantlib.checkpoint.manifest import finish
from quantlib.checkpoint.publish import Scratch, keep_mode, remove, replacing, sync
from quantlib.checkpoint.stored import KEY, Contents, Stored, as_stored
from quantlib.measure import OnNonfinite, Sums, check_finite
from quantlib.nn.functional import SLAB, SOURCES, Weight, quantize_weight, slabs
from quantlib.ops.check import dtype_name
from quantlib.record import ENTRY, entry_of
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec, check_dynamic

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """The output for one safetensors file, known from its header alone."""

    reader: Reader
    batches: list[Batch]
    contents: Contents
    converted: list[str]

    def cost(self, batch: Batch) -> int:
        """Bytes that are read to make ``batch``, its scales aside."""
        if batch.cost is not None:
            return batch.cost
        return sum(self.reader.slots[slot.name].nbytes for slot in batch.slots if slot.name in self.reader.slots)

    @property
    def total(self) -> int:
        """Bytes that are read for all batches."""
        return sum(map(self.cost, self.batches))


def quantize_file(
    src: str | Path,
    dst: str | Path,
    spec: Any,
    *,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    on_nonfinite: OnNonfinite = "raise",
    overwrite: bool = False,
    resume: bool = True,
    join: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Quantize the weights of a model on disk without building the model.

    Quantized is every matrix of float32, float16 or bfloat16 whose name is ``weight`` or ends in ``.weight``, except
    embeddings, routers, heads, adapters and norms, which are known by their names, and what ``exclude`` matches. The
    bytes are those that `quantize_` makes of the same weights. Memory does not grow with the model: a few MiB of a
    tensor are there at a time.

    Parameters
    ----------
    src : path
        A ``.safetensors`` file, or a model folder: the files that its index names are quantized each on its own, or
        ``model.safetensors``, or all of them; the index is brought up to date, everything else is copied except
        copies of the same weights.
    dst : path
        A ``.safetensors`` file or a folder, as ``src`` is. Appears whole, or not at all.
    spec : QuantSpec or what `QuantSpec.parse` takes
        An activation in it is written down for the module which loads the weight.
    exclude, include : sequence of str
        Shell patterns of tensor names: to leave as they are, such as ``model.layers.0.*``, and to quantize although
        their names are those of a head or the like, such as ``lm_head*``. ``exclude`` counts where both match.
    on_nonfinite : {"raise", "propagate"}
        As for `quantize_`.
    overwrite : bool
        Whether an existing ``dst`` is replaced, once the new one is complete. Files in the folder that are no weights
        and that the new one does not have stay there.
    resume : bool
        Whether to go on with what the same call left that was killed, interrupted or met a full disk: its finished
        tensors are not made again, and the bytes are the same. The call is the same where ``src`` has not changed,
        and ``dst`` and all arguments before this one are equal.
    join : bool
        Whether to share the work, file by file, with other processes that make the same call, on this machine or on
        others with the same file system. One of them completes ``dst``; all return when it is there, each with the
        report of what it did, and that one with the whole report. Where `torch.distributed` is initialized, its
        processes begin together. Otherwise one that comes when ``dst`` is there gets a FileExistsError.
    progress : callable (name, bytes done, bytes in all), optional
        Called after each tensor, with an empty name after one that earlier work has made.

    Returns
    -------
    Report
        Each weight's bytes and signal-to-noise ratio; every float tensor of two or more axes that stays as it is, with
        its size and the reason; and the share of all parameters that are quantized.

    Raises
    ------
    FileNotFoundError, FileExistsError, OSError
        For a ``src`` that is absent, a ``dst`` that is there or that another process makes, a disk that is full.
    TypeError
        For an ``exclude`` or ``include`` that is a single string.
    ValueError
        For an unknown spec or one with static activations; for a file that is truncated, foreign or already
        quantized, by quantlib or by others; for a folder with links that leave it or files that are none; for a weight
        that is not finite (naming it and the row); and when there is nothing to quantize.
    """
    spec = QuantSpec.parse(spec)
    check_dynamic(spec)
    check_on_nonfinite(on_nonfinite)
    for name, patterns in (("exclude", exclude), ("include", include)):
        if isinstance(patterns, str):
            raise TypeError(f"{name} must be a sequence of patterns, got the string {patterns!r}")
    report = Report()
    planned: dict[str, Stored] = {}

    def plan(model: Model) -> list[Plan]:
        for reader in model.readers:
            if Contents.of(reader).weights:
                help = "convert_file quantizes them anew, dequantize_file gives floats"
                raise ValueError(
                    f"{reader.path} must hold float weights, got weights that are quantized already: {help}"
                )
        slots = model.slots
        choose.check_float(src, slots, model.config)
        layouts = choose.layouts_of(slots, model.config)
        reasons = choose.reasons(slots, model.config, include, exclude, layouts)
        planned.update(
            (name, choose.stored_as(slots[name], spec, layouts)) for name, why in reasons.items() if why is None
        )
        for name, stored in planned.items():
            for part in stored.slots(name)[1:]:
                if part.name in slots:
                    raise ValueError(f"{src} must leave {part.name} free for the codes of {name}, got a tensor there")
        for option, patterns in (("exclude", exclude), ("include", include)):
            if unused := [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in slots)]:
                log.warning("%s matches no tensor of %s: %s", option, src, ", ".join(unused))
        for name, why in reasons.items():
            slot = slots[name]
            size = math.prod(slot.shape)
            if why is None:
                report.quantized += size
                continue
            report.floats += size
            report.float_bytes += slot.nbytes
            if len(slot.shape) > 1:
                report.skipped[name], report.sizes[name] = why, size
        if None not in reasons.values():
            largest = sorted(report.sizes, key=lambda name: report.sizes[name], reverse=True)[:3]
            why = "; ".join(f"{name}: {report.skipped[name]}" for name in largest) or "no matrix"
            raise ValueError(f"{src} must hold weights to convert, got none among {len(slots)} tensors: {why}")
        return [plan_of(reader) for reader in model.readers]

    def plan_of(reader: Reader) -> Plan:
        batches, weights = [], {}
        for name, slot in reader.slots.items():
            if name in planned:
                weights[name] = stored = planned[name]
                rows, told = rows_of(reader, name, stored), f"{reader.path.name}: {name}"
                batches.append(Projection(name, stored, on_nonfinite, rows, told, slot.nbytes).batch)
            else:
                batches.append(files.copied(reader, slot))
        return Plan(reader, batches, Contents(weights), list(weights))

    job = {"spec": str(spec), "exclude": list(exclude), "include": list(include), "on_nonfinite": on_nonfinite}
    call = Call(Path(src), Path(dst), job, overwrite, resume, join, progress)

    def card(notes: list[Any]) -> Card:
        words = [
            f"--{option} '{p}'" for option, patterns in (("exclude", exclude), ("include", include)) for p in patterns
        ]
        words += ["--on-nonfinite propagate"] if on_nonfinite == "propagate" else []
        command = " ".join(["quantlib quantize IN OUT --to", str(spec), *words])
        return Card(str(spec), command, layers_of(notes), report.quantized, report.floats, skipped=report.skipped)

    report.layers += layers_of(convert(call, plan, None if spec.scaled else spec.format, card))
    return report


def dequantize_file(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: Any = "float32",
    overwrite: bool = False,
    resume: bool = True,
    join: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """The float model that the codes of ``src`` stand for: the inverse of `quantize_file`, up to rounding.

    Parameters
    ----------
    src, dst, overwrite, resume, join, progress
        As for `quantize_file`.
    dtype : {"float32", "float16", "bfloat16"} or torch.dtype
        The dtype of the weights that were codes; other tensors are copied. ``config.json`` gets this ``dtype``.

    Returns
    -------
    list of str
        The names of those weights.

    Raises
    ------
    FileNotFoundError, FileExistsError, OSError, ValueError
        As for `quantize_file`; ValueError also when there are no codes of quantlib.
    """
    target = getattr(torch, str(dtype).removeprefix("torch."), None)
    if target not in SOURCES:
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype!r}")

    names: list[str] = []

    def plan(model: Model) -> list[Plan]:
        plans = [plan_of(reader) for reader in model.readers]
        names.extend(name for plan in plans for name in plan.converted)
        if not any(plan.converted for plan in plans) and (found := choose.codes_of_others(model.slots, model.config)):
            raise ValueError(f"{src} must be a model that quantize_file or save_quantized wrote, got {found}")
        return plans

    def plan_of(reader: Reader) -> Plan:
        weights = Contents.of(reader).weights
        parts = {slot.name for name, stored in weights.items() for slot in stored.slots(name)}
        batches = [files.copied(reader, slot) for name, slot in reader.slots.items() if name not in parts]
        for name, stored in weights.items():
            batches.append(Batch([Slot(name, target, stored.shape)], values(reader, name, stored, target)))
        return Plan(reader, batches, Contents(), list(weights))

    job = {"dtype": str(target)}
    call = Call(Path(src), Path(dst), job, overwrite, resume, join, progress)
    command = (
        f"python -c \"import quantlib.checkpoint as c; c.dequantize_file('IN', 'OUT', dtype='{dtype_name(target)}')\""
    )
    convert(call, plan, dtype_name(target), lambda notes: Card("", command))
    return names


def layers_of(notes: list[Any]) -> list[LayerReport]:
    """The reports of weights among what batches said of themselves."""
    return [LayerReport(**{**note, "shape": tuple(note["shape"])}) for note in notes if note]


@dataclass(frozen=True)
class Projection:
    """A float weight that becomes codes, a slab of rows of one of its matrices [N, K] at a time."""

    name: str
    stored: Stored
    on_nonfinite: OnNonfinite
    rows: Callable[[int, slice], Tensor]  # values of some rows of the matrix of an expert
    told: str  # its name in errors
    size: int  # bytes that it takes where it comes from
    sums: dict[tuple[int, int], Sums] = field(default_factory=dict)  # expert, first row of a slab -> its sums

    @cached_property
    def spec(self) -> QuantSpec:
        return QuantSpec.parse(self.stored.spec)

    @property
    def batch(self) -> Batch:
        slots, (E, N, K, _) = self.stored.slots(self.name), self.stored.stack
        multiple, elements = self.spec.block((N, K))[0] if self.spec.scaled else 1, SLAB
        if self.stored.stack.transposed:  # rows of the matrix are columns of the file, which has them apart
            elements = max(SLAB, COLUMNS * K)
        jobs: list[Job]
        if (
            self.spec.per == "tensor" and self.spec.search == "minmax" and not self.spec.hadamard
        ):  # which read all at once
            jobs = [partial(self._with_one_scale, e) for e in range(E)]
        else:
            parts = list(slabs(N, K, min(multiple, max(N, 1)), elements))
            jobs = [partial(self._slab, e, rows) for e in range(E) for rows in parts]
        return Batch(slots, jobs, lambda: self._report(sum(slot.nbytes for slot in slots)))

    def _slab(self, e: int, rows: slice) -> list[Piece]:
        x = self.rows(e, rows)
        return self._pieces(e, rows, x, quantize_weight(x, self.spec))

    def _with_one_scale(self, e: int) -> Iterator[Piece]:
        """Quantize all rows in two passes over the file: the first finds the extremes, which alone decide the scale."""
        parts = list(slabs(*self.stored.matrix)) if math.prod(self.stored.shape) else []
        extremes = [torch.stack(self.rows(e, rows).aminmax()) for rows in parts]
        if not extremes:
            return
        _, scale, zero_point = quantize_weight(torch.cat(extremes).view(1, -1), self.spec)
        for rows in parts:
            x = self.rows(e, rows)
            block = self.spec.block(x.shape)
            assert scale is not None
            codes = ops.quantize(x, scale, self.spec.format, block=block, zero_point=zero_point)
            yield from self._pieces(e, rows, x, Weight(codes, scale, zero_point))

    def _pieces(self, e: int, rows: slice, x: Tensor, weight: Weight) -> list[Piece]:
        """Codes and scales of some rows, each with the byte that it begins at; the rows are counted."""
        sums = self.sums[e, rows.start] = Sums()
        sums.add(x, weight, self.spec)
        if self.on_nonfinite == "raise" and not math.isfinite(sums.noise):
            self._check(e)
        N, K = self.stored.matrix
        first = rows.start // self.spec.block((N, K))[0]
        first += e * self.spec.scale_shape((N, K))[0] if self.spec.scaled else 0
        starts = (e * N + rows.start, first, first)
        names = (self.name, f"{self.name}_scale", f"{self.name}_zero_point")
        return [
            (name, start * (t[:1].numel() * t.element_size()), t)
            for name, start, t in zip(names, starts, as_stored(weight), strict=False)
        ]

    def _check(self, e: int) -> None:
        parts = ((rows.start, self.rows(e, rows)) for rows in slabs(*self.stored.matrix))
        check_finite(f"{self.told} of expert {e}" if self.stored.is_experts else self.told, parts, self.spec)

    def _report(self, size: int) -> dict[str, Any]:
        total = Sums()
        for start in sorted(self.sums):
            total.signal += self.sums[start].signal
            total.noise += self.sums[start].noise
        self.sums.clear()
        return asdict(LayerReport(self.name, self.stored.shape, str(self.spec), self.size, size, total.snr_db))


COLUMNS = 512  # of a matrix [K, N] that are read at a time: as many values lie beside each other in the file


def rows_of(reader: Reader, name: str, stored: Stored) -> Callable[[int, slice], Tensor]:
    """The function that reads some rows of the matrix [N, K] of an expert from a float tensor of a file."""
    _, N, K, _ = stored.stack

    def rows_of_expert(e: int, rows: slice) -> Tensor:
        if stored.stack.transposed:
            return reader.columns(name, slice(e * K, (e + 1) * K), rows).t().contiguous()
        return reader.part(name, e * N + rows.start, (rows.stop - rows.start, K))

    return rows_of_expert


def values(reader: Reader, name: str, stored: Stored, dtype: torch.dtype) -> list[Job]:
    """Jobs that make the values of the codes of a file."""
    E, N, K, _ = stored.stack
    block = QuantSpec.parse(stored.spec).block((N, K))

    def job(e: int, rows: slice) -> list[Piece]:
        y = stored.rows(reader, name, rows, dtype, e)
        y = y.t().contiguous() if stored.stack.transposed else y
        return [(name, (e * N + rows.start) * K * dtype.itemsize, y)]

    parts = list(slabs(N, K, block[0] if block[0] < N else 1))
    if stored.stack.transposed:  # what is one block of the file is made at once: a whole matrix
        parts = [slice(0, N)]
    return [partial(job, e, rows) for e in range(E) for rows in parts]


@dataclass(frozen=True)
class Call:
    """The arguments of `quantize_file` and the like.

    Attributes
    ----------
    job : dict
        Everything that decides the bytes of the output, besides the source.
    """

    src: Path
    dst: Path
    job: dict[str, Any]
    overwrite: bool = False
    resume: bool = True
    join: bool = False
    progress: Progress | None = None


def entry_of_plans(plans: list[Plan]) -> dict[str, Any] | None:
    """The ``quantization_config`` of the weights that quantlib quantized."""
    stored = {name: stored for p in plans for name, stored in p.contents.weights.items()}
    if not any(s.scaled for s in stored.values()):  # a float weight like any other, for every library
        return None
    return entry_of({name: {"spec": s.spec, "shape": s.shape} for name, s in stored.items()})


def convert(
    call: Call,
    plan: Callable[[Model], list[Plan]],
    dtype: str | None,
    card: Callable[[list[Any]], Card],
    entry: Callable[[list[Plan]], dict[str, Any] | None] = entry_of_plans,
) -> list[Any]:
    """The model at ``call.src`` as ``plan`` says into ``call.dst``; what its batches said of themselves, in order.

    ``dtype`` is what ``config.json`` tells of the weights from now on. ``card`` makes of the notes what is to be told,
    ``entry`` of the plans the ``quantization_config``.
    """
    src, dst = call.src, call.dst
    with Model.open(src) as model:
        folder = src.is_dir()
        if not folder and (dst.suffix != ".safetensors" or dst.is_dir()):
            raise ValueError(f"dst must be a .safetensors file, as src is, got {dst}")
        if folder and dst.suffix == ".safetensors" and not dst.is_dir():
            raise ValueError(f"dst must be a folder, as src is, got {dst}, which is the name of a file")
        here, there = src.resolve(), dst.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ValueError(f"dst must lie outside src, got {dst}")
        rest = list(model.rest()) if folder else []
        plans = plan(model)
        if not any(p.converted for p in plans):
            raise ValueError(f"{src} must hold weights to convert, got none among {len(model.slots)} tensors")
        job = json.dumps({"version": __version__, **call.job, "source": model.identity(rest)}, sort_keys=True)
        with replacing(dst, call.overwrite, folder, job, resume=call.resume, join=call.join) as scratch:
            if call.join and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.barrier()
            checksums: dict[str, str] = {}
            notes = write_files(plans, scratch, call.progress, folder, checksums)
            if not scratch.last():
                return notes
            for p in plans:
                keep_mode(p.reader.path, scratch.new / p.reader.path.name if folder else scratch.new)
            if folder:
                clear(scratch.new, [p.reader.path.name for p in plans])
                copy_the_rest(model, rest, scratch.new, plans, dtype, entry(plans))
                told = replace(card(notes), **base_of(model.path, model.config))
                told.bytes_before = sum(slot.nbytes for slot in model.slots.values())
                told.bytes_after = sum(batch.nbytes for p in plans for batch in p.batches)
                finish(scratch.new, told, checksums)
                for source, target in reversed([(model.path, Path()), *(pair for pair in rest if pair[0].is_dir())]):
                    sync(scratch.new / target)
                    keep_mode(source, scratch.new / target)
    return notes


def write_files(
    plans: list[Plan], scratch: Scratch, progress: Progress | None, folder: bool, checksums: dict[str, str]
) -> list[Any]:
    """Every file that no other process writes; the notes of their batches. Their checksums come into ``checksums``."""
    done, total = 0, sum(p.total for p in plans)
    notes: dict[int, list[Any]] = {}
    waiting = list(range(len(plans)))
    while waiting:
        for k in list(waiting):
            p = plans[k]
            journal = scratch.claim(p.reader.path.name)
            if journal is None:
                continue
            with journal:
                notes[k] = []

                def written(batch: Batch, note: Any, before: bool, p: Plan = p, notes: list[Any] = notes[k]) -> None:
                    nonlocal done
                    done += p.cost(batch)
                    notes.append(note)
                    if progress is not None:
                        progress("" if before else batch.slots[0].name, done, total)

                kept = {key: value for key, value in p.reader.metadata.items() if key != KEY}
                path = scratch.new / p.reader.path.name if folder else scratch.new
                metadata = {"format": "pt", **kept, **p.contents.metadata()}
                if scratch.join and journal.checksum is not None:  # by another process, which may move it any time
                    done += p.total
                    notes[k], checksums[path.name] = journal.notes, journal.checksum
                else:
                    checksums[path.name] = files.write(path, p.batches, metadata, written, journal)
            waiting.remove(k)
        if waiting:
            if scratch.done:
                break
            time.sleep(0.05)
    return [note for k in sorted(notes) for note in notes[k]]


def clear(folder: Path, names: list[str]) -> None:
    """Remove all but the files ``names``: an earlier process may have been killed while it copied the rest."""
    for path in folder.iterdir():
        if path.name not in names:
            remove(path)


def copy_the_rest(
    model: Model,
    rest: list[tuple[Path, Path]],
    new: Path,
    plans: list[Plan],
    dtype: str | None,
    entry: dict[str, Any] | None,
) -> None:
    """Copy everything of a model folder that is not a weight, with an index of the weights that the files hold now."""
    for path, target in rest:
        if path.is_dir():
            (new / target).mkdir()
        elif str(target) == CONFIG and (config := config_of(model, dtype, entry)) is not None:
            files.write_bytes(new / target, text_of(config))
            keep_mode(path, new / target)
        else:
            files.copy(path, new / target)
    if model.index is not None:
        path, index = model.index
        weight_map = {slot.name: p.reader.path.name for p in plans for batch in p.batches for slot in batch.slots}
        size = sum(batch.nbytes for p in plans for batch in p.batches)
        index = {**index, "metadata": {**index["metadata"], "total_size": size}}
        index["weight_map"] = dict(sorted(weight_map.items()))
        files.write_bytes(new / path.name, text_of(index))
        keep_mode(path, new / path.name)


def config_of(model: Model, dtype: str | None, entry: dict[str, Any] | None) -> dict[str, Any] | None:
    """``config.json`` with ``dtype`` for its dtypes of weights, and with what is quantized; None where nothing changes.

    transformers finds out from it that `quantlib.hf` loads the model.
    """
    try:
        config: dict[str, Any] = json.loads(text_of(model.config))  # a copy
    except (ValueError, RecursionError):
        return None
    waiting = [config]
    while waiting:
        part = waiting.pop()
        for key in choose.CONFIGS:
            if isinstance(part.get(key), dict):
                del part[key]
        for key in ("dtype", "torch_dtype"):
            if dtype is not None and isinstance(part.get(key), str):
                part[key] = ("torch." if part[key].startswith("torch.") else "") + str(dtype)
        waiting += [value for value in part.values() if isinstance(value, dict)]
    if entry is not None:
        config[ENTRY] = entry
    return None if config == model.config else config


def text_of(value: dict[str, Any]) -> bytes:
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode()
