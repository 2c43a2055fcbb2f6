"""Load, keep and save a model whose weights are codes in transformers."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from quantlib.api import (
    account,
    dequantize_,
)
from quantlib.checkpoint.files import some
from quantlib.checkpoint.model import join
from quantlib.checkpoint.stored import Stored
from quantlib.hf.config import QuantlibConfig
from quantlib.hf.loading import Loading, adopt_codes, kept_by, may_lack_an_axis, state_as_stored
from quantlib.nn import QuantLinear
from quantlib.nn.experts import QuantExperts
from quantlib.record import LIBRARY, entry_of, own_config, record_, weights_of

log = logging.getLogger(__name__)


@register_quantizer(LIBRARY)
class QuantlibQuantizer(Loading, HfQuantizer):
    """Quantizes a float model tensor by tensor while it is loaded, or builds the layers for codes that were saved.

    Attributes
    ----------
    report : Report or None
        The report of a model that was quantized while it was loaded: see `quantlib.quantize_`.
    """

    quantization_config: QuantlibConfig

    def __init__(self, quantization_config: QuantlibConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._begin()
        self.model: Any = None  # while it is loaded

    # ---- the skeleton, before the files are read --------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._prepare(model, self.pre_quantized)
        self.model = model

    def _names_in(self, model: Any, weights: dict[str, Stored]) -> dict[str, Stored]:
        return names_in(model, weights)

    # ---- while they are read ----------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.waiting or (self.pre_quantized and may_lack_an_axis(model, param_name))

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        model = self.model if model is None else model  # transformers before 5.24 leaves it out
        return conversions_of_codes(weight_conversions, model) if self.codes else weight_conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Codes of FP8 count as floats for whoever asks them, and scales stay float32."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if name.startswith(("F8", "torch.float8")) else super().get_new_dtype(converter, param, dtype)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.places.clear()
        self.model = None
        if self.pre_quantized:
            check_loaded(model)
        adopt_codes(model)
        if self.report is not None:
            account(model, self.report)
        self.quantization_config.weights = weights_of(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        dequantize_(model)
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # as a config has it
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The state as quantlib's files have it: codes under the name of the weight, with an axis more."""
        record_(model)
        model._weight_conversions = conversions_for_saving(model)
        return state_as_stored(model), {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def check_loaded(model: nn.Module) -> None:
    """Every part of every quantized weight came from the files: a loader only warns where one did not."""
    missing = [
        f"{prefix}.{key}"
        for prefix, module in model.named_modules()
        for key in kept_by(module)
        if (p := module._parameters[key]) is not None
        and not getattr(p, "_is_hf_initialized", False)
        and not (p.is_meta and "_hf_hook" in vars(module))  # accelerate reads it from disk for each call
    ]
    if missing:
        raise ValueError(f"model must find all of its codes and scales in its files, got no {some(missing)}")


class Quantize(ConversionOps):
    """A float weight, as the model has it once all conversions are done, to its codes, scales and zero points."""

    def __init__(self, quantizer: QuantlibQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        done: dict[str, Any] = {}
        for name, value in input_dict.items():
            x = value[0] if isinstance(value, list) else value
            if name not in self.quantizer.waiting:
                done[name] = x
                continue
            done |= self.quantizer.quantize(model, name, x)
            if missing_keys is not None:
                missing_keys -= {name, *(f"{other}.weight" for other in self.quantizer.tied.get(name, ()))}
        return done


class Codes(WeightRenaming):
    """``layer.weight`` of a file is ``layer.weight_codes`` of the model, where ``names`` has it.

    ``names`` are those of weights in the model; in a file the prefix of the base model may be there or not.
    """

    __slots__ = ("back", "names", "prefix")

    def __init__(self, names: frozenset[str], prefix: str, back: bool = False) -> None:
        super().__init__(source_patterns=r"\.weight$", target_patterns=".weight_codes")
        self.prefix, self.back = prefix, back
        base = f"{prefix}." if prefix else ""
        self.names = names | {base + n for n in names} | {n.removeprefix(base) for n in names}

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        weight = source_key.removesuffix("_codes") if self.back else source_key
        if weight not in self.names or (self.back and weight == source_key):
            return source_key, None
        self._was_used = True
        return (weight if self.back else f"{weight}_codes"), self.source_patterns[0]

    def reverse_transform(self) -> Codes:
        return Codes(self.names, self.prefix, not self.back)


def resizing(resize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """``resize`` of transformers, which makes another output layer for more or fewer tokens, for a quantized one too.

    It gives a float layer. A quantized one takes over its weight, old rows with their codes, and stays in its place.
    """

    @functools.wraps(resize)
    def _get_resized_lm_head(self: Any, old_lm_head: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        new: Any = resize(self, old_lm_head, *args, **kwargs)
        if new is old_lm_head or not isinstance(old_lm_head, QuantLinear):
            return new  # type: ignore[no-any-return]
        old_lm_head.register_parameter("bias", None)  # which has as many elements as there are tokens
        old_lm_head.set_weight_(new.weight)
        old_lm_head.bias = new.bias
        return old_lm_head

    return _get_resized_lm_head


PreTrainedModel._get_resized_lm_head = resizing(PreTrainedModel._get_resized_lm_head)  # type: ignore[assignment, method-assign]


def names_in(model: Any, weights: dict[str, Stored]) -> dict[str, Stored]:
    """``weights`` of a file under the names that they have in ``model``, which may have renamed what it loads."""
    state = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    found = {}
    for name, stored in weights.items():
        known = name if name in state else None
        if known is None:
            known, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        found[known] = stored
    return found


def conversions_for_saving(model: Any) -> list[Any]:
    """Return the conversions that ``save_pretrained`` undoes to write the names and shapes of the source files."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # as for a model that was not loaded
        made = get_model_conversion_mapping(model, add_legacy=False)
        conversions = [entry for entry in made if not isinstance(entry, PrefixChange)]
    return conversions_of_codes(conversions, model)


def conversions_of_codes(conversions: list[Any], model: Any) -> list[Any]:
    """``conversions`` for a model some of whose weights are codes: each part of a weight goes the way of the weight."""
    known = [entry for entry in conversions if not isinstance(entry, Codes)]
    stacks = {
        join(prefix, key): module
        for prefix, module in model.named_modules()
        if isinstance(module, QuantExperts)
        for key in module.stacks
    }
    parts = [copy for entry in known if isinstance(entry, WeightConverter) for copy in of_parts(entry, stacks)]
    parts += [
        copy for entry in known if isinstance(entry, WeightRenaming) for copy in renamings_of_parts(entry, stacks)
    ]
    return [*parts, *known, Codes(frozenset(weights_of(model)), model.base_model_prefix)]


def of_parts(converter: WeightConverter, stacks: dict[str, QuantExperts]) -> list[WeightConverter]:
    """``converter``, which stacks the matrices of experts, for their codes, their scales and their zero points.

    None where it does more than to put matrices below each other: such experts are saved as they are.
    """
    targets, sources = converter._original_target_patterns, converter._original_source_patterns
    owners = [m for name, m in stacks.items() if any(re.search(f"{target}$", name) for target in targets)]
    simple = all(isinstance(op, (MergeModulelist, Concatenate)) for op in converter.operations)
    specs = [m.spec for m in owners]
    rows = all(not spec.scaled or spec.block((2, 2))[0] == 1 for spec in specs)
    rows = rows and not any(stack.transposed for m in owners for stack in m.stacks.values())
    if not owners or len(targets) != 1 or not simple or not rows:
        return []
    if not hasattr(converter, "copy"):
        raise ImportError(
            f"transformers must be 5.24 or newer to load experts of codes, got {transformers.__version__}"
        )
    suffixes = {"_codes": ""} | ({"_scale": "_scale"} if specs[0].scaled else {})
    suffixes |= {} if specs[0].symmetric is not False else {"_zero_point": "_zero_point"}
    return [
        converter.copy(
            [s + of_source for s in sources], [targets[0] + of_target], operations=list(converter.operations)
        )
        for of_target, of_source in suffixes.items()
    ]


def renamings_of_parts(renaming: WeightRenaming, stacks: dict[str, QuantExperts]) -> list[Any]:
    """``renaming`` of a weight of experts, for its scales and zero points: a pattern ends where a name does."""
    pairs = zip(renaming._original_source_patterns, renaming._original_target_patterns, strict=False)
    return [
        renaming.copy([f"{source}{part}"], [f"{target}{part}"])
        for source, target in pairs
        if re.search(r"\w$", target) and any(re.search(f"{target}$", name) for name in stacks)
        for part in ("_scale", "_zero_point")
    ]


def keep(model: Any, weights: dict[str, Any]) -> None:
    """Have transformers save ``model`` as one of quantlib; as one of floats if there are no ``weights``.

    A model that was not loaded with a quantizer may still be cast and trained as a whole: ``model.is_quantized``, which
    forbids that, is not set. A config that several models share becomes this model's own.
    """
    own_config(model)
    quantizer = vars(model).get("hf_quantizer")
    if not weights:
        HfQuantizer.remove_quantization_config(quantizer, model)  # type: ignore[no-untyped-call]
        return
    if not isinstance(quantizer, QuantlibQuantizer):
        quantizer = QuantlibQuantizer(QuantlibConfig(entry_of(weights)["spec"], weights=weights))
        model.hf_quantizer = quantizer
    quantizer.quantization_config.weights = weights
    model.config.quantization_config = quantizer.quantization_config
