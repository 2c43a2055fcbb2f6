"""`plan`: the needs of a model, before a byte of it is loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from quantlib import formats
from quantlib.checkpoint.files import WORKERS
from quantlib.nn.functional import SLAB
from quantlib.plan import cache, compute, sizes
from quantlib.plan.devices import Device, device_of
from quantlib.plan.fakes import Peak, faked
from quantlib.plan.lines import Line, Plan, Section
from quantlib.plan.parallel import Parallel, layers_of
from quantlib.plan.parameters import Parameters, count
from quantlib.plan.runs import Inputs, forward_peak, lora_skeleton, qat_skeleton, step_peak
from quantlib.plan.sizes import Sizes, quantized_skeleton
from quantlib.plan.source import Source, on_meta, source_of
from quantlib.plan.training import Memory, Trained, memory_of, optimizer_of
from quantlib.plan.training import section as training_section
from quantlib.spec import QuantSpec

log = logging.getLogger(__name__)

TRAINS = ("full", "lora", "qat")
PRECISIONS = ("float32", "bfloat16", "autocast")
CONTEXT, RANK, UTILIZATION = 2048, 8, 0.4


@dataclass(frozen=True)
class Options:
    """The options of a plan; `plan` describes each."""

    to: tuple[QuantSpec, ...]
    context: int = CONTEXT
    batch: int = 1
    train: str | None = None
    optimizer: str = "adamw"
    precision: str | None = None
    checkpointing: bool = False
    rank: int = RANK
    parallel: Parallel = field(default_factory=Parallel)
    gpus: int = 1
    device: Device | None = None
    tokens: float | None = None
    utilization: float = UTILIZATION
    activations: bool = True

    def told(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        device = None if self.device is None else self.device.name
        words = {"to": [str(spec) for spec in self.to], "parallel": str(self.parallel), "device": device}
        return {**vars(self), **words}


def plan(
    model: Any = None,
    *,
    params: float | None = None,
    to: Iterable[Any] = ("W8A16", "W4A16"),
    context: int = CONTEXT,
    batch: int = 1,
    train: str | None = None,
    optimizer: str = "adamw",
    precision: str | None = None,
    checkpointing: bool = False,
    rank: int = RANK,
    gpus: int = 1,
    parallel: str | None = None,
    device: Any = None,
    tokens: float | None = None,
    utilization: float = UTILIZATION,
    inputs: Inputs | None = None,
    activations: bool = True,
) -> Plan:
    """Plan what a model takes: parameters, bytes in each format, cache, peaks of a forward and of training, compute.

    No weight is read and nothing is fetched. Bytes of weights are those that `quantize_file` or `save_quantized`
    write; peaks come of running the model on tensors without memory, by its own code.

    Parameters
    ----------
    model : nn.Module or path, optional
        A module on any device, a folder, a ``.safetensors`` file, or a ``config.json``.
    params : float, optional
        In place of a model: a number of parameters of which nothing else is known.
    to : sequence of QuantSpec or what `QuantSpec.parse` takes
        The formats.
    context, batch : int
        Tokens of a sequence, and sequences.
    train : {"full", "lora", "qat"}, optional
        Plan training: all parameters; `LoRALinear` adapters beside the first format of ``to``; `prepare_qat_` for it.
    optimizer : {"adamw", "adamw8bit", "sgd"}
    precision : {"float32", "bfloat16", "autocast"}, optional
        The dtype of what is trained, as the model is stored by default; autocast keeps float32 and multiplies
        in bfloat16.
    checkpointing : bool
        Whether activations of a layer are computed again in the backward pass.
    rank : int
        The rank of the adapters.
    gpus : int
        Devices.
    parallel : str, optional
        ``ddp`` (the default), ``zero1``, ``zero2`` or ``zero3``, with ``tp:N`` and ``pp:N`` beside it.
    device : str, optional
        A name of `quantlib.plan.devices`, or bytes: ``H100``, ``24GB``.
    tokens : float, optional
        To train on; 20 a parameter by default.
    utilization : float
        The share of a device's operations that training reaches.
    inputs : dict of str to Tensor, optional
        Arguments for ``model.forward``, of which shapes and dtypes count, for a model that takes no ``input_ids``.
    activations : bool
        Whether the model is run on tensors without memory: seconds for one of 8 billion parameters, and all but a
        fraction of the time that planning takes.

    Returns
    -------
    Plan
        Prints as a table; ``plan["weights"]["int8:row"].value``; ``as_dict()`` for JSON.

    Raises
    ------
    FileNotFoundError, OSError
        For a path that is absent, and a folder with neither config.json nor safetensors files.
    TypeError
        For a model that is neither a module nor a path.
    ValueError
        For an option out of range, naming it; a file that is foreign; sizes that do not divide devices or heads.

    Examples
    --------
    >>> found = plan(params=1e9)
    >>> found["weights"]["float32"].value, found["weights"]["bfloat16"].value
    (4000000000, 2000000000)
    """
    options = checked(
        to=to,
        context=context,
        batch=batch,
        train=train,
        optimizer=optimizer,
        precision=precision,
        checkpointing=checkpointing,
        rank=rank,
        gpus=gpus,
        parallel=parallel,
        device=device,
        tokens=tokens,
        utilization=utilization,
        activations=activations,
    )
    if (model is None) == (params is None):
        raise ValueError(f"model or params must be given, and not both, got {model!r} and {params!r}")
    if params is not None:
        return of_count(checked_number("params", params), options)
    return Planner(source_of(model), options, inputs).plan()


def checked(**given: Any) -> Options:
    """`Options` of the arguments of `plan`."""
    for name in ("context", "batch", "rank"):
        if isinstance(given[name], bool) or not isinstance(given[name], int) or given[name] < 1:
            raise ValueError(f"{name} must be a whole number >= 1, got {given[name]!r}")
    for name, known in (("train", (None, *TRAINS)), ("precision", (None, *PRECISIONS))):
        if given[name] not in known:
            raise ValueError(f"{name} must be one of {', '.join(filter(None, known))}, got {given[name]!r}")
    optimizer_of(given["optimizer"])
    if isinstance(given["to"], (str, QuantSpec)):
        given["to"] = (given["to"],)
    given["to"] = tuple(dict.fromkeys(QuantSpec.parse(spec) for spec in given["to"]))
    if not given["to"] and given["train"] in ("lora", "qat"):
        raise ValueError(f"to must name a format to train {given['train']} with, got none")
    given["parallel"] = Parallel.parse(given["parallel"], given["gpus"])
    given["device"] = None if given["device"] is None else device_of(given["device"])
    if given["tokens"] is not None:
        given["tokens"] = checked_number("tokens", given["tokens"])
    if not 0 < given["utilization"] <= 1:
        raise ValueError(f"utilization must be above 0 and at most 1, got {given['utilization']!r}")
    return Options(**given)


def checked_number(name: str, value: Any) -> int:
    """``value`` as a whole number of at least 1."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value < math.inf
    if not number or value != int(value):
        raise ValueError(f"{name} must be a whole number >= 1, such as 1e9, got {value!r}")
    return int(value)


