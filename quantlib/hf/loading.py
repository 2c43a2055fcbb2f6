"""The choice and the replacement of layers while a model is loaded, shared by transformers and diffusers."""

from __future__ import annotations

import fnmatch
import logging
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.api import (
    by_reason,
    experts_of,
    other_weights,
    places_of,
    put,
    quantized_type,
    reason_to_skip,
    reasons_to_skip,
    share_weight,
)
from quantlib.backends.packing import kept_zero_points
from quantlib.checkpoint.choose import RULES, TABLE
from quantlib.checkpoint.model import join
from quantlib.checkpoint.stored import Contents, Stored
from quantlib.hf.config import QuantlibConfig
from quantlib.measure import Sums, check_weight, describe_experts
from quantlib.nn import QUANTIZED, QuantModule
from quantlib.nn.experts import QuantExperts, ways_of
from quantlib.nn.forms import with_likes
from quantlib.nn.functional import quantize_weight
from quantlib.nn.module import PARTS, stored_dtype
from quantlib.nn.weight import QuantParameter
from quantlib.ops.check import dtype_of
from quantlib.report import LayerReport, Report
from quantlib.spec import QuantSpec

log = logging.getLogger(__name__)


class Loading:
    """The layers of a skeleton on meta become codes, one weight at a time as a library reads them.

    Attributes
    ----------
    report : Report or None
        The report of a model that was quantized while it was loaded: see `quantlib.quantize_`.
    """

    quantization_config: QuantlibConfig

    def _begin(self) -> None:
        self.report: Report | None = None
        self.waiting: set[str] = set()  # names of weights that are to be quantized
        self.tied: dict[str, list[str]] = {}  # such a name -> the other layers that have this weight
        self.places: dict[int, list[Any]] = {}
        self.codes: frozenset[str] = frozenset()  # names of weights that are codes in the files too

    def _names_in(self, model: Any, weights: dict[str, Stored]) -> dict[str, Stored]:
        """``weights`` of a file under the names that they have in ``model``."""
        return weights

    def _prepare(self, model: Any, pre_quantized: bool) -> None:
        """Before the files are read, make layers for the codes in them, or choose layers to quantize."""
        self.places = places_of(model)
        if pre_quantized:
            self._build(model)
        else:
            self._choose(model)

    def _choose(self, model: Any) -> None:
        """Decide which layers become codes when their weights arrive."""
        config = self.quantization_config
        also = (nn.Embedding,) * config.embeddings + (nn.Conv1d, nn.Conv2d) * config.convolutions
        types = with_likes((nn.Linear, *also))
        skipped = reasons_to_skip(model, types=types)
        experts = experts_of(model, lambda module, name: True, skipped)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, types) and name not in skipped}
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, layer in (layers | experts).items():
            if why := self._unwanted(name, layer is head):
                skipped[name] = why
        groups: dict[str, list[str]] = {}  # layer whose weight others have -> all of them
        for target, source in tied_keys(model).items():
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
        names = [n for name, _ in model.named_modules() for n in (name, f"{name}.weight")]
        for option in ("skip", "include"):
            patterns: list[str] = getattr(self.quantization_config, option)
            if unused := [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]:
                log.warning(
                    "no module matches %s %s; '*.%s' is every module of that name",
                    option,
                    ", ".join(unused),
                    unused[0].rpartition(".")[2],
                )
        self.waiting = {f"{name}.weight" for name in wanted}
        self.waiting |= {f"{name}.{key}" for name, m in experts.items() if name not in skipped for key in ways_of(m)}
        if not self.waiting:
            found = by_reason(skipped | other_weights(model, skipped)) or "none"
            raise ValueError(f"model must have a layer to quantize, got {found}")

    def _unwanted(self, name: str, is_head: bool) -> str | None:
        """Return why a layer stays a float though it could be quantized, or None."""
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
        stored = self._names_in(model, given.weights)
        modules = dict(model.named_modules(remove_duplicate=False))
        for name, weight in stored.items():
            owner, _, key = name.rpartition(".")
            parameter = modules[owner]._parameters.get(key) if owner in modules else None
            shape = None if parameter is None else tuple(parameter.shape)
            if shape is None or (shape != weight.shape and key not in ways_of(modules[owner])):
                got = "no such weight" if shape is None else f"one of {list(shape)}"
                raise ValueError(f"model must have {name} {list(weight.shape)} for its codes, got {got}")
        if unable := {n: why for n in stored if (why := reason_against(modules[n.rpartition(".")[0]], n)) is not None}:
            told = "; ".join(f"{name}: {why}" for name, why in list(unable.items())[:3])
            more = f" and {len(unable) - 3} more" if len(unable) > 3 else ""
            raise ValueError(
                f"model must have layers that can hold the codes of its files, got {told}{more}: leave these weights "
                "out (exclude, --exclude) when files are quantized, or give the float folder to from_pretrained"
            )
        for name, weight in stored.items():
            owner, _, key = name.rpartition(".")
            spec, way = QuantSpec.parse(weight.spec), ways_of(modules[owner]).get(key)
            if way in ("enk", "ekn") and len(weight.shape) == 2 and spec.scaled and spec.block((2, 2))[0] != 1:
                raise ValueError(
                    f"{name} must have scales of rows or groups to become one stack, got {spec} of each matrix in its "
                    "files: give the float folder to from_pretrained, or quantize it to scales of rows or groups"
                )
        sources = {target: source for target, source in tied_keys(model).items() if source in stored}
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
        """Give the layer of weight ``name`` the codes of the layer of weight ``source``."""
        layer, first = (model.get_submodule(n.removesuffix(".weight")) for n in (name, source))
        put(share_weight(first, layer, QuantSpec.parse(spec)), layer, self.places)
        tied = tied_keys(model)
        del tied[name]  # transformers ties parameters: from now on there are several
        for key in PARTS:
            if first._parameters[key] is not None:
                tied[name.removesuffix("weight") + key] = source.removesuffix("weight") + key

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


