"""y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), e the expert that row t belongs to"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.check import INPUTS, Block, Result, check_dtype, last_size, no_gradient
from quantlib.ops.declare import declare, format_name
from quantlib.ops.explain import explain
from quantlib.ops.weight import block_of_weight, check_epilogue, check_experts, check_followed

OP = "grouped_dequant_matmul"


def _results(
    x: Tensor, weight: QuantizedWeight, offsets: Tensor, epilogue: Epilogue, batch_invariant: bool
) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    check_experts(OP, weight, offsets, x)
    N, _ = weight.shape
    check_epilogue(OP, epilogue, N, x, (weight.codes.shape[0],))
    return [([x.shape[0], N], x.dtype)]


_grouped, _grouped_out = declare(OP, _results, differentiable=True)


def ends_of(offsets: Tensor) -> Tensor:
    """``offsets`` as the ops take them: int32."""
    return offsets.to(torch.int32) if isinstance(offsets, Tensor) and offsets.dtype == torch.int64 else offsets


def grouped_dequant_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    offsets: Tensor,
    *,
    block: Block,
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    batch_invariant: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Multiply the rows of each expert of a mixture with its own quantized weight, in one call: W8A16, W4A16.

    Parameters
    ----------
    x : Tensor [T, K]
        float32, float16 or bfloat16, the rows of expert 0 first, then those of expert 1, and so on. May require a
        gradient.
    codes : Tensor [E, N, K] of the format's dtype
        [E, N, ceil(K / 2)] uint8 for a format of four bits.
    scale : Tensor [E, ceil(N / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        What codes are multiplied by.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    offsets : Tensor [E], int32 or int64
        Where the rows of each expert end, as ``torch._grouped_mm`` takes them: those of expert e are
        ``offsets[e - 1]`` to ``offsets[e]``, from 0 for the first. They ascend; an expert may have no rows. Rows from
        ``offsets[-1]`` on belong to no expert: their y is 0.
    block : (br, bk)
        Rows and columns of one expert's weight that share a scale, -1 for the whole axis.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero, for integer formats.
    bias : Tensor [E, N], optional
        float32, float16 or bfloat16; added to the sum in float32. May require a gradient.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied in float32 before the result is rounded.
    batch_invariant : bool
        Give a row of x the same bytes whatever rows come with it.
    out : Tensor [T, N] of x's dtype, optional
        Written to and returned, without a gradient.

    Returns
    -------
    Tensor [T, N] of x's dtype
        The bytes of `dequant_matmul` of the rows of one expert after the other; on a GPU, where the host does not know
        how many rows each has, those of ``batch_invariant=True``.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or one that requires a gradient and has none. On a GPU nothing looks at
        the values of ``offsets``: the host would wait. What is outside of x is not read there.

    Notes
    -----
    Contract C11, ``docs/contract.md``.
    """
    try:
        check_followed(OP, codes, scale, zero_point, out)
        no_gradient(OP, "scale", scale)
        block = block_of_weight(OP, codes, block, last_size(OP, "x", x))
        args = (x, codes, scale, format_name(format), block, ends_of(offsets))
        rest = (zero_point, bias, activation, batch_invariant)
        if out is not None:
            _grouped_out(*args, *rest, out=out)
            return out
        y: Tensor = _grouped(*args, *rest)
        return y
    except Exception as error:
        explain("grouped_dequant_matmul", grouped_dequant_matmul, locals(), error)