def of_count(parameters: int, options: Options) -> Plan:
    """The plan of so many parameters of which nothing else is known."""
    shown = {str(dtype).removeprefix("torch."): sizes.cast(parameters, dtype) for dtype in BASELINES}
    shown |= {str(spec): sizes.of_count(parameters, spec) for spec in options.to}
    found = Parameters({"other": parameters})
    sections = [found.section(), sizes.section(shown, of_files=False, shapeless=True)]
    missing = ["cache and activations: a number of parameters has no layers"]
    needs = {name: s.weights for name, s in shown.items()}
    memory = None
    if options.train == "full":
        itemsize = 2 if options.precision == "bfloat16" else 4
        trained = Trained.of_count(parameters, itemsize)
        memory = memory_of(trained, optimizer_of(options.optimizer), options.parallel, on_gpu(options.device))
        sections.append(training_section(f"training, {options.train}", memory, parameters, options.parallel.data))
    elif options.train is not None:
        missing.append(f"training {options.train}: a number of parameters has no layers to put adapters or codes into")
    sections.append(compute.section(found, options.tokens, options.device, options.gpus, options.utilization))
    fits = [] if options.device is None else verdict(options.device, needs, memory)
    return Plan(f"{parameters:,} parameters", {"params": parameters, **options.told()}, sections, fits, missing)


BASELINES = (torch.float32, torch.float16, torch.bfloat16)


def on_gpu(device: Device | None) -> bool:
    return device is not None and bool(device.context)


