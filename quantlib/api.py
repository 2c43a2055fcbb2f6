"""The verbs of a model: `quantize_` puts modules of codes where float ones were, `dequantize_` puts those back."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from quantlib.measure import OnNonfinite, Sums, check_weight, describe_experts
from quantlib.nn import QUANTIZED, FakeQuantize, QuantModule, form_of
from quantlib.nn.experts import QuantExperts, ways_of
from quantlib.nn.functional import SOURCES
from quantlib.nn.module import check_plain, check_whole, hooked_forward, rebind_hooks
from quantlib.nn.qat import QATModule
from quantlib.nn.qat_experts import QATExperts
from quantlib.ops.check import dtype_name, one_of
from quantlib.record import record_
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec, check_dynamic, check_unrotated

Filter = Callable[[nn.Module, str], bool]

# Layers whose owner computes with their weight itself, and never calls them (always, or on a fast path).
READ_DIRECTLY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2"),
}

# Modules of torch that hold matrices and have no form of codes, and why.
WITHOUT_FORM: dict[type[nn.Module], str] = {
    nn.RNNBase: "gives its weights to a kernel of torch for all steps, which takes floats",
    nn.RNNCellBase: "gives its weights to a kernel of torch, which takes floats",
    nn.EmbeddingBag: "sums its rows in a kernel of torch, which takes floats: an nn.Embedding and a sum can be codes",
    nn.modules.conv._ConvTransposeNd: "has its weight as [in, out, ...], and no quantized form",
    nn.MultiheadAttention: "reads its weight directly",
}

PLAIN = nn.Module()  # whose attributes every module has
NO_SOURCE = "not float32, float16 or bfloat16"  # the end of a reason against a layer that was asked for


@torch.inference_mode(False)  # a tensor made in inference mode could never take part in a backward pass
def quantize_(
    model: nn.Module,
    spec: Any,
    filter_fn: Filter | None = None,
    *,
    types: Sequence[type[nn.Module]] = (nn.Linear,),
    on_nonfinite: OnNonfinite = "raise",
) -> Report:
    """Quantize the weights of the ``nn.Linear`` layers of ``model``, or of the layers of ``types``, in place.

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
    types : sequence of {nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, transformers.pytorch_utils.Conv1D}
        Layers to quantize; ``nn.Linear`` stands for experts of transformers too. An embedding and a linear layer
        that share a weight share its codes where both are asked for, and stay as they are where one is not.
    on_nonfinite : {"raise", "propagate"}
        The treatment of a weight that is infinite, NaN, or too large for a 16-bit float without a scale: raise, or
        follow the numeric contract, by which a NaN makes a NaN of all that share its scale.

    Returns
    -------
    Report
        Each layer's bytes and signal-to-noise ratio; everything with two or more axes that stays a float, with its
        size and the reason; and the share of all parameters that are quantized. Below 90 % a warning is logged.

    Raises
    ------
    TypeError
        For a model that is not a module.
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
    experts = experts_of(model, filter_fn, skipped) if nn.Linear in types else {}
    asked = filter_fn is None or any(why.endswith(NO_SOURCE) for why in skipped.values())
    if not layers and not experts and asked:
        found = by_reason(skipped | other_weights(model, skipped)) or "none"
        raise ValueError(f"model must have an {names_of(types)} to quantize, got {found}")
    on_meta = [weight_of(layer).is_meta for layer in layers.values()]
    on_meta += [weight.is_meta for module in experts.values() for weight in stacks_of(module).values()]
    if not all(on_meta):  # a skeleton's scales are still to be loaded
        check_dynamic(spec)
    for name, module in (layers | experts).items() if spec.hadamard else ():
        if not isinstance(module, nn.Linear):
            check_unrotated(spec, f"{name}, {type(module).__name__}")
    for name, layer in layers.items():
        check_weight(f"weight of layer {name}", weight_of(layer).flatten(1), spec, on_nonfinite)
    for name, module in experts.items():
        for key, weight in stacks_of(module).items():
            check_weight(f"{key} of {name}", weight.flatten(0, -2), spec, on_nonfinite)

    report, places = Report(skipped=skipped), places_of(model)
    done: dict[int, QuantModule] = {}  # id of a float weight -> what it became
    for name in list(layers):
        layer = layers.pop(name)  # the last reference to a layer that is replaced: its memory is free for the next
        weight = weight_of(layer)
        new: QuantModule
        if id(weight) in done:
            new = share_weight(done[id(weight)], layer, spec)
        else:
            sums = Sums()
            done[id(weight)] = new = quantized_type(layer).from_float(layer, spec, seen=sums.add)
            snr_db = math.nan if weight.is_meta else sums.snr_db
            report.layers.append(LayerReport.of(name, weight, str(new.spec), new.plain, snr_db))
        del weight
        put(new, layer, places)
    for name in list(experts):
        module = experts.pop(name)
        codes = QuantExperts.from_float(module, spec)
        report.layers += [describe_experts(name, key, x, codes) for key, x in stacks_of(module).items()]
        put(codes, module, places)
    account(model, report)
    record_(model)
    return report


