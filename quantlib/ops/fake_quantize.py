"""y[i, j] = c[i, j] * scale[i // br, j // bk], c = decode(encode(x[i, j] / scale[i // br, j // bk])), with gradients"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from quantlib import formats
from quantlib.ops.check import (
    INPUTS,
    Block,
    Result,
    check_block,
    check_dense,
    check_dtype,
    check_format,
    check_tensor,
    dtype_name,
    fail,
    host_values,
    wants_gradient,
)
from quantlib.ops.declare import Kernel, declare, format_name, matrices, whole_axes
from quantlib.ops.explain import explain

Limits = tuple[int, int]
WIDEST = 1 << 16  # codes of a fake quantization: so few that t, clamped to one beyond them, rounds exactly


def check_fake_quantize(
    op: str, x: Tensor, scale: Tensor, format: str, block: Block, zero_point: Tensor | None, limits: Limits | None
) -> Result:
    """What forward and backward ask alike; the shape and dtype of y."""
    f = check_format(op, format)
    check_dtype(op, "x", x.dtype, INPUTS)
    expected = check_block(op, x.shape, block)
    check_tensor(op, "scale", scale, expected, x.device)
    values = host_values(scale)
    if values is not None and not values[0] > 0:
        fail(op, "scale", "above 0", values[0])
    for argument, value in (("zero_point", zero_point), ("limits", limits)):
        if f.is_float and value is not None:
            fail(op, argument, f"None for {f.name}", "a value")
    if zero_point is not None:
        check_tensor(op, "zero_point", zero_point, expected, x.device)
    if limits is not None and not -WIDEST <= limits[0] <= 0 < limits[1] <= WIDEST:
        fail(op, "limits", f"qmin <= 0 < qmax inside {-WIDEST}..{WIDEST}", list(limits))
    return list(x.shape), x.dtype


def _results(
    x: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
    limits: Limits | None = None,
    lsq_mask: bool = False,
    grad_factor: float = 1.0,
) -> list[Result]:
    return [check_fake_quantize("fake_quantize", x, scale, format, block, zero_point, limits)]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    x: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
    limits: Limits | None = None,
    *_: Any,
) -> None:
    M, K, block = matrices(x.shape, block)
    f = formats.get(format)
    kernel(
        x.contiguous().view(M, K),
        scale.contiguous(),
        f,
        block,
        *codes_of_range(f, zero_point, limits),
        outs[0].view(M, K),
    )


_fake_quantize, _fake_quantize_out = declare("fake_quantize", _results, _launch)


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
        What the gradients of scale and zero point are multiplied by: :func:`grad_factor` of LSQ, or 1.
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
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | float,
    quant_min: int,
    quant_max: int,
    *,
    grad_factor: float = 1.0,
) -> Tensor:
    """:func:`fake_quantize` with the arguments of ``torch.fake_quantize_per_tensor_affine``, and its forward bytes.

    Parameters
    ----------
    x : Tensor [...]
    scale, zero_point : Tensor of one element, or number
        With gradients where they are float32 tensors that require one, like torch's learnable variant, which rounds a
        float zero point; without one it is truncated.
    quant_min, quant_max : int
        The lowest and the highest code; 0 lies between them.
    grad_factor : float
        What the gradients of scale and zero point are multiplied by.

    Returns
    -------
    Tensor [...] of x's dtype

    Raises
    ------
    RuntimeError
        As :func:`fake_quantize`.
    """
    try:
        op = "fake_quantize_per_tensor_affine"
        check_dense(op, "x", x)
        _check_integers(op, zero_point, quant_min, quant_max)
        rows = x.reshape(1, x.numel())
        if isinstance(zero_point, float) or (
            isinstance(zero_point, Tensor)
            and zero_point.is_floating_point()
            and not wants_gradient("fake_quantize", "zero_point", zero_point)
        ):
            zero_point = torch.as_tensor(zero_point).trunc()
        scale, zero_point = (
            torch.as_tensor(v, dtype=torch.float32, device=x.device).reshape(1, 1)[:, : rows.shape[1]]
            for v in (scale, zero_point)
        )
        return _affine(rows, scale, zero_point, quant_min, quant_max, grad_factor).reshape(x.shape)
    except Exception as error:
        explain("fake_quantize_per_tensor_affine", fake_quantize_per_tensor_affine, locals(), error)


def fake_quantize_per_channel_affine(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int,
    quant_min: int,
    quant_max: int,
    *,
    grad_factor: float = 1.0,
) -> Tensor:
    """:func:`fake_quantize` with the arguments of ``torch.fake_quantize_per_channel_affine``, and its forward bytes.

    Parameters
    ----------
    x : Tensor [...]
    scale, zero_point : Tensor [x.shape[axis]]
        float32 and an integer dtype or float32. With gradients where they require one, like torch's learnable variant,
        which rounds a float zero point to a code; without one it is added as it is, before rounding.
    axis : int
        The axis whose entries have a scale each.
    quant_min, quant_max : int
        The lowest and the highest code; 0 lies between them.
    grad_factor : float
        What the gradients of scale and zero point are multiplied by.

    Returns
    -------
    Tensor [...] of x's dtype

    Raises
    ------
    RuntimeError
        As :func:`fake_quantize`.
    """
    try:
        op = "fake_quantize_per_channel_affine"
        for argument, value in (("x", x), ("scale", scale), ("zero_point", zero_point)):
            check_dense(op, argument, value)
        _check_integers(op, zero_point, quant_min, quant_max)
        if type(axis) is not int or not -x.dim() <= axis < x.dim():
            fail(op, "axis", f"in {-x.dim()}..{x.dim() - 1}", axis)
        if scale.dtype != torch.float32:
            fail("fake_quantize", "scale", "float32", dtype_name(scale.dtype))
        if zero_point.is_floating_point() and not any(wants_gradient(op, "", v) for v in (scale, zero_point)):
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point.float(), axis, quant_min, quant_max)
        moved = x.movedim(axis, 0)
        rows = moved.reshape(moved.shape[0], moved[:1].numel())
        scale, zero_point = (v.float().reshape(-1, 1)[:, : rows.shape[1]] for v in (scale, zero_point))
        y = _affine(rows, scale, zero_point, quant_min, quant_max, grad_factor)
        return y.reshape(moved.shape).movedim(0, axis)
    except Exception as error:
        explain("fake_quantize_per_channel_affine", fake_quantize_per_channel_affine, locals(), error)


def grad_factor(n: int, qmax: float) -> float:
    """1 / sqrt(n * qmax): what LSQ multiplies the gradient of a scale by that ``n`` elements share, as float32.

    Notes
    -----
    Esser et al., Learned Step Size Quantization, 2020, section 2.2.
    """
    return float(torch.tensor(1.0 / math.sqrt(n * qmax), dtype=torch.float32))


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


def _check_integers(op: str, zero_point: Tensor | float, qmin: int, qmax: int) -> None:
    """An integer zero point is a code, as torch asks; one that is a float is learned, and clamped."""
    for argument, value in (("quant_min", qmin), ("quant_max", qmax)):
        if not hasattr(value, "__index__") or isinstance(value, (bool, Tensor)):
            fail(op, argument, "an integer", type(value).__name__)
    if not -WIDEST <= qmin <= 0 < qmax <= WIDEST:
        fail(op, "quant_min..quant_max", f"a range around 0 inside {-WIDEST}..{WIDEST}", f"{qmin}..{qmax}")
    if isinstance(zero_point, Tensor):
        if not zero_point.is_floating_point():
            check_codes(zero_point, "int8", (qmin, qmax))
    elif isinstance(zero_point, int) and not qmin <= zero_point <= qmax:
        fail("fake_quantize", "zero_point", f"in {qmin}..{qmax}", zero_point)


def check_codes(zero_point: Tensor, name: str, limits: Limits | None) -> None:
    """Integer zero points are codes; one that is learned may leave their range, and is clamped."""
    f, values = formats.get(name), host_values(zero_point)
    if values is None or isinstance(f, formats.FloatFormat):
        return
    qmin, qmax = limits or f.range(affine=True)
    if values[0] < qmin or values[1] > qmax:
        fail("fake_quantize", "zero_point", f"in {qmin}..{qmax}", int(values[0] if values[0] < qmin else values[1]))


def codes_of_range(f: formats.Format, zero_point: Tensor | None, limits: Limits | None) -> tuple[Tensor | None, Limits]:
    """The zero point as kernels take it, and the lowest and highest code (0, 0 for a float format)."""
    if isinstance(f, formats.FloatFormat):
        return None, (0, 0)
    lowest, highest = limits or f.range(affine=zero_point is not None)
    return None if zero_point is None else zero_point.contiguous(), (lowest, highest)
