"""The processes that see parts of one batch, those of the DDP or FSDP2 whose forward is running, or of one tensor."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from quantlib import ops
from quantlib.ops.check import is_sharded
from quantlib.ops.sharding import cuts_columns


def groups_of_batch() -> list[dist.ProcessGroup]:
    """Process groups that together span all ranks of the batch; none outside the forward of DDP and FSDP2.

    A process group that is initialized says nothing by itself: its ranks may hold the stages of a pipeline, or parts
    of one layer. DDP and FSDP2 say which ranks split a batch, and every one of them runs the forward.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    ddp = DistributedDataParallel._get_active_ddp_module()
    if ddp is not None:
        return [ddp.process_group]
    return _groups_of_fsdp()


def _groups_of_fsdp() -> list[dist.ProcessGroup]:
    """One for each dimension of the mesh over which the root of the running forward is sharded or replicated."""
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state = reference()
        context = getattr(state, "_state_ctx", None)
        if context is None or context.iter_forward_root is not state:
            continue
        groups = itertools.chain.from_iterable(s._fsdp_param_groups for s in context.all_states)
        mesh = next((group.mesh_info.mesh for group in groups), None)
        if mesh is not None:
            return [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    return []


def reduce_(t: Tensor, op: dist.ReduceOp.RedOpType, groups: list[dist.ProcessGroup]) -> Tensor:
    """``t``, reduced over the ranks of all ``groups`` in place."""
    local = t.to_local() if is_sharded(t) else t  # type: ignore[attr-defined]
    for group in groups:
        dist.all_reduce(local, op, group)
    return t


@contextlib.contextmanager
def whole(x: Any) -> Iterator[Tensor]:
    """``x``, gathered on every rank if it is a DTensor, which other tensors join inside the block."""
    if not is_sharded(x):
        yield x
        return
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.experimental import implicit_replication

    with implicit_replication():
        yield x.redistribute(placements=[Replicate()] * x.device_mesh.ndim)


def looked_up(table: Any, rows: Tensor) -> Any:
    """table[rows] of a DTensor, without gathering the table: each rank looks up the rows that it has."""
    from torch.distributed.tensor import Replicate

    found: Any = F.embedding(rows, table)
    return found.redistribute(placements=[Replicate() if p.is_partial() else p for p in found.placements])


def scale_of_shards(x: Any, format: str, block: tuple[int, int]) -> Tensor:
    """C4 of a DTensor, symmetric, without gathering rows that share a scale: the largest scale of their parts.

    Scales are compared as integers, whose order is that of the values, with NaN last: a maximum over floats may lose
    it.
    """
    if not cuts_columns(x) or block[1] < x.shape[-1]:
        found = ops.compute_scale(x, format, block)
        assert isinstance(found, Tensor)
        return found
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, last, shared = x.device_mesh, x.dim() - 1, block[0] > 1
    placements = [p if p.is_shard(last) or (shared and p.is_shard()) else Replicate() for p in x.placements]
    local = x.redistribute(placements=placements).to_local()
    scale = ops.compute_scale(local, format, (-1 if shared else 1, -1))
    assert isinstance(scale, Tensor)
    bits = scale.view(torch.int32)
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            dist.all_reduce(bits, dist.ReduceOp.MAX, mesh.get_group(dim))
    whole: Tensor = DTensor.from_local(bits.view(torch.float32), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole
