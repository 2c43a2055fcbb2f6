"""y[m, n] = activation(sum over k of x[m, k] * w[n, k] + bias[n]), w = dequantize(codes)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.tiles import TileLayout
from quantlib.ops.check import (
    INPUTS,
    Block,
    Result,
    check_block,
    check_dtype,
    check_format,
    check_scale,
    check_tensor,
)
from quantlib.ops.declare import Kernel, declare, format_name
from quantlib.ops.explain import explain
from quantlib.ops.weight import (
    block_of_weight,
    check_epilogue,
    check_followed,
    check_weight,
    float_bias,
    last_size,
    launched,
)

OP = "dequant_matmul"


def _results(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    _, N = check_weight(OP, codes, scale, format, block, zero_point, last_size(OP, "x", x), x)
    check_epilogue(OP, bias, activation, N, x)
    return [([*x.shape[:-1], N], x.dtype)]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
    tiled: bool = False,
) -> None:
    K, N = x.shape[-1], outs[0].shape[-1]
    M = outs[0].numel() // N
    weight = launched(codes, scale, format, block, zero_point, (N, K))
    rows, y = x.contiguous().view(M, K), outs[0].view(M, N)
    kernel(rows, *weight, float_bias(bias), activation, batch_invariant, tiled, y)


def _tiled_results(
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    size: int,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    f, K = check_format(OP, format, TileLayout.FORMATS), last_size(OP, "x", x)
    check_tensor(OP, "tiles", tiles, (TileLayout(f).shape(size, K), torch.uint8), x.device)
    check_scale(OP, scale, zero_point, f, check_block(OP, [size, K], block), x)
    check_epilogue(OP, bias, activation, size, x)
    return [([*x.shape[:-1], size], x.dtype)]


def _launch_tiled(
    kernel: Kernel,
    outs: list[Tensor],
    x: Tensor,
    tiles: Tensor,
    scale: Tensor,
    format: str,
    block: Block,
    size: int,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
) -> None:
    rest = (scale, format, block, zero_point, bias, activation, batch_invariant, True)
    _launch(kernel, outs, x, tiles, *rest)


_dequant_matmul, _dequant_matmul_out = declare(OP, _results, _launch)
_tiled, _tiled_out = declare(f"{OP}.tiled", _tiled_results, _launch_tiled)


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
    size: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply with a quantized weight, without a copy of it in floating point: W8A16, W4A16.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16. May require a gradient.
    codes : Tensor [N, K] of the format's dtype
        [N, ceil(K / 2)] uint8 for a format of four bits; or, with ``size``, the tiles of `quantlib.ops.tile`.
    scale : Tensor [ceil(N / br), ceil(K / bk)] float32
        What codes are multiplied by, not negative. May require a gradient.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns of the weight that share a scale, -1 for the whole axis.
    zero_point : Tensor, int32 of scale's shape, optional
        The code of zero, for integer formats.
    bias : Tensor [N], optional
        float32, float16 or bfloat16; added to the sum in float32. May require a gradient.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied in float32 before the result is rounded.
    batch_invariant : bool
        Give a row of x the same bytes whatever rows come with it.
    size : int, optional
        N, where ``codes`` are tiles: their last rows may be padding.
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
        block = block_of_weight(OP, codes if size is None else size, block, last_size(OP, "x", x))
        y: Tensor
        if size is not None:
            args = (x, codes, scale, name, block, size, zero_point, bias, activation, batch_invariant)
            if out is None:
                y = _tiled(*args)
                return y
            _tiled_out(*args, out=out)
            return out
        if out is not None:
            _dequant_matmul_out(x, codes, scale, name, block, zero_point, bias, activation, batch_invariant, out=out)
            return out
        y = _dequant_matmul(x, codes, scale, name, block, zero_point, bias, activation, batch_invariant)
        return y
    except Exception as error:
        explain("dequant_matmul", dequant_matmul, locals(), error)
