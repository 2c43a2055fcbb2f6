"""`calibrate`: `quantize_` with codes that suit the inputs of the layers of a model."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantlib.api import (
    Filter,
    account,
    check_root,
    experts_of,
    places_of,
    put,
    quantized_type,
    reasons_to_skip,
    share_weight,
    stacks_of,
    weight_of,
)
from quantlib.calibration.experts import expert_name, is_told, rounded_stack, stack_of
from quantlib.calibration.finished import Finished, Layer, key_of
from quantlib.calibration.fold import fold_
from quantlib.calibration.gptq import Rounded, gptq
from quantlib.calibration.stages import Gram, calls_of, run
from quantlib.measure import check_weight, describe, describe_experts
from quantlib.nn.experts import QuantExperts
from quantlib.nn.functional import Weight, rotated
from quantlib.nn.module import QuantModule
from quantlib.ops.check import one_of
from quantlib.record import record_
from quantlib.report import Report, aligned
from quantlib.spec import QuantSpec, check_dynamic, check_unrotated

METHODS = ("gptq", "awq", "smoothquant", "sinkhorn", "awq+gptq", "smoothquant+gptq", "sinkhorn+gptq")


@dataclass(frozen=True)
class LayerCalibration:
    """The errors of a layer before and after calibration, as shares of the energy of its output.

    Of a weight of experts they are those of all of its matrices; ``idle`` are the experts that no token reached, which
    have the codes of `quantize_`.
    """

    name: str
    spec: str
    tokens: int
    loss: float
    rounding: float  # the loss of `quantize_`
    damping: float
    idle: tuple[int, ...] = ()


@dataclass
class CalibrationReport:
    """The report of `calibrate`.

    Attributes
    ----------
    report : Report
        As that of `quantize_`.
    layers : list of LayerCalibration
        The layers with codes that suit their inputs.
    data_free : dict
        Name of a layer that has the codes of `quantize_` -> why. Experts that no token reached are here too, each set
        under the name of its weight.
    scaled : list of str
        The layers whose input channels were scaled.
    biased : list of str
        The layers whose biases took the mean of the error.
    """

    report: Report
    layers: list[LayerCalibration] = field(default_factory=list)
    data_free: dict[str, str] = field(default_factory=dict)
    scaled: list[str] = field(default_factory=list)
    biased: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [("layer", "format", "tokens", "loss", "of rounding", "damping")]
        rows += [
            (x.name, x.spec, f"{x.tokens:,}", f"{x.loss:.5f}", f"{x.rounding:.5f}", f"{x.damping:g}")
            for x in self.layers
        ]
        lines = aligned(rows, left=2)
        if self.data_free:
            lines += ["", *aligned([("without calibration", "because"), *self.data_free.items()], left=2)]
        return "\n".join(lines)


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    inputs: Iterable[Any] | None,
    spec: Any = "W4A16",
    method: str = "gptq",
    *,
    filter_fn: Filter | None = None,
    damping: float = 0.01,
    search: bool = True,
    correct_bias: bool = True,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> CalibrationReport:
    """Quantize the ``nn.Linear`` layers and the experts of ``model`` in place, with codes that suit its inputs.

    The format, the bytes and the speed are those of `quantize_`; only the choice of scales and codes differs. A block
    of the model sees what the blocks before it give once they are quantized. The activations of one block and the sums
    of its layers' inputs, K x K float32, are in memory at a time. Each expert is rounded for its own tokens, in modules
    whose computation transformers describes; it needs sums of its own.

    Parameters
    ----------
    model : nn.Module
        As for `quantize_`, with its weights.
    inputs : iterable, or None
        Batches that the model is called with: a tensor, a tuple of arguments, or a mapping of them. A thousand tokens
        of text like that of later use do for a language model. sinkhorn needs none: with None the ``dummy_inputs`` of
        transformers show that the model computes what it did.
    spec : QuantSpec, what `QuantSpec.parse` takes, or a mapping of names of layers to these
        A mapping, as `assign` gives it, leaves layers that it does not name as they are.
    method : {"gptq", "awq", "smoothquant", "sinkhorn", "awq+gptq", "smoothquant+gptq", "sinkhorn+gptq"}
        gptq: columns of a weight are rounded one by one, and the error of each is moved into those that are left. awq
        and smoothquant: channels of the inputs are scaled, and the scales folded into the norm or the layer before,
        for the least error of the weights, or for activations that are easier to quantize; then weights are rounded.
        sinkhorn: the same by the weights alone, whose columns and rows get more equal spreads. They need a model whose
        norms and layers have the names of Llama's; sinkhorn scales the values of BERT's attention too.
    filter_fn : callable (module, name) -> bool, optional
        Which of the layers; all of them by default.
    damping : float
        The amount added to the diagonal of the sum of x x^T, as a share of its mean. If the sum is not positive
        definite more is added, and the report says how much.
    search : bool
        Look for the scale that leaves the least error, weighted by the energy of each input; else that of `quantize_`.
    correct_bias : bool
        Add the mean of a layer's error over the inputs to its bias, in place, where method is or ends with gptq. A
        layer without a bias gets none, and one whose bias belongs to another layer too keeps it.
    folder : path, optional
        Where finished layers are kept. A run that was interrupted and is called once more, with the same model, inputs
        and options, goes on from there to the same bytes. The folder may be deleted afterwards.
    progress : bool, optional
        A bar on stderr with the loss of each layer; by default on a terminal.

    Returns
    -------
    CalibrationReport
        Losses beside those of rounding. Layers and experts that no token reached, experts of other kinds, and weights
        without a scale have the codes of `quantize_`, and are named with the reason.

    Raises
    ------
    TypeError
        For a model that is not a module, or inputs that are no batches.
    ValueError
        For inputs that are empty, of another float dtype or not finite, or None where the method or the model needs
        some, an unknown spec, method or layer, one with static activations, a weight that is not finite, or a model
        that a method cannot scale.

    Notes
    -----
    Frantar et al., GPTQ, 2023; Lin et al., AWQ, 2024; Xiao et al., SmoothQuant, 2023; Müller et al., SINQ, 2025. Sums
    are made by torch's matrix products, so that codes may differ between machines, but not between runs on one.
    """
    if method not in METHODS:
        raise ValueError(f"method must be {one_of(METHODS)}, got {method!r}")
    if not 0 < damping < math.inf:
        raise ValueError(f"damping must be a number > 0, got {damping}")
    check_root(model)
    by_name = {n: QuantSpec.parse(s) for n, s in spec.items()} if isinstance(spec, Mapping) else None
    common = None if by_name is not None else QuantSpec.parse(spec)
    skipped = reasons_to_skip(model, filter_fn)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skipped}
    if by_name is not None:
        if unknown := [name for name in by_name if name not in layers]:
            raise ValueError(f"spec must name layers of the model that can be quantized, got {unknown[0]!r}")
        skipped |= dict.fromkeys((n for n in layers if n not in by_name), "spec does not name it")
        layers = {n: m for n, m in layers.items() if n in by_name}
    specs = {n: common or (by_name or {})[n] for n in layers}
    experts = experts_of(model, filter_fn, skipped) if common is not None else {}
    if not layers and not experts:
        raise ValueError("model must have an nn.Linear to quantize, got none")
    for s in {*specs.values(), *([common] if common else [])}:
        check_dynamic(s)
    if experts and common is not None:
        check_unrotated(common, f"experts, {next(iter(experts))}")
    if method.startswith("awq"):
        for s in specs.values():
            check_unrotated(s, "awq, which searches the scales of channels that are not mixed")
    for name, layer in layers.items():
        if weight_of(layer).is_meta:
            raise ValueError(f"weight of layer {name} must be there, got one on meta")
        check_weight(f"weight of layer {name}", weight_of(layer).flatten(1), specs[name], "raise")
    for name, module in experts.items():
        for key, weight in stacks_of(module).items():
            check_weight(f"{key} of {name}", weight.flatten(0, -2), common or specs[name], "raise")
    calls = calls_of(inputs_of(model, method) if inputs is None else inputs, model)

    done = CalibrationReport(Report(skipped=skipped))
    finished = None
    if folder is not None:
        every = {name: str(s) for name, s in specs.items()} | dict.fromkeys(experts, str(common))
        options = (method, damping, search, correct_bias, every)
        finished = Finished(Path(folder), key_of(model, calls, *options))
    scaling = method.partition("+")[0]
    if scaling != "gptq":
        done.scaled = fold_(model, calls, specs, scaling)
    places = places_of(model)
    first: dict[int, QuantModule] = {}  # id of a float weight -> what it became
    originals = {name: weight_of(layer) for name, layer in layers.items()}
    kept: list[nn.Parameter] = []  # so that no id is used twice
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    shown = None if progress is None else not progress
    with tqdm(total=len(layers) + len(experts), unit="layer", file=sys.stderr, disable=shown) as bar:

        def bias_of(module: nn.Module, name: str = "bias") -> nn.Parameter | None:
            bias = module._parameters.get(name)
            return bias if correct_bias and type(bias) is nn.Parameter and owners[id(bias)] == 1 else None

        def shifted(name: str, bias: nn.Parameter | None, by: Tensor | None) -> Tensor | None:
            """``bias`` after it took the mean of the error, ``by``."""
            return None if bias is None or by is None else set_bias(name, bias, (bias.detach() + by).to(bias.dtype))

        def set_bias(name: str, bias: nn.Parameter, value: Tensor) -> Tensor:
            with torch.inference_mode(bias.is_inference()), torch.no_grad():
                bias.copy_(value)
            done.biased.append(name)
            return value

        def replace(name: str, weight: Weight | None, told: LayerCalibration | None, why: str = "") -> None:
            layer, s, original = layers.pop(name), specs[name], originals.pop(name)
            new: QuantModule
            if id(original) in first:
                new = share_weight(first[id(original)], layer, s)
            else:
                if weight is None:
                    new = quantized_type(layer).from_float(layer, s)
                else:
                    new = quantized_type(layer).like(layer, s)
                    new._freeze(weight)
                    new.weight_codes.requires_grad_(original.requires_grad)  # which they only remember
                first[id(original)] = new
                kept.append(original)
                done.report.layers.append(describe(name, original, new.plain, new.spec))
                if told is None:
                    done.data_free[name] = why
                else:
                    done.layers.append(told)
                    bar.set_postfix_str(f"{name[-40:]} {told.loss:.4f}", refresh=False)
            put(new, layer, places)
            bar.update()

        def replace_experts(name: str, stacks: dict[str, tuple[Weight, LayerCalibration]], why: str = "") -> None:
            assert common is not None
            module = experts.pop(name)
            codes = QuantExperts.like(module, common)
            for key, x in stacks_of(module).items():
                if key in stacks:
                    weight, told = stacks[key]
                    codes.take(key, weight)
                    done.layers.append(told)
                    if told.idle:
                        who = "expert" if len(told.idle) == 1 else "experts"
                        done.data_free[told.name] = f"no token reached {who} {', '.join(map(str, told.idle))}"
                else:
                    codes.quantize(key, x.detach())
                done.report.layers.append(describe_experts(name, key, x, codes))
            if not stacks:
                done.data_free[name] = why
            put(codes, module, places)
            bar.update()

        def finish_experts(name: str, grams: dict[str, Gram]) -> Iterator[Layer]:
            assert common is not None
            module, stacks = experts[name], {}
            for key in stacks_of(module):
                bias = bias_of(module, f"{key}_bias")

                def found_of(w: Tensor, e: int) -> Rounded | None:
                    gram = grams.pop(expert_name(name, key, e), None)  # noqa: B023 (called before the next key)
                    return None if gram is None else rounded(f"{name}.{key}", w, gram, common, bias is not None)  # noqa: B023

                tokens = sum(g.tokens for n, g in grams.items() if n.startswith(f"{name}.{key}."))
                found = rounded_stack(*stack_of(module, key), common, found_of)
                told = LayerCalibration(
                    f"{name}.{key}", str(common), tokens, found.loss, found.rounding, found.damping, found.idle
                )
                stacks[key] = found.weight, told
                yield Layer(told.name, found.weight, shifted(told.name, bias, found.shift), asdict(told))
            replace_experts(name, stacks)

        def rounded(name: str, w: Tensor, gram: Gram, s: QuantSpec, biased: bool) -> Rounded:
            mean, H = gram.total / gram.tokens if biased else None, gram.H / gram.tokens
            if s.hadamard:  # the codes are those of rotated columns, for rotated inputs
                w, H = rotated(w, s), rotated(rotated(H, s).T, s)
                mean = None if mean is None else rotated(mean, s)
            try:
                return gptq(w, H, s.unrotated, damping, search, mean)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None

        def finish(grams: dict[str, Gram]) -> None:
            stage: list[Layer] = []
            for name in list(experts):
                if any(n.startswith(tuple(f"{name}.{key}." for key in stacks_of(experts[name]))) for n in grams):
                    stage += finish_experts(name, grams)
            for name, gram in grams.items():
                s = specs[name]
                if not s.scaled or id(originals[name]) in first:
                    replace(name, None, None, f"{s} has no scale")
                    continue
                bias = bias_of(layers[name])
                found = rounded(name, originals[name].detach().float(), gram, s, bias is not None)
                told = LayerCalibration(name, str(s), gram.tokens, found.loss, found.rounding, found.damping)
                stage.append(Layer(name, found.weight, shifted(name, bias, found.shift), asdict(told)))
                replace(name, found.weight, told)
            if finished is not None:
                finished.write(stage)

        stacks: dict[str, tuple[Weight, LayerCalibration]] = {}
        for was in finished.read() if finished is not None else ():
            told = LayerCalibration(**{**was.told, "idle": tuple(was.told["idle"])})
            name, key = (was.name, "") if was.name in layers else was.name.rsplit(".", 1)
            device = originals[name].device if not key else stack_of(experts[name], key)[0].device
            weight = Weight(*(None if t is None else t.to(device) for t in was.weight))  # type: ignore[arg-type]
            if was.bias is not None:
                owner: nn.Module = experts[name] if key else layers[name]
                set_bias(was.name, owner.get_parameter(f"{key}_bias" if key else "bias"), was.bias)
            if not key:
                replace(name, weight, told)
                continue
            stacks[key] = weight, told
            if len(stacks) == len(stacks_of(experts[name])):
                replace_experts(name, stacks)
                stacks = {}
        with_gptq = method.endswith("gptq")
        if with_gptq:
            of_kind = [name for name, module in experts.items() if is_told(module) and common and common.scaled]
            run(model, calls, [*layers, *of_kind], finish)
        for name in list(layers):
            replace(name, None, None, "no token reached it" if with_gptq else "it was rounded")
        for name, module in list(experts.items()):
            why = "no token reached it" if is_told(module) else "experts of its kind are not calibrated"
            why = why if common is None or common.scaled else f"{common} has no scale"
            replace_experts(name, {}, why if with_gptq else "it was rounded")
    account(model, done.report)
    record_(model)
    return done


def inputs_of(model: nn.Module, method: str) -> list[Any]:
    """A batch that shows whether ``model`` computes what it did, for a method that needs no inputs."""
    if method != "sinkhorn":
        raise ValueError(f"inputs must be batches for {method}, got None")
    found = getattr(model, "dummy_inputs", None)
    if not isinstance(found, Mapping):
        raise ValueError("inputs must hold a batch for a model without dummy_inputs, got None")
    device = next(model.parameters()).device
    return [{name: x.to(device) if isinstance(x, Tensor) else x for name, x in found.items()}]
