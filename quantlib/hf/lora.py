"""Adapters of peft over quantized layers: merging quantizes base + adapter, unmerging restores the previous codes.

peft offers no way to add a kind of layer to those that it knows for every model, so importing this module replaces
some of its functions by ones that call them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import dora
from peft.tuners.lora import layer as layers
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from quantlib.api import dequantize_
from quantlib.nn import QuantModule
from quantlib.nn.experts import LowRank, QuantExperts
from quantlib.nn.weight import DecodedWeight

log = logging.getLogger(__name__)


class Merge:
    """The merge of a layer of peft into a weight of codes, and the tensors from before."""

    def __init__(self, before: dict[str, Tensor]) -> None:
        self.before = before


class Merges(list[Merge]):
    """The merges into one weight, the first one first: layers that share it, as tied ones do, share this list."""


class Merging:
    """The methods of a layer of peft that differ over a quantized layer."""

    get_base_layer: Callable[[], Any]
    merged_adapters: list[str]
    _merges: tuple[Merges, Merge] | None = None  # those into the weight, and the one of this layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize the sum of the base and the adapters; the log says how far the result is from it."""
        if not self._is_over_codes():
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
            return
        count = len(self.merged_adapters)
        before = {name: p.data for name, p in self._parts() if p is not None}
        values = self._values() if log.isEnabledFor(logging.INFO) else None
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        merged = self.merged_adapters[count:]
        if not merged:
            return
        if self._merges is None:
            self._merges = merges_into(self._parts()), Merge(before)
            self._merges[0].append(self._merges[1])
        if values is None:
            return
        error = ""
        if isinstance(self, layers.LoraLayer):
            wanted = values + sum(self.get_delta_weight(name).float() for name in merged)  # type: ignore[attr-defined]
            error = f": the adapter is {rms(wanted - values):.3g}, the rounding {rms(self._values() - wanted):.3g}"
        log.info("merged into %s%s", self.get_base_layer().spec, error)

    def unmerge(self, *args: Any, **kwargs: Any) -> None:
        """Restore the codes from before the first merge.

        Where another layer merged into the same codes since, the adapter is taken from these; that layer's
        ``unmerge`` then restores the codes from before both.
        """
        if not self._is_over_codes():
            self._merges = None
        if self._merges is None or args or kwargs:
            super().unmerge(*args, **kwargs)  # type: ignore[misc]
            return
        merges, mine = self._merges
        before, later = mine.before, merges[merges.index(mine) + 1 :]
        if later:
            super().unmerge()  # type: ignore[misc]
            shared = (before.keys() & later[0].before.keys()) - {"bias"}
            later[0].before |= {name: before[name] for name in shared}
            before = {name: t for name, t in before.items() if name not in shared}
        for name, p in self._parts():
            if p is not None and name in before:
                p.data = before[name].to(p.device)
        merges.remove(mine)
        self.merged_adapters.clear()
        self._merges = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time: pickle finds that of peft by its name."""
        return remade, (type(self).__bases__[1],), self.__getstate__()  # type: ignore[attr-defined]

    def _is_over_codes(self) -> bool:
        """False once `dequantize_` has put a float layer in the place of the quantized one."""
        return isinstance(self.get_base_layer(), (QuantModule, QuantExperts))

    def _parts(self) -> Iterator[tuple[str, nn.Parameter | None]]:
        """The parameters that merging changes."""
        yield from self.get_base_layer()._parameters.items()

    def _values(self) -> Tensor:
        values: Tensor = self.get_base_layer().values()
        return values


def merges_into(parts: Iterator[tuple[str, nn.Parameter | None]]) -> Merges:
    """The merges into the codes among ``parts``, which know them as long as a layer does."""
    codes: Any = next(p for name, p in parts if name.endswith("_codes"))
    merges = known() if (known := getattr(codes, "merges", None)) is not None else None
    if merges is None:
        merges = Merges()
        codes.merges = weakref.ref(merges)
    return merges


class MergingParam(Merging):
    """The same for ``target_parameters``: a weight of a module of experts."""

    parameter_name: str

    def _parts(self) -> Iterator[tuple[str, nn.Parameter | None]]:
        return (item for item in super()._parts() if item[0].startswith(f"{self.parameter_name}_"))

    def _values(self) -> Tensor:
        values: Tensor = self.get_base_layer().values(self.parameter_name, torch.float32)
        return values

    @contextlib.contextmanager
    def _activate_lora(self: Any, active_adapters: list[str]) -> Iterator[None]:
        """Multiply by the codes and by the two factors of each adapter: no float weight of all experts is made."""
        experts: QuantExperts = self.get_base_layer()
        added = []
        for name in active_adapters:
            if name in self.lora_A:
                left, right, scaling = self.get_delta_factors(name)  # [E, p, r], [E, r, q] of a weight [E, p, q]
                if experts.stacks[self.parameter_name].transposed:
                    left, right = right.transpose(1, 2), left.transpose(1, 2)
                added.append(LowRank(right, left, scaling))
        with experts.adapted(self.parameter_name, added):
            yield


def rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / math.sqrt(max(x.numel(), 1))


def over_codes(cls: type[nn.Module], mixin: type) -> type[nn.Module]:
    """Return ``cls`` with the changes of ``mixin``, under the same name, which peft compares."""
    return type(cls.__name__, (mixin, cls), {"__doc__": mixin.__doc__, "__module__": __name__})


@functools.cache
def form_of(cls: Any) -> type[nn.Module]:
    """The class of a layer of peft over a quantized one, for ``cls`` over a float one."""
    return over_codes(cls, MergingParam if issubclass(cls, layers.ParamWrapper) else Merging)


def remade(cls: Any) -> nn.Module:
    form: Any = form_of(cls)
    new: nn.Module = form.__new__(form)
    return new


def adopt(model: nn.Module) -> None:
    """Give the layers of peft over quantized ones their form."""
    for module in model.modules():
        plain = isinstance(module, BaseTunerLayer) and hasattr(module, "merge") and not isinstance(module, Merging)
        if plain and isinstance(module.get_base_layer(), (QuantModule, QuantExperts)):  # type: ignore[operator]
            cls: Any = type(module)
            module.__class__ = form_of(cls)


def adopting(inject: Callable[..., None]) -> Callable[..., None]:
    """``inject`` of peft, which puts adapters into a model, with `Merging` over quantized layers."""

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        adopt(model)

    return inject_adapter


def with_floats(update: Callable[..., None]) -> Callable[..., None]:
    """``update`` of peft, which copies a module of ``modules_to_save``, with float weights in the copy.

    The copy is trained and saved as a whole. Of codes only scales could be, if at all.
    """

    @functools.wraps(update)
    def update_copies(self: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        update(self, adapter_name, *args, **kwargs)
        copies = nn.ModuleDict({adapter_name: self.modules_to_save[adapter_name]})
        if not any(isinstance(module, (QuantModule, QuantExperts)) for module in copies.modules()):
            return
        trained = adapter_name == self.active_adapter
        dequantize_(copies)
        self.modules_to_save[adapter_name] = copies[adapter_name].requires_grad_(trained)
        log.warning("modules_to_save: %s is trained as floats, a copy of its codes' values", spec_of(self))

    return update_copies


def spec_of(wrapper: Any) -> str:
    """The quantized layer that ``wrapper`` of peft has a copy of, or the kind of the module around it."""
    module = wrapper.original_module
    return f"a layer of {module.spec}" if isinstance(module, QuantModule) else f"a {type(module).__name__}"


def named_as_floats(setup: Callable[..., None]) -> Callable[..., None]:
    """``setup`` of peft for prompts, which finds the embedding of tokens by the name of its ``weight``."""

    @functools.wraps(setup)
    def _setup_prompt_encoder(self: Any, *args: Any, **kwargs: Any) -> None:
        modules = [self.base_model, *self.base_model.children()]
        for module in modules:
            vars(module)["named_parameters"] = functools.partial(of_weights, module)
        try:
            setup(self, *args, **kwargs)
        finally:
            for module in modules:
                del vars(module)["named_parameters"]

    return _setup_prompt_encoder


def of_weights(module: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of ``module``, codes under the names of the weights that they stand for."""
    for name, p in type(module).named_parameters(module, *args, **kwargs):
        yield name.removesuffix("_codes") if name.endswith(".weight_codes") else name, p


