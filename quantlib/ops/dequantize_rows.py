"""y[..., j] = decode(codes[i, j]) * scale[i // br, j // bk], i = indices[...]"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.weight import QuantizedWeight
from quantlib.ops.check import INPUTS, Block, Result, check_dtype, fail, no_gradient, visible
from quantlib.ops.declare import Kernel, declare, format_name, whole_axes
from quantlib.ops.dequantize import size_of_packed
from quantlib.ops.explain import explain
from quantlib.ops.weight import check_weight

OP = "dequantize_rows"


def _results(indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype | None) -> list[Result]:
    (N, K), dtype, used = weight.shape, dtype or torch.float32, None
    check_dtype(OP, "indices", indices.dtype, ("int64", "int32"))
    check_dtype(OP, "dtype", dtype, INPUTS)
    rows = visible(indices) if weight.codes.dim() == 2 else None
    if rows is not None:
        wrong = rows[(rows < 0) | (rows >= N)]
        if wrong.numel():
            fail(OP, "indices", f"in 0..{N - 1}", wrong[0].item())
        used = rows.flatten() // max(weight.block[0], 1)
    check_weight(OP, weight, indices, used)
    return [([*indices.shape, K], dtype)]


def _launch(
    kernel: Kernel, outs: list[Tensor], indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype | None
) -> None:
    kernel(indices.reshape(-1).contiguous(), weight.for_kernel(), outs[0].view(-1, weight.shape[1]))


_dequantize_rows, _dequantize_rows_out = declare(OP, _results, _launch)


def dequantize_rows(
    indices: Tensor,
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
    """The values of some rows of a table of codes: a lookup that decodes what it reads, and nothing else.

    Parameters
    ----------
    indices : Tensor [...] int64 or int32
        The rows, each in 0..N - 1. A device that the host would wait for takes the nearest row for another number.
    codes : Tensor [N, K] of the format's dtype
        [N, ceil(K / 2)] uint8 for a format of four bits.
    scale : Tensor [ceil(N / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        The scales of the codes.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns of the table that share a scale, -1 for the whole axis.
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
        The bytes of ``dequantize(codes, ...)[indices]``.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or a scale that requires a gradient.

    Notes
    -----
    Contract C7, ``docs/contract.md``.
    """
    try:
        no_gradient(OP, "codes", codes)
        no_gradient(OP, "scale", scale)
        name = format_name(format)
        size = size_of_packed(name, codes, size, out)
        block = whole_axes(OP, codes, block, size)
        if out is not None:
            _dequantize_rows_out(indices, codes, scale, name, block, zero_point, out.dtype, size, out=out)
            return out
        y: Tensor = _dequantize_rows(indices, codes, scale, name, block, zero_point, dtype, size)
        return y
    except Exception as error:
        explain(OP, dequantize_rows, locals(), error)
