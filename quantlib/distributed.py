"""y = x w^T over the ranks of a mesh, each of which has some rows or some columns of the codes of w.

Styles for ``torch.distributed.tensor.parallel.parallelize_module``. Those of torch serve a `QuantLinear` and a
`QuantEmbedding` too; these also cut what is made of several parameters, LoRA and QAT layers and experts, keep scales
that are not cut whole, and say at once where a cut would go through a block of weights or a byte of codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor, parallel
from torch.distributed.tensor.parallel import ParallelStyle

from quantlib.nn.experts import QuantExperts
from quantlib.nn.fake_quantize import FakeQuantize
from quantlib.nn.forms import TransposedLinear
from quantlib.nn.lora import LoRALinear
from quantlib.nn.module import QuantModule
from quantlib.nn.qat import QATEmbedding, QATLinear
from quantlib.ops.sharding import Matrix, refusal
from quantlib.spec import matrix_shape

__all__ = ["ColwiseParallel", "ExpertParallel", "RowwiseParallel"]

LINEAR = (nn.Linear, TransposedLinear, LoRALinear)  # QuantLinear and QATLinear are the first
CUTS = (QuantModule, LoRALinear, QATLinear, QATEmbedding)


class _Cutting(ParallelStyle):
    """The part that both styles share: `_cut` parameters, and torch's hooks around the forward."""

    AXIS: int  # of the weight [N, K] of a linear layer; that of a table is the other
    input_layouts: Any
    desired_input_layouts: Any
    output_layouts: Any
    use_local_output: bool
    _prepare_input_fn: Callable[..., Any]
    _prepare_output_fn: Callable[..., Any]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, CUTS):
            return super()._apply(module, device_mesh)  # type: ignore[safe-super]
        linear = isinstance(module, LINEAR)
        axis = self.AXIS if linear else 1 - self.AXIS
        whole = not linear or self.AXIS == 0
        self.desired_input_layouts = (Replicate() if whole else Shard(-1),)

        def cut_root(name: str, submodule: nn.Module, mesh: DeviceMesh) -> None:
            if not name:
                cut(submodule, mesh, axis, self.src_data_rank)

        return distribute_module(
            module,
            device_mesh,
            cut_root,
            partial(self._prepare_input_fn, self.input_layouts, self.desired_input_layouts),
            partial(self._prepare_output_fn, self.output_layouts, self.use_local_output),
        )


class ColwiseParallel(_Cutting, parallel.ColwiseParallel):
    """`torch.distributed.tensor.parallel.ColwiseParallel`, for quantized, LoRA and QAT layers too.

    Each rank has some outputs of a linear layer, rows of its codes; of a table some columns.

    Raises
    ------
    ValueError
        From ``parallelize_module``, for a cut through a block of weights or a byte of codes, with a way out.
    """

    AXIS = 0


class RowwiseParallel(_Cutting, parallel.RowwiseParallel):
    """`torch.distributed.tensor.parallel.RowwiseParallel`, for quantized, LoRA and QAT layers too.

    Each rank has some inputs of a linear layer, columns of its codes, and the sums of all ranks are added; of a table
    some rows. W8A8 takes the scale of a row of inputs over all ranks.

    Raises
    ------
    ValueError
        From ``parallelize_module``, for a cut through a block of weights or a byte of codes, with a way out.
    """

    AXIS = 1


def cut(module: nn.Module, mesh: DeviceMesh, axis: int, src: int | None) -> None:
    """Have a part of the weight [N, K] of ``module`` on each rank: rows (0) or columns (1)."""
    if isinstance(module, LoRALinear):
        cut(module.base, mesh, axis, src)
        name = ("b", "a")[axis]
        place(module, name, mesh, Shard(axis), src)
        return
    if isinstance(module, QuantModule):
        module.shard_(mesh, axis, src)
    elif isinstance(module, (QATLinear, QATEmbedding)):
        cut_trained(module, mesh, axis, src)
    if axis == 0 and module._parameters.get("bias") is not None:
        place(module, "bias", mesh, Shard(0), src)


def cut_trained(module: Any, mesh: DeviceMesh, axis: int, src: int | None) -> None:
    """The weight of a QAT layer, and its scales where their blocks lie in a row of the same length on every rank."""
    quantizer = module.weight_quantizer
    matrix = matrix_of(quantizer, module.weight.shape)
    if why := refusal(matrix, axis, mesh.size()):
        raise ValueError("weight must be {}, got {}".format(*why))
    place(module, "weight", mesh, Shard(axis), src)
    rows, columns = quantizer.blocks
    flat = axis == 0 and rows > 1 and (columns == 1 or rows % mesh.size() == 0)
    for name in ("base", "base_zero", "scale_bias", "zero_point_bias"):
        if quantizer._parameters.get(name) is not None:
            place(quantizer, name, mesh, Shard(0) if flat else Replicate(), src)


def place(module: nn.Module, name: str, mesh: DeviceMesh, placement: Any, src: int | None) -> None:
    p = module._parameters[name]
    assert p is not None
    part = distribute_tensor(p.data, mesh, [placement], src_data_rank=src)
    module.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))


class ExpertParallel(ParallelStyle):
    """Each rank has some of the experts of a `QuantExperts` of transformers, and the sums of all ranks are added.

    The module is called as before, with the same hidden states and choices of a router on every rank, and gives the
    same result on every rank.

    Raises
    ------
    TypeError
        From ``parallelize_module``, for another module.
    ValueError
        For experts that the ranks do not divide.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, QuantExperts) or "_is_expert_parallel" not in vars(module):
            raise TypeError(f"module must be quantized experts of transformers, got {type(module).__name__}")
        E, parts, rank = module.num_experts, device_mesh.size(), device_mesh.get_local_rank()
        if E % parts:
            raise ValueError(f"experts must divide evenly over {parts} ranks, got {E}: use fewer ranks")
        for name, p in module._parameters.items():
            if p is not None:
                place(module, name, device_mesh, Shard(0), self.src_data_rank)
        own = module.num_experts = E // parts
        module.stacks = {name: stack._replace(E=own) for name, stack in module.stacks.items()}

        def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            hidden, chosen, weights = args
            chosen = chosen - rank * own
            chosen = torch.where((chosen >= 0) & (chosen < own), chosen, own)  # which adds nothing
            return entering(hidden, device_mesh), chosen, entering(weights, device_mesh)

        def give(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            total: Tensor = DTensor.from_local(y, device_mesh, [Partial()], run_check=False)
            return total.redistribute(placements=[Replicate()]).to_local()  # type: ignore[attr-defined,no-any-return]

        module.register_forward_pre_hook(take)
        module.register_forward_hook(give)
        return module


def entering(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """``x``, the same on every rank, whose gradient is the sum over the ranks."""
    whole: Any = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    local: Tensor = whole.to_local(grad_placements=[Partial()])
    return local


def matrix_of(quantizer: FakeQuantize, shape: Sequence[int]) -> Matrix:
    """The weight that ``quantizer`` projects, and its blocks: codes of a format that is packed are cut as bytes."""
    row, matrix = quantizer.spec.row, matrix_shape((shape[0], math.prod(shape[1:])))
    block = quantizer.spec.block(matrix) if quantizer.spec.scaled else (1, 1)
    per_byte = row.per_byte if row.packed else 1
    return Matrix(matrix, block, per_byte, 1 if quantizer.spec.symmetric else per_byte)
