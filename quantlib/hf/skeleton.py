"""The classes that a model of transformers has, by its config.json alone: how its files have experts and `Conv1D`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantlib.checkpoint.files import Slot
from quantlib.checkpoint.stored import Stored
from quantlib.hf.quantizer import names_in
from quantlib.nn.experts import number_of, ways_of
from quantlib.nn.forms import TransposedLinear, form_of

log = logging.getLogger(__name__)


def layouts_of(config: Mapping[str, Any], slots: Mapping[str, Slot]) -> dict[str, str]:
    """Name of a tensor of the files -> how it lies, for experts and `Conv1D`: see `quantlib.checkpoint.stored`.

    Only tensors of the shape that the model has are named: of others the class tells nothing. None are where
    transformers does not know the model, or runs code of its own for it.
    """
    model = skeleton_of(config)
    if model is None:
        return {}
    known: dict[str, tuple[str, tuple[int, ...]]] = {}
    for prefix, module in model.named_modules():
        for key, way in ways_of(module).items():
            layout = way if way in ("enk", "ekn") else f"{way}/{number_of(module)}"
            known[f"{prefix}.{key}"] = layout, tuple(module.get_parameter(key).shape)
        form = form_of(type(module))
        if form is not None and issubclass(form, TransposedLinear):
            known[f"{prefix}.weight"] = "kn", tuple(module.weight.shape)
    shapes = {name: Stored("int8", slot.shape) for name, slot in slots.items() if len(slot.shape) > 1}
    names: dict[str, str] = {}
    for name, stored in shapes.items():  # one at a time: several matrices of experts may become one tensor
        (names[name],) = names_in(model, {name: stored})
    return {name: known[of][0] for name, of in names.items() if of in known and known[of][1] == slots[name].shape}


def skeleton_of(config: Mapping[str, Any]) -> Any:
    """The model of a config.json on meta; None where transformers cannot build it."""
    try:
        parsed = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        found = [getattr(transformers, name, None) for name in config.get("architectures") or ()]
        build: Any = next((cls._from_config for cls in found if cls is not None), transformers.AutoModel.from_config)
        with torch.device("meta"):
            return build(parsed)
    except Exception as error:  # a model that cannot be built tells nothing
        log.info("config.json tells nothing of how weights lie: %s", error)
        return None
