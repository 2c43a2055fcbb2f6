"""LoRA of peft over quantized layers: merging quantizes base + adapter, unmerging restores the previous codes.

peft offers no way to add a kind of layer to those that it knows for every model, so importing this module replaces two
of its functions by ones that call them.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as layers
from peft.tuners.lora import model as models
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from quantlib.nn import QuantModule
from quantlib.nn.experts import LowRank, QuantExperts

log = logging.getLogger(__name__)


class Merging:
    """The methods of a LoRA layer of peft that differ over a quantized layer."""

    get_base_layer: Callable[[], Any]
    merged_adapters: list[str]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantize the sum of the base and the adapters; the log says how far the result is from it."""
        count = len(self.merged_adapters)
        before = {name: p.data for name, p in self._parts() if p is not None}
        values = self._values() if log.isEnabledFor(logging.INFO) else None
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        merged = self.merged_adapters[count:]
        if not merged:
            return
        if not count:
            self._before = before
        if values is not None:
            wanted = values + sum(self.get_delta_weight(name).float() for name in merged)  # type: ignore[attr-defined]
            size, error = rms(wanted - values), rms(self._values() - wanted)
            log.info("merged into %s: the adapter is %.3g, the rounding %.3g", self.get_base_layer().spec, size, error)

    def unmerge(self) -> None:
        """Restore the codes from before the first merge."""
        if not self.merged_adapters:
            super().unmerge()  # type: ignore[misc]
            return
        for name, p in self._parts():
            if p is not None:
                p.data = self._before[name]
        self.merged_adapters.clear()
        del self._before

    def _parts(self) -> Iterator[tuple[str, nn.Parameter | None]]:
        """The parameters that merging changes."""
        yield from self.get_base_layer()._parameters.items()

    def _values(self) -> Tensor:
        values: Tensor = self.get_base_layer().values()
        return values


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


PLAIN = (layers.Linear, layers.Embedding, layers.Conv1d, layers.Conv2d)
FORMS: dict[type[nn.Module], type[nn.Module]] = {cls: over_codes(cls, Merging) for cls in PLAIN}
FORMS[layers.ParamWrapper] = over_codes(layers.ParamWrapper, MergingParam)


def dispatching(dispatch: Callable[..., nn.Module | None]) -> Callable[..., nn.Module | None]:
    """``dispatch`` of peft, which makes the LoRA layer for a layer, with `Merging` over a quantized one."""

    @functools.wraps(dispatch)
    def dispatch_default(*args: Any, **kwargs: Any) -> nn.Module | None:
        new: Any = dispatch(*args, **kwargs)
        if type(new) in FORMS and isinstance(new.get_base_layer(), (QuantModule, QuantExperts)):
            new.__class__ = FORMS[type(new)]
        return new  # type: ignore[no-any-return]

    return dispatch_default


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


models.dispatch_default = dispatching(layers.dispatch_default)  # type: ignore[attr-defined]
BaseTuner._inject_parameters = finding(BaseTuner._inject_parameters)  # type: ignore[method-assign]
