"""AdamW8bit under FSDP2: the same bytes on 1, 2 and 4 gloo processes, and checkpoints that any number of them reads."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from quantlib.optim import AdamW8bit, parameter_groups
from quantlib.testing import assert_same_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
]

WORLDS, STEPS = (1, 2, 4), 3
Bytes = dict[str, Tensor]


class Model(nn.Module):
    """33 rows that no number of processes shares evenly, three rows for four, an embedding, convolution and norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 96)
        self.conv = nn.Conv2d(16, 33, 3)
        self.wide = nn.Linear(200, 33, dtype=torch.bfloat16)
        self.few = nn.Linear(2000, 3, bias=False)
        self.norm = nn.LayerNorm(96)


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    """Steps with gradients that are the same for every number of processes."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            whole = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole
        optimizer.step()


def whole(t: Any) -> Tensor:
    found: Tensor = t.full_tensor() if isinstance(t, DTensor) else t
    return found.detach().clone()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bytes:
    found = {}
    for name, p in model.named_parameters():
        found[name] = whole(p)
        found |= {f"{name} {key}": whole(t) for key, t in sorted(optimizer.state[p].items())}
    return found


def made(world: int) -> tuple[nn.Module, AdamW8bit]:
    torch.manual_seed(0)
    model = Model()
    if world:
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.conv, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model, AdamW8bit(parameter_groups(model), lr=1e-2, stochastic_rounding=True, block=64)


def rank(number: int, world: int, folder: str) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{world}",
        rank=number,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    model, optimizer = made(world)
    trained(model, optimizer, 0, STEPS)
    found = {"trained": everything(model, optimizer)}
    local = {n: p.to_local().shape for n, p in model.named_parameters()}
    held = optimizer.state[model.wide.weight]["exp_avg_scale"].to_local().shape
    assert held == (local["wide.weight"][0], 4)  # a rank holds the scales of its rows

    path = Path(folder, "checkpoint")
    state = get_optimizer_state_dict(model, optimizer)
    parameters = dict(model.named_parameters())
    if world == 2:
        dcp.save({"model": parameters, "optimizer": state}, checkpoint_id=path)
    else:  # which was written by two
        dcp.load({"model": parameters, "optimizer": state}, checkpoint_id=path)
        set_optimizer_state_dict(model, optimizer, state)
        found["loaded"] = everything(model, optimizer)
    trained(model, optimizer, STEPS, 1)
    found["resumed"] = everything(model, optimizer)

    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    other_model, other = made(world)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(other_model, other, full if number == 0 else {}, options=options)
    states = everything(other_model, other)
    found["broadcast"] = {name: t for name, t in states.items() if " " in name}
    if number == 0:
        torch.save(found, Path(folder, f"{world}.pt"))
    if world == 2:
        columns_and_refusals()
    dist.destroy_process_group()


def columns_and_refusals() -> None:
    """Shards along the columns: whole blocks give the bytes of one process, others are refused."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(1)
    value, gradient = torch.randn(40, 256).bfloat16(), torch.randn(40, 256).bfloat16()
    alone = nn.Parameter(value.clone())
    optimizer = AdamW8bit([alone], stochastic_rounding=True)
    for placement in (Shard(1), Shard(0), Replicate()):
        sharded = nn.Parameter(distribute_tensor(value.clone(), mesh, [placement]))
        other = AdamW8bit([sharded], stochastic_rounding=True)
        with torch.no_grad():
            alone.copy_(value)
        optimizer.state.clear()
        for _ in range(2):
            alone.grad, sharded.grad = gradient.clone(), distribute_tensor(gradient.clone(), mesh, [placement])
            optimizer.step()
            other.step()
        assert_same_bytes(whole(sharded), alone.detach(), f"{placement}")
        for name, t in other.state[sharded].items():
            assert_same_bytes(whole(t), optimizer.state[alone][name], f"{placement} {name}")
    cut = nn.Parameter(distribute_tensor(torch.randn(64, 200), mesh, [Shard(1)]))
    with pytest.raises(ValueError, match=r"block must divide the columns .* got 128 of \[64, 200\] in parts of 100"):
        AdamW8bit([cut])
    AdamW8bit([cut], bits=32)
    deep = nn.Parameter(distribute_tensor(torch.randn(8, 8, 64, 2), mesh, [Shard(2)]))
    with pytest.raises(ValueError, match="must be sharded along its first or second axis"):
        AdamW8bit([deep])
    torn = nn.Parameter(distribute_tensor(torch.randn(64, 256), mesh, [Shard(0)]))
    torn.grad = distribute_tensor(torch.randn(64, 256), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="a gradient must be sharded as its parameter is"):
        AdamW8bit([torn]).step()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Bytes]]:
    """Return the results of the first process, by the number of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    for world in (2, 1, 4):  # two write the checkpoint
        gloo.start(rank, world, world, str(folder))
    return {world: torch.load(folder / f"{world}.pt") for world in WORLDS}


def assert_same(got: Bytes, want: Bytes, where: str) -> None:
    assert got.keys() == want.keys()
    for name, t in got.items():
        assert_same_bytes(t, want[name], f"{where}: {name}")


@pytest.mark.parametrize("world", WORLDS)
def test_the_same_bytes_as_without_fsdp(found: dict[int, dict[str, Bytes]], world: int) -> None:
    model, optimizer = made(0)
    trained(model, optimizer, 0, STEPS)
    want = everything(model, optimizer)
    eight = [name for name, t in want.items() if t.dtype == torch.int8 and name.endswith("exp_avg")]
    assert eight == ["conv.weight exp_avg", "wide.weight exp_avg", "few.weight exp_avg"]
    assert_same(found[world]["trained"], want, f"{world} processes")


@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_two_is_resumed_by_any_number(found: dict[int, dict[str, Bytes]], world: int) -> None:
    if world != 2:
        assert_same(found[world]["loaded"], found[2]["trained"], f"{world} processes")
    assert_same(found[world]["resumed"], found[2]["resumed"], f"{world} processes")


@pytest.mark.parametrize("world", WORLDS)
def test_a_full_state_is_broadcast(found: dict[int, dict[str, Bytes]], world: int) -> None:
    want = {name: t for name, t in found[world]["resumed"].items() if " " in name}
    assert_same(found[world]["broadcast"], want, f"{world} processes")