@torch.inference_mode(False)
def dequantize_(model: nn.Module) -> list[str]:
    """Put a float module with the values of the codes where each module of codes of ``model`` is, in place.

    Returns
    -------
    list of str
        The names of the modules. Weights that were tied are tied again.
    """
    check_root(model)
    kinds = (QuantModule, QuantExperts)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    for name, module in layers.items():
        try:
            check_plain(module)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from None
    names, places = list(layers), places_of(model)
    done: dict[int, nn.Parameter] = {}  # id of the codes -> the weight that they became
    for name in names:
        quantized = layers.pop(name)
        if isinstance(quantized, QuantExperts):
            put(quantized.dequantize(), quantized, places)
            continue
        tied = id(quantized.weight_codes)
        new = quantized.with_weight(done[tied]) if tied in done else quantized.dequantize()
        done[tied] = weight_of(new)
        put(new, quantized, places)
    record_(model)
    return names


def reasons_to_skip(
    model: nn.Module,
    filter_fn: Filter | None = None,
    types: tuple[type[nn.Module], ...] = (nn.Linear,),
    form: Callable[[type[nn.Module]], type[nn.Module] | None] = form_of,
) -> dict[str, str]:
    """name -> why, for each layer of ``types`` of ``model`` that cannot or shall not be quantized.

    ``form`` gives the class that takes the place of a layer of a class, or None.
    """
    readers = {
        id(getattr(owner, child)): f"nn.{cls.__name__} reads its weight directly"
        for owner in model.modules()
        for cls, children in READ_DIRECTLY.items()
        if isinstance(owner, cls)
        for child in children
    }
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function (module, name) -> bool, got {filter_fn!r}")
    adapters, elsewhere, weights = adapters_of(model), kept_elsewhere(model), weights_kept_elsewhere(model)
    skipped: dict[str, str] = {}
    holders: dict[int, list[tuple[str, str]]] = defaultdict(list)  # id of a parameter -> (module, name in it)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, types)}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            holders[id(parameter)].append((name, key))
    for name, layer in layers.items():
        why = (
            readers.get(id(layer)) or adapters.get(id(layer)) or reason_to_skip(layer, form) or elsewhere.get(id(layer))
        )
        if why is None and form is form_of:  # in training the parameters stay those that they are
            why = weights.get(id(layer.weight))
        if why is None and filter_fn is not None and not filter_fn(layer, name):
            why = "filter_fn said no"
        if why is None and weight_of(layer).dtype not in SOURCES:
            why = f"its weight is of {dtype_name(weight_of(layer).dtype)}, {NO_SOURCE}"
        if why is not None:
            skipped[name] = why
    for name, layer in layers.items():
        if name not in skipped:
            kept = ((h, k) for h, k in holders[id(layer.weight)] if k != "weight" or h in skipped or h not in layers)
            if other := next(kept, None):
                skipped[name] = f"shares its weight with {'.'.join(filter(None, other))}, which stays as it is"
                if type(owner := model.get_submodule(other[0])) in QUANTIZED and not isinstance(owner, types):
                    skipped[name] += f": types= can name nn.{type(owner).__name__} too"
    return skipped


