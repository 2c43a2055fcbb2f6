"""Training towards codes: `prepare_qat_` has a model compute with the values of codes, `convert_` leaves the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quantlib.api import (
    Filter,
    account,
    check_root,
    checked_types,
    experts_of,
    names_of,
    places_of,
    put,
    reasons_to_skip,
    stacks_of,
    weight_of,
)
from quantlib.measure import check_weight, describe
from quantlib.nn import QUANTIZED
from quantlib.nn.experts import QuantExperts
from quantlib.nn.fake_quantize import FakeQuantize, Source
from quantlib.nn.functional import Weight
from quantlib.nn.module import QuantModule, check_whole
from quantlib.nn.observers import Initial, MovingAverageObserver, Observer
from quantlib.nn.qat import QAT, QATModule
from quantlib.nn.qat_experts import QATExperts
from quantlib.record import record_
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec, check_unrotated


@torch.inference_mode(False)  # parameters made in inference mode could never be trained
def prepare_qat_(
    model: nn.Module,
    spec: Any,
    filter_fn: Filter | None = None,
    *,
    types: Sequence[type[nn.Module]] = (nn.Linear,),
    scale: Source = "learned",
    initial: Initial = "minmax",
    mask: str = "rounded",
    activation_scale: Source | None = None,
    observer: type[Observer] = MovingAverageObserver,
) -> Report:
    """Make the layers of ``model`` compute with the values that their codes will have, in place, to be trained so.

    Weights and biases stay the parameters that they are, under their names, so that an optimizer which holds them
    still does; the gains of learned scales are new ones: see `qat_parameters`. Every layer is looked at before the
    first is changed, so that an error leaves the model as it was.

    Parameters
    ----------
    model : nn.Module
        With float32, float16 or bfloat16 weights.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The one that `quantize_` would be given: what is trained is what is deployed.
    filter_fn : callable (module, name) -> bool, optional
        Which of the layers; all of them by default.
    types : sequence of {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d}
        The classes of layers to prepare; ``nn.Linear`` stands for experts of transformers too.
    scale : {"learned", "dynamic"}
        Whether the scales of weights are parameters (LSQ), or follow the weights at each forward as `quantize_` takes
        them. Activations are projected with the scales of the moment, as they will be when deployed, unless the spec
        has them static.
    initial : {"minmax", "mse", "lsq"}
        Where learned scales start: at those of `quantize_` (C4), so that training starts from exactly what
        quantizing without training gives; at those of least squared error, which is better at 4 bits and takes 64
        passes over the weights; or at LSQ's 2 mean|w| / sqrt(Q).
    mask : {"rounded", "lsq"}
        Where a weight passes its gradient on: where its rounded code is in range, or where weight / scale itself is.
    activation_scale : {"observed", "learned"}, optional
        The scale of static activations: the observer's until ``qat_mode_(observers=False)``, the
        default, or a parameter that is learned from there.
    observer : type of Observer
        The observer of static activations: `nn.MovingAverageObserver`, `nn.MinMaxObserver`, `nn.PercentileObserver` ...

    Returns
    -------
    Report
        Each layer with the bytes that it will have and its signal-to-noise ratio at the start, and the layers that
        were left alone with the reason.

    Raises
    ------
    TypeError
        For a model that is not a module, and for a weight that is not float32, float16 or bfloat16.
    ValueError
        For an unknown spec, type or option, a model without a layer to prepare, or a weight that is not finite.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> report = prepare_qat_(model, "W8A8")
    >>> optimizer = torch.optim.AdamW(qat_parameters(model), lr=1e-3)
    >>> loss = model(torch.randn(16, 64)).square().mean()
    >>> loss.backward()
    >>> optimizer.step()
    >>> report = convert_(model)
    >>> model[0]
    QuantLinear(in_features=64, out_features=64, bias=True, spec=int8:row@int8:row)
    """
    spec = QuantSpec.parse(spec)
    check_unrotated(spec, "training")
    check_root(model)
    types = checked_types(types)
    skipped = reasons_to_skip(model, filter_fn, types, QUANTIZED.get)
    for name, module in model.named_modules():
        if isinstance(module, QATExperts) or (isinstance(module, QATModule) and name in skipped):
            skipped[name] = f"already prepared for {module.spec}"
    layers = {n: m for n, m in model.named_modules() if isinstance(m, types) and n not in skipped}
    experts = experts_of(model, filter_fn, skipped) if nn.Linear in types else {}
    for name, module in list(experts.items()):
        if why := QATExperts.refuses(module, spec):
            skipped[name] = why
            del experts[name]
    if not layers and not experts and filter_fn is None:
        found = "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "none"
        raise ValueError(f"model must have an {names_of(types)} to prepare, got {found}")
    for name, layer in layers.items():
        check_weight(f"weight of layer {name}", weight_of(layer).flatten(1), spec, "raise")
    for name, module in experts.items():
        for key, weight in stacks_of(module).items():
            check_weight(f"{key} of {name}", weight.flatten(0, -2), spec, "raise")

    options: dict[str, Any] = {
        "scale": scale, "initial": initial, "mask": mask, "activation_scale": activation_scale, "observer": observer,
    }  # fmt: skip
    report, prepared = Report(skipped=skipped), dict[str, QATModule]()
    quantizers: dict[int, FakeQuantize] = {}  # id of a weight -> what projects it
    for name, layer in layers.items():
        prepared[name] = new = QAT[type(layer)].from_float(layer, spec, **options)
        if id(new.weight) in quantizers:
            new.weight_quantizer = quantizers[id(new.weight)]
        else:
            quantizers[id(new.weight)] = new.weight_quantizer
            report.layers.append(describe(name, new.weight, new.codes(), new.spec))
    trained = {
        name: QATExperts.from_float(module, spec, scale=scale, initial=initial, mask=mask)
        for name, module in experts.items()
    }
    for name, stacks in trained.items():
        report.layers += described(name, stacks)
    places = places_of(model)
    for name, new in prepared.items():
        put(new, layers[name], places)
    for name, stacks in trained.items():
        put(stacks, experts[name], places)
    account(model, report)
    return report


def described(name: str, experts: QATExperts) -> list[LayerReport]:
    """Report on each weight of ``experts`` and the codes that it would have now."""
    reports = []
    for key, stack in experts.stacks.items():
        codes = Weight(*(None if t is None else t.flatten(0, 1) for t in experts.codes(key)))  # type: ignore[arg-type]
        flat = describe(f"{name}.{key}", experts.rows(key).detach(), codes, experts.spec)
        reports.append(replace(flat, shape=stack.shape))
    return reports


@torch.inference_mode(False)
def convert_(model: nn.Module) -> Report:
    """Put modules of codes where the prepared ones of ``model`` are, in place: the end of training.

    The codes are those that the next forward would project the weights to, the scales are the trained ones. Every
    layer is looked at before the first is changed, so that an error leaves the model as it was.

    Returns
    -------
    Report
        Each layer's bytes, and the signal-to-noise ratio of its codes beside the trained float weight.

    Raises
    ------
    ValueError
        For a model without a prepared layer or one that fully_shard has sharded, a scale that is 0 or not finite, or a
        weight that is not finite.
    RuntimeError
        Where no forward has projected a weight yet, naming the layer.
    """
    if isinstance(model, (QATModule, QATExperts)):
        raise ValueError(
            f"model must contain the layers to replace, got a single {type(model).__name__}: use .convert()"
        )
    check_whole(
        model,
        "load get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)) into a prepared model "
        "that is not, and convert that",
    )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QATModule)}
    experts = {name: module for name, module in model.named_modules() if isinstance(module, QATExperts)}
    if not layers and not experts:
        raise ValueError("model must have been prepared by prepare_qat_, got one without a prepared layer")
    report, converted = Report(), dict[str, QuantModule]()
    done: dict[int, QuantModule] = {}  # id of a weight -> what it became
    for name, layer in layers.items():
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if quantizer is not None and quantizer.observer is not None:
                quantizer.observer.report()
        first = done.get(id(layer.weight))
        try:
            converted[name] = new = layer.convert(first)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"layer {name}: {error}") from None
        if first is None:
            done[id(layer.weight)] = new
            report.layers.append(describe(name, layer.weight, new.plain, new.spec))
    landed: dict[str, QuantExperts] = {}
    for name, module in experts.items():
        try:
            landed[name] = module.convert()
            report.layers += described(name, module)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"layer {name}: {error}") from None
    places = places_of(model)
    for name, new in converted.items():
        put(new, layers[name], places)
    for name, codes in landed.items():
        put(codes, experts[name], places)
    account(model, report)
    record_(model)
    return report


def qat_mode_(
    model: nn.Module,
    *,
    fake_quantize: bool | None = None,
    observers: bool | None = None,
    learn_scales: bool | None = None,
) -> None:
    """Switch what `prepare_qat_`, or a `FakeQuantize` of one's own, put into ``model``; None leaves it as it is.

    Parameters
    ----------
    fake_quantize : bool
        Whether weights and activations are projected: off, the model is the float one. Learned scales of weights of
        which nothing is learned yet start from the weights once more when it is switched on.
    observers : bool
        Whether observers see what passes in training, and set the scales that they are asked for. Where the model is in
        evaluation, they see what passes there too, until it is put into training: a calibration.
    learn_scales : bool
        Whether learned scales and zero points require a gradient. Frozen they lose the one they have, so that no
        optimizer moves them. Under DDP, freeze before wrapping or wrap again.

    Notes
    -----
    The switches are part of the state of the model. Under DDP, a model that is trained with ``fake_quantize=False`` has
    to be wrapped with ``find_unused_parameters=True``: learned scales get no gradient.

    Examples
    --------
    A schedule: floats, then codes with learned scales, then weights alone for the last part.

    >>> def at_epoch(model, epoch):
    ...     qat_mode_(model, fake_quantize=epoch >= 1)
    ...     if epoch >= 2:
    ...         qat_mode_(model, observers=False)
    ...     if epoch >= 8:
    ...         qat_mode_(model, learn_scales=False)
    """
    for module in model.modules():
        if fake_quantize and isinstance(module, (QATModule, QATExperts)):
            module.catch_up()
        if isinstance(module, FakeQuantize):
            module.enabled = module.enabled if fake_quantize is None else bool(fake_quantize)
            if observers is not None and module.observer is not None:
                module.observing = bool(observers)
                module.calibrate(module.observing and not module.training)
                module.observer.report()
            if learn_scales is not None:
                module.learn(learn_scales)


def qat_parameters(model: nn.Module) -> list[dict[str, Any]]:
    """The parameters of ``model`` that require a gradient, in two groups for an optimizer.

    Returns
    -------
    list of dict
        Weights, biases and the like, in the optimizer's own settings; then the gains of learned scales and the zero
        points, without weight decay, which would pull them to 0, where a scale means nothing.
    """
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantize)]
    learned = {id(p) for q in quantizers for p in (q.scale_bias, q.zero_point_bias) if p is not None}
    fixed = {id(p) for q in quantizers for p in (q.base, q.base_zero)}  # which get no gradient
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in fixed:
            groups[id(parameter) in learned].append(parameter)
    return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]
