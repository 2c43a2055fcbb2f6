"""y[b, n, ...] = bias[n] + x[b] convolved with w[n], w[n, k] = decode(weight[n, k]) * weight_scale[n // br, k // bk]"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_input, conv2d_input

from quantlib.nn.functional import SOURCES, Weight, autocast, dequantize_rows
from quantlib.nn.leaf import check_input, check_inside
from quantlib.nn.module import QuantModule
from quantlib.ops.autograd import apply
from quantlib.spec import QuantSpec

SLAB = 1 << 22  # weights that are floats at a time: each slab is a convolution of its own, which packs x again
SLOW = tuple(  # floats of 16 bits that torch has no fast convolution for on this CPU
    dtype
    for dtype, fast in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported),
    )
    if torch.backends.mkldnn.is_available() and not fast()
)

CONVOLVE = {1: F.conv1d, 2: F.conv2d}
GRADIENT_OF_X = {1: conv1d_input, 2: conv2d_input}


class QuantConv(QuantModule, nn.modules.conv._ConvNd):
    """The common base of `QuantConv1d` and `QuantConv2d`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As for the float module.
    device : torch.device, optional
    dtype : torch.dtype, optional
        The dtype of the bias, and of the module that `dequantize` gives.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The spec of the weight [out, in / groups, *kernel], viewed as [out, in / groups * kernel]. An
        activation is left out of it: only weights are quantized here.

    Attributes
    ----------
    weight, weight_codes, weight_scale, weight_zero_point, spec, block, dtype
        As in `QuantModule`.
    bias : nn.Parameter [out], or None

    Notes
    -----
    The weight is dequantized a slab of output channels at a time, forward and backward; the convolution is torch's own,
    in the dtype of the input. On a CPU without instructions for a float of 16 bits torch convolves it by a slow loop:
    there it is done in float32, and rounded once. Gradients reach the input and the bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        spec: Any,
    ) -> None:
        sizes = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self._take(self.FLOAT(*sizes, bias, padding_mode, device="meta"), spec, dtype, device)

    def _allocate(self, spec: QuantSpec, dtype: torch.dtype | None, device: Any) -> None:
        super()._allocate(spec.weight_only, dtype, device)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def forward(self, input: Tensor) -> Tensor:
        """x [batch, in, ...] or [in, ...] of any float dtype -> [batch, out, ...] of the same."""
        check_inside(input)
        x = autocast(input)
        spatial = len(self.kernel_size)
        if input.dim() not in (spatial + 1, spatial + 2):
            raise RuntimeError(f"input must have {spatial + 1} or {spatial + 2} axes, got {list(input.shape)}")
        check_input(x, self.in_channels, -1 - spatial)
        x = x.unsqueeze(0) if input.dim() == spatial + 1 else x
        padding = self.padding
        if self.padding_mode != "zeros" or padding == "same":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode)
        if self.padding_mode != "zeros" or isinstance(padding, str):
            padding = (0,) * spatial
        how = Convolution(self.weight_shape, self.stride, padding, self.dilation, self.groups)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = apply(_Convolve, x, bias, *self.plain, self.spec.format, self.block, how)
        return y.squeeze(0) if input.dim() == spatial + 1 else y


class QuantConv1d(QuantConv, nn.Conv1d):
    """``nn.Conv1d`` whose weight is codes and their scales: see `QuantConv`."""

    FLOAT = nn.Conv1d


class QuantConv2d(QuantConv, nn.Conv2d):
    """``nn.Conv2d`` whose weight is codes and their scales: see `QuantConv`."""

    FLOAT = nn.Conv2d


