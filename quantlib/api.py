"""The verbs of a model: `quantize_` puts `QuantLinear` where ``nn.Linear`` was, `dequantize_` puts it back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantlib import ops
from quantlib.nn import QuantLinear
from quantlib.nn.functional import Weight, dequantize_weight
from quantlib.nn.linear import FROZEN
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec

OnNonfinite = Literal["raise", "propagate"]
Filter = Callable[[nn.Module, str], bool]

# Layers whose owner computes with their weight itself, and never calls them (always, or on a fast path).
READ_DIRECTLY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}
SOURCES = (torch.float32, torch.float16, torch.bfloat16)


def quantize_(
    model: nn.Module, spec: Any, filter_fn: Filter | None = None, *, on_nonfinite: OnNonfinite = "raise"
) -> Report:
    """Project the weights of the ``nn.Linear`` layers of ``model``, in place.

    Every layer is looked at before the first is changed, so that an error leaves the model as it was. Then one layer
    at a time is replaced: the memory in use never exceeds that of the model and one layer.

    Parameters
    ----------
    model : nn.Module
        On any device; on ``meta`` it becomes the skeleton that `load_quantized` or ``load_state_dict(assign=True)``
        fills.
    spec : QuantSpec or what `QuantSpec.parse` takes
        ``"W8A16"``, ``"W8A8"``, ``"W4A16"``, ``"int4:group:32"``, ``torch.bfloat16`` ...
    filter_fn : callable (module, name) -> bool, optional
        Which of the layers; all of them by default.
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
        For an unknown spec, a model without a layer to quantize, or a weight that is not finite, naming the layer and
        the row.

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
    skipped = reasons_to_skip(model, filter_fn)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skipped}
    if not layers and filter_fn is None:
        found = "; ".join(f"{name}: {why}" for name, why in skipped.items()) or "none"
        raise ValueError(f"model must have an nn.Linear to quantize, got {found}")
    for name, linear in layers.items():
        check_weight(f"weight of layer {name}", linear.weight, spec, on_nonfinite)

    report, places = Report(skipped=skipped), places_of(model)
    done: dict[int, QuantLinear] = {}  # id of a float weight -> what it became
    for name in list(layers):
        linear = layers.pop(name)  # the last reference to a layer that is replaced: its memory is free for the next
        tied = id(linear.weight)
        if tied in done:
            new = share_weight(done[tied], linear)
        else:
            done[tied] = new = QuantLinear.from_float(linear, spec)
            weight = Weight(new.weight, new.weight_scale, new.weight_zero_point)
            report.layers.append(describe(name, linear.weight, weight, spec))
        put(new, linear, places)
    return report


def dequantize_(model: nn.Module) -> list[str]:
    """Put an ``nn.Linear`` with the values of the codes where each `QuantLinear` of ``model`` is, in place.

    Returns
    -------
    list of str
        The names of the layers. Weights that were tied are tied again.
    """
    check_root(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    names, places = list(layers), places_of(model)
    done: dict[int, nn.Linear] = {}  # id of the codes -> what they became
    for name in names:
        quantized = layers.pop(name)
        tied = id(quantized.weight)
        if tied in done:
            new = nn.Linear(quantized.in_features, quantized.out_features, bias=False, device="meta")
            new.weight, new.bias = done[tied].weight, quantized.bias
        else:
            done[tied] = new = quantized.dequantize()
        put(new, quantized, places)
    return names


def reasons_to_skip(model: nn.Module, filter_fn: Filter | None = None) -> dict[str, str]:
    """name -> why, for each ``nn.Linear`` of ``model`` that cannot or shall not be quantized."""
    readers = {
        id(getattr(owner, child)): f"nn.{cls.__name__} reads its weight directly"
        for owner in model.modules()
        for cls, children in READ_DIRECTLY.items()
        if isinstance(owner, cls)
        for child in children
    }
    skipped: dict[str, str] = {}
    holders: dict[int, list[tuple[str, str]]] = defaultdict(list)  # id of a parameter -> (module, name in it)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders[id(parameter)].append((name, key))
        if isinstance(module, nn.Linear):
            why = readers.get(id(module)) or reason_to_skip(module)
            if why is None and filter_fn is not None and not filter_fn(module, name):
                why = "filter_fn said no"
            if why is not None:
                skipped[name] = why
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in skipped:
            others = (f"{h}.{k}" for h, k in holders[id(module.weight)] if k != "weight" or stays(model, h, skipped))
            if other := next(others, None):
                skipped[name] = f"shares its weight with {other.removeprefix('.')}, which stays as it is"
    return skipped


def stays(model: nn.Module, name: str, skipped: dict[str, str]) -> bool:
    """Whether the module of this name keeps its weight."""
    return name in skipped or not isinstance(model.get_submodule(name), nn.Linear)


def reason_to_skip(linear: nn.Linear) -> str | None:
    """What about a layer itself keeps it from being replaced."""
    if isinstance(linear, QuantLinear):
        return f"already quantized to {linear.spec}"
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__}, a subclass of nn.Linear, may compute something else"
    if "forward" in vars(linear):
        return "its forward has been replaced"
    if linear._parameters.get("weight") is None:
        return "its weight is computed from other parameters"
    if type(linear.weight) is not nn.Parameter:
        return f"its weight is of {type(linear.weight).__name__}"
    return None


