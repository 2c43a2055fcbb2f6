"""y[i, j] = decode(encode(x[i, j] / scale[i // br, j // bk])) * scale[i // br, j // bk], scale = base * gain"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quantlib import ops
from quantlib.formats import IntFormat
from quantlib.nn.functional import Scale, Weight, project, quantize_weight
from quantlib.nn.observers import Initial, KeepsDtype, Observer, initial_scale
from quantlib.spec import QuantSpec

Source = Literal["learned", "observed", "dynamic"]


class FakeQuantize(KeepsDtype):
    """The projection of a tensor, as training sees it: `quantlib.fake_quantize` with a scale of its own.

    Parameters
    ----------
    shape : sequence of int
        Of what is projected. Where all of a tensor shares a scale, only the last size of an activation is asked for.
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
    base : nn.Parameter [blocks] float32, or None where the scale is dynamic
        The scale that was set, row by row of blocks, frozen.
    gain : nn.Parameter [blocks] float32, or None where nothing is learned
        What training multiplies it by, 1 at first.
    zero_point : nn.Parameter [blocks] float32, or None
        Rounded where it is used; None unless the spec is affine.
    enabled : bool
        Whether anything is projected: if not, y is x.
    observing : bool
        Whether the observer, if there is one, sees x and sets the scale.
    forwards : Tensor, int64
        How often x was projected.

    Notes
    -----
    Scales of int8 weights are a thousand times smaller than the weights: one step of Adam, which is as long as its
    learning rate however small the gradient, would take a bare scale below 0. A gain is of the size of 1, like that of
    a normalization, and needs no learning rate of its own. It has one axis, so that FSDP2 can shard it.
    """

    base: nn.Parameter | None
    gain: nn.Parameter | None
    zero_point: nn.Parameter | None
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
        if scale not in ("learned", "observed", "dynamic"):
            raise ValueError(f"scale must be learned, observed or dynamic, got {scale!r}")
        if mask not in ("rounded", "lsq"):
            raise ValueError(f"mask must be rounded or lsq, got {mask!r}")
        if scale == "observed" and observer is None:
            raise ValueError("observer must be given for a scale that is observed, got None")
        self.source: Source = scale if self.spec.scaled else "dynamic"
        self.mask, self.enabled = mask, True
        self.observer, self.observing = observer, observer is not None
        self.blocks = self.spec.scale_shape(shape)
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64, device=device))
        n, learned = self.blocks[0] * self.blocks[1], self.source == "learned"
        for name, start, there, trained in (
            ("base", torch.ones, self.source != "dynamic", False),
            ("gain", torch.ones, learned, True),
            ("zero_point", torch.zeros, self.source != "dynamic" and not self.spec.symmetric, learned),
        ):
            parameter = nn.Parameter(start(n, dtype=torch.float32, device=device), trained) if there else None
            self.register_parameter(name, parameter)

    @property
    def scale(self) -> Tensor | None:
        """[blocks] float32: what codes are multiplied by, base * gain; None where it is dynamic."""
        return self.base if self.base is None or self.gain is None else self.base * self.gain

    @torch.no_grad()
    def initialize(self, x: Tensor, how: Initial = "minmax") -> None:
        """Set the scale to what x asks for: see `prepare_qat_` for ``how``."""
        if self.base is not None:
            self._set(*initial_scale(x, self.spec, how))
            if self.gain is not None:
                self.gain.fill_(1)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] float32, float16 or bfloat16 -> y [..., K] of the same."""
        base: Tensor | None = self.base
        zero_point: Tensor | None = self.zero_point
        if self.observer is not None and self.observing:
            self.observer(x)
            base, zero_point = self._set(*self.observer.scale())
        if not self.enabled:
            return x
        self.forwards += 1
        if base is None:
            return project(x, self.spec)
        if not x.numel():
            return x
        scale = (base if self.gain is None else base * self.gain).view(self.blocks)
        zero_point = None if zero_point is None else zero_point.view(self.blocks)
        block = self.spec.block(x.shape)
        return ops.fake_quantize(x, scale, self.spec.format, block=block, zero_point=zero_point, mask=self.mask)

    @torch.no_grad()
    def codes(self, x: Tensor) -> Weight:
        """The codes whose values `forward` gives, with their scales and zero points.

        Raises
        ------
        ValueError
            For a scale that is not above 0.
        """
        if self.base is None:
            return quantize_weight(x, self.spec)
        (scale, zero_point), x, block = self.static(), x.detach(), self.spec.block(x.shape)
        return Weight(ops.quantize(x, scale, self.spec.format, block=block, zero_point=zero_point), scale, zero_point)

    @torch.no_grad()
    def static(self) -> Scale:
        """The scale that is not dynamic, and its zero point, of [blocks] each, as codes have them.

        Raises
        ------
        ValueError
            For a scale that is dynamic or not above 0.
        """
        if self.scale is None:
            raise ValueError(f"scale must be learned or observed, got {self.source}")
        scale, zero_point = self.scale.detach().view(self.blocks).clone(), None
        if not scale.is_meta and not (scale > 0).all():
            raise ValueError(f"scale must be above 0, got {scale[~(scale > 0)][0]:g}")
        if self.zero_point is not None and isinstance(self.spec.row, IntFormat):  # as C10 has it
            z = self.zero_point.detach().view(self.blocks)
            zero_point = torch.where(z == z, z, 0).clamp(*self.spec.row.range(affine=True)).round().int()
        return Scale(scale, zero_point)

    def extra_repr(self) -> str:
        words = [f"{self.spec}, {self.source} scale"]
        if not self.enabled:
            words.append("disabled")
        elif self.gain is not None and not self.gain.requires_grad:
            words.append("frozen")
        return ", ".join(words)

    @torch.no_grad()
    def _set(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Keep what an observer says; it is returned because what is kept may change before the backward of now."""
        if self.base is not None:
            self.base.copy_(scale.reshape(-1))
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point.reshape(-1))
        return scale.reshape(-1), None if zero_point is None else zero_point.reshape(-1).float()
