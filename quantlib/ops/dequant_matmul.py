"""y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = dequantize(codes)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.backends.tiles import TileLayout
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.check import INPUTS, Block, Result, check_dtype, fail, last_size
from quantlib.ops.declare import declare, format_name
from quantlib.ops.explain import explain
from quantlib.ops.weight import block_of_weight, check_epilogue, check_followed, check_weight

OP = "dequant_matmul"


def _results(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue, batch_invariant: bool) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    check_weight(OP, weight, x)
    N, _ = weight.shape
    check_epilogue(OP, epilogue, N, x)
    return [([*x.shape[:-1], N], x.dtype)]


def check_layout(layout: str, rows: int | None) -> None:
    """Check that ``layout`` exists, and that the rows of a weight are given if and only if its codes are tiles."""
    if layout not in ("plain", "tiles"):
        fail(OP, "layout", "plain or tiles", layout)
    if (rows is None) == (layout == "tiles"):
        fail(OP, "rows", "the rows of the weight for tiles" if rows is None else "None for plain codes", rows)


_dequant_matmul, _dequant_matmul_out = declare(OP, _results, differentiable=True)
_tiled, _tiled_out = declare(f"{OP}.tiled", _results, accepted=TileLayout.FORMATS, differentiable=True)


def dequant_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    *,
    block: Block,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
    layout: str = "plain",
    rows: int | None = None,
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply with a quantized weight, without a copy of it in floating point: W8A16, W4A16.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16. May require a gradient.
    codes : Tensor [N, K] of the format's dtype
        [N, ceil(K / 2)] uint8 for a format of four bits; or the tiles of `quantlib.ops.tile`, as ``layout`` says.
    scale : Tensor [ceil(N / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        The scales of the codes. May require a gradient.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns of the weight that share a scale, -1 for the whole axis.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero, for integer formats.
    bias : Tensor [N], optional
        float32, float16 or bfloat16; added to the sum in float32. May require a gradient.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied in float32 before the result is rounded.
    batch_invariant : bool
        Give a row of x the same bytes whatever rows come with it.
    layout : {"plain", "tiles"}
        How ``codes`` lie in memory.
    rows : int, optional
        N, where ``codes`` are tiles: their last rows may be padding.
    size : int, optional
        ``size=N`` is an older spelling of ``layout="tiles", rows=N``.
    out : Tensor [..., N] of x's dtype, optional
        Written to and returned, without a gradient.

    Returns
    -------
    Tensor [..., N] of x's dtype

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or one that requires a gradient and has none.

    Notes
    -----
    Contract C11, ``docs/contract.md``. The sum is float32, of the float32 values that `dequantize` gives, in a fixed
    order: the same bytes on every run, within ``2 * K * 2**-23 * sum(abs(x) * abs(w))`` of the exact sum.
    """
    try:
        check_followed(OP, codes, scale, zero_point, out)
        name = format_name(format)
        N = rows if size is None else size
        if layout != "plain" or N is not None:
            check_layout(layout if size is None else "tiles", N)
        block = block_of_weight(OP, codes if N is None else N, block, last_size(OP, "x", x))
        rest = (zero_point, bias, activation, batch_invariant)
        args: tuple[Any, ...]
        if N is None:
            op, op_out, args = _dequant_matmul, _dequant_matmul_out, (x, codes, scale, name, block, *rest)
        else:
            op, op_out, args = _tiled, _tiled_out, (x, codes, scale, name, block, N, *rest)
        if out is not None:
            op_out(*args, out=out)
            return out
        y: Tensor = op(*args)
        return y
    except Exception as error:
        explain("dequant_matmul", dequant_matmul, locals(), error)
