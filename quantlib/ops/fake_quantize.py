"""y[i, j] = c[i, j] * scale[i // br, j // bk], c = decode(encode(x[i, j] / scale[i // br, j // bk])), with gradients"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantlib import formats
from quantlib.formats import Format
from quantlib.ops.check import (
    INPUTS,
    Block,
    Result,
    check_block,
    check_dense,
    check_dtype,
    check_tensor,
    dtype_name,
    fail,
    host_values,
    visible,
    wants_gradient,
)
from quantlib.ops.declare import Kernel, declare, format_name, launch_matrices, whole_axes
from quantlib.ops.explain import explain

Limits = tuple[int, int]
WIDEST = 1 << 16  # codes of a fake quantization: so few that t, clamped to one beyond them, rounds exactly


def check_fake_quantize(
    op: str, x: Tensor, scale: Tensor, f: Format, block: Block, zero_point: Tensor | None, limits: Limits | None
) -> Result:
    """Check the arguments that forward and backward share; return the shape and dtype of y."""
    check_dtype(op, "x", x.dtype, INPUTS)
    expected = check_block(op, x.shape, block)
    check_tensor(op, "scale", scale, expected, x.device)
    values = visible(scale)
    if values is not None and (wrong := (values == 0) | values.isnan()).any():
        fail(op, "scale", "a number other than 0", values[wrong][0].item())
    for argument, value in (("zero_point", zero_point), ("limits", limits)):
        if f.is_float and value is not None:
            fail(op, argument, f"None for {f.name}", "a value")
    if zero_point is not None:
        check_tensor(op, "zero_point", zero_point, expected, x.device)
    if limits is not None and not -WIDEST <= limits[0] <= 0 < limits[1] <= WIDEST:
        fail(op, "limits", f"qmin <= 0 < qmax inside {-WIDEST}..{WIDEST}", list(limits))
    return list(x.shape), x.dtype


def _results(
    x: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None, limits: Limits | None, **_: Any
) -> list[Result]:
    return [check_fake_quantize("fake_quantize", x, scale, format, block, zero_point, limits)]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    *,
    zero_point: Tensor | None,
    limits: Limits | None,
    lsq_mask: bool,
    grad_factor: float,
    **arguments: Any,
) -> None:
    zero_point, limits = codes_of_range(arguments["format"], zero_point, limits)
    launch_matrices(kernel, outs, **arguments, zero_point=zero_point, limits=limits)


_fake_quantize, _fake_quantize_out = declare("fake_quantize", _results, _launch, differentiable=True)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    *,
    block: Block,
    zero_point: Tensor | None = None,
    grad_factor: float = 1.0,
    mask: str = "rounded",
    out: Tensor | None = None,
) -> Tensor:
    """The values that ``x`` has after a projection, with the gradients that training needs.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16, viewed as [M, K].
    scale : Tensor [ceil(M / br), ceil(K / bk)] float32
        Above 0. May require a gradient: a learned step size.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns that share a scale, -1 for the whole axis.
    zero_point : Tensor of scale's shape, optional
        For integer formats: int32, a code; or float32, to be learned, which is rounded and clamped to the codes there
        are.
    grad_factor : float
        The factor of the gradients of scale and zero point: :func:`grad_factor` of LSQ, or 1.
    mask : {"rounded", "lsq"}
        Where x passes its gradient on: where its rounded code is in range, or where x / scale itself is.
    out : Tensor [..., K] of x's dtype, optional
        Written to and returned, without a gradient.

    Returns
    -------
    Tensor [..., K] of x's dtype
        The bytes of ``dequantize(quantize(x))``; NaN where x is NaN.

    Raises
    ------
    RuntimeError
        For an argument that is not as above; for a second derivative.

    Notes
    -----
    Contract C10, ``docs/contract.md``; Esser et al., Learned Step Size Quantization, 2020.
    """
    try:
        check_grad_factor(grad_factor)
        if mask not in ("rounded", "lsq"):
            fail("fake_quantize", "mask", "rounded or lsq", repr(mask))
        for argument, value in (("x", x), ("scale", scale)):
            if not isinstance(value, Tensor):
                fail("fake_quantize", argument, "a tensor", type(value).__name__)
        block = whole_axes("fake_quantize", x, block)
        return _call(x, scale, format_name(format), block, zero_point, None, mask == "lsq", grad_factor, out)
    except Exception as error:
        explain("fake_quantize", fake_quantize, locals(), error)


def fake_quantize_per_tensor_affine(
    input: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int,
    quant_max: int,
    *,
    grad_factor: float = 1.0,
) -> Tensor:
    """``torch.fake_quantize_per_tensor_affine``, by faster kernels, and with gradients for scale and zero point.

    Parameters
    ----------
    input : Tensor [...]
        float32, float16, bfloat16 or float64.
    scale, zero_point : number, or Tensor of one element
        With gradients where they are float32 tensors that require one, as in torch's learnable variant, which rounds a
        float zero point and clamps it to the codes.
    quant_min, quant_max : int
        The lowest and the highest code.
    grad_factor : float
        The factor of the gradients of scale and zero point.

    Returns
    -------
    Tensor [...] of input's dtype
        The bytes of torch.

    Raises
    ------
    RuntimeError, TypeError
        Where torch raises. Where scale or zero point require a gradient: as :func:`fake_quantize`.

    Notes
    -----
    Where torch's bytes are not those of contract C10, torch computes them: for float64, an input that is not finite or
    as large as 2^62 scales, a scale outside 2^-100..2^120, codes beyond +-2^16 or without 0 among them. Values that the
    host cannot see (on a GPU, compiled, batched) are taken to be ordinary.

    The gradient of input is that of torch, save that it is +0 where it is masked: torch multiplies by 0, which gives -0
    or, of an infinity, NaN. It cannot be differentiated again.
    """
    try:
        op, x, limits = "fake_quantize", input, (quant_min, quant_max)
        check_dense(op, "input", x)
        learned = any(isinstance(v, Tensor) and wants_gradient(op, "", v) for v in (scale, zero_point))
        if isinstance(x, Tensor):
            _check_as_torch(x, limits, None if isinstance(zero_point, Tensor) else zero_point)
        numbers = type(scale) in (float, int) and type(zero_point) is int
        tensors = all(isinstance(v, Tensor) and v.numel() == 1 for v in (scale, zero_point))
        if not learned and not ((numbers or tensors) and _as_torch(x, scale, zero_point, limits)):
            by_torch: Any = torch.fake_quantize_per_tensor_affine  # whose numbers and tensors are two overloads
            y: Tensor = by_torch(x, scale, zero_point, *limits)
            return y
        if isinstance(zero_point, Tensor) and zero_point.is_floating_point() and not wants_gradient(op, "", zero_point):
            zero_point = zero_point.trunc()
        rows = x.reshape(1, -1)
        scale, zero_point = (
            torch.as_tensor(v, dtype=torch.float32, device=x.device).reshape(1, 1)[:, : rows.shape[1]]
            for v in (scale, zero_point)
        )
        return (
            _affine(rows, scale, zero_point, *limits, grad_factor).reshape(x.shape).contiguous(memory_format=layout(x))
        )
    except Exception as error:
        explain("fake_quantize_per_tensor_affine", fake_quantize_per_tensor_affine, locals(), error)


def fake_quantize_per_channel_affine(
    input: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    grad_factor: float = 1.0,
) -> Tensor:
    """``torch.fake_quantize_per_channel_affine``, by faster kernels, and with gradients for scale and zero point.

    Parameters
    ----------
    input : Tensor [...]
        float32, float16, bfloat16 or float64.
    scale : Tensor [input.shape[axis]]
        float32 or bfloat16.
    zero_point : Tensor [input.shape[axis]]
        int32, float32 or float16. A float one is added as it is, before rounding. Where it or a scale requires a
        gradient, both are float32, or the zero point an int32, as in torch's learnable variant, which rounds a float
        zero point and clamps it to the codes.
    axis : int
        The axis whose entries have a scale each, at least 0.
    quant_min, quant_max : int
        The lowest and the highest code.
    grad_factor : float
        The factor of the gradients of scale and zero point.

    Returns
    -------
    Tensor [...] of input's dtype
        The bytes of torch.

    Raises
    ------
    RuntimeError, TypeError
        Where torch raises. Where scale or zero point require a gradient: as :func:`fake_quantize`.

    Notes
    -----
    As for :func:`fake_quantize_per_tensor_affine`; torch also computes what has a float zero point or a bfloat16 scale.
    """
    try:
        op, x, limits = "fake_quantize", input, (quant_min, quant_max)
        for argument, value in (("input", x), ("scale", scale), ("zero_point", zero_point)):
            check_dense(op, argument, value)
        learned = any(isinstance(v, Tensor) and wants_gradient(op, "", v) for v in (scale, zero_point))
        if all(isinstance(v, Tensor) for v in (x, scale, zero_point)):
            _check_as_torch(x, limits, zero_point)
            _check_channels(x, scale, zero_point, axis)
        ordinary = scale.dtype == torch.float32 and zero_point.dtype == torch.int32 and scale.numel() > 0
        if not learned and not (ordinary and _as_torch(x, scale, zero_point, limits)):
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)
        if scale.dtype != torch.float32:
            fail(op, "scale", "float32", dtype_name(scale.dtype))
        moved = x.movedim(axis, 0)
        rows = moved.unsqueeze(-1).flatten(1)
        scale, zero_point = (v.float().reshape(-1, 1)[:, : rows.shape[1]] for v in (scale, zero_point))
        y = _affine(rows, scale, zero_point, *limits, grad_factor).reshape(moved.shape).movedim(0, axis)
        return y.contiguous(memory_format=layout(x))
    except Exception as error:
        explain("fake_quantize_per_channel_affine", fake_quantize_per_channel_affine, locals(), error)


def grad_factor(n: int, qmax: float) -> float:
    """1 / sqrt(n * qmax), float32: LSQ's factor for the gradient of a scale that ``n`` elements share.

    Notes
    -----
    Esser et al., Learned Step Size Quantization, 2020, section 2.2.
    """
    return float(torch.tensor(1.0 / math.sqrt(n * qmax), dtype=torch.float32, device="cpu"))


def check_grad_factor(value: float) -> None:
    """A float32 that is not negative: what it is multiplied by is float32."""
    if not 0 <= value <= torch.finfo(torch.float32).max:
        fail("fake_quantize", "grad_factor", "a finite float32, at least 0", value)


def _affine(rows: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, grad_factor: float) -> Tensor:
    check_grad_factor(grad_factor)
    name = "int8" if qmin < 0 else "uint8"  # of the format only the largest scale is used: the codes are qmin..qmax
    return _call(rows, scale, name, (1, max(rows.shape[1], 1)), zero_point, (qmin, qmax), False, grad_factor)


def _call(
    x: Tensor,
    scale: Tensor,
    name: str,
    block: Block,
    zero_point: Tensor | None,
    limits: Limits | None,
    lsq_mask: bool,
    grad_factor: float,
    out: Tensor | None = None,
) -> Tensor:
    if isinstance(zero_point, Tensor) and not zero_point.is_floating_point():
        check_codes(zero_point, name, limits)
        zero_point = zero_point.to(torch.float32)
    args = (x, scale, name, block, zero_point, limits, lsq_mask, grad_factor)
    if out is None:
        y: Tensor = _fake_quantize(*args)
        return y
    _fake_quantize_out(*args, out=out)
    return out


def layout(x: Tensor) -> torch.memory_format:
    """The memory format of a result: channels last if ``x`` is."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if last is not None and x.is_contiguous(memory_format=last) and not x.is_contiguous():
        return last
    return torch.contiguous_format