def reason_to_skip(layer: nn.Module, form: Callable[[type[nn.Module]], type[nn.Module] | None] = form_of) -> str | None:
    """Return the reason in a layer itself that keeps it from being replaced, or None."""
    if isinstance(layer, QuantModule):
        return f"already quantized to {layer.spec}"
    if isinstance(layer._parameters.get("weight"), UninitializedParameter):
        return "its weight has no shape before the first forward"
    if isinstance(layer, QATModule):
        return f"already prepared for {layer.spec}: convert_ makes its codes"
    if computed := getattr(layer, "parametrizations", None):
        return f"its {' and '.join(computed)} is computed from other parameters"
    if form(type(layer)) is None:
        base = next((t for t in QUANTIZED if isinstance(layer, t)), nn.Linear)
        return f"{type(layer).__name__}, a subclass of nn.{base.__name__}, may compute something else"
    if "forward" in vars(layer) and hooked_forward(layer) is None:
        return "its forward has been replaced"
    if layer._compiled_call_impl is not None:
        return "it has been compiled: quantize the model before layer.compile()"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters"
    if type(weight) is not nn.Parameter:
        return f"its weight is of {type(weight).__name__}"
    if weight.layout is not torch.strided:
        return f"its weight has the layout {str(weight.layout).removeprefix('torch.')}"
    if weight.is_meta and hooked_forward(layer) is not None:
        return "accelerate has offloaded its weight: quantize the model before it is dispatched"
    codes = quantized_type(layer)
    if taken := next((name for name in codes.OWN if name in vars(layer)), None):
        return f"it has an attribute {taken} of its own"
    why = codes.refuses(layer)
    return None if why is None else f"an nn.{type(layer).__name__} {why}"


def experts_of(model: nn.Module, filter_fn: Filter | None, skipped: dict[str, str]) -> dict[str, nn.Module]:
    """Modules of experts whose matrices are to be quantized; the reasons against others go into ``skipped``."""
    found: dict[str, nn.Module] = {}
    adapters, elsewhere = adapters_of(model), kept_elsewhere(model)
    for name, module in model.named_modules():
        if not ways_of(module):
            continue
        why = adapters.get(id(module)) or elsewhere.get(id(module))
        if why is None and not all(type(weight) is nn.Parameter for weight in stacks_of(module).values()):
            why = "its weights are computed from other parameters"
        if why is None and "forward" in vars(module) and hooked_forward(module) is None:
            why = "its forward has been replaced"
        if why is None and filter_fn is not None and not filter_fn(module, name):
            why = "filter_fn said no"
        if why is None and (wide := {w.dtype for w in stacks_of(module).values()}.difference(SOURCES)):
            why = f"its weights are of {dtype_name(wide.pop())}, {NO_SOURCE}"
        if why is None:
            found[name] = module
        else:
            skipped[name] = why
    return found


def stacks_of(experts: nn.Module) -> dict[str, Any]:
    """The float weights of ``experts`` that are stacks of matrices, by name."""
    return {key: getattr(experts, key, None) for key in ways_of(experts)}


def adapters_of(model: nn.Module) -> dict[int, str]:
    """id of a module that peft trains beside a layer or before a model -> why it is not part of the base."""
    found: dict[int, str] = {}
    for owner in model.modules():
        names = getattr(owner, "adapter_layer_names", ())
        names = (*names, "prompt_encoder") if hasattr(owner, "peft_config") else names
        for name in names:
            child = owner._modules.get(name)
            if child is not None:
                why = f"an adapter, {name} of {type(owner).__name__}"
                found.update((id(module), why) for module in child.modules())
    return found


def account(model: nn.Module, report: Report) -> None:
    """Complete ``report`` with every parameter of ``model``: how many are quantized, and what stays a float and why.

    A weight that is trained as its codes counts as quantized.
    """
    counted: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, FakeQuantize):  # scales
            continue
        own, sizes = quantized_parameters(module)
        for key, parameter in module._parameters.items():
            if parameter is None or isinstance(parameter, UninitializedParameter) or id(parameter) in counted:
                continue
            counted.add(id(parameter))
            report.quantized += sizes.get(key, 0)
            if key in own:
                continue
            report.floats += parameter.numel()
            report.float_bytes += parameter.numel() * parameter.element_size()
            if parameter.dim() > 1:
                name = name_of(prefix, key)
                parts = name.split(".")
                above = (".".join(parts[:n]) for n in range(1, len(parts)))
                name = next((a for a in above if a in report.skipped), name)  # a layer with parametrizations
                report.skipped.setdefault(name, why_float(module, key, parameter))
                report.sizes[name] = report.sizes.get(name, 0) + parameter.numel()
    report.warn()