def check_root(model: nn.Module) -> None:
    """``model`` is a module whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"model must contain the layers to replace, got a single {type(model).__name__}: "
            "use QuantLinear.from_float(layer, spec) and QuantLinear.dequantize()"
        )


def check_on_nonfinite(on_nonfinite: str) -> None:
    if on_nonfinite not in ("raise", "propagate"):
        raise ValueError(f"on_nonfinite must be raise or propagate, got {on_nonfinite!r}")


def check_weight(name: str, x: Tensor, spec: QuantSpec, on_nonfinite: OnNonfinite) -> None:
    """x [N, K] is of a dtype that can be quantized, and finite; so is its cast where ``spec`` has no scale."""
    if x.dtype not in SOURCES:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {str(x.dtype).removeprefix('torch.')}")
    if on_nonfinite == "propagate" or x.is_meta or x.numel() == 0:
        return
    x = x.detach()
    finite = x.isfinite()
    if not spec.scaled and finite.all():
        finite = ops.cast(x, spec.format).isfinite()
    bad_rows = (~finite.all(-1)).nonzero()
    if len(bad_rows):
        row = int(bad_rows[0])
        value = float(x[row][~finite[row]][0])
        more = f" and in {len(bad_rows) - 1} more rows" if len(bad_rows) > 1 else ""
        if math.isfinite(value):
            expected = f"at most {spec.row.max:g} in magnitude, or {spec.format} have a scale ({spec.format}:row)"
        else:
            expected = 'finite, or on_nonfinite "propagate"'
        raise ValueError(f"{name} must be {expected}, got {value:g} in row {row}{more}")


def describe(name: str, x: Tensor, weight: Weight, spec: QuantSpec) -> LayerReport:
    """What became of x [N, K]."""
    ratio = math.nan
    if not x.is_meta:
        ratio = snr_db(x.detach(), dequantize_weight(weight, spec, x.shape[-1], torch.float32))
    size = sum(t.numel() * t.element_size() for t in weight if t is not None)
    return LayerReport(name, tuple(x.shape), str(spec), x.numel() * x.element_size(), size, ratio)


def snr_db(x: Tensor, y: Tensor) -> float:
    """10 log10(sum of x^2 / sum of (y - x)^2), summed in float64; ``y`` is overwritten."""
    signal, noise = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) for t in (x, y.sub_(x)))
    if noise == 0:
        return math.inf
    ratio = signal / noise
    return 20 * math.log10(ratio) if 0 < ratio < math.inf else math.nan


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


def share_weight(first: QuantLinear, linear: nn.Linear) -> QuantLinear:
    """The quantized form of ``linear``, whose weight is the one that ``first`` was made of."""
    new = QuantLinear(
        linear.in_features, linear.out_features, False, device="meta", dtype=linear.weight.dtype, spec=first.spec
    )
    for name in FROZEN:
        new.register_parameter(name, first._parameters[name])
    new.bias = linear.bias
    return new
