"""parameter -= rate * m / (sqrt(v) * correction + eps), m and v moving averages in 8 bits"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quantlib.ops.check import INPUTS, Result, check_dtype, check_tensor, described, fail, no_gradient
from quantlib.ops.declare import Kernel, declare
from quantlib.ops.explain import explain, unpacked

OP = "adamw_step"
CONSTANTS = ("decay", "l2", "beta1", "rest1", "beta2", "rest2", "rate", "correction", "eps")
BLOCKS = (0, 32, 64, 128, 256, 512, 1024)
NAMES = ("parameter_out", "m_out", "v_out", "m_scale_out", "v_scale_out")


def states_of(rows: int, columns: int, block: int) -> dict[str, Result]:
    """The shape and the dtype of the states of a parameter [rows, columns]."""
    shape, scales = [rows, columns], [rows, -(-columns // block) if block else 0]
    m, v = (torch.int8, torch.uint8) if block else (torch.float32, torch.float32)
    return {"m": (shape, m), "v": (shape, v), "m_scale": (scales, torch.float32), "v_scale": (scales, torch.float32)}


def _results(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    constants: Tensor,
    block: int,
    key: Tensor | None,
    origin: Sequence[int] | None,
) -> list[Result]:
    device = parameter.device
    check_dtype(OP, "parameter", parameter.dtype, INPUTS)
    if parameter.dim() != 2:
        fail(OP, "parameter", "[M, K]", described(parameter.shape, parameter.dtype, device))
    if block not in BLOCKS:
        fail(OP, "block", f"one of {', '.join(map(str, BLOCKS))}", block)
    like: Result = (list(parameter.shape), parameter.dtype)
    check_tensor(OP, "gradient", gradient, like, device)
    M, K = parameter.shape
    states = states_of(M, K, block)
    for name, state in {"m": m, "v": v, "m_scale": m_scale, "v_scale": v_scale}.items():
        check_tensor(OP, name, state, states[name], device)
    check_tensor(OP, "constants", constants, ([len(CONSTANTS)], torch.float32), device)
    if key is not None:
        check_tensor(OP, "key", key, ([2], torch.int32), device)
        if parameter.dtype != torch.bfloat16:
            fail(OP, "key", f"None for a parameter of {str(parameter.dtype).removeprefix('torch.')}", "a tensor")
    if origin is not None and (len(origin) != 2 or origin[0] < 0 or origin[1] < 0):
        fail(OP, "origin", "two sizes >= 0", f"[{', '.join(map(str, origin))}]")
    return [like, *states.values()]


def _launch(
    kernel: Kernel,
    outs: list[Tensor],
    block: int,
    key: Tensor | None,
    origin: Sequence[int] | None,
    **tensors: Tensor,
) -> None:
    read = (t.contiguous() for t in tensors.values())
    first = (0, 0) if origin is None else (origin[0], origin[1])
    kernel(*read, block, None if key is None else key.contiguous(), first, *outs)


_step, _step_out = declare(OP, _results, _launch)


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    constants: Tensor,
    *,
    block: int,
    key: Tensor | None = None,
    origin: tuple[int, int] | None = None,
    out: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, ...]:
    """One step of AdamW or Adam for one parameter, with states in 8 bits.

    ``g = gradient + l2 * parameter`` where l2 is not 0; ``m = beta1 * m + rest1 * g``;
    ``v = beta2 * v + rest2 * g * g``;
    ``parameter = parameter * decay - rate * m / (sqrt(v) * correction + eps)``.

    Parameters
    ----------
    parameter, gradient : Tensor [M, K]
        float32, float16 or bfloat16, both of one dtype.
    m, v : Tensor [M, K]
        int8 codes of the signed square root of the mean, uint8 codes of the fourth root of the mean square; float32
        values where ``block`` is 0.
    m_scale, v_scale : Tensor [M, ceil(K / block)] float32
        [M, 0] where ``block`` is 0.
    constants : Tensor [9] float32
        decay, l2, beta1, rest1, beta2, rest2, rate, correction, eps: of AdamW in step t 1 - lr * weight_decay, 0,
        beta1, 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps.
    block : int
        Columns of a row that share a scale: a power of two from 32 to 1024. 0: the states are float32.
    key : Tensor [2] int32, optional
        Round a bfloat16 parameter up or down at random, by these two words and the row and the column of an element.
    origin : (row, column), optional
        Where the matrix begins in the whole parameter, of which it is a shard.
    out : tuple of five tensors, optional
        Written to and returned. Each may be the argument that it follows.

    Returns
    -------
    parameter, m, v, m_scale, v_scale : Tensor

    Raises
    ------
    RuntimeError
        For an argument that is not as above, or one that requires a gradient.

    Notes
    -----
    Contract C13 and C9, ``docs/contract.md``. The method: Loshchilov and Hutter 2019, "Decoupled Weight Decay
    Regularization"; blocks of states: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization".
    """
    try:
        read = {"parameter": parameter, "gradient": gradient, "m": m, "v": v, "m_scale": m_scale, "v_scale": v_scale}
        for name, value in {**read, "constants": constants}.items():
            no_gradient(OP, name, value)
        given = (*read.values(), constants, block, key, origin)
        if out is None:
            result: tuple[Tensor, ...] = _step(*given)
            return result
        _step_out(*given, **unpacked(OP, out, NAMES))
        return out
    except Exception as error:
        explain(OP, adamw_step, locals(), error)