def verdict(device: Device, needs: Mapping[str, int], memory: Memory | None) -> list[str]:
    """Say whether each need, and training, fits the device."""
    room = device.memory - device.context
    lines = []
    for name, need in [*needs.items(), *([(training_of(memory), memory.total)] if memory else [])]:
        word = "fits" if need <= room else "does not fit"
        lines.append(f"{name}: {word} {device.name}, {gigabytes(need)} of {gigabytes(room)}")
    return lines


def training_of(memory: Memory) -> str:
    known = "activations and temporaries" in memory.parts
    return "training" if known else "training, activations aside"


def gigabytes(n: float) -> str:
    return f"{n / 1e9:.2f} GB"


class Planner:
    """A source and the options; each quantity is found once."""

    def __init__(self, source: Source, options: Options, inputs: Inputs | None) -> None:
        self.source, self.options, self.inputs = source, options, inputs
        self.missing = list(source.missing)
        self.parameters = count(source.shapes, source.config)
        self._runs: dict[Any, Any] = {}
        self.deployed = dict.fromkeys(("as stored", *map(str, options.to))).keys()  # the float model has one dtype
        self.layers = cache.layers_of(source.config, options.context) if source.config else None
        if not options.activations and source.model is not None:
            self.missing.append("activations: they were not asked for")

    def plan(self) -> Plan:
        source, options = self.source, self.options
        sections = [self.parameters.section()]
        shown = self.sizes()
        sections.append(sizes.section(shown, bool(source.files), shapeless=False))
        if self.layers is not None:
            sections.append(cache.section(self.layers, options.context, options.batch))
        elif source.config:
            self.missing.append("cache: config.json does not say what a decoder keeps of a token")
        inference, needs = self.inference(shown)
        sections.append(inference)
        memory = None
        if options.train is not None:
            self.check_parallel()
            memory = self.training(options)
            if memory is not None:
                title = f"training, {options.train}, {options.optimizer}, {options.parallel}"
                sections.append(training_section(title, memory, self.parameters.total, options.gpus))
        sections.append(self.quantizing())
        spent = compute.section(self.parameters, options.tokens, options.device, options.gpus, options.utilization)
        if options.device is not None and options.device.bandwidth:
            spent = replace(spent, lines=[*spent.lines, *self.decoding(shown, options.device)])
        sections.append(spent)
        fits = self.fits(shown, needs, memory)
        title = f"{source.name}: {self.parameters.total:,} parameters"
        return Plan(title, {"model": source.name, **options.told()}, sections, fits, list(dict.fromkeys(self.missing)))

    def sizes(self) -> dict[str, Sizes]:
        """Bytes as stored, in the baselines, and in each format of the options."""
        total = self.parameters.total
        found = {}
        if self.source.nbytes:
            found["as stored"] = Sizes(floats=self.source.nbytes, parameters=total)
        found |= {str(dtype).removeprefix("torch."): sizes.cast(total, dtype) for dtype in BASELINES}
        return found | {str(spec): s for spec in self.options.to if (s := self.size_of(spec)) is not None}

    def size_of(self, spec: QuantSpec) -> Sizes | None:
        """Bytes in a format; None where the model cannot be had in it, with the reason in ``missing``."""
        key = ("size", spec)
        if key not in self._runs:
            try:
                if self.source.files:
                    self._runs[key] = sizes.of_files(self.source, spec)
                else:
                    self._runs[key] = sizes.of_state(self.fake(spec), self.parameters.total)
            except ValueError as error:
                self._runs[key] = None
                self.missing.append(f"{spec}: {error}")
        return self._runs[key]  # type: ignore[no-any-return]

    def fake(self, spec: QuantSpec | None) -> nn.Module:
        """The model in a format, of tensors without memory; the float model where that is None."""
        key = ("fake", spec)
        if key not in self._runs:
            assert self.source.model is not None
            skeleton = self.source.model if spec is None else quantized_skeleton(self.source.model, spec)
            self._runs[key] = faked(skeleton)
        found: nn.Module = self._runs[key]
        return found

    def forward(self, spec: QuantSpec | None) -> Peak | None:
        """The peak of a forward over the context in a format; of the float model where that is None."""
        key = ("forward", spec)
        if key not in self._runs:
            self._runs[key] = None
            options = self.options
            if self.source.model is not None and options.activations:

                def run() -> Peak:
                    return forward_peak(self.fake(spec), options.batch, options.context, self.inputs)

                self._runs[key] = self.tried("forward", run)
        return self._runs[key]  # type: ignore[no-any-return]

    def tried(self, what: str, run: Any) -> Any:
        """``run()``; None where the model cannot be run on fake tensors, with the reason in ``missing``."""
        try:
            return run()
        except Exception as error:  # the model's own code, on tensors without values
            log.debug("%s", what, exc_info=True)
            words = " ".join(str(error).split())[:200] or type(error).__name__
            self.missing.append(f"activations of {what}: {words}")
            return None

    def inference(self, shown: Mapping[str, Sizes]) -> tuple[Section, dict[str, int]]:
        """Weights, cache and the peak of a forward, in each format."""
        cached = self.cached(torch.bfloat16)
        specs: dict[str, QuantSpec | None] = {str(spec): spec for spec in self.options.to}
        lines, needs = [], {}
        for name in (name for name in shown if name in self.deployed):
            size = shown[name]
            peak = self.forward(specs.get(name))
            parts = {"weights": size.weights, "cache": cached, "activations": 0 if peak is None else peak.bytes}
            needs[name] = sum(parts.values())
            largest = "" if peak is None else f", the largest tensor in it {peak.largest:,} bytes"
            how = f"weights + cache in 16 bits + peak of a forward over the context on fake tensors{largest}"
            lines.append(Line(name, needs[name], "bytes", how, parts))
        return Section(f"inference, {self.options.batch} x {self.options.context:,} tokens", lines), needs

    def cached(self, dtype: torch.dtype | None) -> int:
        return sum(layer.nbytes(dtype) for layer in self.layers or ()) * self.options.batch

    def check_parallel(self) -> None:
        heads = self.source.config.get("num_attention_heads")
        self.options.parallel.check(layers_of(self.source.shapes), heads if type(heads) is int else None)

    def training(self, options: Options) -> Memory | None:
        """The memory of a rank; None where there is no module to train."""
        model = self.source.model
        if model is None:
            self.missing.append("training: no module of this architecture")
            return None
        autocast = torch.bfloat16 if options.precision == "autocast" else None
        key = ("train", options.train, options.to[:1], options.precision, options.checkpointing, options.rank)
        sharded = options.parallel.kind in ("zero2", "zero3") and options.parallel.data > 1
        if key not in self._runs:
            self._runs[key] = self.trained_skeleton(options)
        skeleton = self._runs[key]
        if skeleton is None:
            return None
        given: dict[str, Any] = {"checkpointing": options.checkpointing, "autocast": autocast}
        peaks = {}
        for keep in (True, False):
            if (key, keep) not in self._runs and (keep or sharded) and options.activations:

                def run(keep: bool = keep) -> Peak:
                    return step_peak(skeleton, options.batch, options.context, self.inputs, keep=keep, **given)

                self._runs[key, keep] = self.tried("a training step", run)
            found = self._runs.get((key, keep))
            peaks[keep] = None if found is None else found.bytes
        alone = peaks[False] if sharded else 0
        trained = Trained.of(skeleton, peaks[True], alone)
        return memory_of(trained, optimizer_of(options.optimizer), options.parallel, on_gpu(options.device))

    def trained_skeleton(self, options: Options) -> Any:
        """The module that is trained, on meta."""
        assert self.source.model is not None
        model = self.source.model
        if options.precision is not None:
            model = on_meta(model).to(torch.bfloat16 if options.precision == "bfloat16" else torch.float32)
        try:
            if options.train == "lora":
                return lora_skeleton(model, options.to[0], options.rank)
            if options.train == "qat":
                return qat_skeleton(model, options.to[0])
            return on_meta(model).requires_grad_(True)
        except ValueError as error:
            self.missing.append(f"training {options.train}: {error}")
            return None

    def quantizing(self) -> Section:
        """The memory it takes to quantize the model."""
        largest = max((math.prod(shape) for shape in self.source.shapes.values() if len(shape) > 1), default=0)
        itemsize = self.source.dtype.itemsize
        lines = []
        for spec in self.options.to[:1]:
            code = formats.get(spec.format).bytes_per_element
            lines.append(
                Line(
                    "quantize_",
                    round(self.source.nbytes + largest * code),
                    "bytes",
                    f"the model as it is + the codes of its largest tensor: one layer at a time is replaced; {spec}",
                )
            )
            row = max((shape[-1] for shape in self.source.shapes.values() if len(shape) > 1), default=0)
            slab = max(SLAB, row * (spec.block((1 << 30, row))[0] if spec.per and spec.per.startswith("tile") else 1))
            lines.append(
                Line(
                    "quantize_file",
                    round(WORKERS * slab * (itemsize + 4 + code)),
                    "bytes",
                    f"at most {WORKERS} threads x {slab:,} elements x ({itemsize} read + 4 decoded + {code:g} "
                    "written), whatever the size of the model",
                )
            )
        return Section("quantizing", lines)

    def decoding(self, shown: Mapping[str, Sizes], device: Device) -> list[Line]:
        """The bound on tokens a second in each format, from the bytes that a step reads."""
        cached, found = self.cached(torch.bfloat16), self.parameters
        return [
            compute.decode_bound(name, size.read_a_step(found), cached, self.options.batch, device)
            for name, size in shown.items()
            if name in self.deployed
        ]

    def fits(self, shown: Mapping[str, Sizes], needs: Mapping[str, int], memory: Memory | None) -> list[str]:
        """The verdict on the device, and the cheapest change that makes the model fit."""
        device = self.options.device
        if device is None:
            return []
        lines = verdict(device, needs, memory)
        room = device.memory - device.context
        if memory is not None and memory.total > room:
            lines.append(self.cheaper_training(device, room))
        elif memory is None and all(need > room for need in needs.values()):
            lines.append(self.cheaper_inference(device, room, shown))
        return lines

    def cheaper_inference(self, device: Device, room: int, shown: Mapping[str, Sizes]) -> str:
        """A format of 8 or 4 bits, a cache of 8 bits, a shorter context; or how many devices hold the weights."""
        saved = self.cached(torch.bfloat16) - self.cached(None)
        tried = [*self.options.to, *(QuantSpec.parse(name) for name in ("W8A16", "W4A16"))]
        smallest = None
        for spec in dict.fromkeys(tried):
            size, peak = self.size_of(spec), self.forward(spec)
            if size is None:
                continue
            need = size.weights + self.cached(torch.bfloat16) + (0 if peak is None else peak.bytes)
            if need <= room:
                return f"fits {device.name} with {spec}: {gigabytes(need)}"
            if need - saved <= room:
                return f"fits {device.name} with {spec} and a cache of 8 bits: {gigabytes(need - saved)}"
            smallest = min(filter(None, (smallest, size.weights)))
        if smallest is not None and smallest <= room:
            return (
                f"fits {device.name} with a shorter context than {self.options.context:,}: "
                f"weights alone {gigabytes(smallest)}"
            )
        least = smallest or min(size.weights for size in shown.values())
        return f"fits {math.ceil(least / room)} x {device.name} at the least, split: weights alone {gigabytes(least)}"

    def cheaper_training(self, device: Device, room: int) -> str:
        """The first of the changes that cost more and more which makes training fit."""
        best = None
        for words, options in self.changes():
            memory = self.training(options)
            if memory is not None and memory.total <= room:
                return f"fits {device.name} with {words}: {gigabytes(memory.total)}"
            if memory is not None and (best is None or memory.total < best):
                best = memory.total
        least = f": {gigabytes(best)} at the least" if best else ""
        return f"does not fit {device.name} with checkpointing, 8-bit states, sharding or adapters{least}"

    def changes(self) -> Sequence[tuple[str, Options]]:
        """The changes to try, from one that costs nothing to one that trains less."""
        now = self.options
        steps: list[tuple[str, dict[str, Any]]] = []
        if now.gpus > 1 and now.parallel.data > 1:
            for kind in ("zero1", "zero2", "zero3"):
                steps.append((kind, {"parallel": replace(now.parallel, kind=kind)}))
        found = [(words, replace(now, **change)) for words, change in steps]
        more: dict[str, Any] = steps[-1][1] if steps else {}
        names = [steps[-1][0]] if steps else []
        for word, change in (
            ("checkpointing", {"checkpointing": True}),
            ("adamw8bit", {"optimizer": "adamw8bit"}),
            ("bfloat16", {"precision": "bfloat16"}),
        ):
            if all(getattr(now, key) == value for key, value in change.items()) or (
                word == "bfloat16" and now.train != "full"
            ):
                continue
            more, names = more | change, [*names, word]
            found.append((" and ".join(names), replace(now, **more)))
        if now.train == "full":
            for scheme in ("W8A16", "W4A16"):
                spec = QuantSpec.parse(scheme)
                lora: dict[str, Any] = {"train": "lora", "to": (spec,), "checkpointing": True}
                found.append((f"lora over {scheme} and checkpointing", replace(now, **lora)))
        return found
