"""Stages of a pipeline, and meshes of two axes: FSDP2 or DDP over tensor parallel, HSDP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo import far
from test_data_parallel import adamw, fit, fsdp, trainable
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import parallelize_module

from quantlib import prepare_qat_, quantize_
from quantlib.distributed import ColwiseParallel, RowwiseParallel
from quantlib.nn import LoRALinear

pytestmark = pytest.mark.slow

WIDTH, BATCH, PARTS = 32, 16, 8
KINDS = ("int8:row", "W8A8", "lora", "qat")


def block(kind: str, n: int = 4) -> nn.Sequential:
    torch.manual_seed(6)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(n)))
    if kind == "qat":
        prepare_qat_(model, "int4:group:8")
        return model
    quantize_(model, "int4:group:8" if kind == "lora" else kind)
    if kind == "lora":
        for layer in model:
            layer[0] = LoRALinear(layer[0], 4)  # type: ignore[index]
            nn.init.normal_(layer[0].b, std=0.1)  # type: ignore[index]
    return model


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y - target).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def stages(mesh: DeviceMesh) -> dict[str, float]:
    """Each rank has some layers; parts of a batch pass from one to the next, and their gradients back."""
    found, rank, n = {}, mesh.get_local_rank(), mesh.size()
    generator = torch.Generator().manual_seed(2)
    x, target = torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, WIDTH, generator=generator)
    for kind in KINDS:
        one = block(kind)
        expected = one(x)
        loss(expected, target).backward()
        for schedule in (ScheduleGPipe, Schedule1F1B):
            mine = block(kind)[rank * 4 // n : (rank + 1) * 4 // n]
            stage = PipelineStage(mine, rank, n, torch.device("cpu"), group=mesh.get_group())
            steps = schedule(stage, PARTS, loss_fn=loss)
            last = rank == n - 1
            y = steps.step(*((x,) if rank == 0 else ()), **({"target": target} if last else {}))
            own = gradients(one[rank * 4 // n : (rank + 1) * 4 // n])
            found[f"{kind} {schedule.__name__}, gradients"] = far(own, gradients(mine))
            if last:
                found[f"{kind} {schedule.__name__}"] = far(expected, y)
    return found


def two_axes(mesh: DeviceMesh) -> dict[str, float]:
    """Two copies or shards of two parts of each layer: what four processes do that two cannot."""
    if mesh.size() < 4:
        return {}
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
    rank, found = both["data"].get_local_rank(), {}

    for spec, kind in (("int8:row", "codes"), ("W8A8", "codes"), ("int4:group:8:affine", "lora"), ("int4:row", "qat")):
        one = wide(spec, kind)
        expected = fit(one, adamw(trainable(one)), 0, 1)
        model = parallelize_module(wide(spec, kind), both["model"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        model = fsdp(model, both["data"])
        found[f"FSDP2 x tensor parallel; {kind} {spec}"] = far(expected, fit(model, adamw(trainable(model)), rank, 2))
        hybrid = fsdp(wide(spec, kind), both)
        found[f"HSDP; {kind} {spec}"] = far(expected, fit(hybrid, adamw(trainable(hybrid)), mesh.get_local_rank(), 4))
    return found


def wide(spec: str, kind: str) -> nn.Sequential:
    """Layers that two ranks share evenly, in whole groups."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 7))
    if kind == "qat":
        prepare_qat_(model, spec)
        return model
    quantize_(model, spec)
    if kind == "lora":
        for name in ("0", "2"):
            setattr(model, name, adapter := LoRALinear(model.get_submodule(name), 4))  # type: ignore[arg-type]
            nn.init.normal_(adapter.b, std=0.1)
    return model


CASES = (stages, two_axes)


def test_stages_pass_on_what_one_process_computes(found: Callable[[Any], list[Any]]) -> None:
    ranks = found(stages)
    for of_rank in ranks:
        assert max(of_rank.values()) <= 1e-6, of_rank
    assert len({name for of_rank in ranks for name in of_rank}) == 4 * len(KINDS)


def test_two_axes(ranks: Any) -> None:
    for of_rank in ranks["two_axes", 4]:
        assert not isinstance(of_rank, Exception), of_rank
        assert len(of_rank) == 8
        assert max(of_rank.values()) <= 2e-5, of_rank
