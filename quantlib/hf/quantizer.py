"""How transformers loads, keeps and saves a model whose weights are codes."""

from __future__ import annotations

import fnmatch
import logging
import re
from typing import Any

import torch
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
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from quantlib.api import (
    account,
    dequantize_,
    experts_of,
    places_of,
    put,
    quantized_type,
    reasons_to_skip,
    share_weight,
)
from quantlib.checkpoint.choose import RULES, TABLE
from quantlib.checkpoint.files import some
from quantlib.checkpoint.model import join
from quantlib.checkpoint.stored import Contents, Stored
from quantlib.hf.config import QuantlibConfig
from quantlib.measure import Sums, check_weight, describe_experts
from quantlib.nn import QuantModule
from quantlib.nn.experts import QuantExperts, ways_of
from quantlib.nn.forms import with_likes
from quantlib.nn.functional import quantize_weight
from quantlib.nn.module import PARTS, stored_dtype
from quantlib.nn.weight import QuantParameter
from quantlib.ops.check import dtype_of
from quantlib.record import LIBRARY, entry_of, record_, weights_of
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec

log = logging.getLogger(__name__)


@register_quantizer(LIBRARY)
class QuantlibQuantizer(HfQuantizer):
    """Quantizes a float model tensor by tensor while it is loaded, or builds the layers for codes that were saved.

    Attributes
    ----------
    report : Report or None
        Of a model that was quantized while it was loaded: see `quantlib.quantize_`.
    """

    quantization_config: QuantlibConfig

    def __init__(self, quantization_config: QuantlibConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.report: Report | None = None
        self.waiting: set[str] = set()  # names of weights that are to be quantized
        self.tied: dict[str, list[str]] = {}  # such a name -> the other layers that have this weight
        self.places: dict[int, list[Any]] = {}
        self.codes: frozenset[str] = frozenset()  # names of weights that are codes in the files too

    # ---- the skeleton, before the files are read --------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.places = places_of(model)
        if self.pre_quantized:
            self._build(model)
        else:
            self._choose(model)

    def _choose(self, model: Any) -> None:
        """Decide which layers become codes when their weights arrive."""
        types = with_likes((nn.Linear, nn.Embedding) if self.quantization_config.embeddings else (nn.Linear,))
        skipped = reasons_to_skip(model, types=types)
        experts = experts_of(model, lambda module, name: True, skipped)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, types) and name not in skipped}
        head = model.get_output_embeddings()
        for name, layer in (layers | experts).items():
            if why := self._unwanted(name, layer is head):
                skipped[name] = why
        groups: dict[str, list[str]] = {}  # layer whose weight others have -> all of them
        for target, source in model.all_tied_weights_keys.items():
            owner, other = (name.rpartition(".")[0] for name in (source, target))
            groups.setdefault(owner, [owner]).append(other)
        for first, group in groups.items():
            if self.quantization_config.embeddings and all(name in layers for name in group):
                for name in group:  # an embedding takes its output layer along
                    if skipped.get(name) == HEAD:
                        del skipped[name]
            if out := next((name for name in group if name in skipped or name not in layers), None):
                for name in set(group) & set(layers):
                    skipped.setdefault(name, f"shares its weight with {out}, which stays as it is")
            else:
                self.tied[f"{first}.weight"] = group[1:]
        self.report = Report(skipped=skipped)
        followers = {name for group in self.tied.values() for name in group}
        wanted = {name: m for name, m in layers.items() if name not in skipped and name not in followers}
        self.waiting = {f"{name}.weight" for name in wanted}
        self.waiting |= {f"{name}.{key}" for name, m in experts.items() if name not in skipped for key in ways_of(m)}
        if not self.waiting:
            raise ValueError(f"model must have a layer to quantize, got {skipped or 'none'}")

    def _unwanted(self, name: str, is_head: bool) -> str | None:
        """Why a layer stays a float, though it could be quantized."""
        config, names = self.quantization_config, (name, f"{name}.weight")
        if pattern := next((p for p in config.skip if any(fnmatch.fnmatchcase(n, p) for n in names)), None):
            return f"matches {pattern}"
        if any(fnmatch.fnmatchcase(n, p) for p in config.include for n in names):
            return None
        if is_head:
            return HEAD
        rule = next((rule for rule in RULES if rule.why != TABLE and rule.matches(names[1])), None)
        return None if rule is None else rule.why

    def _build(self, model: Any) -> None:
        """Put modules of codes, on meta, where the config says that the files hold codes."""
        given = Contents.parse({"version": 1, "weights": self.quantization_config.weights, "tied": {}}, "config.json")
        stored = names_in(model, given.weights)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, weight in stored.items():
            owner, _, key = name.rpartition(".")
            parameter = modules[owner]._parameters.get(key) if owner in modules else None
            shape = None if parameter is None else tuple(parameter.shape)
            if shape is None or (shape != weight.shape and key not in ways_of(modules[owner])):
                got = "no such weight" if shape is None else f"one of {list(shape)}"
                raise ValueError(f"model must have {name} {list(weight.shape)} for its codes, got {got}")
        sources = {target: source for target, source in model.all_tied_weights_keys.items() if source in stored}
        for name, weight in stored.items():
            if name not in sources:
                codes_as_stored(self._replace(model, name, weight.spec))
        for name, source in sources.items():  # an embedding's spec tells nothing of activations, that of its head does
            self._share(model, name, source, stored.get(name, stored[source]).spec)
        self.codes = frozenset(stored)

    def _replace(self, model: Any, name: str, spec: Any) -> QuantModule | QuantExperts:
        """A module of codes, on meta, where the layer or the experts of weight ``name`` are."""
        layer, spec = model.get_submodule(name.rpartition(".")[0]), QuantSpec.parse(spec)
        if isinstance(layer, QuantExperts):  # of which another weight came before
            return layer
        new = (QuantExperts if ways_of(layer) else quantized_type(layer)).like(layer, spec)
        put(new, layer, self.places)
        return new

    def _share(self, model: Any, name: str, source: str, spec: Any) -> None:
        """For the layer of weight ``name`` the codes of the one of weight ``source``."""
        layer, first = (model.get_submodule(n.removesuffix(".weight")) for n in (name, source))
        put(share_weight(first, layer, QuantSpec.parse(spec)), layer, self.places)
        del model.all_tied_weights_keys[name]  # transformers ties parameters: from now on there are several
        for key in PARTS:
            if first._parameters[key] is not None:
                model.all_tied_weights_keys[name.removesuffix("weight") + key] = source.removesuffix("weight") + key

    # ---- while they are read ----------------------------------------------------------------------------------------

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.waiting

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return conversions_of_codes(weight_conversions, model) if self.codes else weight_conversions

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Codes of FP8 count as floats for whoever asks them, and scales stay float32."""
        name = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return None if name.startswith(("F8", "torch.float8")) else super().get_new_dtype(converter, param, dtype)

    def quantize(self, model: Any, name: str, x: Tensor) -> dict[str, nn.Parameter]:
        """The parameters that x [N, ...], the weight ``name`` of ``model``, becomes; its layer is replaced."""
        self.waiting.discard(name)
        assert self.report is not None
        config, (prefix, _, key), spec = (
            self.quantization_config,
            name.rpartition("."),
            QuantSpec.parse(self.quantization_config.spec),
        )
        check_weight(
            f"{key} of {prefix}", x.flatten(0, -2) if key != "weight" else x.flatten(1), spec, config.on_nonfinite
        )
        new = self._replace(model, name, spec)
        if isinstance(new, QuantExperts):
            new.quantize(key, x)
            self.report.layers.append(describe_experts(prefix, key, x, new))
        else:
            sums = Sums()
            new._freeze(quantize_weight(new.as_matrix(x.detach()), new.spec, sums.add))
            self.report.layers.append(LayerReport.of(prefix, x, str(new.spec), new.plain, sums.snr_db))
            for other in self.tied.get(name, ()):
                self._share(model, f"{other}.weight", name, spec)
        parts = ((f"{key}_{part}", new._parameters.get(f"{key}_{part}")) for part in ("codes", "scale", "zero_point"))
        return {f"{prefix}.{part}": p for part, p in parts if p is not None}

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.places.clear()
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
        state = model.state_dict()
        for prefix, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, QuantModule) and (name := join(prefix, "weight_codes")) in state:
                codes = state[name].view(dtype_of(module.spec.row))
                state[name] = codes.view(module.stored_shape)
            elif isinstance(module, QuantExperts) and module.spec.scaled:
                for name in (join(prefix, f"{key}_codes") for key in module.stacks):
                    state[name] = state[name].view(dtype_of(module.spec.row)).unsqueeze(-1)
        return state, {}

    def is_serializable(self, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


HEAD = "the output layer"


def kept_by(module: nn.Module) -> tuple[str, ...]:
    """The parameters of ``module`` that are codes, scales or zero points."""
    return module.KEPT if isinstance(module, QuantModule) else module.kept if isinstance(module, QuantExperts) else ()


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


def codes_as_stored(module: QuantModule | QuantExperts) -> None:
    """Have codes on meta in the dtype and shape of the files, for a loader that compares them."""
    for key in kept_by(module):
        if (shapes := shapes_of_codes(module, key)) is not None:
            codes = torch.empty(shapes[1], dtype=dtype_of(module.spec.row), device="meta")
            module._parameters[key] = QuantParameter(codes, requires_grad=False)


def adopt_codes(model: nn.Module) -> None:
    """Tensors that a loader has put in place of codes, scales and zero points are `QuantParameter`, codes [N, K].

    Codes on meta stay what they are: accelerate reads those from disk for each call, as the files have them.
    """
    made: dict[int, QuantParameter] = {}
    for module in model.modules():
        for key in kept_by(module):
            p = module._parameters[key]
            if p is None or p.is_meta:
                continue
            if id(p) not in made:
                data, shapes = p.data, shapes_of_codes(module, key)
                data = data if shapes is None else data.view(stored_dtype(module.spec)).view(shapes[0])  # type: ignore[arg-type]
                made[id(p)] = QuantParameter(data, requires_grad=False)
            module._parameters[key] = made[id(p)]


def shapes_of_codes(module: nn.Module, key: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of the parameter ``key`` of ``module`` in memory and in a file; None where it holds no codes."""
    if isinstance(module, QuantExperts) and key.endswith("_codes"):
        E, N, K, _ = module.stacks[key.removesuffix("_codes")]
        kept = E, *module.spec.codes_shape((N, K))
        return kept, (*kept, 1) if module.spec.scaled else kept
    if isinstance(module, QuantModule) and key == "weight_codes":
        return module.spec.codes_shape(module._matrix), module.stored_shape
    return None


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
    """What ``save_pretrained`` undoes to write the names and shapes of the files that ``model`` came from."""
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
    suffixes = {"_codes": ""} | ({"_scale": "_scale"} if specs[0].scaled else {})
    suffixes |= {} if specs[0].symmetric is not False else {"_zero_point": "_zero_point"}
    return [
        converter.copy(
            [s + of_source for s in sources], [targets[0] + of_target], operations=list(converter.operations)
        )
        for of_target, of_source in suffixes.items()
    ]


def keep(model: Any, weights: dict[str, Any]) -> None:
    """Have transformers save ``model`` as one of quantlib; as one of floats if there are no ``weights``.

    A model that was not loaded with a quantizer may still be cast and trained as a whole: ``model.is_quantized``, which
    forbids that, is not set.
    """
    quantizer = vars(model).get("hf_quantizer")
    if not weights:
        HfQuantizer.remove_quantization_config(quantizer, model)  # type: ignore[no-untyped-call]
        return
    if not isinstance(quantizer, QuantlibQuantizer):
        quantizer = QuantlibQuantizer(QuantlibConfig(entry_of(weights)["spec"], weights=weights))
        model.hf_quantizer = quantizer
    quantizer.quantization_config.weights = weights
    model.config.quantization_config = quantizer.quantization_config
