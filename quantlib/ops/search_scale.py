"""found[I, J] = the part of scale[I, J] whose codes of block (I, J) of x leave the least error"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.formats import Format
from quantlib.ops.check import (
    INPUTS,
    Block,
    Result,
    check_block,
    check_dtype,
    check_scale,
    check_tensor,
    fail,
    host_values,
    no_gradient,
    one_of,
)
from quantlib.ops.declare import declare, format_name, whole_axes
from quantlib.ops.explain import explain
from quantlib.spec import SEARCHES, matrix_shape


def _results(
    x: Tensor,
    scale: Tensor,
    format: Format,
    block: Block,
    method: str,
    kept: str,
    zero_point: Tensor | None,
    energy: Tensor | None,
) -> list[Result]:
    check_dtype("search_scale", "x", x.dtype, INPUTS)
    found = check_block("search_scale", x.shape, block)
    check_scale("search_scale", scale, zero_point, format, found, x)
    for argument, value, known in (("method", method, SEARCHES), ("kept", kept, INPUTS)):
        if value not in known:
            fail("search_scale", argument, one_of(known), value)
    if energy is not None:
        check_tensor("search_scale", "energy", energy, ([matrix_shape(x.shape)[1]], torch.float32), x.device)
        check_energy(energy)
    return [found]


def check_energy(energy: Tensor) -> None:
    """Energies are finite and not negative where looking does not make a device wait."""
    values = host_values(energy)
    if values is not None and not 0 <= values[0] <= values[1] < float("inf"):  # NaN is none of this
        wrong = values[0] if values[0] != values[0] or values[0] < 0 else values[1]
        fail("search_scale", "energy", "finite and >= 0", wrong)


_search, _search_out = declare("search_scale", _results)


def search_scale(
    x: Tensor,
    scale: Tensor,
    format: str | torch.dtype,
    *,
    block: Block,
    method: str = "mse",
    kept: str | torch.dtype = "float32",
    zero_point: Tensor | None = None,
    energy: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The part of each scale, from 20/32 to 36/32 of it, whose codes leave the least error.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16, viewed as [M, K].
    scale : Tensor [ceil(M / br), ceil(K / bk)] float32, float16, bfloat16 or float8_e8m0fnu
        Where the search begins: what :func:`compute_scale` gives.
    format : str or torch.dtype
        A row of ``quantlib.formats``.
    block : (br, bk)
        Rows and columns that share a scale, -1 for the whole axis.
    method : {"mse", "magnitude", "signed_mse", "signed_magnitude"}
        What is summed over a block: the squared error of each element, or that times the element's magnitude. The
        second errs less where weights are large, and is the better one for language models. "signed" tries the scales
        of the other sign too: of a code book whose values are not symmetric, such as nf4, one of the two fits better.
    kept : {"float32", "float16", "bfloat16"} or a torch.dtype
        What a scale will be kept in: only numbers of this dtype are tried.
    zero_point : Tensor, int32 of scale's shape, or kept as codes are, optional
        The code of zero, for integer formats. It stays: a part of a range has it where the whole range has it.
    energy : Tensor [K] float32, optional
        What the error of each column counts: the energy of an input, say. Finite and not negative.
    out : Tensor, optional
        Written to and returned.

    Returns
    -------
    Tensor float32 of scale's shape
        A number of ``kept``. NaN where the scale is.

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or an x that requires a gradient.

    Notes
    -----
    Contract C4, ``docs/contract.md``. One thread, or one program of a GPU, searches a block: blocks should be many.
    """
    try:
        no_gradient("search_scale", "x", x)
        no_gradient("search_scale", "scale", scale)
        name, block = format_name(format), whole_axes("search_scale", x, block)
        arguments = (x, scale, name, block, method, format_name(kept), zero_point, energy)
        if out is None:
            found: Tensor = _search(*arguments)
            return found
        _search_out(*arguments, out=out)
        return out
    except Exception as error:
        explain("search_scale", search_scale, locals(), error)
