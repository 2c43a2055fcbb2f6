"""dx[t, k] = sum over n of dy[t, n] * w[e, n, k], e the expert that row t belongs to"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.autograd import Gradients, differentiable
from quantlib.ops.check import INPUTS, Result, check_dtype, fail, last_size
from quantlib.ops.declare import declare
from quantlib.ops.dequant_matmul_backward import through_activation
from quantlib.ops.weight import check_experts

OP = "grouped_dequant_matmul_backward"


def _results(dy: Tensor, weight: QuantizedWeight, offsets: Tensor) -> list[Result]:
    check_dtype(OP, "dy", dy.dtype, INPUTS)
    check_experts(OP, weight, offsets, dy, "dy")
    N, K = weight.shape
    if last_size(OP, "dy", dy) != N:
        fail(OP, "dy", f"[T, {N}]", list(dy.shape))
    return [([dy.shape[0], K], dy.dtype)]


_backward, _ = declare(OP, _results)


def _gradients(
    dy: Tensor,
    needs: set[str],
    *,
    x: Tensor,
    weight: QuantizedWeight,
    offsets: Tensor,
    epilogue: Epilogue,
    op: str,
    **_: Any,
) -> Gradients:
    _check_frozen(op, needs)
    dy, bias = _through(op, dy, x, weight, offsets, epilogue), epilogue.bias
    found: Gradients = {}
    if "x" in needs:
        found["x"] = _backward(dy, *_arguments(weight, offsets), weight.shape[1])
    if bias is not None and "bias" in needs:
        found["bias"] = (_members(offsets, len(dy)).T @ dy.float()).to(bias.dtype)
    return found


def _tangent(
    tangents: dict[str, Tensor],
    *,
    x: Tensor,
    weight: QuantizedWeight,
    offsets: Tensor,
    epilogue: Epilogue,
    op: str,
    **_: Any,
) -> Tensor:
    _check_frozen(op, tangents)
    x_t, bias_t = tangents.get("x"), tangents.get("bias")
    if x_t is not None:
        y_t: Tensor = torch.ops.quantlib.grouped_dequant_matmul(x_t, *_arguments(weight, offsets), bias_t)
    else:
        assert bias_t is not None
        y_t = (_members(offsets, len(x)) @ bias_t.float()).to(x.dtype)
    return _through(op, y_t, x, weight, offsets, epilogue)


def _second_gradients(g: Tensor, needs: set[str], *, dy: Tensor, weight: QuantizedWeight, offsets: Tensor) -> Gradients:
    """The derivatives of dx, which is linear in dy."""
    _check_frozen(OP, needs)
    return {"dy": torch.ops.quantlib.grouped_dequant_matmul(g, *_arguments(weight, offsets))}


def _second_tangent(tangents: dict[str, Tensor], *, dy: Tensor, weight: QuantizedWeight, offsets: Tensor) -> Tensor:
    _check_frozen(OP, tangents)
    y: Tensor = _backward(tangents["dy"], *_arguments(weight, offsets), weight.shape[1])
    return y


def _through(op: str, dy: Tensor, x: Tensor, weight: QuantizedWeight, offsets: Tensor, epilogue: Epilogue) -> Tensor:
    """dy * activation'(before), `before` computed again."""
    product = getattr(torch.ops.quantlib, op)
    return through_activation(dy, epilogue.activation, lambda: product(x, *_arguments(weight, offsets), epilogue.bias))


def _arguments(weight: QuantizedWeight, offsets: Tensor) -> tuple[Any, ...]:
    codes, scale, format, block, zero_point = weight.arguments
    return codes, scale, format, block, offsets, zero_point


def _members(offsets: Tensor, rows: int) -> Tensor:
    """[T, E] float32: 1 where row t is one of expert e; sums with it take a fixed order, and no host waits."""
    t = torch.arange(rows, device=offsets.device)[:, None]
    starts = torch.nn.functional.pad(offsets[:-1], (1, 0))
    return ((starts <= t) & (t < offsets)).float()


def _check_frozen(op: str, asked: Any) -> None:
    for name in ("codes", "scale"):
        if name in asked:
            fail(op, name, "frozen, it has no gradient here", f"{name} that requires one")


def attach_gradients() -> None:
    """Give the grouped products their derivatives, with respect to x and bias."""
    for op in ("grouped_dequant_matmul", "grouped_dynamic_matmul"):
        differentiable(op, partial(_gradients, op=op), partial(_tangent, op=op))
    differentiable(OP, _second_gradients, _second_tangent)
