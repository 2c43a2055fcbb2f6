"""Convert quantized models on disk from the format of one library to another, a tensor at a time: `convert_file`."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from quantlib.checkpoint import choose, compressed
from quantlib.checkpoint.card import Card
from quantlib.checkpoint.convert import Call, Plan, Progress, Projection, convert, entry_of_plans, layers_of
from quantlib.checkpoint.files import Batch, Job, Piece, Reader, Slot, copied
from quantlib.checkpoint.folder import Model
from quantlib.checkpoint.foreign import Found, Tensors, find, own
from quantlib.checkpoint.foreign.found import Experts
from quantlib.checkpoint.stored import Contents, Stored, as_stored
from quantlib.nn.functional import SOURCES, slabs
from quantlib.ops.check import dtype_name
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec, check_dynamic

log = logging.getLogger(__name__)

OURS, THEIRS = "quantlib", "compressed-tensors"
DTYPES = tuple(map(dtype_name, SOURCES))


def convert_file(
    src: str | Path,
    dst: str | Path,
    to: Any,
    *,
    overwrite: bool = False,
    resume: bool = True,
    join: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Turn a model on disk that is quantized, by quantlib or by others, into one of another format.

    Read are compressed-tensors (naive, int-, float- and pack-quantized), GPTQ, AWQ, bitsandbytes (int8, nf4, fp4), FP8
    blocks (``weight_scale_inv``), MXFP4 (experts of gpt-oss), HQQ, torchao's safetensors, and quantlib's own. Codes,
    scales and zero points stay as they are where the format that is written holds them. What it cannot hold becomes a
    float of the dtype that its own library decodes it to, and the report says why.

    Parameters
    ----------
    src, dst, overwrite, resume, join, progress
        As for `quantize_file`.
    to : "quantlib", "compressed-tensors", a float dtype, or what `QuantSpec.parse` takes
        The output format. A float dtype gives the values, as their own libraries decode them, rounded to it. A spec
        quantizes these values anew; the report has the error.

    Returns
    -------
    Report
        Each weight with its signal-to-noise ratio to the values that its own library decodes: infinite where codes and
        scales are kept.

    Raises
    ------
    FileNotFoundError, FileExistsError, OSError
        As for `quantize_file`.
    ValueError
        For a model without quantized weights, one of which some codes cannot be read, tensors that do not fit, and an
        unknown ``to``.
    """
    target = Target.of(to)
    report = Report()
    lost: Counter[str] = Counter()
    written: dict[str, QuantSpec] = {}  # of compressed-tensors

    def plan(model: Model) -> list[Plan]:
        tensors = Tensors(model.readers, model.config)
        found = find(model.readers, model.config)
        check(src, model, found, target)
        of_reader: dict[int, list[Found]] = {}
        for weight in found:
            of_reader.setdefault(id(tensors.owner[weight.parts[0]]), []).append(weight)
        taken = {part for weight in found for part in weight.parts}
        for name, slot in model.slots.items():
            if name not in taken and slot.dtype in choose.FLOATS:
                report.floats += math.prod(slot.shape)
                report.float_bytes += slot.nbytes
                if len(slot.shape) > 1:
                    report.skipped[name], report.sizes[name] = "a float in the source", math.prod(slot.shape)
        return [plan_of(reader, of_reader.get(id(reader), []), taken) for reader in model.readers]

    def plan_of(reader: Reader, found: list[Found], taken: set[str]) -> Plan:
        batches = [copied(reader, slot) for name, slot in reader.slots.items() if name not in taken]
        weights: dict[str, Stored] = {}
        for weight in found:
            cost = sum(tensors_of[part] for part in weight.parts)
            batch, spec, why = target.batch(weight, cost)
            batches.append(batch)
            if why:
                lost[f"{weight.method}: {why}"] += 1
            size = math.prod(weight.float_shape)
            if spec is None:
                report.floats += size
                report.float_bytes += batch.nbytes
                report.skipped[weight.name], report.sizes[weight.name] = why or "asked for", size
            else:
                report.quantized += size
                written[weight.name] = spec
                if target.to != THEIRS:
                    weights[weight.name] = weight.stored(spec)
        return Plan(reader, batches, Contents(weights), [weight.name for weight in found])

    tensors_of: dict[str, int] = {}

    def planned(model: Model) -> list[Plan]:
        tensors_of.update({name: slot.nbytes for name, slot in model.slots.items()})
        return plan(model)

    def entry(plans: list[Plan]) -> dict[str, Any] | None:
        if target.to != THEIRS:
            return entry_of_plans(plans)
        return compressed.entry(written, [name for name in report.skipped if name.endswith("weight")])

    def card(notes: list[Any]) -> Card:
        spec = "" if target.dtype is not None else target.word(written)
        load = LOAD if target.to == THEIRS else ""
        command = f"quantlib convert IN OUT --to {target.to}"
        layers, told = layers_of(notes), [f"{why} ({count} weights)" for why, count in lost.items()]
        return Card(
            spec, command, layers, report.quantized, report.floats, skipped=report.skipped, notes=told, load=load
        )

    call = Call(Path(src), Path(dst), {"to": target.to, "from": "codes"}, overwrite, resume, join, progress)
    report.layers += layers_of(convert(call, planned, target.dtype_word, card, entry))
    report.notes += [f"{why} ({count} weights)" for why, count in lost.items()]
    return report


LOAD = """from transformers import AutoModel  # or AutoModelForCausalLM; pip install compressed-tensors

model = AutoModel.from_pretrained("PATH OR NAME OF THIS")"""


@dataclass(frozen=True)
class Target:
    """The format to write."""

    to: str
    dtype: torch.dtype | None = None
    spec: QuantSpec | None = None

    @classmethod
    def of(cls, to: Any) -> Target:
        text = str(to).removeprefix("torch.")
        if text in (OURS, THEIRS):
            return cls(text)
        if text in DTYPES:
            return cls(text, dtype=getattr(torch, text))
        try:
            spec = QuantSpec.parse(to)
        except ValueError as error:
            raise ValueError(
                f"to must be {OURS}, {THEIRS}, {', '.join(DTYPES)} or a spec, got {text!r}: {error}"
            ) from None
        check_dynamic(spec)
        return cls(str(spec), spec=spec)

    @property
    def dtype_word(self) -> str | None:
        return None if self.dtype is None else dtype_name(self.dtype)

    def word(self, written: dict[str, QuantSpec]) -> str:
        """Return the name of the target on a card."""
        specs = sorted({str(spec) for spec in written.values()})
        return f"{', '.join(specs)}{' (compressed-tensors)' if self.to == THEIRS else ''}"

    def batch(self, weight: Found, cost: int) -> tuple[Batch, QuantSpec | None, str]:
        """Return the batch that writes ``weight``, its spec (None for a float), and what is lost."""
        if self.spec is not None:
            return requantized(weight, self.spec, cost), self.spec, ""
        if self.dtype is not None:
            return floats(weight, self.dtype, cost), None, ""
        if weight.experts is not None and self.to == OURS:
            return kept_experts(weight, weight.experts, cost), weight.experts.spec, ""
        if weight.spec is None:
            return floats(weight, weight.dtype, cost), None, weight.why
        if self.to == OURS:
            return kept(weight, cost), weight.spec, weight.why
        if why := compressed.refuses(weight):
            return floats(weight, weight.dtype, cost), None, why
        return compressed.batch(weight, cost), weight.spec, weight.why


def check(src: object, model: Model, found: list[Found], target: Target) -> None:
    """Check that every quantized tensor is understood, and that there is one."""
    taken = {part for weight in found for part in weight.parts}
    rest = {name: slot for name, slot in model.slots.items() if name not in taken}
    if (left := choose.codes_of_others(rest, {})) is not None:
        raise ValueError(f"{src} must hold codes that quantlib reads, got {left}")
    if not found:
        raise ValueError(f"{src} must hold weights that are quantized, got none: quantize_file is for floats")
    if target.to == OURS and all(weight.method.startswith(own.METHOD) for weight in found):
        raise ValueError(f"{src} must be of another library to become quantlib's, got quantlib's own")


@contextmanager
def forgetting(weight: Found) -> Iterator[None]:
    """Free the data that was read of a weight if the block raises."""
    try:
        yield
    except BaseException:
        weight.forget()
        raise


