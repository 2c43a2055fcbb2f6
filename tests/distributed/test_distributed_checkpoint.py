"""Some ranks save and others load: more, fewer, one, cut in another way; and a run that lost a rank goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo import far
from test_data_parallel import adamw, fit, fsdp, trainable
from test_stages_and_meshes import wide
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import parallelize_module

from quantlib.distributed import ColwiseParallel, RowwiseParallel

pytestmark = pytest.mark.slow

KINDS = {
    "int8:row": "codes",
    "W4A16": "codes",
    "float8_e4m3fn:row": "codes",
    "int4:group:8:affine": "lora",
    "int4:row": "qat",
}


def cut(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def named(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


def resharded(mesh: DeviceMesh) -> dict[str, float]:
    """Codes, scales, adapters and states of AdamW, saved by FSDP2 on this mesh and loaded in three other ways."""
    found, rank, world = {}, mesh.get_local_rank(), mesh.size()
    other = gloo.MESHES[6 - world]
    for spec, kind in KINDS.items():
        saved = fsdp(wide(spec, kind), mesh)
        optimizer = adamw(trainable(saved))
        fit(saved, optimizer, rank, world)
        first = f"{gloo.FOLDERS[0]}/{kind}-{spec.replace(':', '-')}-{world}-"
        folder = f"{first}{dist.get_process_group_ranks(mesh.get_group())[0]}"
        state = dict(zip(("model", "optimizer"), get_state_dict(saved, optimizer), strict=True))
        dcp.save(state, checkpoint_id=folder, process_group=mesh.get_group())
        dist.barrier()  # where both pairs of ranks saved, all four load what the first did
        ways = {
            "the other number of ranks": lambda m: fsdp(m, other),
            "one": lambda m: m,
            "tensor parallel": lambda m: cut(m, gloo.MESHES[2]),
        }
        for way, wrap in ways.items():
            torch.manual_seed(0)
            fresh = wrap(wide(spec, kind))
            for p in fresh.parameters():
                p.detach().zero_()
            own = adamw(trainable(fresh))
            model_state, optimizer_state = get_state_dict(fresh, own)
            target = {"model": model_state, "optimizer": optimizer_state}
            dcp.load(target, checkpoint_id=f"{first}0", no_dist=way == "one", process_group=None)
            set_state_dict(fresh, own, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
            found[f"{kind} {spec}, {way}"] = far(named(saved), named(fresh))
            states = [
                {f"{i} {k}": v for i, p in enumerate(trainable(m)) for k, v in o.state[p].items()}
                for m, o in ((saved, optimizer), (fresh, own))
            ]
            found[f"{kind} {spec}, {way}, AdamW"] = far(*states)
    return found


CASES = (resharded,)


def test_checkpoints_load_on_other_ranks(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(resharded):
        assert len(of_rank) == 30
        assert set(of_rank.values()) == {0.0}, of_rank
