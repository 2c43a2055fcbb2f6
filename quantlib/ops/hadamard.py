"""y[..., b n + i] = sum over j of (-1)^(bits that i and j share) x[..., b n + j] / sqrt(n), n the block"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.ops.autograd import Gradients, differentiable
from quantlib.ops.check import INPUTS, Result, check_dtype, fail
from quantlib.ops.declare import Kernel, declare
from quantlib.ops.explain import explain
from quantlib.spec import MOST_ROTATED, matrix_shape


def _results(x: Tensor, block: int) -> list[Result]:
    check_dtype("hadamard", "x", x.dtype, INPUTS)
    K = x.shape[-1] if x.dim() else 1
    if not 1 <= block <= MOST_ROTATED or block & (block - 1) or K % block:
        fail("hadamard", "block", f"a power of two, at most {MOST_ROTATED}, that divides the last size {K}", block)
    return [(list(x.shape), x.dtype)]


def _launch(kernel: Kernel, outs: list[Tensor], x: Tensor, block: int) -> None:
    shape = matrix_shape(x.shape)
    kernel(x.contiguous().view(shape), block, outs[0].view(shape))


def _backward(dy: Tensor, needs: set[str], x: Tensor, block: int) -> Gradients:
    return {"x": torch.ops.quantlib.hadamard(dy, block)}


def _tangent(tangents: dict[str, Tensor], x: Tensor, block: int) -> Tensor:
    y_t: Tensor = torch.ops.quantlib.hadamard(tangents["x"], block)
    return y_t


_hadamard, _hadamard_out = declare("hadamard", _results, _launch, differentiable=True)
differentiable("hadamard", _backward, _tangent)


def hadamard(x: Tensor, block: int, *, out: Tensor | None = None) -> Tensor:
    """Multiply each ``block`` of columns by the orthogonal Hadamard matrix, which is its own inverse.

    A value that is larger than its neighbours is spread over all of them, so that a scale for all serves each.
    ``hadamard(x, n) @ hadamard(w, n).T`` is ``x @ w.T`` but for rounding.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16.
    block : int
        A power of two, at most 1024, that divides K.
    out : Tensor [..., K], optional
        Written to and returned: of x's shape and dtype.

    Returns
    -------
    Tensor [..., K]
        Of x's dtype, computed in float32. The gradient is the op of the gradient.

    Raises
    ------
    RuntimeError
        For an x, block or out that is not as above.

    Notes
    -----
    Contract C14, ``docs/contract.md``. The use: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated
    LLMs".
    """
    try:
        if out is None:
            y: Tensor = _hadamard(x, block)
            return y
        _hadamard_out(x, block, out=out)
        return out
    except Exception as error:
        explain("hadamard", hadamard, locals(), error)
