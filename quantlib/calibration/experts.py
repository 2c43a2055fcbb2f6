"""H[e] = sum over the tokens of expert e of x x^T: a matrix is rounded for the tokens that its router sent it"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.calibration.gptq import Rounded
from quantlib.nn.experts import QuantExperts, Stack, by_expert, number_of, ways_of
from quantlib.nn.functional import Weight, quantize_weight
from quantlib.ops.check import is_sharded
from quantlib.spec import QuantSpec

Tell = Callable[[str, int, Tensor], None]  # the name of a weight, an expert, and rows that its matrix multiplies


def expert_name(name: str, key: str, e: int) -> str:
    """The name of the matrix of expert ``e`` in the weight ``key`` of the experts ``name``."""
    return f"{name}.{key}.{e}"


def is_told(experts: nn.Module) -> bool:
    """True if the rows of each matrix are known: transformers says what all experts of its own kind compute."""
    return "_is_expert_parallel" in vars(experts) and not any(is_sharded(p) for p in experts.parameters())


@torch.no_grad()
def tell_rows(experts: nn.Module, tell: Tell, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Tell which rows the matrices of a float module of experts multiply when it is called with these arguments."""
    stands_in: Any = Told(experts, tell)
    QuantExperts._routed(stands_in, *args, **kwargs)


class Told:
    """A float module of experts in the place of a `QuantExperts` that computes: the same, but for its products."""

    def __init__(self, experts: nn.Module, tell: Tell) -> None:
        self.experts, self.tell = experts, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)

    def _product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """y[t] = x[t] @ weight[e].T + bias[e], ends[e - 1] <= t < ends[e]; 0 for rows of no expert."""
        weight, stack = stack_of(self.experts, name)
        bias = getattr(self.experts, f"{name}_bias") if self.has_bias else None

        def product(rows: Tensor, e: int) -> Tensor:
            if len(rows):
                self.tell(name, e, rows)
            return F.linear(rows, stack.matrix(weight, e), None if bias is None else bias[e])

        return by_expert(product, x, ends)


def stack_of(experts: nn.Module, name: str) -> tuple[Tensor, Stack]:
    """The float weight ``name`` of ``experts``, and its matrices."""
    weight = experts._parameters[name]
    assert weight is not None
    return weight, Stack.of_shape(weight.shape, ways_of(experts)[name], number_of(experts))


class RoundedStack(NamedTuple):
    """The codes and scales of the matrices of a stack, and their error over the tokens of all experts."""

    weight: Weight  # [E, ...]
    loss: float
    rounding: float
    damping: float  # the largest
    shift: Tensor | None  # [E, N]
    idle: tuple[int, ...]  # the experts that no token reached, which have the codes of `quantize_`


def rounded_stack(
    weight: Tensor, stack: Stack, spec: QuantSpec, found_of: Callable[[Tensor, int], Rounded | None]
) -> RoundedStack:
    """Round each matrix w of ``weight`` as ``found_of(w, e)`` finds it; as `quantize_` does where that is None."""
    parts: list[Weight] = []
    reached: list[Rounded] = []
    shifts, idle = [], []
    for e in range(stack.E):
        w = stack.matrix(weight.detach(), e).contiguous()
        found = found_of(w.float(), e)
        parts.append(quantize_weight(w, spec) if found is None else found.weight)
        if found is None:
            idle.append(e)
        else:
            reached.append(found)
        none = torch.zeros(stack.N, dtype=torch.float32, device=w.device)
        shifts.append(none if found is None or found.shift is None else found.shift)
    energy = sum(found.energy for found in reached) or 1.0
    loss, rounding = (
        sum(share * found.energy for found, share in zip(reached, shares, strict=True)) / energy
        for shares in ([found.loss for found in reached], [found.rounding for found in reached])
    )
    stacked = Weight(*(None if p[0] is None else torch.stack(p) for p in zip(*parts, strict=True)))  # type: ignore[arg-type]
    shift = torch.stack(shifts) if any(found.shift is not None for found in reached) else None
    return RoundedStack(stacked, loss, rounding, max((f.damping for f in reached), default=0.0), shift, tuple(idle))