HEAD = "the output layer"


def reason_against(layer: nn.Module, name: str) -> str | None:
    """Return why ``layer`` cannot hold codes for its weight ``name``, or None."""
    if isinstance(layer, (QuantModule, QuantExperts)) or name.rpartition(".")[2] in ways_of(layer):
        return None
    known = isinstance(layer, with_likes(tuple(QUANTIZED)))
    return reason_to_skip(layer) if known else f"{type(layer).__name__} has no quantized form"


def tied_keys(model: Any) -> dict[str, str]:
    """Name of a weight -> the weight that it shares, in a model of transformers; other libraries tie none."""
    keys: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return keys


def kept_by(module: nn.Module) -> tuple[str, ...]:
    """The parameters of ``module`` that are codes, scales or zero points."""
    return module.KEPT if isinstance(module, QuantModule) else module.kept if isinstance(module, QuantExperts) else ()


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
    for prefix, module in model.named_modules():
        for key in kept_by(module):
            p = module._parameters[key]
            if p is None or p.is_meta:
                continue
            if id(p) not in made:
                data, shapes = p.data, shapes_of_codes(module, key)
                if shapes is not None and data.shape not in shapes:
                    expected = " or ".join(str(list(shape)) for shape in shapes)
                    raise ValueError(f"{join(prefix, key)} must have shape {expected}, got {list(data.shape)}")
                data = data if shapes is None else data.view(stored_dtype(module.spec)).view(shapes[0])
                if key.endswith("_zero_point") and data.dtype == torch.int32:  # as versions before 3 wrote them
                    data = kept_zero_points(data, module.spec.row)
                made[id(p)] = QuantParameter(data, requires_grad=False)
            module._parameters[key] = made[id(p)]


def shapes_of_codes(module: nn.Module, key: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The shapes of the parameter ``key`` of ``module`` in memory and in a file; None where it holds no codes."""
    if isinstance(module, QuantExperts) and key.endswith("_codes"):
        stack = module.stacks[key.removesuffix("_codes")]
        return (stack.E, *module.spec.codes_shape(stack.matrix_shape)), stack.stored_shape(module.spec)
    if isinstance(module, QuantModule) and key == "weight_codes":
        return module.spec.codes_shape(module._matrix), module.stored_shape
    return None


def may_lack_an_axis(model: nn.Module, name: str) -> bool:
    """True of what older versions wrote otherwise: zero points as int32, and codes without a scale as [..., N, K].

    The loader of transformers asks it where the shape of a file is not that of the model; `adopt_codes` compares both.
    """
    prefix, _, key = name.rpartition(".")
    module = model.get_submodule(prefix)
    if isinstance(module, (QuantModule, QuantExperts)) and key.endswith("_zero_point"):
        return True
    if not isinstance(module, (QuantModule, QuantExperts)) or module.spec.scaled:
        return False
    shapes = shapes_of_codes(module, key)
    return shapes is not None and shapes[1] == (*shapes[0], 1)


def state_as_stored(model: nn.Module) -> dict[str, Tensor]:
    """The state of ``model`` with codes in the dtypes and shapes of files.

    Codes that are offloaded to disk are read: whoever saves the state reads them in the shape of the parameter.
    """
    state: dict[str, Tensor] = model.state_dict()
    on_meta = [name for name, tensor in state.items() if name.endswith("_codes") and tensor.is_meta]
    if on_meta and hasattr(model, "hf_device_map"):
        from transformers.integrations.accelerate import load_offloaded_parameter

        state |= {name: load_offloaded_parameter(model, name) for name in on_meta}  # type: ignore[arg-type]
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantModule) and (name := join(prefix, "weight_codes")) in state:
            state[name] = state[name].view(dtype_of(module.spec.row)).view(module.stored_shape)
        elif isinstance(module, QuantExperts):
            for key, stack in module.stacks.items():
                name = join(prefix, f"{key}_codes")
                state[name] = state[name].view(dtype_of(module.spec.row)).view(stack.stored_shape(module.spec))
    return state
