"""codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.formats import Format
from quantlib.ops.check import INPUTS, Block, Result, check_block, check_dtype, check_scale, codes_of, no_gradient
from quantlib.ops.declare import declare, format_name, whole_axes
from quantlib.ops.explain import explain


def _results(x: Tensor, scale: Tensor, format: Format, block: Block, zero_point: Tensor | None) -> list[Result]:
    check_dtype("quantize", "x", x.dtype, INPUTS)
    check_scale("quantize", scale, zero_point, format, check_block("quantize", x.shape, block), x)
    return [codes_of(x.shape, format)]


_quantize, _quantize_out = declare("quantize", _results)


def quantize(
    x: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    *,
    block: Block,
    zero_point: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project ``x`` onto the codes of ``format``, in units of ``scale``.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16, viewed as [M, K].
    scale : Tensor [ceil(M / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        The scales of the codes. Element (i, j) uses ``scale[i // br, j // bk]``.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns that share a scale, -1 for the whole axis.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero, for integer formats. Without it codes are symmetric: -127..127 for int8, not -128.
    out : Tensor, optional
        Written to and returned.

    Returns
    -------
    Tensor [..., K] of the format's dtype
        Formats of four bits are packed two a byte: [..., ceil(K / 2)] uint8.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or an x that requires a gradient.

    Notes
    -----
    Contract C5 and C6, ``docs/contract.md``: r = fl(1 / s), t = fl(x * r), q = clamp(RNE(t) + z, qmin, qmax).
    """
    try:
        no_gradient("quantize", "x", x)
        no_gradient("quantize", "scale", scale)
        name, block = format_name(format), whole_axes("quantize", x, block)
        if out is None:
            codes: Tensor = _quantize(x, scale, name, block, zero_point)
            return codes
        _quantize_out(x, scale, name, block, zero_point, out=out)
        return out
    except Exception as error:
        explain("quantize", quantize, locals(), error)
