"""``config.quantization_config``: the record of codes that ``save_pretrained`` of transformers and diffusers writes."""

from __future__ import annotations

import copy
import importlib
from typing import Any

from torch import nn

from quantlib.nn import QuantModule
from quantlib.nn.experts import QuantExperts

LIBRARY = "quantlib"
VERSION = 1
ENTRY = "quantization_config"

# Base class of another library's models -> the module of ours whose ``keep(model, weights)`` has that library save
# them. It is imported for such a model only, and that library is there then.
KEEPERS = {
    "transformers.modeling_utils.PreTrainedModel": "quantlib.hf.quantizer",
    "diffusers.models.modeling_utils.ModelMixin": "quantlib.hf.diffusion",
}


def record_(model: nn.Module) -> None:
    """Record the quantized weights and their specs in the config of ``model``; a model without one is left alone.

    A model of transformers or diffusers is saved by `quantlib.hf` from now on. The config of another library's model,
    which becomes this model's own where several share it, names no ``quant_method``, since that library knows none of
    ours: it raises, where it would otherwise go on with weights drawn at random.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or config is None:
        return
    known = config.get(ENTRY) if isinstance(config, dict) else getattr(config, ENTRY, None)
    weights = weights_of(model)
    if not weights and of_config(known) is None:
        return
    keeper = next((KEEPERS[name] for cls in type(model).__mro__ if (name := full_name(cls)) in KEEPERS), None)
    if keeper is not None:
        importlib.import_module(keeper).keep(model, weights)
    elif isinstance(config, dict) or not hasattr(config, "to_dict"):
        return
    elif weights:
        own_config(model).quantization_config = {"library": LIBRARY, "version": VERSION, "weights": weights}
    else:
        del own_config(model).quantization_config


def entry_of(weights: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The ``quantization_config`` of a config.json for ``weights``, as `quantlib.hf` reads it."""
    specs = [weight["spec"] for weight in weights.values()]
    most = max(sorted(set(specs)), key=specs.count)
    return {"quant_method": LIBRARY, "version": VERSION, "spec": most, "weights": weights}


def weights_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Name of a quantized weight of ``model`` -> its spec and the shape of the float weight."""
    weights: dict[str, dict[str, Any]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        shapes: dict[str, tuple[int, ...]] = {}
        if isinstance(module, QuantModule):
            shapes = {"weight": module.weight_shape}
        elif isinstance(module, QuantExperts):
            shapes = {key: stack.shape for key, stack in module.stacks.items()}
        for key, shape in shapes.items():
            weights[f"{prefix}.{key}".removeprefix(".")] = {"spec": str(module.spec), "shape": list(shape)}
    return weights


def full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__name__}"


def own_config(model: nn.Module) -> Any:
    """A copy of the config of ``model``, which each module of it that held the old one, or a part of it, now holds."""
    memo: dict[int, Any] = {}
    new = copy.deepcopy(model.config, memo)
    for module in model.modules():
        if (held := vars(module).get("config")) is not None and id(held) in memo:
            module.config = memo[id(held)]
    return new


def of_config(entry: Any) -> dict[str, Any] | None:
    """Return ``entry``, a ``quantization_config``, as a dict if quantlib made it."""
    entry = entry.to_dict() if hasattr(entry, "to_dict") else entry
    ours = isinstance(entry, dict) and LIBRARY in (entry.get("library"), entry.get("quant_method"))
    return entry if ours else None
