"""``config.quantization_config``: what ``save_pretrained`` of transformers and diffusers says of codes."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from quantlib.nn import QuantModule

LIBRARY = "quantlib"
VERSION = 1


def record_(model: nn.Module) -> None:
    """Have the config of ``model`` say which weights are quantized to what; a model without a config is left alone.

    A config that several models share becomes this model's own. The entry names no ``quant_method``: a loader that
    does not know it raises, where it would otherwise warn and go on with weights drawn at random.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "save_pretrained") or not hasattr(config, "to_dict") or isinstance(config, dict):
        return
    weights = {
        f"{prefix}.weight".removeprefix("."): {"spec": str(module.spec), "shape": list(module.weight_shape)}
        for prefix, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, QuantModule)
    }
    if not weights and of_config(getattr(config, "quantization_config", None)) is None:
        return
    config = own_config(model)
    if weights:
        config.quantization_config = {"library": LIBRARY, "version": VERSION, "weights": weights}
    else:
        del config.quantization_config


def own_config(model: nn.Module) -> Any:
    """A copy of the config of ``model``, which each module of it that held the old one, or a part of it, now holds."""
    memo: dict[int, Any] = {}
    new = copy.deepcopy(model.config, memo)
    for module in model.modules():
        if (held := vars(module).get("config")) is not None and id(held) in memo:
            module.config = memo[id(held)]
    return new


def of_config(entry: Any) -> dict[str, Any] | None:
    """``entry``, a ``quantization_config``, if `record_` made it."""
    return entry if isinstance(entry, dict) and entry.get("library") == LIBRARY else None