def quantized_parameters(module: nn.Module) -> tuple[Collection[str], dict[str, int]]:
    """The parameters of a quantized weight, or of one that is trained as its codes; and of those that hold codes how
    many weights they stand for."""
    if isinstance(module, QuantModule):
        return module.KEPT, {"weight_codes": math.prod(module.weight_shape)}
    if isinstance(module, QuantExperts):
        return module.kept, {f"{name}_codes": math.prod(stack.shape) for name, stack in module.stacks.items()}
    if isinstance(module, QATModule):
        return ("weight",), {"weight": module.weight.numel()}
    if isinstance(module, QATExperts):
        return tuple(module.stacks), {name: math.prod(stack.shape) for name, stack in module.stacks.items()}
    return (), {}


def other_weights(model: nn.Module, skipped: dict[str, str]) -> dict[str, str]:
    """name -> why it stays a float, for each parameter of two or more axes of a module that is not in ``skipped``."""
    return {
        name_of(prefix, key): why_float(module, key, parameter)
        for prefix, module in model.named_modules()
        for key, parameter in module._parameters.items()
        if parameter is not None
        and not isinstance(parameter, UninitializedParameter)
        and parameter.dim() > 1
        and prefix not in skipped
    }


def name_of(prefix: str, key: str) -> str:
    """The name of a parameter in a report: of a weight, that of its module."""
    return prefix if key == "weight" and prefix else f"{prefix}.{key}".removeprefix(".")


def by_reason(skipped: dict[str, str]) -> str:
    """Each reason once, with the first of the names that it holds for, the largest group first."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, why in skipped.items():
        names[why].append(name)
    groups = sorted(names.items(), key=lambda group: -len(group[1]))
    return "; ".join(f"{n[0]}{f' and {len(n) - 1} more' * (len(n) > 1)}: {why}" for why, n in groups)


def reason_without_form(cls: type) -> str | None:
    """Return why modules of class ``cls`` of torch stay floats, for a sentence with their name; None if not known."""
    return next((why for known, why in WITHOUT_FORM.items() if issubclass(cls, known)), None)


def why_float(module: nn.Module, key: str, parameter: nn.Parameter) -> str:
    """Return why ``parameter``, which no rule of `reasons_to_skip` covers, stays as it is."""
    if not parameter.is_floating_point():
        return f"it is of {dtype_name(parameter.dtype)}"
    if why := reason_without_form(type(module)):
        return f"nn.{type(module).__name__} {why}"
    if form_of(type(module)) is not None and key == "weight":
        base = next((t for t in QUANTIZED if isinstance(module, t)), nn.Linear)
        like = "" if type(module) is base else f"{type(module).__name__}, like "
        return f"{like}an nn.{base.__name__}, which types= does not name"
    if key != "weight":
        return f"a parameter of {type(module).__name__}, which is not a layer that quantlib knows"
    return f"{type(module).__name__} has no quantized form"


def quantized_type(layer: nn.Module) -> type[QuantModule]:
    """The module of codes that stands for ``layer``, which `reason_to_skip` has found nothing against."""
    form = form_of(type(layer))
    assert form is not None
    return form


def weight_of(layer: nn.Module) -> nn.Parameter:
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def checked_types(types: Sequence[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    """``types`` as isinstance takes them."""
    known = one_of([f"nn.{known.__name__}" for known in QUANTIZED])
    if isinstance(types, (type, str)) or not isinstance(types, Iterable):
        raise TypeError(f"types must be a list of {known}, got {types!r}")
    if not (types := tuple(types)):
        raise ValueError(f"types must be at least one of {known}, got none")
    for t in types:
        if not isinstance(t, type) or form_of(t) is None:
            why = reason_without_form(t) if isinstance(t, type) else None
            raise ValueError(f"types must be {known}, got {getattr(t, '__name__', t)}{f', which {why}' if why else ''}")
    return types


def names_of(types: tuple[type[nn.Module], ...]) -> str:
    """``types`` for a message."""
    return one_of([f"nn.{t.__name__}" if t in QUANTIZED else t.__name__ for t in types])


def check_root(model: nn.Module) -> None:
    """Check that ``model`` is a module whose layers can be replaced."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if isinstance(model, tuple(QUANTIZED)):
        quantized = next(q for t, q in QUANTIZED.items() if isinstance(model, t)).__name__
        raise ValueError(
            f"model must contain the layers to replace, got a single {type(model).__name__}: "
            f"use {quantized}.from_float(layer, spec) and {quantized}.dequantize()"
        )
    check_whole(model, "this must come before fully_shard or parallelize_module")
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "model must not hold a DistributedDataParallel, which waits for gradients of the parameters "
            "that it found: this must come before"
        )


