"""`calibrate`: `quantize_` with codes that suit the inputs of the layers of a model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
from quantlib.calibration.finished import Finished, key_of
from quantlib.calibration.fold import fold_
from quantlib.calibration.gptq import gptq
from quantlib.calibration.stages import Gram, calls_of, run
from quantlib.measure import check_weight, describe, describe_experts
from quantlib.nn.experts import QuantExperts
from quantlib.nn.functional import Weight
from quantlib.nn.module import QuantModule
from quantlib.ops.check import one_of
from quantlib.record import record_
from quantlib.report import Report, aligned
from quantlib.spec import QuantSpec, check_dynamic

METHODS = ("gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq")


@dataclass(frozen=True)
class LayerCalibration:
    """The errors of a layer before and after calibration, as shares of the energy of its output."""

    name: str
    spec: str
    tokens: int
    loss: float
    rounding: float  # the loss of `quantize_`
    damping: float


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
        Name of a layer that has the codes of `quantize_` -> why.
    scaled : list of str
        The layers whose input channels were scaled.
    """

    report: Report
    layers: list[LayerCalibration] = field(default_factory=list)
    data_free: dict[str, str] = field(default_factory=dict)
    scaled: list[str] = field(default_factory=list)

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
    inputs: Iterable[Any],
    spec: Any = "W4A16",
    method: str = "gptq",
    *,
    filter_fn: Filter | None = None,
    damping: float = 0.01,
    search: bool = True,
    folder: str | Path | None = None,
    progress: bool | None = None,
) -> CalibrationReport:
    """Quantize the ``nn.Linear`` layers of ``model`` in place, with codes that suit the inputs that it is given.

    The format, the bytes and the speed are those of `quantize_`; only the choice of scales and codes differs. A block
    of the model sees what the blocks before it give once they are quantized. The activations of one block and the sums
    of its layers' inputs, K x K float32, are in memory at a time.

    Parameters
    ----------
    model : nn.Module
        As for `quantize_`, with its weights.
    inputs : iterable
        Batches that the model is called with: a tensor, a tuple of arguments, or a mapping of them. A thousand tokens
        of text like that of later use do for a language model.
    spec : QuantSpec, what `QuantSpec.parse` takes, or a mapping of names of layers to these
        A mapping, as `assign` gives it, leaves layers that it does not name as they are.
    method : {"gptq", "awq", "smoothquant", "awq+gptq", "smoothquant+gptq"}
        gptq: columns of a weight are rounded one by one, and the error of each is moved into those that are left. awq
        and smoothquant: channels of the inputs are scaled, and the scales folded into the norm or the layer before,
        for the least error of the weights, or for activations that are easier to quantize; then weights are rounded.
        They need a model whose norms and layers have the names of Llama's.
    filter_fn : callable (module, name) -> bool, optional
        Which of the layers; all of them by default.
    damping : float
        The amount added to the diagonal of the sum of x x^T, as a share of its mean. If the sum is not positive
        definite more is added, and the report says how much.
    search : bool
        Look for the scale that leaves the least error, weighted by the energy of each input; else that of `quantize_`.
    folder : path, optional
        Where finished layers are kept. A run that was interrupted and is called once more, with the same model, inputs
        and options, goes on from there to the same bytes. The folder may be deleted afterwards.
    progress : bool, optional
        A bar on stderr with the loss of each layer; by default on a terminal.

    Returns
    -------
    CalibrationReport
        Losses beside those of rounding. Layers that no token reached, experts, and weights without a scale have the
        codes of `quantize_`, and are named with the reason.

    Raises
    ------
    TypeError
        For a model that is not a module, or inputs that are no batches.
    ValueError
        For inputs that are empty, of another float dtype or not finite, an unknown spec, method or layer, one with
        static activations, a weight that is not finite, or a model that a method cannot scale.

    Notes
    -----
    Frantar et al., GPTQ, 2023; Lin et al., AWQ, 2024; Xiao et al., SmoothQuant, 2023. Sums are made by torch's matrix
    products, so that codes may differ between machines, but not between runs on one.
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
    for name, layer in layers.items():
        if weight_of(layer).is_meta:
            raise ValueError(f"weight of layer {name} must be there, got one on meta")
        check_weight(f"weight of layer {name}", weight_of(layer).flatten(1), specs[name], "raise")
    for name, module in experts.items():
        for key, weight in stacks_of(module).items():
            check_weight(f"{key} of {name}", weight.flatten(0, -2), common or specs[name], "raise")
    calls = calls_of(inputs, model)

    done = CalibrationReport(Report(skipped=skipped))
    finished = None
    if folder is not None:
        options = (method, damping, search, {name: str(s) for name, s in specs.items()})
        finished = Finished(Path(folder), key_of(model, calls, *options))
    scaling = method.partition("+")[0]
    if scaling != "gptq":
        done.scaled = fold_(model, calls, specs, scaling)
    places = places_of(model)
    first: dict[int, QuantModule] = {}  # id of a float weight -> what it became
    originals = {name: weight_of(layer) for name, layer in layers.items()}
    kept: list[nn.Parameter] = []  # so that no id is used twice
    shown = None if progress is None else not progress
    with tqdm(total=len(layers), unit="layer", file=sys.stderr, disable=shown) as bar:

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

        def finish(grams: dict[str, Gram]) -> None:
            stage: dict[str, tuple[Weight, dict[str, Any]]] = {}
            for name, gram in grams.items():
                s = specs[name]
                if not s.scaled or id(originals[name]) in first:
                    replace(name, None, None, f"{s} has no scale")
                    continue
                try:
                    found = gptq(originals[name].detach().float(), gram.H, s, damping, search)
                except ValueError as error:
                    raise ValueError(f"layer {name}: {error}") from None
                told = LayerCalibration(name, str(s), gram.tokens, found.loss, found.rounding, found.damping)
                stage[name] = found.weight, asdict(told)
                replace(name, found.weight, told)
            if finished is not None:
                finished.write(stage)

        for name, weight, told in finished.read() if finished is not None else ():
            device = originals[name].device
            values, *parts = (None if t is None else t.to(device) for t in weight)
            assert values is not None
            replace(name, Weight(values, *parts), LayerCalibration(**told))
        if method.endswith("gptq"):
            run(model, calls, list(layers), finish)
        for name in list(layers):
            replace(name, None, None, "no token reached it" if method.endswith("gptq") else "it was rounded")
    for name, module in experts.items():
        assert common is not None
        codes = QuantExperts.from_float(module, common)
        done.report.layers += [describe_experts(name, key, x, codes) for key, x in stacks_of(module).items()]
        done.data_free[name] = "experts are quantized without calibration"
        put(codes, module, places)
    account(model, done.report)
    record_(model)
    return done
