"""scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), codes[i, j] = encode(x[i, j] / scale[i // br, j // bk])"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.formats import Format
from quantlib.ops.check import INPUTS, INTEGERS, Block, Result, check_block, check_dtype, codes_of, no_gradient
from quantlib.ops.declare import declare, format_name, whole_axes
from quantlib.ops.explain import explain, unpacked


def _results(x: Tensor, format: Format, block: Block) -> list[Result]:
    check_dtype("quantize_dynamic", "x", x.dtype, INPUTS)
    scale = check_block("quantize_dynamic", x.shape, block)
    return [codes_of(x.shape, format), scale]


def _affine_results(x: Tensor, format: Format, block: Block) -> list[Result]:
    codes, scale = _results(x, format, block)
    return [codes, scale, (scale[0], torch.int32)]


_symmetric, _symmetric_out = declare("quantize_dynamic", _results)
_affine, _affine_out = declare("quantize_dynamic.affine", _affine_results, accepted=INTEGERS)


def quantize_dynamic(
    x: Tensor,
    format: str | torch.dtype,
    *,
    block: Block,
    symmetric: bool = True,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """Scale and codes in one pass over ``x``: the bytes of :func:`compute_scale` and :func:`quantize`.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16, viewed as [M, K].
    format : str or torch.dtype
        A row of ``quantlib.formats``; an integer one where not symmetric.
    block : (br, bk)
        Rows and columns that share a scale, -1 for the whole axis.
    symmetric : bool
        Whether the range is -amax..amax (True) or min..max with a zero point (False).
    out : tuple of the results, optional
        Written to and returned.

    Returns
    -------
    codes : Tensor [..., K] of the format's dtype
        [..., ceil(K / 2)] uint8 for a format of four bits.
    scale : Tensor [ceil(M / br), ceil(K / bk)] float32
    zero_point : Tensor, int32 of scale's shape
        Only where not symmetric.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or an x that requires a gradient.

    Notes
    -----
    Contract C4, C5 and C6, ``docs/contract.md``.
    """
    try:
        no_gradient("quantize_dynamic", "x", x)
        name, block = format_name(format), whole_axes("quantize_dynamic", x, block)
        if out is None:
            result: tuple[Tensor, ...] = (_symmetric if symmetric else _affine)(x, name, block)
            return result
        results = ("codes", "scale") if symmetric else ("codes", "scale", "zero_point")
        (_symmetric_out if symmetric else _affine_out)(x, name, block, **unpacked("quantize_dynamic", out, results))
        return out
    except Exception as error:
        explain("quantize_dynamic", quantize_dynamic, locals(), error)