def check_on_nonfinite(on_nonfinite: str) -> None:
    if on_nonfinite not in ("raise", "propagate"):
        raise ValueError(f"on_nonfinite must be raise or propagate, got {on_nonfinite!r}")


class Place(NamedTuple):
    """A place in which ``owner`` holds a module: ``store[key]``."""

    owner: nn.Module
    store: Any  # a dictionary or a list
    key: Any


def places_of(model: nn.Module) -> dict[int, list[Place]]:
    """id of a module -> where it can be reached: as a submodule, and in attributes, lists and dictionaries."""
    places: dict[int, list[Place]] = defaultdict(list)
    for owner in model.modules():
        seen: set[int] = set()
        stores: list[Any] = [vars(owner)]
        while stores:
            store = stores.pop()
            seen.add(id(store))
            for key, value in list(store.items() if isinstance(store, dict) else enumerate(store)):
                if isinstance(value, nn.Module):
                    places[id(value)].append(Place(owner, store, key))
                elif isinstance(value, (dict, list)) and id(value) not in seen:
                    stores.append(value)
    return places


def kept_elsewhere(model: nn.Module) -> dict[int, str]:
    """id of a module -> why another would not be called in its place, though it is where `places_of` finds it."""
    found: dict[int, str] = {}
    for owner in model.modules():
        for name, value in vars(owner).items() if not is_compiled(owner) else ():
            values = value if isinstance(value, (tuple, set, frozenset)) else (value,)
            called = [v.func if isinstance(v, functools.partial) else v for v in values]
            for v in called:
                layer = v if isinstance(v, nn.Module) and v is not value else getattr(v, "__self__", None)
                if isinstance(layer, nn.Module) and layer is not owner:
                    found[id(layer)] = (
                        f"{type(owner).__name__} holds it in its attribute {name}, a {type(value).__name__}"
                    )
    return found


def weights_kept_elsewhere(model: nn.Module) -> dict[int, str]:
    """id of a parameter -> who would go on with its float values: a module that has it in an attribute, or in a list,
    a tuple or a dictionary that is one."""
    found: dict[int, str] = {}
    for owner in model.modules():
        for name, value in vars(owner).items():
            if name.startswith("_") and name in vars(PLAIN):
                continue  # of nn.Module itself
            held = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
            )
            for parameter in held:
                if isinstance(parameter, nn.Parameter):
                    kind = "" if parameter is value else f", a {type(value).__name__}"
                    found[id(parameter)] = f"{type(owner).__name__} holds its weight in its attribute {name}{kind}"
    return found


def put(new: nn.Module, old: nn.Module, places: dict[int, list[Place]]) -> None:
    """Put ``new`` wherever ``old`` is, with the hooks of ``old`` themselves, not copies."""
    for key, value in vars(old).items():
        if "hooks" in key and isinstance(value, dict):
            vars(new)[key] = value  # the same dictionary: a handle still removes its hook
    rebind_hooks(new)
    for owner, store, key in places.pop(id(old)):
        store[key] = new
        if is_compiled(owner):  # its forward calls the layer that it was made of
            owner.__setstate__(owner.__getstate__())


def is_compiled(module: nn.Module) -> bool:
    """True for a module that ``torch.compile`` made. The name is compared: importing its class is slow."""
    return type(module).__name__ == "OptimizedModule"


def share_weight(first: QuantModule, layer: nn.Module, spec: QuantSpec) -> QuantModule:
    """The quantized form of ``layer``, whose weight is the one that ``first`` was made of."""
    new = quantized_type(layer).like(layer, spec)
    new.share(first)
    return new
