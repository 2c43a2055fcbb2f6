"""y[...] = encode(decode(x[...])): from one float format to another, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.formats import Format
from quantlib.ops.autograd import StraightThrough, apply
from quantlib.ops.check import CASTS, Result, check_dtype, dtype_of, fail, wants_gradient
from quantlib.ops.declare import Kernel, declare, format_name
from quantlib.ops.explain import explain


def _results(x: Tensor, format: Format, saturate: bool) -> list[Result]:
    check_dtype("cast", "x", x.dtype, CASTS)
    return [(list(x.shape), dtype_of(format))]


def _launch(kernel: Kernel, outs: list[Tensor], x: Tensor, format: Format, saturate: bool) -> None:
    kernel(x.contiguous().view(-1), formats.get(x.dtype), format, saturate, outs[0].view(-1))


_cast, _cast_out = declare("cast", _results, _launch, CASTS)
_SATURATES = {name: bool(getattr(f, "saturates", False)) for name, f in formats.FORMATS.items()}


def cast(x: Tensor, format: str | torch.dtype, *, saturate: bool | None = None, out: Tensor | None = None) -> Tensor:
    """Round ``x`` to a float format, once, to nearest with ties to even.

    Parameters
    ----------
    x : Tensor [...]
        float32, float16, bfloat16, float8_e4m3fn or float8_e5m2. Narrower than float32, it is decoded first: exact.
    format : str or torch.dtype
        One of the same five.
    saturate : bool, optional
        Whether what is too large becomes the largest finite value (True) or infinity, in float8_e4m3fn NaN (False).
        By default only the 8-bit formats saturate.
    out : Tensor [...], optional
        Written to and returned: x's shape, the format's dtype.

    Returns
    -------
    Tensor [...]
        A tensor of the format's dtype. Every NaN is the format's one NaN. Between 32 and 16 bits the gradient is passed
        straight through.

    Raises
    ------
    RuntimeError
        For an x, format or out that is not as above, and for a gradient through 8 bits.

    Notes
    -----
    Contract C1, C2 and C3, ``docs/contract.md``.
    """
    try:
        name = format_name(format)
        saturates = _SATURATES.get(name, False) if saturate is None else saturate
        if wants_gradient("cast", "x", x):
            if out is not None:
                fail("cast", "out", "None where x requires a gradient", "a tensor")
            if x.dtype.itemsize == 1 or name.startswith("float8"):
                way_out = "call it under torch.no_grad() or on x.detach()"
                raise RuntimeError(
                    "quantlib::cast: x must not require a gradient, which cannot pass through 8 bits, "
                    f"got {x.dtype} to {name}: {way_out}"
                )
            return apply(_Cast, x, name, saturates)
        if out is None:
            y: Tensor = _cast(x, name, saturates)
            return y
        _cast_out(x, name, saturates, out=out)
        return out
    except Exception as error:
        explain("cast", cast, locals(), error)


class _Cast(StraightThrough):
    @staticmethod
    def forward(x: Tensor, name: str, saturate: bool) -> Tensor:
        y: Tensor = _cast(x, name, saturate)
        return y