def _as_torch(x: Tensor, scale: Tensor | float, zero_point: Tensor | float, limits: Limits) -> bool:
    """True if the kernels give torch's bytes, as far as the host can see what is in the tensors."""
    qmin, qmax = limits
    if x.dtype == torch.float64 or type(qmin) is not int or type(qmax) is not int:
        return False
    if not -WIDEST <= qmin <= 0 < qmax <= WIDEST:
        return False
    unseen = 1.0, 1.0  # good for all
    (least, largest), (s, s_max), (z, z_max) = (
        host_values(v) or unseen if isinstance(v, Tensor) else (v, v) for v in (x, scale, zero_point)
    )
    ordinary = s >= 2.0**-100 and s_max <= 2.0**120 and qmin <= z and z_max <= qmax
    return ordinary and -least < 2.0**62 * s and largest < 2.0**62 * s


def _check_as_torch(x: Tensor, limits: Limits, zero_point: Tensor | float | None) -> None:
    """Check what torch's two functions check: an integer zero point that torch looks at is a code."""
    check_dtype("fake_quantize", "input", x.dtype, (*INPUTS, "float64"))
    qmin, qmax = limits
    if qmin > qmax:
        fail("fake_quantize", "quant_min", f"at most quant_max {qmax}", qmin)
    if isinstance(zero_point, Tensor):
        if zero_point.dtype == torch.int32:
            check_codes(zero_point, "int8", limits)
    elif isinstance(zero_point, int) and not qmin <= zero_point <= qmax:
        fail("fake_quantize", "zero_point", f"in {qmin}..{qmax}", zero_point)


