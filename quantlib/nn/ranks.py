"""The processes that see parts of one batch: those of the DDP or FSDP2 whose forward is running."""

from __future__ import annotations

import itertools

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


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
    for group in groups:
        dist.all_reduce(t, op, group)
    return t
