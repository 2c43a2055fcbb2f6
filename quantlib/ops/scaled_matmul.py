"""y[m, n] = activation(fl(fl(d[m, n] * x_scale[m]) * scale[n]) + bias[n]), d the exact integer product of the codes"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.formats import Format, IntFormat
from quantlib.ops.check import (
    INPUTS,
    INTEGERS,
    Block,
    Result,
    check_dtype,
    check_tensor,
    check_zero_point,
    described,
    dtype_name,
    fail,
    last_size,
    no_gradient,
)
from quantlib.ops.declare import declare, format_name
from quantlib.ops.explain import explain
from quantlib.ops.weight import block_of_weight, check_epilogue, check_weight
from quantlib.spec import matrix_shape

OP = "scaled_matmul"
X_FORMATS = tuple(f.name for f in formats.TABLE if not f.is_float and f.whole)


def _results(
    x_codes: Tensor, x_scale: Tensor, weight: QuantizedWeight, x_zero_point: Tensor | None, epilogue: Epilogue
) -> list[Result]:
    check_dtype(OP, "x_codes", x_codes.dtype, X_FORMATS)
    dtype = epilogue.dtype or torch.float32
    check_dtype(OP, "dtype", dtype, INPUTS)
    check_weight(OP, weight, x_codes)
    x_format, M = formats.get(dtype_name(x_codes.dtype)), matrix_shape(x_codes.shape)[0]
    if list(x_scale.shape) not in ([M, 1], [1, 1]):
        expected = described([M, 1], torch.float32, x_codes.device).replace(" on ", " or [1, 1] on ")
        fail(OP, "x_scale", expected, described(x_scale.shape, x_scale.dtype, x_scale.device))
    check_tensor(OP, "x_scale", x_scale, (x_scale.shape, torch.float32), x_codes.device)
    if x_zero_point is not None:
        check_zero_point(OP, "x_zero_point", x_zero_point, x_format, (x_scale.shape, torch.int32), x_codes)
    check_sum(OP, x_format, x_zero_point, weight)
    N, _ = weight.shape
    check_epilogue(OP, epilogue, N, x_codes)
    return [([*x_codes.shape[:-1], N], dtype)]


def check_sum(op: str, x_format: Format, x_zero_point: Tensor | None, weight: QuantizedWeight) -> None:
    """An int32 holds the sum of as many products as share a scale."""
    most = (2**31 - 1) // (_widest(x_format, x_zero_point) * _widest(weight.format, weight.zero_point))
    size = min(weight.shape[1], weight.block[1])
    if size > most:
        fail(op, "K", f"at most {most}, so that an int32 holds the sum", size)


def _widest(f: Format, zero_point: Tensor | None) -> int:
    """The largest magnitude of a code less its zero point."""
    assert isinstance(f, IntFormat)
    qmin, qmax = f.range(affine=True)
    return max(-qmin, qmax) if zero_point is None else qmax - qmin


_scaled_matmul, _scaled_matmul_out = declare(OP, _results, accepted=INTEGERS)


def scaled_matmul(
    x_codes: Tensor,
    x_scale: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str | torch.dtype = "int8",
    *,
    block: Block = (1, -1),
    x_zero_point: Tensor | None = None,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply integer codes with integer codes, exactly: the same bytes on every backend.

    Parameters
    ----------
    x_codes : Tensor [..., K] int8 or uint8
        Viewed as [M, K]; any M, 0 and 1 too, any K whose sums an int32 holds (131071 for int8 without zero points).
    x_scale : Tensor [M, 1] or [1, 1] float32
        The scales of x_codes.
    codes : Tensor [N, K] of the format's dtype
        [N, ceil(K / 2)] uint8 for int4.
    scale : Tensor [ceil(N / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        The scales of the codes.
    format : {"int8", "uint8", "int4"} or a torch.dtype
        The format of the weight.
    block : (br, bk)
        Rows and columns of the weight that share a scale, -1 for the whole axis; a row each by default.
    x_zero_point, zero_point : Tensor, int32 of the scale's shape, optional
        The codes of zero.
    bias : Tensor [N], optional
        float32, float16 or bfloat16; added in float32.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied in float32 before the result is rounded.
    dtype : torch.dtype
        The dtype of the result: float32, float16 or bfloat16.
    out : Tensor [..., N] of ``dtype``, optional
        Written to and returned; its dtype is the default of ``dtype``.

    Returns
    -------
    Tensor [..., N] of ``dtype``

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or one that requires a gradient: codes have none.

    Notes
    -----
    Contract C11, ``docs/contract.md``: an exact int32 sum, rounded to float32, times x_scale, times scale. Where a
    row of the weight has several scales, the products of their sums are added in ascending order, and x_scale comes
    last.
    """
    try:
        for argument, value in (("x_scale", x_scale), ("codes", codes), ("scale", scale), ("bias", bias), ("out", out)):
            if value is not None or argument not in ("bias", "out"):
                no_gradient(OP, argument, value)
        block = block_of_weight(OP, codes, block, last_size(OP, "x_codes", x_codes))
        args = (x_codes, x_scale, codes, scale, format_name(format), block, x_zero_point, zero_point, bias, activation)
        if out is not None:
            _scaled_matmul_out(*args, out.dtype, out=out)
            return out
        y: Tensor = _scaled_matmul(*args, dtype)
        return y
    except Exception as error:
        explain("scaled_matmul", scaled_matmul, locals(), error)
