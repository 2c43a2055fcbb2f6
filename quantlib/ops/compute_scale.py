"""scale[I, J] = clamp(amax(|x[i, j]| of block I, J) / Q), or the part of it that leaves the least error"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantlib.formats import Format
from quantlib.ops.check import INPUTS, INTEGERS, Block, Result, check_block, check_dtype, fail, no_gradient, one_of
from quantlib.ops.declare import declare, format_name, whole_axes
from quantlib.ops.explain import explain, unpacked
from quantlib.ops.search_scale import search_scale
from quantlib.spec import SEARCHES

METHODS = ("minmax", *SEARCHES)


def _results(x: Tensor, format: Format, block: Block) -> list[Result]:
    check_dtype("compute_scale", "x", x.dtype, INPUTS)
    return [check_block("compute_scale", x.shape, block)]


def _affine_results(x: Tensor, format: Format, block: Block) -> list[Result]:
    (scale,) = _results(x, format, block)
    return [scale, (scale[0], torch.int32)]


_symmetric, _symmetric_out = declare("compute_scale", _results)
_affine, _affine_out = declare("compute_scale.affine", _affine_results, accepted=INTEGERS)


def compute_scale(
    x: Tensor,
    format: str | torch.dtype,
    block: Block,
    *,
    symmetric: bool = True,
    method: str = "minmax",
    energy: Tensor | None = None,
    kept: str | torch.dtype = "float32",
    out: Tensor | tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scale of each block of ``x``: what its codes are multiplied by.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16, viewed as [M, K].
    format : str or torch.dtype
        A row of ``quantlib.formats``; an integer one where not symmetric.
    block : (br, bk)
        Rows and columns that share a scale, -1 for the whole axis: (-1, -1) tensor, (1, -1) row, (1, g) group of g,
        (b, b) tile.
    symmetric : bool
        Whether the range is -amax..amax (True) or min..max with a zero point (False).
    method : {"minmax", "mse", "magnitude", "signed_mse", "signed_magnitude"}
        The scale of the range, or the part of it, from 20/32 to 36/32, that leaves the least sum of squared errors, or
        of squared errors times magnitudes, of one sign or of both: :func:`search_scale`.
    energy : Tensor [K] float32, optional
        What the error of each column counts in a search.
    kept : {"float32", "float16", "bfloat16"} or a torch.dtype
        What a scale will be kept in; a search tries only numbers of this dtype.
    out : Tensor, or a tuple of the results, optional
        Written to and returned.

    Returns
    -------
    scale : Tensor [ceil(M / br), ceil(K / bk)] float32
        amax / Q inside [2^-100, the format's largest scale], or of a signed search perhaps less than 0. NaN where the
        block holds a NaN.
    zero_point : Tensor, int32 of scale's shape
        The code of zero; only where not symmetric.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or an x that requires a gradient; for an energy or a narrow ``kept``
        without a search.

    Notes
    -----
    Contract C4, ``docs/contract.md``.
    """
    try:
        no_gradient("compute_scale", "x", x)
        name, block = format_name(format), whole_axes("compute_scale", x, block)
        if method not in METHODS:
            fail("compute_scale", "method", one_of(METHODS), repr(method))
        if method != "minmax":
            return _searched(x, name, block, symmetric, method, energy, kept, out)
        if energy is not None or format_name(kept) != "float32":
            argument, got = ("kept", kept) if energy is None else ("energy", "a tensor")
            fail("compute_scale", argument, "left out with method minmax", got)
        if out is None:
            result: Tensor | tuple[Tensor, Tensor] = (_symmetric if symmetric else _affine)(x, name, block)
            return result
        if symmetric:
            _symmetric_out(x, name, block, out=out)
        else:
            _affine_out(x, name, block, **unpacked("compute_scale", out, ("scale", "zero_point")))
        return out
    except Exception as error:
        explain("compute_scale", compute_scale, locals(), error)


def _searched(
    x: Tensor,
    format: str,
    block: Block,
    symmetric: bool,
    method: str,
    energy: Tensor | None,
    kept: str | torch.dtype,
    out: Tensor | tuple[Tensor, Tensor] | None,
) -> Tensor | tuple[Tensor, Tensor]:
    if symmetric:
        scale = _symmetric(x, format, block)
        into: Any = out
        return search_scale(x, scale, format, block=block, method=method, kept=kept, energy=energy, out=into)
    outs = {} if out is None else unpacked("compute_scale", out, ("scale", "zero_point"))
    scale, zero_point = _affine(x, format, block)
    how: dict[str, Any] = {"method": method, "kept": kept, "energy": energy, "out": outs.get("scale")}
    scale = search_scale(x, scale, format, block=block, zero_point=zero_point, **how)
    return scale, outs["zero_point"].copy_(zero_point) if outs else zero_point
