"""y[i, j] = decode(encode(x[i, j] / scale[i // br, j // bk])) * scale[i // br, j // bk], scale = base * gain"""

from __future__ import annotations

import itertools
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from quantlib import ops
from quantlib.formats import IntFormat
from quantlib.nn import ranks
from quantlib.nn.functional import Scale, Weight, kept_scale, kept_weight, project, quantize_weight
from quantlib.nn.leaf import Leaf
from quantlib.nn.observers import Initial, KeepsDtype, Observer, initial_scale
from quantlib.ops.autograd import StraightThrough, apply
from quantlib.ops.check import is_sharded
from quantlib.spec import QuantSpec, check_unrotated

if TYPE_CHECKING:
    from typing_extensions import Self

Source = Literal["learned", "observed", "dynamic"]


SMALLEST_GAIN = 2.0**-20  # of a learned scale: below it, in float32, nothing is left of a step of training


class Pass(NamedTuple):
    """A forward that was observed, by which one that is recomputed finds its scale."""

    checksum: Tensor  # of x
    scale: Tensor  # [blocks]
    zero_point: Tensor | None


class FakeQuantize(Leaf, KeepsDtype):
    """The projection of a tensor, as training sees it: `quantlib.fake_quantize` with a scale of its own.

    Parameters
    ----------
    shape : sequence of int
        The shape of x. Where all of a tensor shares a scale, only the last size of an activation is asked for.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The format, and what shares a scale.
    scale : {"learned", "observed", "dynamic"}
        Moved by gradients; what ``observer`` says; or taken from x at each forward (C4), as `quantize_` and the
        activations of `QuantLinear` do. A format without a scale is a cast, "dynamic" whatever is said.
    observer : Observer, optional
        Sees x, and sets the scale, as long as ``observing``. Without one a learned scale starts from `initialize`.
    mask : {"rounded", "lsq"}
        Where x passes its gradient on: where its rounded code is in range, or where x / scale itself is.
    device : torch.device, optional

    Attributes
    ----------
    base : Tensor [blocks] float32, or None where the scale is dynamic
        The scale that was set, row by row of blocks: a frozen parameter, which FSDP2 shards, or with an observer,
        which writes it in the forward, a buffer. NaN until the observer has seen something.
    base_zero : Tensor [blocks] float32, or None
        The zero point that was set, kept as ``base`` is; None unless the spec is affine.
    scale_bias : nn.Parameter [blocks] float32, or None where nothing is learned
        The value that training adds to a gain of 1: ``scale = base * gain``, see `gain`.
    zero_point_bias : nn.Parameter [blocks] float32, or None
        The value that training adds to the zero point that was set, in codes; None unless it is learned.
    enabled : bool
        Whether anything is projected: if not, y is x.
    observing : bool
        Whether the observer, if there is one, sees x and sets the scale, in training.
    calibrating : bool
        Whether it does so in evaluation too, until the module is put into training: true if it had seen nothing when
        the module was put into evaluation, or was switched on by `qat_mode_` there. What it saw unasked is forgotten
        at the first forward in training.
    forwards : Tensor, int64
        How often x was projected; a forward that is recomputed counts again only where it is compiled.

    Notes
    -----
    Scales of int8 weights are a thousand times smaller than the weights: one step of Adam, which is as long as its
    learning rate however small the gradient, would take a bare scale below 0. A gain is of the size of 1, like that of
    a normalization, and needs no learning rate of its own. What is learned is 0 at first and called a bias, so that
    weight decay leads back to what was set, and trainers that exempt biases from weight decay exempt it. It has one
    axis, so that FSDP2 can shard it.

    Under ``torch.utils.checkpoint`` a forward that is recomputed in the backward is not observed again, and gets the
    scale that it had. `state_dict` keeps the switches: ``enabled``, ``observing``, and whether scales are learned.
    """

    base: Tensor | None
    base_zero: Tensor | None
    scale_bias: nn.Parameter | None
    zero_point_bias: nn.Parameter | None
    observer: Observer | None
    forwards: Tensor

    def __init__(
        self,
        shape: Sequence[int],
        spec: Any,
        *,
        scale: Source = "learned",
        observer: Observer | None = None,
        mask: str = "rounded",
        device: Any = None,
    ) -> None:
        super().__init__()
        self.spec = QuantSpec.parse(spec).weight_only
        check_unrotated(self.spec, "fake quantization")
        if scale not in ("learned", "observed", "dynamic"):
            raise ValueError(f"scale must be learned, observed or dynamic, got {scale!r}")
        if mask not in ("rounded", "lsq"):
            raise ValueError(f"mask must be rounded or lsq, got {mask!r}")
        if scale == "observed" and observer is None:
            raise ValueError("observer must be given for a scale that is observed, got None")
        self.source: Source = scale if self.spec.scaled else "dynamic"
        self.mask, self.enabled, self.calibrating = mask, True, False
        self.observer, self.observing = observer, observer is not None
        self.blocks = self.spec.scale_shape(shape)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64, device=device))
        self._passes: deque[Pass] = deque(maxlen=64)  # the latest first
        self._handle = handle_of(self)
        self._provisional = False  # the observer saw its data unasked, as in a validation before training
        n, static, learned = self.blocks[0] * self.blocks[1], self.source != "dynamic", self.source == "learned"
        affine = static and not self.spec.symmetric
        for name, there, trained, value in (
            ("base", static, False, 1 if observer is None else math.nan),
            ("base_zero", affine, False, 0),
            ("scale_bias", learned, True, 0),
            ("zero_point_bias", affine and learned, True, 0),
        ):
            start = torch.full((n,), value, dtype=torch.float32, device=device) if there else None
            if start is None or (observer is not None and not trained):
                self.register_buffer(name, start)
            else:
                self.register_parameter(name, nn.Parameter(start, trained))
        if observer is not None and not self._unseen():
            self._set(*observer.scale())

    @torch.no_grad()
    def reset(self) -> None:
        """Set scales of 1, or none where an observer is to find them; forget everything learned and seen."""
        for tensor in (self.base_zero, self.scale_bias, self.zero_point_bias, self.forwards):
            if tensor is not None:
                tensor.zero_()
        if self.base is not None:
            self.base.fill_(1 if self.observer is None else math.nan)
        if self.observer is not None:
            self.observer.reset()
        self._provisional = False
        self._passes.clear()

    @property
    def gain(self) -> Tensor | None:
        """[blocks] float32: |1 + scale_bias|, and never below `SMALLEST_GAIN`; None where nothing is learned.

        Training may drive it through 0, where a scale means nothing: it goes on from the other side.
        """
        if self.scale_bias is None:
            return None
        gain = 1 + self.scale_bias
        gain = torch.where(gain < 0, -gain, gain)  # abs, but with a gradient at 0
        return gain + (SMALLEST_GAIN - gain).clamp(min=0).detach()  # with a gradient below it too

    @property
    def scale(self) -> Tensor | None:
        """[blocks] float32: the scale of the codes, base * gain; None where it is dynamic."""
        return None if self.base is None else self._learned(self.base, None)[0]

    @property
    def zero_point(self) -> Tensor | None:
        """[blocks] float32: the code of zero, rounded where it is used; None unless there is one."""
        return None if self.base is None else self._learned(self.base, self.base_zero)[1]

    @property
    def watching(self) -> bool:
        """True if the observer sees the next x."""
        return self.observer is not None and self.observing and (self.training or self.calibrating)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode:
            self.calibrating = False
        elif self.observing and not self.calibrating and self._unseen():
            self.calibrating = self._provisional = True
        return self

    @torch.no_grad()
    def initialize(self, x: Tensor, how: Initial = "minmax") -> None:
        """Set the scale to what x asks for, with nothing learned: see `prepare_qat_` for ``how``."""
        if self.base is not None:
            self._set(*initial_scale(x, self.spec, how))
            for learned in (self.scale_bias, self.zero_point_bias):
                if learned is not None:
                    learned.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, float16 or bfloat16 -> y [..., K] of the same.

        Raises
        ------
        RuntimeError
            Where the scale is an observer's that has seen nothing; under the transforms of ``torch.func``, for an
            observer that would see x; where a forward is recomputed whose scale is not known any more.
        """
        base, zero_point = self.base, self.base_zero
        if self.watching:
            if not torch.compiler.is_compiling():
                with ranks.whole(x) as seen:
                    said = self._observe(seen)
            else:
                n, affine = self.blocks[0] * self.blocks[1], not self.spec.symmetric
                scale, z = observe(x.detach(), self._handle, self.forwards, n, affine)
                said = scale, z if affine else None
            base, zero_point = (None, None) if base is None else said
        if not self.enabled:
            return x
        if not (recomputing() or transformed()):
            self.forwards.add_(1)
        if base is None:
            return project(x, self.spec)
        if not x.numel():
            return x
        if self.observer is not None and not self.watching:
            known = torch.compiler.is_compiling() or transformed() or base.device.type != "cpu"
            if not known and base.isnan().any():
                raise RuntimeError(
                    "FakeQuantize must have observed a batch before its scale is used, got none: run one in training, "
                    "or in evaluation after qat_mode_(model, observers=True)"
                )
            base = base.clone()  # DDP writes buffers before the backward of now
        scale, zero_point = self._learned(base, zero_point)
        block, z = self.spec.block(x.shape), None if zero_point is None else zero_point.view(self.blocks)
        scale = as_kept(scale, self.spec).view(self.blocks)
        return ops.fake_quantize(x, scale, self.spec.format, block=block, zero_point=z, mask=self.mask)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Weight:
        """The codes whose values `forward` gives, with their scales and zero points.

        Raises
        ------
        ValueError
            For a scale that is 0 or not finite.
        """
        if self.base is None:
            return quantize_weight(x, self.spec)
        (scale, zero_point), x, block = self.static(), x.detach(), self.spec.block(x.shape)
        scale = kept_scale(scale, self.spec)
        codes = ops.quantize(x, scale, self.spec.format, block=block, zero_point=zero_point)
        return kept_weight(Weight(codes, scale, zero_point), self.spec)

    @torch.no_grad()
    def static(self) -> Scale:
        """The scale that is not dynamic, and its zero point, of [blocks] each, as codes have them.

        Raises
        ------
        ValueError
            For a scale that is dynamic, 0 or not finite, or negative where E8M0 keeps it.
        """
        if self.scale is None:
            raise ValueError(f"scale must be learned or observed, got {self.source}")
        scale, zero_point = self.scale.detach().view(self.blocks).clone(), None
        unsigned = self.spec.scale == "e8m0"  # powers of two, none of them negative
        if not scale.is_meta and not (good := (scale > 0 if unsigned else scale != 0) & scale.isfinite()).all():
            expected = "above 0 and finite for e8m0" if unsigned else "finite and not 0"
            raise ValueError(f"scale must be {expected}, got {scale[~good][0]:g}")
        if isinstance(self.spec.row, IntFormat) and (z := self.zero_point) is not None:  # as C10 has it
            z = z.detach().view(self.blocks)
            zero_point = torch.where(z == z, z, 0).clamp(*self.spec.row.range(affine=True)).round().int()
        return Scale(scale, zero_point)

    def extra_repr(self) -> str:
        words = [f"{self.spec}, {self.source} scale"]
        if not self.enabled:
            words.append("disabled")
        elif self.scale_bias is not None and not self.scale_bias.requires_grad:
            words.append("frozen")
        return ", ".join(words)

    def get_extra_state(self) -> Tensor:
        """The switches, as bytes: enabled, observing, and whether scales are learned."""
        learning = self.scale_bias is None or self.scale_bias.requires_grad
        return torch.tensor([self.enabled, self.observing, learning], dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.enabled, observing, learning = (bool(switch) for switch in state.tolist())
        self.observing = observing and self.observer is not None
        self.learn(learning)

    def catch_up(self, x: Tensor, how: Initial) -> None:
        """`initialize` once more, if x, a weight, was trained without its scale until now.

        The scale must be switched off, nothing of it may be learned, and it must not be frozen after it was in use.
        """
        learned = [t for t in (self.scale_bias, self.zero_point_bias) if t is not None]
        if self.enabled or not learned or x.is_meta or self.forwards.is_meta:
            return
        if not (learned[0].requires_grad or not int(self.forwards)):
            return
        if is_sharded(x):
            warnings.warn("scales of sharded weights start from the weights of prepare_qat_", stacklevel=4)
        elif not any(bool(t.any()) for t in learned):
            self.initialize(x, how)

    def calibrate(self, calibrating: bool) -> None:
        """Have the observer watch in evaluation, until the module is put into training, or not."""
        self.calibrating, self._provisional = calibrating, False

    def learn(self, learning: bool) -> None:
        """Make the learned parameters require a gradient; frozen ones lose the gradient that they have."""
        for parameter in (self.scale_bias, self.zero_point_bias):
            if parameter is not None:
                parameter.requires_grad_(learning)
                parameter.grad = parameter.grad if learning else None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        gain = state_dict.pop(f"{prefix}gain", None)  # the names of older states
        if gain is not None:
            state_dict[f"{prefix}scale_bias"] = gain - 1
            if (zero_point := state_dict.pop(f"{prefix}zero_point", None)) is not None:
                state_dict[f"{prefix}base_zero"] = zero_point
                state_dict[f"{prefix}zero_point_bias"] = torch.zeros_like(zero_point)
        elif (zero_point := state_dict.pop(f"{prefix}zero_point", None)) is not None:
            state_dict[f"{prefix}base_zero"] = zero_point
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        missing: list[str] = args[1]
        if f"{prefix}_extra_state" in missing:
            missing.remove(f"{prefix}_extra_state")
        if f"{prefix}base" in state_dict:
            self.calibrate(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._passes.clear()
        return super()._apply(fn, recurse)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = handle_of(self)  # a copy is another module

    def _unseen(self) -> bool:
        return self.observer is not None and (self.observer.batches.is_meta or not int(self.observer.batches))

    def _learned(self, base: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The scale and the zero point that training has made of those that were set.

        A set scale gets no gradient, also where ``model.requires_grad_(True)`` asks for one: it would be trained as
        the bare scale that it is.
        """
        base, gain = base.detach(), self.gain
        scale = base if gain is None else base * gain
        if zero_point is not None:
            zero_point = zero_point.detach()
            zero_point = zero_point if self.zero_point_bias is None else zero_point + self.zero_point_bias
        return scale, zero_point

    @torch.no_grad()
    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Show x to the observer; return its scale and zero point, in a recomputed forward those of the first."""
        assert self.observer is not None
        if transformed():
            raise RuntimeError(
                "observers must be off under the transforms of torch.func, which would lose what they see, got one "
                "that is on: use qat_mode_(model, observers=False)"
            )
        if recomputing():
            return self._said_of(x)
        if self.training and self._provisional:
            self.observer.reset()
            self._provisional = False
        self.observer(x)
        said = self.observer.scale()
        kept = self._set(*said) if x.numel() or self.observer.groups() else flat(*said)
        self._passes.appendleft(Pass(checksum(x), *kept))
        return kept

    def _said_of(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The scale and zero point of the forward that x was in before, without waiting for a device."""
        same = torch.stack([a.checksum for a in self._passes]) == checksum(x) if self._passes else None
        if same is None or (x.device.type == "cpu" and not same.any()):
            raise RuntimeError(
                f"a forward that is recomputed in the backward must have been one of the last {self._passes.maxlen} "
                "forwards that were observed, got another input: checkpoint fewer at once, or use "
                "qat_mode_(model, observers=False)"
            )
        latest = same.long().argmax().view(1)
        scale = torch.stack([a.scale for a in self._passes]).index_select(0, latest)[0]
        if self.base_zero is None:
            return scale, None
        zero_points = [a.zero_point for a in self._passes if a.zero_point is not None]
        return scale, torch.stack(zero_points).index_select(0, latest)[0]

    @torch.no_grad()
    def _set(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keep what an observer says; it is returned because what is kept may change before the backward of now."""
        if self.base is not None:
            self.base.copy_(scale.reshape(-1))
        if self.base_zero is not None and zero_point is not None:
            self.base_zero.copy_(zero_point.reshape(-1))
        return flat(scale, zero_point)


MODULES: WeakValueDictionary[int, FakeQuantize] = WeakValueDictionary()  # by the number that stands in `_handle`
NUMBERS = itertools.count()


class _Kept(StraightThrough):
    """The values of scales in the dtype that they are kept in, float32; the derivative passes straight through."""

    @staticmethod
    def forward(scale: Tensor, spec: QuantSpec) -> Tensor:
        return kept_scale(scale, spec).float()


def as_kept(scale: Tensor, spec: QuantSpec) -> Tensor:
    return scale if spec.scale == "float32" else apply(_Kept, scale, spec)


def handle_of(module: FakeQuantize) -> Tensor:
    """A tensor that names ``module`` to `observe`: compiled code is not compiled anew for another tensor."""
    number = next(NUMBERS)
    MODULES[number] = module
    return torch.tensor(number, device="cpu")


@torch.library.custom_op("quantlib_qat::observe", mutates_args=("forwards",), tags=(torch.Tag.cudagraph_unsafe,))
def observe(x: Tensor, handle: Tensor, forwards: Tensor, n: int, affine: bool) -> tuple[Tensor, Tensor]:
    """The scale and zero point [n] of `FakeQuantize._observe`, opaque to a compiler.

    Traced through, an observer would be repeated where a compiled function is checkpointed, with what it had seen
    since. What it writes in its module no compiler sees; ``forwards`` is said to be written to, so that none takes the
    call for one that has no effect.
    """
    scale, zero_point = MODULES[int(handle)]._observe(x)
    return scale.clone(), scale.new_empty(0) if zero_point is None else zero_point.clone()


@observe.register_fake
def _(x: Tensor, handle: Tensor, forwards: Tensor, n: int, affine: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(n, dtype=torch.float32), x.new_empty(n if affine else 0, dtype=torch.float32)


def flat(scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[I, J] as they are kept: [blocks] float32."""
    return scale.reshape(-1), None if zero_point is None else zero_point.reshape(-1).float()


def recomputing() -> bool:
    """True if a backward is running: a forward in it is one that ``torch.utils.checkpoint`` repeats."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def transformed() -> bool:
    """True if a transform of ``torch.func`` is running, in which nothing outside can be written."""
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def checksum(x: Tensor) -> Tensor:
    """int64: the sum of the bits of x, in whatever order they are added."""
    bits = (
        x.detach().contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
    )
    return bits.sum(dtype=torch.int64)
