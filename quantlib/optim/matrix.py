"""A parameter as the matrix that its states are kept for, or the part of it that this process holds.

The blocks of states depend on the shape of the whole parameter. Row i of the matrix is ``parameter[i]``, so a shard
along the first axis, as FSDP2 makes it, never cuts a block; a shard along the columns must not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantlib.ops.check import is_sharded


@dataclass(frozen=True)
class Matrix:
    """The place of a part [rows, columns] in a parameter [whole_rows, whole_columns]."""

    whole: tuple[int, int]
    part: tuple[int, int]
    origin: tuple[int, int]  # row and column


def columns_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter of ``shape``: its first size and the product of the others, or one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def local(t: Any) -> Tensor:
    """Return the part of ``t`` that this process holds, in the same memory."""
    part: Tensor = t.to_local() if is_sharded(t) else t
    return part


def like(parameter: Any, part: Tensor, shape: Sequence[int]) -> Tensor:
    """``part`` as this process's part of a tensor of ``shape`` that is sharded as ``parameter`` is."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    stride = torch.empty(tuple(shape), device="meta").stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def matrix_of(parameter: Any) -> Matrix:
    """The part of ``parameter`` that this process holds, as a matrix.

    Raises
    ------
    ValueError
        For a DTensor that is sharded along its third axis or a later one, or partial.
    """
    whole = columns_of(parameter.shape)
    if not is_sharded(parameter):
        return Matrix(whole, whole, (0, 0))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in parameter.placements:
        if placement.is_partial() or (placement.is_shard() and placement.dim > 1):
            raise ValueError(f"a parameter must be sharded along its first or second axis, got {placement}")
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    if len(shape) < 2:
        return Matrix(whole, columns_of(shape), (0, offset[0] if offset else 0))
    width = math.prod(shape[2:])
    return Matrix(whole, (shape[0], shape[1] * width), (offset[0], offset[1] * width))
