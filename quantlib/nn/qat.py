"""y = F(fake_quantize(x), fake_quantize(weight)): float modules that compute with the values their codes will have"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.nn.conv import QuantConv1d, QuantConv2d
from quantlib.nn.embedding import QuantEmbedding
from quantlib.nn.fake_quantize import FakeQuantize, Source
from quantlib.nn.functional import Weight
from quantlib.nn.leaf import Leaf
from quantlib.nn.linear import QuantLinear
from quantlib.nn.module import QuantModule, rebind_hooks, taken_over
from quantlib.nn.observers import Initial, MovingAverageObserver, Observer
from quantlib.ops.check import is_sharded
from quantlib.spec import QuantSpec, check_of_weight

if TYPE_CHECKING:
    from typing_extensions import Self


class QATModule(Leaf):
    """A float module whose weight is trained as the codes that it will become.

    The weight [N, ...] is a float parameter under its own name, viewed as a matrix [N, K] and projected at each
    forward. A subclass derives from this and from a float module, and says which module of codes it becomes, `QUANT`.

    Parameters
    ----------
    *args, **kwargs
        As for the float module.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The spec of the weight, and of the input of a linear layer if it has an activation.
    scale : {"learned", "dynamic"}
        Whether the scale of the weight is a parameter, or follows the weight at each forward, as `quantize_` takes it.
    initial : {"minmax", "mse", "lsq"}
        Where a learned scale starts: see `quantlib.prepare_qat_`.
    mask : {"rounded", "lsq"}
        Where the weight passes its gradient on: where its rounded code is in range, or where weight / scale itself is.
    activation_scale : {"observed", "learned"}, optional
        Where the scale of a static activation comes from: see `quantlib.prepare_qat_`.
    observer : type of Observer
        The observer of a static activation.

    Attributes
    ----------
    weight_quantizer : FakeQuantize
        Holds the scale of the weight: ``weight_quantizer.scale``.
    input_quantizer : FakeQuantize, or None
        Projects the input, as `QuantLinear` does; None without an activation in the spec.
    spec : QuantSpec
    """

    QUANT: ClassVar[type[QuantModule]]
    PROJECTS_INPUT: ClassVar[bool] = False
    OWN: ClassVar[tuple[str, ...]] = ("weight_quantizer", "input_quantizer", "initial", "_scales_came_first")
    weight: Any
    weight_quantizer: FakeQuantize
    input_quantizer: FakeQuantize | None
    spec: QuantSpec
    initial: Initial
    _scales_came_first: bool

    def __init__(
        self,
        *args: Any,
        spec: Any,
        scale: Source = "learned",
        initial: Initial = "minmax",
        mask: str = "rounded",
        activation_scale: Source | None = None,
        observer: type[Observer] = MovingAverageObserver,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._fake_quantize(spec, scale, initial, mask, activation_scale, observer)

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        spec: Any,
        *,
        scale: Source = "learned",
        initial: Initial = "minmax",
        mask: str = "rounded",
        activation_scale: Source | None = None,
        observer: type[Observer] = MovingAverageObserver,
    ) -> Self:
        """``layer``, prepared: the weight and the bias are the same parameters, not copies.

        Raises
        ------
        TypeError
            For another module than the float one that this stands for.
        ValueError
            For an unknown spec or option, and for what `QUANT` cannot serve.
        """
        if type(layer) is not cls.QUANT.FLOAT:
            raise TypeError(f"layer must be an nn.{cls.QUANT.FLOAT.__name__}, got {type(layer).__name__}")
        if why := cls.QUANT.refuses(layer):
            raise ValueError(f"layer must be an nn.{type(layer).__name__} that {cls.__name__} can serve, got one {why}")
        new = cls.__new__(cls)
        vars(new).update(taken_over(layer))
        rebind_hooks(new)
        new._fake_quantize(spec, scale, initial, mask, activation_scale, observer)
        return new.train(layer.training)

    def fake_weight(self) -> Tensor:
        """The weight as its codes will have it, in its own shape and dtype, with the gradients of training."""
        y: Tensor = self.weight_quantizer(self.weight.flatten(1))
        return y.view(self.weight.shape)

    def codes(self) -> Weight:
        """Quantize the weight as it is now: codes [N, K] or their bytes, scales and zero points.

        Raises
        ------
        ValueError
            For a scale that is 0 or not finite.
        """
        return self.weight_quantizer.codes(self.weight.flatten(1))

    def convert(self, shared: QuantModule | None = None) -> QuantModule:
        """The module of codes: what it computes is what this one does in evaluation.

        Parameters
        ----------
        shared : QuantModule, optional
            The result for another module with the same weight: the codes are shared too.

        Raises
        ------
        RuntimeError
            Where no forward has projected the weight yet: there is nothing to land on.
        ValueError
            For a scale that is 0 or not finite, and a weight that is not finite or is computed, as by pruning.
        """
        if "weight" not in self._parameters:
            raise ValueError(
                "weight must be a parameter, got one that is computed: make what computes it permanent first"
            )
        quantizer = self.weight_quantizer
        if not quantizer.forwards.is_meta and not int(quantizer.forwards):
            raise RuntimeError(
                "convert_ must come after a forward with fake quantization on, got none: "
                "train the prepared model, or use quantize_ on the float one"
            )
        if not self.weight.is_meta and not self.weight.isfinite().all():
            raise ValueError(f"weight must be finite, got {self.weight[~self.weight.isfinite()][0]:g}")
        new = self.QUANT.like(self, self.spec)
        for name in self.OWN:
            new._modules.pop(name, None)
            vars(new).pop(name, None)
        if shared is None:
            new._freeze(self.codes())
        else:
            new.share(shared)
        projects = self.input_quantizer
        if isinstance(new, QuantLinear) and projects is not None and projects.spec.static:
            seen = None if projects.observer is None else projects.observer.batches
            if seen is not None and not seen.is_meta and not int(seen):
                raise RuntimeError("convert_ must come after a forward with observers on, got none")
            new.set_input_scale(projects.static())
        return new.train(self.training)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, spec={self.spec}"

    def reset_parameters(self) -> None:
        """Draw the weight as the float module does, and start its scale from it."""
        super().reset_parameters()  # type: ignore[misc]
        if hasattr(self, "weight_quantizer"):  # which the constructor of the float module comes before
            if is_sharded(self.weight):
                raise ValueError("weight must be whole for its scale to start from it, got one that is sharded")
            self._start_over()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """A weight without scales, of a float model, has them start from it as `prepare_qat_` would.

        Parts of a state may come one after the other: scales that came without their weight are those of the weight
        that comes without scales.
        """
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        with_weight = f"{prefix}weight" in state_dict
        of_quantizer = (f"{prefix}weight_quantizer.{name}" for name in ("forwards", "base", "scale_bias", "gain"))
        with_scales = any(name in state_dict for name in of_quantizer)
        if with_weight and not with_scales and not self._scales_came_first:
            if is_sharded(self.weight):
                args[-1].append(f"{prefix}weight must be loaded before fully_shard where it comes without scales")
            else:
                self._start_over()
        self._scales_came_first = with_scales and not with_weight

    def catch_up(self) -> None:
        """Start the scale from the weight once more, if the weight was trained without it until now."""
        self.weight_quantizer.catch_up(self.weight.flatten(1), self.initial)

    def _start_over(self) -> None:
        """Scales as they start from the weight, on its device if they are on ``meta``."""
        for quantizer in (self.weight_quantizer, self.input_quantizer):
            if quantizer is not None and quantizer.forwards.is_meta and not self.weight.is_meta:
                quantizer.to_empty(device=self.weight.device)
                quantizer.reset()
        self.weight_quantizer.initialize(self.weight.flatten(1), self.initial)

    def _fake_quantize(
        self,
        spec: Any,
        scale: Source,
        initial: Initial,
        mask: str,
        activation_scale: Source | None,
        observer: type[Observer],
    ) -> None:
        if scale == "observed":
            raise ValueError("scale must be learned or dynamic for a weight, got 'observed'")
        spec = QuantSpec.parse(spec)
        check_of_weight(spec)
        check_activation_scale(activation_scale, spec)
        self.initial, self._scales_came_first = initial, False
        self.spec = spec if self.PROJECTS_INPUT else spec.weight_only
        weight = self.weight.detach().flatten(1)
        self.weight_quantizer = FakeQuantize(weight.shape, self.spec, scale=scale, mask=mask, device=weight.device)
        self.weight_quantizer.initialize(weight, initial)
        activation, size, device = self.spec.activation, weight.shape[1:], weight.device
        self.input_quantizer = None
        if activation is not None and activation.static:
            source, watch = activation_scale or "observed", observer(size, activation, device=device)
            self.input_quantizer = FakeQuantize(
                size, activation, scale=source, observer=watch, mask=mask, device=device
            )
        elif activation is not None:
            self.input_quantizer = FakeQuantize(size, activation, scale="dynamic", device=device)


class QATLinear(QATModule, nn.Linear):
    """``nn.Linear``, trained as the codes it becomes: see `QATModule`."""

    QUANT = QuantLinear
    PROJECTS_INPUT = True

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        x = input if self.input_quantizer is None else self.input_quantizer(input)
        return F.linear(x, self.fake_weight(), self.bias)


class QATEmbedding(QATModule, nn.Embedding):
    """``nn.Embedding``, trained as the codes it becomes: see `QATModule`."""

    QUANT = QuantEmbedding

    def forward(self, input: Tensor) -> Tensor:
        """ids [...] -> [..., K]"""
        return F.embedding(input, self.fake_weight(), self.padding_idx)


class QATConv1d(QATModule, nn.Conv1d):
    """``nn.Conv1d``, trained as the codes it becomes: see `QATModule`. Batch norm is not folded into it."""

    QUANT = QuantConv1d

    def forward(self, input: Tensor) -> Tensor:
        """x [batch, in, length] -> [batch, out, length]"""
        y: Tensor = self._conv_forward(input, self.fake_weight(), self.bias)
        return y


class QATConv2d(QATModule, nn.Conv2d):
    """``nn.Conv2d``, trained as the codes it becomes: see `QATModule`. Batch norm is not folded into it."""

    QUANT = QuantConv2d

    def forward(self, input: Tensor) -> Tensor:
        """x [batch, in, height, width] -> [batch, out, height, width]"""
        y: Tensor = self._conv_forward(input, self.fake_weight(), self.bias)
        return y


def check_activation_scale(source: str | None, spec: QuantSpec) -> None:
    """Check that ``source`` suits the activation of ``spec``; None suits any."""
    static = spec.activation is not None and spec.activation.static
    if source is not None and not static:
        raise ValueError(f"activation_scale must be None unless activations are static, got {source!r} for {spec}")
    if source not in (None, "observed", "learned"):
        raise ValueError(f"activation_scale must be observed or learned, got {source!r}")


QAT: dict[type[nn.Module], type[QATModule]] = {
    cls.QUANT.FLOAT: cls for cls in (QATLinear, QATEmbedding, QATConv1d, QATConv2d)
}  # float module -> the one that trains it
