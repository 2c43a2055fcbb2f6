"""y[t] = sum over j of p[t, j] * expert(x[t]) with fake_quantize(weight[e]): experts that train as their codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.nn.experts import QuantExperts, Routed, Stack, by_expert, form_of, number_of, remade, ways_of
from quantlib.nn.fake_quantize import FakeQuantize, Source
from quantlib.nn.functional import Weight
from quantlib.nn.module import rebind_hooks, stored_dtype, taken_over
from quantlib.nn.observers import Initial
from quantlib.ops.check import is_sharded
from quantlib.spec import QuantSpec, check_of_weight


class QATExperts(Routed):
    """A module of experts whose matrices are trained as the codes that they will become.

    It derives from the float module too. A weight ``w`` stays the parameter that it is, and is projected at each
    forward, each row of each expert with the scales that `QuantExperts` would have.

    Attributes
    ----------
    stacks : dict of str to Stack
        The weights by name, and how the float module has them.
    <name>_quantizer : FakeQuantize
        Holds the scales of the weight, seen as [E * N, K].
    <name>_input_quantizer : FakeQuantize
        Projects the rows that this weight multiplies; there with an activation in the spec.
    spec : QuantSpec
    """

    FLOAT: ClassVar[type[nn.Module]]
    stacks: dict[str, Stack]
    spec: QuantSpec
    initial: Initial
    _scales_came_first: set[str]  # weights whose scales were loaded without them
    _fakes: dict[str, Tensor]  # the projected weights, during a forward

    @classmethod
    def refuses(cls, experts: nn.Module, spec: QuantSpec) -> str | None:
        """Return why ``experts`` cannot be trained as codes of ``spec``; None if they can."""
        for name, way in ways_of(experts).items():
            weight = experts._parameters[name]
            assert weight is not None
            stack = Stack.of_shape(weight.shape, way, number_of(experts))
            if spec.scaled and stack.N % spec.block(stack.matrix_shape)[0]:
                return f"rows of several experts would share a scale of {name}: {stack.N} rows in tiles"
            if spec.per == "tensor" and spec.scaled:
                return "each of its matrices would have one scale: train rows, groups or tiles"
        if spec.activation is not None and "_is_expert_parallel" not in vars(experts):
            return "its forward multiplies by itself, so that activations cannot be projected: train weights alone"
        if spec.activation is not None and spec.activation.static:
            return "activations of experts have no static scale"
        return None

    @classmethod
    def from_float(
        cls,
        experts: nn.Module,
        spec: Any,
        *,
        scale: Source = "learned",
        initial: Initial = "minmax",
        mask: str = "rounded",
    ) -> QATExperts:
        """``experts``, prepared: weights and biases are the same parameters, not copies.

        Raises
        ------
        TypeError
            For a module whose experts are not known to be matrices.
        ValueError
            For an unknown spec or option, and for what `refuses` names.
        """
        if not ways_of(experts):
            got = type(experts).__name__
            raise TypeError(f"experts must be a module of float experts that quantlib knows, got {got}")
        if scale == "observed":
            raise ValueError("scale must be learned or dynamic for a weight, got 'observed'")
        spec = QuantSpec.parse(spec)
        check_of_weight(spec)
        if why := cls.refuses(experts, spec):
            raise ValueError(f"experts must be such that {spec} can be trained, got {type(experts).__name__}: {why}")
        form = form_of(type(experts), QATExperts)
        new = form.__new__(form)
        vars(new).update(taken_over(experts))
        new.spec, new.stacks, new.initial, new._scales_came_first, new._fakes = spec, {}, initial, set(), {}
        rebind_hooks(new)
        for name, way in ways_of(experts).items():
            weight = getattr(new, name)
            stack = new.stacks[name] = Stack.of_shape(weight.shape, way, number_of(experts))
            device, shape = weight.device, (stack.E * stack.N, stack.K)
            quantizer = FakeQuantize(shape, spec.weight_only, scale=scale, mask=mask, device=device)
            quantizer.initialize(new.rows(name), initial)
            new.add_module(f"{name}_quantizer", quantizer)
            if spec.activation is not None:
                x = FakeQuantize((stack.K,), spec.activation, scale="dynamic", device=device)
                new.add_module(f"{name}_input_quantizer", x)
        return new.train(experts.training)

    def rows(self, name: str) -> Tensor:
        """The weight ``name`` as a matrix [E * N, K]."""
        return self.stacks[name].rows(self._parameters[name])  # type: ignore[arg-type]

    def fake_weight(self, name: str) -> Tensor:
        """The weight ``name`` as its codes will have it, in its own shape and dtype, with the gradients of training."""
        return self.stacks[name].whole(self._quantizer(name)(self.rows(name)))

    def codes(self, name: str) -> Weight:
        """Quantize the weight ``name`` as it is now: codes [E, N, ...], scales and zero points.

        Raises
        ------
        ValueError
            For a scale that is 0 or not finite.
        """
        E, parts = self.stacks[name].E, self._quantizer(name).codes(self.rows(name).detach().contiguous())
        return Weight(*(None if t is None else t.view(E, t.shape[0] // E, *t.shape[1:]) for t in parts))  # type: ignore[arg-type]

    def convert(self) -> QuantExperts:
        """The module of codes: what it computes is what this one does in evaluation.

        Raises
        ------
        RuntimeError
            Where no forward has projected a weight yet: there is nothing to land on.
        ValueError
            For a scale that is 0 or not finite, and a weight that is not finite.
        """
        for name in self.stacks:
            weight, forwards = self._parameters[name], self._quantizer(name).forwards
            assert weight is not None
            if not forwards.is_meta and not int(forwards):
                raise RuntimeError(
                    "convert_ must come after a forward with fake quantization on, got none: "
                    "train the prepared model, or use quantize_ on the float one"
                )
            if not weight.is_meta and not weight.isfinite().all():
                raise ValueError(f"{name} must be finite, got {weight[~weight.isfinite()][0]:g}")
        parts = {name: self.codes(name) for name in self.stacks}
        new = QuantExperts.like(self.as_float(), self.spec)
        for name, found in parts.items():
            new._keep(name, found._replace(codes=found.codes.view(stored_dtype(self.spec))))
        return new.train(self.training)

    def as_float(self) -> nn.Module:
        """The float module, with the same parameters."""
        new = self.FLOAT.__new__(self.FLOAT)
        own = ("stacks", "spec", "initial", "_scales_came_first", "_fakes")
        vars(new).update({name: value for name, value in taken_over(self).items() if name not in own})
        for name in self.stacks:
            for end in ("_quantizer", "_input_quantizer"):
                new._modules.pop(f"{name}{end}", None)
        rebind_hooks(new)
        return new

    def catch_up(self) -> None:
        """Start the scales from the weights once more, as `QATModule.catch_up` does."""
        for name, quantizer in self.quantizers():
            quantizer.catch_up(self.rows(name), self.initial)

    def quantizers(self) -> Iterator[tuple[str, FakeQuantize]]:
        """Name of a weight, and what projects it."""
        yield from ((name, self._quantizer(name)) for name in self.stacks)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the float module over the projected weights."""
        self._fakes.update({name: self.fake_weight(name) for name in self.stacks})
        shadows = {} if "_is_expert_parallel" in vars(self) else dict(self._fakes)
        vars(self).update(shadows)  # what `self.gate_up_proj` finds before the parameter
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._fakes.clear()
            for name in shadows:
                del vars(self)[name]

    def _product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        bias: Any = getattr(self, f"{name}_bias") if self.has_bias else None
        (E, N, K, _), project = self.stacks[name], self._modules.get(f"{name}_input_quantizer")
        weights = self.stacks[name].rows(self._fakes[name]).view(E, N, K).unbind()
        if project is not None and self.spec.activation is not None and self.spec.activation.per in ("row", "group"):
            x, project = project(x), None

        def multiply(rows: Tensor, e: int) -> Tensor:
            rows = rows if project is None else project(rows)
            y: Tensor = F.linear(rows, weights[e], None if bias is None else bias[e])
            return y

        return by_expert(multiply, x, ends)

    def _quantizer(self, name: str) -> FakeQuantize:
        quantizer = self._modules[f"{name}_quantizer"]
        assert isinstance(quantizer, FakeQuantize)
        return quantizer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A weight without scales, of a float model, has them start from it, as in a `QATModule`."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name, quantizer in self.quantizers():
            with_weight = f"{prefix}{name}" in state_dict
            with_scales = any(key.startswith(f"{prefix}{name}_quantizer.") for key in state_dict)
            if with_weight and not with_scales and name not in self._scales_came_first:
                weight = self._parameters[name]
                assert weight is not None
                if is_sharded(weight):
                    args[-1].append(f"{prefix}{name} must be loaded before fully_shard where it comes without scales")
                    continue
                if quantizer.forwards.is_meta and not weight.is_meta:
                    quantizer.to_empty(device=weight.device)
                    quantizer.reset()
                quantizer.initialize(self.rows(name), self.initial)
            change = self._scales_came_first.add if with_scales and not with_weight else self._scales_came_first.discard
            change(name)

    def extra_repr(self) -> str:
        shapes = (f"{name}={list(stack.shape)}" for name, stack in self.stacks.items())
        return ", ".join([*shapes, f"spec={self.spec}"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return remade, (self.FLOAT, vars(self), QATExperts)