class Convolution(NamedTuple):
    """A convolution but for its weight: what torch's functions take, and how a slab of output channels fits in."""

    weight_shape: tuple[int, ...]  # [out, in / groups, *kernel]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def slabs(self) -> Iterator[tuple[slice, slice, int]]:
        """Output channels, the input channels that they see, and the groups in them: some of one, or several whole."""
        out, inside, *kernel = self.weight_shape
        of_group = out // self.groups
        at_once = max(SLAB // max(inside * math.prod(kernel), 1), 1)
        if at_once < of_group:
            for n in range(0, out, of_group):
                k = n // of_group * inside
                for start in range(n, n + of_group, at_once):
                    yield slice(start, min(start + at_once, n + of_group)), slice(k, k + inside), 1
        else:
            several = at_once // max(of_group, 1)
            for g in range(0, self.groups, several):
                stop = min(g + several, self.groups)
                yield slice(g * of_group, stop * of_group), slice(g * inside, stop * inside), stop - g


class _Convolve(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor | None,
        zero_point: Tensor | None,
        format: str,
        block: tuple[int, int],
        how: Convolution,
    ) -> Tensor:
        return convolved(x, bias, Weight(codes, scale, zero_point), format, block, how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, codes, scale, zero_point, ctx.format, ctx.block, ctx.how = inputs
        ctx.shape = x.shape
        ctx.save_for_backward(codes, scale, zero_point, x if ctx.needs_input_grad[3] else None)
        ctx.save_for_forward(codes, scale, zero_point, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        how, dx, dbias, dscale = ctx.how, None, None, None
        codes, scale, zero_point, x = ctx.saved_tensors
        if ctx.needs_input_grad[0]:
            total = torch.float32 if dy.dtype in SOURCES else dy.dtype
            working = working_dtype(dy)
            parts: dict[int, Tensor] = {}  # first of some channels of x -> their gradient: several slabs may see them
            for n, k, groups in how.slabs():
                w = slab(Weight(codes, scale, zero_point), n, ctx.format, ctx.block, how, working)
                shape = (ctx.shape[0], k.stop - k.start, *ctx.shape[2:])
                rest = (how.stride, how.padding, how.dilation, groups)
                dy_n = dy.narrow(1, n.start, n.stop - n.start).to(working)  # `dy[:, n]` has no rule for batches
                part = GRADIENT_OF_X[len(how.stride)](shape, w, dy_n, *rest).to(total)  # type: ignore[no-untyped-call]
                parts[k.start] = parts[k.start].add_(part) if k.start in parts else part
            dx = torch.cat(list(parts.values()), 1).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            dbias = dy.sum([d for d in range(dy.dim()) if d != 1])
        if ctx.needs_input_grad[3]:

            def of_scale(s: Tensor) -> Tensor:
                return convolved(x, None, Weight(codes, s, zero_point), ctx.format, ctx.block, how)

            with torch.enable_grad():
                (dscale,) = torch.func.vjp(of_scale, scale)[1](dy)
        return dx, dbias, None, dscale, None, None, None, None

    @staticmethod
    def tangent(
        ctx: Any, x_t: Tensor | None, bias_t: Tensor | None, _: None, scale_t: Tensor | None, *__: Any
    ) -> Tensor:
        codes, scale, zero_point, x = ctx.saved_tensors
        rest, parts = (ctx.format, ctx.block, ctx.how), []
        if x_t is not None:
            parts.append(convolved(x_t, None, Weight(codes, scale, zero_point), *rest))
        if scale_t is not None:  # the values are linear in the scale; no op takes one of 0
            up, down = (Weight(codes, t.clamp(min=0), zero_point) for t in (scale_t, -scale_t))
            parts.append(convolved(x, None, up, *rest) - convolved(x, None, down, *rest))
        if bias_t is not None:
            like = parts[0] if parts else convolved(x, None, Weight(codes, scale, zero_point), *rest)
            parts.append(bias_t.view(-1, *(1,) * len(ctx.how.stride)).expand_as(like))
        return functools.reduce(torch.add, parts)


def convolved(
    x: Tensor, bias: Tensor | None, weight: Weight, format: str, block: tuple[int, int], how: Convolution
) -> Tensor:
    """The convolution of x with the values of ``weight``, a slab of output channels at a time."""
    convolve, parts = CONVOLVE[len(how.stride)], []
    dtype, x = x.dtype, x.to(working_dtype(x))
    for n, k, groups in how.slabs():
        w = slab(weight, n, format, block, how, x.dtype)
        b = None if bias is None else bias[n].to(x.dtype)
        parts.append(convolve(x[:, k], w, b, how.stride, how.padding, how.dilation, groups).to(dtype))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def working_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is convolved in: its own, unless torch is slow in that."""
    return torch.float32 if x.dtype in SLOW and x.device.type == "cpu" else x.dtype


def slab(weight: Weight, n: slice, format: str, block: tuple[int, int], how: Convolution, dtype: torch.dtype) -> Tensor:
    """[n, in / groups, *kernel] of ``dtype``: the values of these output channels."""
    shape = how.weight_shape[1:]
    return dequantize_rows(weight, n, format, block, math.prod(shape), dtype).view(-1, *shape)
