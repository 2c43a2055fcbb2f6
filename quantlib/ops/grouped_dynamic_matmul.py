"""y[t, n] = dynamic_matmul(x[t], codes[e], scale[e])[n], e the expert that row t belongs to"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.check import INPUTS, INTEGERS, Block, Result, check_dtype, last_size, no_gradient
from quantlib.ops.declare import declare, format_name
from quantlib.ops.explain import explain
from quantlib.ops.grouped_dequant_matmul import ends_of
from quantlib.ops.scaled_matmul import check_sum
from quantlib.ops.weight import block_of_weight, check_epilogue, check_experts, check_followed

OP = "grouped_dynamic_matmul"


def _results(x: Tensor, weight: QuantizedWeight, offsets: Tensor, epilogue: Epilogue) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    check_experts(OP, weight, offsets, x)
    check_sum(OP, formats.get("int8"), None, weight)
    N, _ = weight.shape
    check_epilogue(OP, epilogue, N, x, (weight.codes.shape[0],))
    return [([x.shape[0], N], x.dtype)]


_grouped, _grouped_out = declare(OP, _results, accepted=INTEGERS, differentiable=True)


def grouped_dynamic_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    offsets: Tensor,
    *,
    block: Block = (1, -1),
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project each row of x to int8 and multiply the codes with those of the weight of its expert: W8A8.

    Parameters
    ----------
    x : Tensor [T, K]
        float32, float16 or bfloat16, sorted by expert. May require a gradient, which passes straight through the
        rounding of x.
    codes : Tensor [E, N, K] of the format's dtype
        [E, N, ceil(K / 2)] uint8 for int4.
    scale : Tensor [E, ceil(N / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        What codes are multiplied by.
    format : {"int8", "uint8", "int4"} or a torch.dtype
        Of the weight.
    offsets : Tensor [E], int32 or int64
        Where the rows of each expert end: see `grouped_dequant_matmul`.
    block : (br, bk)
        Rows and columns of one expert's weight that share a scale, -1 for the whole axis; a row each by default.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero.
    bias : Tensor [E, N], optional
        float32, float16 or bfloat16; added in float32. May require a gradient.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied in float32 before the result is rounded.
    out : Tensor [T, N] of x's dtype, optional
        Written to and returned, without a gradient.

    Returns
    -------
    Tensor [T, N] of x's dtype
        The bytes of `dynamic_matmul` of the rows of one expert after the other; 0 for rows of no expert.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or one that requires a gradient and has none.

    Notes
    -----
    Contract C11, ``docs/contract.md``.
    """
    try:
        check_followed(OP, codes, scale, zero_point, out)
        no_gradient(OP, "scale", scale)
        block = block_of_weight(OP, codes, block, last_size(OP, "x", x))
        args = (x, codes, scale, format_name(format), block, ends_of(offsets), zero_point, bias, activation)
        if out is not None:
            _grouped_out(*args, out=out)
            return out
        y: Tensor = _grouped(*args)
        return y
    except Exception as error:
        explain("grouped_dynamic_matmul", grouped_dynamic_matmul, locals(), error)
