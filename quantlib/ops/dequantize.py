"""y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk]"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.weight import QuantizedWeight
from quantlib.ops.check import INPUTS, Block, Result, check_block, check_dtype, check_scale, no_gradient
from quantlib.ops.declare import Kernel, declare, format_name, launch_matrices, whole_axes
from quantlib.ops.explain import explain
from quantlib.spec import matrix_shape


def _results(weight: QuantizedWeight, dtype: torch.dtype | None) -> list[Result]:
    codes, f, dtype = weight.codes, weight.format, dtype or torch.float32
    check_dtype("dequantize", "codes", codes.dtype, (f.dtype_name,))
    check_dtype("dequantize", "dtype", dtype, INPUTS)
    shape = [*codes.shape[:-1], weight.shape[1]] if codes.dim() or f.packed else []
    check_scale("dequantize", weight.scale, weight.zero_point, f, check_block("dequantize", shape, weight.block), codes)
    return [(shape, dtype)]


def _launch(kernel: Kernel, outs: list[Tensor], weight: QuantizedWeight, dtype: torch.dtype | None) -> None:
    launch_matrices(kernel, outs, weight=weight)


_dequantize, _dequantize_out = declare("dequantize", _results, _launch)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    *,
    block: Block,
    zero_point: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The values of ``codes``: each less its zero point, times its scale.

    Parameters
    ----------
    codes : Tensor [..., K] of the format's dtype
        Viewed as [M, K]; [..., ceil(K / 2)] uint8 for a format of four bits.
    scale : Tensor [ceil(M / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        The scales of the codes.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns that share a scale, -1 for the whole axis.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero, for integer formats.
    dtype : torch.dtype
        The dtype of the result: float32, float16 or bfloat16, rounded once from float32.
    size : int, optional
        K, for packed codes whose last byte holds one code only; twice the bytes by default.
    out : Tensor [..., K] of ``dtype``, optional
        Written to and returned; its dtype is the default of ``dtype``.

    Returns
    -------
    Tensor [..., K] of ``dtype``

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or a scale that requires a gradient.

    Notes
    -----
    Contract C7, ``docs/contract.md``: y = fl(fl32(q - z) * s).
    """
    try:
        no_gradient("dequantize", "codes", codes)
        no_gradient("dequantize", "scale", scale)
        name = format_name(format)
        size = size_of_packed(name, codes, size, out)
        block = whole_axes("dequantize", codes, block, size)
        if out is not None:
            _dequantize_out(codes, scale, name, block, zero_point, out.dtype, size, out=out)
            return out
        y: Tensor
        if dtype is torch.float32 and size is None:  # their defaults: torch takes half a microsecond to convert a dtype
            y = _dequantize(codes, scale, name, block, zero_point)
        else:
            y = _dequantize(codes, scale, name, block, zero_point, dtype, size)
        return y
    except Exception as error:
        explain("dequantize", dequantize, locals(), error)


def size_of_packed(format: str, codes: Tensor, size: int | None, out: Tensor | None) -> int | None:
    """K of codes that share bytes, where ``size`` does not say it; ``size`` of others."""
    if size is not None or format not in _PACKED:
        return size
    return _PACKED[format] * matrix_shape(codes.shape)[1] if out is None else matrix_shape(out.shape)[1]


_PACKED = {f.name: f.per_byte for f in formats.TABLE if f.packed}