def _check_channels(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> None:
    check_dtype("fake_quantize", "scale", scale.dtype, ("float32", "bfloat16"))
    check_dtype("fake_quantize", "zero_point", zero_point.dtype, ("int32", "float32", "float16"))
    if not 0 <= axis < x.dim():
        fail("fake_quantize", "axis", f"at least 0 and below {x.dim()}", axis)
    for argument, v in (("scale", scale), ("zero_point", zero_point)):
        if list(v.shape) != [x.shape[axis]]:
            fail("fake_quantize", argument, f"[{x.shape[axis]}], one for each entry of axis {axis}", list(v.shape))


def check_codes(zero_point: Tensor, name: str, limits: Limits | None) -> None:
    """Check that integer zero points are codes; a learned one may leave their range, and is clamped."""
    f, values = formats.get(name), host_values(zero_point)
    if values is None or isinstance(f, formats.FloatFormat):
        return
    qmin, qmax = limits or f.range(affine=True)
    if values[0] < qmin or values[1] > qmax:
        fail("fake_quantize", "zero_point", f"in {qmin}..{qmax}", int(values[0] if values[0] < qmin else values[1]))


def codes_of_range(f: Format, zero_point: Tensor | None, limits: Limits | None) -> tuple[Tensor | None, Limits]:
    """The zero point as kernels take it, and the lowest and highest code (0, 0 for a float format)."""
    if isinstance(f, formats.FloatFormat):
        return None, (0, 0)
    lowest, highest = limits or f.range(affine=zero_point is not None)
    return zero_point, (lowest, highest)