def row_slabs(weight: Found) -> list[slice]:
    (N, K), spec = weight.shape, weight.spec
    return list(slabs(N, K, spec.block(weight.shape)[0] if spec is not None and spec.scaled else 1))


def floats(weight: Found, dtype: torch.dtype, cost: int) -> Batch:
    """The values of a weight."""
    K = weight.shape[1]

    def job(rows: slice) -> list[Piece]:
        with forgetting(weight):
            y = weight.decoded(rows, dtype).contiguous()
            if weight.values is not None and weight.experts is None and not y.isfinite().all():
                raise ValueError(f"{weight.name} must have values that are finite, got {float(y[~y.isfinite()][0]):g}")
            return [(weight.name, rows.start * K * dtype.itemsize, y)]

    jobs: list[Job] = [functools.partial(job, rows) for rows in row_slabs(weight)]
    return Batch([Slot(weight.name, dtype, weight.float_shape)], jobs, weight.forget, cost)


def kept(weight: Found, cost: int) -> Batch:
    """Codes, scales and zero points as they are."""
    assert weight.spec is not None
    spec = weight.spec
    slots = weight.stored(spec).slots(weight.name)
    br = spec.block(weight.shape)[0]

    def job(rows: slice) -> list[Piece]:
        with forgetting(weight):
            made = as_stored(weight.weight(rows))
        starts = (rows.start, rows.start // br, rows.start // br)[: len(made)]
        return [
            (slot.name, start * (t[:1].numel() * t.element_size()), t.contiguous())
            for slot, start, t in zip(slots, starts, made, strict=True)
        ]

    def done() -> Any:
        weight.forget()
        size = sum(slot.nbytes for slot in slots)
        return asdict(LayerReport(weight.name, weight.float_shape, str(spec), cost, size, math.inf))

    return Batch(slots, [functools.partial(job, rows) for rows in row_slabs(weight)], done, cost)


def kept_experts(weight: Found, experts: Experts, cost: int) -> Batch:
    """Codes, scales and zero points of every matrix as they are."""
    spec, (N, K), E = experts.spec, experts.stored.matrix, experts.stored.stack.E
    slots = experts.stored.slots(weight.name)
    br = spec.block((N, K))[0] if spec.scaled else 1
    blocks = -(-N // br)

    def job(e: int, rows: slice) -> list[Piece]:
        made = as_stored(experts.codes(e, rows))
        first = e * blocks + rows.start // br
        starts = (e * N + rows.start, first, first)[: len(made)]
        return [
            (slot.name, start * (t[:1].numel() * t.element_size()), t.contiguous())
            for slot, start, t in zip(slots, starts, made, strict=True)
        ]

    def done() -> Any:
        size = sum(slot.nbytes for slot in slots)
        return asdict(LayerReport(weight.name, weight.float_shape, str(spec), cost, size, math.inf))

    return Batch(slots, [functools.partial(job, e, rows) for e in range(E) for rows in slabs(N, K, br)], done, cost)


def requantized(weight: Found, spec: QuantSpec, cost: int) -> Batch:
    """The values of a weight, quantized anew; rows are read as its own blocks are cut."""
    br = weight.spec.block(weight.shape)[0] if weight.spec is not None and weight.spec.scaled else 1
    N, experts = weight.shape[0], weight.experts
    if experts is not None:
        br = experts.spec.block(experts.stored.matrix)[0] if experts.spec.scaled else 1
        N = experts.stored.matrix[0]

    def rows_of(e: int, rows: slice) -> torch.Tensor:
        first, last = rows.start // br * br, min(-(-rows.stop // br) * br, N)
        whole = slice(first, last)
        x = weight.decoded(whole, torch.float32) if experts is None else experts.rows(e, whole, torch.float32)
        return x[rows.start - first : rows.stop - first].contiguous()

    made = Projection(weight.name, weight.stored(spec), "raise", rows_of, weight.name, cost)
    inner = made.batch

    def done() -> Any:
        weight.forget()
        return inner.done()

    return Batch(inner.slots, inner.jobs, done, cost)
