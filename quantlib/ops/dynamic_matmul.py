"""x_codes, x_scale = quantize_dynamic(x) a row, y = scaled_matmul(x_codes, x_scale, codes, scale)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.check import INPUTS, INTEGERS, Block, Result, check_dtype, last_size
from quantlib.ops.declare import declare, format_name
from quantlib.ops.explain import explain
from quantlib.ops.scaled_matmul import check_sum
from quantlib.ops.weight import block_of_weight, check_epilogue, check_followed, check_weight

OP = "dynamic_matmul"


def _results(x: Tensor, weight: QuantizedWeight, epilogue: Epilogue) -> list[Result]:
    check_dtype(OP, "x", x.dtype, INPUTS)
    check_weight(OP, weight, x)
    check_sum(OP, formats.get("int8"), None, weight)
    N, _ = weight.shape
    check_epilogue(OP, epilogue, N, x)
    return [([*x.shape[:-1], N], x.dtype)]


_dynamic_matmul, _dynamic_matmul_out = declare(OP, _results, accepted=INTEGERS, differentiable=True)


def dynamic_matmul(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: str | torch.dtype = "int8",
    *,
    block: Block = (1, -1),
    zero_point: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Project each row of x to int8 and multiply the codes with those of a weight: W8A8.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16. May require a gradient, which passes straight through the rounding of x: nothing
        of x is clipped.
    codes : Tensor [N, K] of the format's dtype
        [N, ceil(K / 2)] uint8 for int4.
    scale : Tensor [ceil(N / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        The scales of the codes. May require a gradient.
    format : {"int8", "uint8", "int4"} or a torch.dtype
        The format of the weight.
    block : (br, bk)
        Rows and columns of the weight that share a scale, -1 for the whole axis; a row each by default.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero.
    bias : Tensor [N], optional
        float32, float16 or bfloat16; added in float32. May require a gradient.
    activation : {"relu", "gelu", "gelu_tanh", "silu"}, optional
        Applied in float32 before the result is rounded.
    out : Tensor [..., N] of x's dtype, optional
        Written to and returned, without a gradient.

    Returns
    -------
    Tensor [..., N] of x's dtype
        The bytes of ``scaled_matmul(*quantize_dynamic(x, "int8", block=(1, -1)), codes, scale, ...)``.

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
        block = block_of_weight(OP, codes, block, last_size(OP, "x", x))
        args = (x, codes, scale, format_name(format), block, zero_point, bias, activation)
        if out is not None:
            _dynamic_matmul_out(*args, out=out)
            return out
        y: Tensor = _dynamic_matmul(*args)
        return y
    except Exception as error:
        explain("dynamic_matmul", dynamic_matmul, locals(), error)