def decoding(transpose: Callable[..., Any]) -> Callable[..., Any]:
    """``transpose`` of DoRA, which makes a parameter of the weight of an embedding to take its norm."""

    @functools.wraps(transpose)
    def transposed(weight: Any, fan_in_fan_out: bool) -> Any:
        return transpose(weight.clone() if isinstance(weight, DecodedWeight) else weight, fan_in_fan_out)

    return transposed


def finding(inject: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """``inject`` of peft, which looks for ``target_parameters``, with the weights of quantized experts among them."""

    @functools.wraps(inject)
    def _inject_parameters(self: Any, peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> list[str]:
        experts = [module for module in model.modules() if isinstance(module, QuantExperts)]
        for module in experts:
            vars(module)["named_parameters"] = functools.partial(with_stacks, module)
        try:
            return inject(self, peft_config, model, *args, **kwargs)
        finally:
            for module in experts:
                del vars(module)["named_parameters"]

    return _inject_parameters


def with_stacks(module: QuantExperts, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
    """The parameters of ``module``, and the float weights that its codes stand for."""
    yield from type(module).named_parameters(module, *args, **kwargs)
    yield from ((name, getattr(module, name)) for name in module.stacks)


BaseTuner.inject_adapter = adopting(BaseTuner.inject_adapter)  # type: ignore[method-assign]
BaseTuner._inject_parameters = finding(BaseTuner._inject_parameters)  # type: ignore[method-assign]
ModulesToSaveWrapper.update = with_floats(ModulesToSaveWrapper.update)  # type: ignore[method-assign]
PeftModel._setup_prompt_encoder = named_as_floats(PeftModel._setup_prompt_encoder)  # type: ignore[method-assign]
dora.transpose = decoding(dora.transpose)  # type: ignore[attr-defined]
