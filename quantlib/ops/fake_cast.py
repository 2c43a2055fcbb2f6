"""y[...] = decode(encode(x[...])), with a gradient: fake quantization to a float format without a scale"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.ops.cast import cast
from quantlib.ops.check import check_dense
from quantlib.ops.declare import format_name
from quantlib.ops.explain import explain
from quantlib.ops.fake_quantize import fake_quantize


def fake_cast(x: Tensor, format: str | torch.dtype, *, saturate: bool | None = None) -> Tensor:
    """The values that ``x`` has in a float format, in x's own dtype.

    Parameters
    ----------
    x : Tensor [...]
        float32, float16 or bfloat16.
    format : {"float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"} or a torch.dtype
    saturate : bool, optional
        As for :func:`quantlib.cast`: by default only the 8-bit formats saturate.

    Returns
    -------
    Tensor [...] of x's dtype
        The bytes of ``cast(cast(x, format), x.dtype)``. The gradient passes straight through; where x saturates, none
        does.

    Raises
    ------
    RuntimeError
        For an argument that is not as above; for a gradient through 8 bits that do not saturate.

    Notes
    -----
    Contract C3 and C10, ``docs/contract.md``.
    """
    try:
        check_dense("fake_cast", "x", x)
        name = format_name(format)
        if getattr(formats.FORMATS.get(name), "saturates", False) if saturate is None else saturate:
            row = x.reshape(1, -1)
            one = torch.ones((1, min(x.numel(), 1)), dtype=torch.float32, device=x.device)
            return fake_quantize(row, one, name, block=(1, -1)).view(x.shape)
        return cast(cast(x, name, saturate=saturate), x.dtype, saturate=False)
    except Exception as error:
        explain("fake_cast", fake_cast, locals(), error)
