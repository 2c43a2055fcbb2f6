"""The verbs of a model: `quantize_` puts modules of codes where float ones were, `dequantize_` puts those back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from quantlib.measure import OnNonfinite, check_weight, describe
from quantlib.nn import QUANTIZED, QuantModule
from quantlib.nn.module import check_dynamic
from quantlib.ops.check import one_of
from quantlib.report import Report
from quantlib.spec import QuantSpec

Filter = Callable[[nn.Module, str], bool]

# Layers whose owner computes with their weight itself, and never calls them (always, or on a fast path).
READ_DIRECTLY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}


def quantize_(
    model: nn.Module,
    spec: Any,
    filter_fn: Filter | None = None,
    *,
    types: Sequence[type[nn.Module]] = (nn.Linear,),
    on_nonfinite: OnNonfinite = "raise",
) -> Report:
    """Project the weights of the ``nn.Linear`` layers of ``model``, or of the layers of ``types``, in place.

    Every layer is looked at before the first is changed, so that an error leaves the model as it was. Then one layer
    at a time is replaced: the memory in use never exceeds that of the model and one layer.

    Parameters
    ----------
    model : nn.Module
        On any device; on ``meta`` it becomes the skeleton that `load_quantized` or ``load_state_dict(assign=True)``
        fills.
    spec : QuantSpec or what `QuantSpec.parse` takes
        ``"W8A16"``, ``"W8A8"``, ``"W4A16"``, ``"int4:group:32"``, ``torch.bfloat16`` ... Activations are those of
        linear layers; of other types the weights alone are projected.
    filter_fn : callable (module, name) -> bool, optional
        Which of the layers; all of them by default.
    types : sequence of {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d}
        What is a layer here. An embedding and a linear layer that share a weight share its codes where both are
        asked for, and stay as they are where one is not.
    on_nonfinite : {"raise", "propagate"}
        What to do about a weight that is infinite, NaN, or too large for a 16-bit float without a scale: raise, or
        follow the numeric contract, by which a NaN makes a NaN of all that share its scale.

    Returns
    -------
    Report
        Each layer's bytes and signal-to-noise ratio, and the layers that were left alone with the reason: their
        weight is read directly by their owner, shared with something that stays a float, or already quantized.

    Raises
    ------
    TypeError
        For a model that is not a module, and for a weight that is not float32, float16 or bfloat16.
    ValueError
        For an unknown spec or type, one with static activations, a model without a layer to quantize, or a weight
        that is not finite, naming the layer and the row.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> report = quantize_(model, "W8A16", lambda module, name: module.out_features > 8)
    >>> model[0], report.skipped
    (QuantLinear(in_features=64, out_features=64, bias=True, spec=int8:row), {'2': 'filter_fn said no'})
    """
    spec = QuantSpec.parse(spec)
    check_on_nonfinite(on_nonfinite)
    check_root(model)
    types = checked_types(types)
    skipped = reasons_to_skip(model, filter_fn, types)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, types) and n not in skipped}
    if not layers and filter_fn is None:
        found = "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "none"
        raise ValueError(f"model must have an {one_of([f'nn.{t.__name__}' for t in types])} to quantize, got {found}")
    if not all(weight_of(layer).is_meta for layer in layers.values()):  # a skeleton's scales are still to be loaded
        check_dynamic(spec)
    for name, layer in layers.items():
        check_weight(f"weight of layer {name}", weight_of(layer).flatten(1), spec, on_nonfinite)

    report, places = Report(skipped=skipped), places_of(model)
    done: dict[int, QuantModule] = {}  # id of a float weight -> what it became
    for name in list(layers):
        layer = layers.pop(name)  # the last reference to a layer that is replaced: its memory is free for the next
        weight = weight_of(layer)
        new: QuantModule
        if id(weight) in done:
            new = share_weight(done[id(weight)], layer, spec)
        else:
            done[id(weight)] = new = quantized_type(layer).from_float(layer, spec)
            report.layers.append(describe(name, weight, new.plain, new.spec))
        del weight
        put(new, layer, places)
    return report


def dequantize_(model: nn.Module) -> list[str]:
    """Put a float module with the values of the codes where each module of codes of ``model`` is, in place.

    Returns
    -------
    list of str
        The names of the modules. Weights that were tied are tied again.
    """
    check_root(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    names, places = list(layers), places_of(model)
    done: dict[int, nn.Parameter] = {}  # id of the codes -> the weight that they became
    for name in names:
        quantized = layers.pop(name)
        tied = id(quantized.weight)
        new = quantized.with_weight(done[tied]) if tied in done else quantized.dequantize()
        done[tied] = weight_of(new)
        put(new, quantized, places)
    return names


def reasons_to_skip(
    model: nn.Module, filter_fn: Filter | None = None, types: tuple[type[nn.Module], ...] = (nn.Linear,)
) -> dict[str, str]:
    """name -> why, for each layer of ``types`` of ``model`` that cannot or shall not be quantized."""
    readers = {
        id(getattr(owner, child)): f"nn.{cls.__name__} reads its weight directly"
        for owner in model.modules()
        for cls, children in READ_DIRECTLY.items()
        if isinstance(owner, cls)
        for child in children
    }
    skipped: dict[str, str] = {}
    holders: dict[int, list[tuple[str, str]]] = defaultdict(list)  # id of a parameter -> (module, name in it)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, types)}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders[id(parameter)].append((name, key))
    for name, layer in layers.items():
        why = readers.get(id(layer)) or reason_to_skip(layer)
        if why is None and filter_fn is not None and not filter_fn(layer, name):
            why = "filter_fn said no"
        if why is not None:
            skipped[name] = why
    for name, layer in layers.items():
        if name not in skipped:
            kept = (
                f"{h}.{k}" for h, k in holders[id(layer.weight)] if k != "weight" or h in skipped or h not in layers
            )
            if other := next(kept, None):
                skipped[name] = f"shares its weight with {other.removeprefix('.')}, which stays as it is"
    return skipped


def reason_to_skip(layer: nn.Module) -> str | None:
    """What about a layer itself keeps it from being replaced."""
    if isinstance(layer, QuantModule):
        return f"already quantized to {layer.spec}"
    if type(layer) not in QUANTIZED:
        base = next(t for t in QUANTIZED if isinstance(layer, t))
        return f"{type(layer).__name__}, a subclass of nn.{base.__name__}, may compute something else"
    if "forward" in vars(layer):
        return "its forward has been replaced"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if type(weight) is not nn.Parameter:
        return f"its weight is of {type(weight).__name__}"
    why = QUANTIZED[type(layer)].refuses(layer)
    return None if why is None else f"an nn.{type(layer).__name__} {why}"


def quantized_type(layer: nn.Module) -> type[QuantModule]:
    """The module of codes that stands for ``layer``, which `reason_to_skip` has found nothing against."""
    return QUANTIZED[type(layer)]


def weight_of(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def checked_types(types: Sequence[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    """``types`` as isinstance takes them."""
    for t in types:
        if t not in QUANTIZED:
            known = one_of([f"nn.{known.__name__}" for known in QUANTIZED])
            raise ValueError(f"types must be {known}, got {getattr(t, '__name__', t)}")
    return tuple(types)


def check_root(model: nn.Module) -> None:
    """``model`` is a module whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, tuple(QUANTIZED)):
        quantized = next(q for t, q in QUANTIZED.items() if isinstance(model, t)).__name__
        raise ValueError(
            f"model must contain the layers to replace, got a single {type(model).__name__}: "
            f"use {quantized}.from_float(layer, spec) and {quantized}.dequantize()"
        )


def check_on_nonfinite(on_nonfinite: str) -> None:
    if on_nonfinite not in ("raise", "propagate"):
        raise ValueError(f"on_nonfinite must be raise or propagate, got {on_nonfinite!r}")


def places_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> the (parent, name) it can be reached by; a shared one has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for parent in model.modules():
        for child, module in parent._modules.items():
            places[id(module)].append((parent, child))
    return places


def put(new: nn.Module, old: nn.Module, places: dict[int, list[tuple[nn.Module, str]]]) -> None:
    """``new`` wherever ``old`` is, in its mode and with its hooks."""
    new.train(old.training)
    for key, value in vars(old).items():
        if key.startswith(("_forward_", "_backward_", "_is_full_backward_")):
            vars(new)[key] = value  # the same dictionary: a handle still removes its hook
    for parent, child in places.pop(id(old)):
        parent._modules[child] = new


def share_weight(first: QuantModule, layer: nn.Module, spec: QuantSpec) -> QuantModule:
    """The quantized form of ``layer``, whose weight is the one that ``first`` was made of."""
    new = quantized_type(layer).like(layer, spec)
    new.share(first)
    return new
