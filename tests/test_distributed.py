"""Two gloo processes train what one does: DDP, FSDP2 and ZeroRedundancyOptimizer over learned scales.

Both processes start once and go through every case; each leaves what it saw in a file of its own.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quantlib import convert_, prepare_qat_, qat_parameters
from quantlib.nn import QuantLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
]

WORLD, STEPS, BATCH, SECONDS = 2, 6, 16, 240
# A scale a row, activations projected too, and groups with zero points, which are learned as the scales are.
SPECS = ("int8:row", "int4:row@int8:row", "int8:group:8:affine")
WAYS = ("ddp", "fsdp2", "zero", "alone")
CASES = tuple(product(WAYS, SPECS))


@dataclass
class Trained:
    """What a process has at the end."""

    losses: list[float]  # of the whole batch, before each step
    parameters: dict[str, Tensor]  # whole, by the names that they have in one process
    codes: list[Tensor]  # of each layer, converted


Both = list[dict[tuple[str, str], Trained]]


def prepared(spec: str) -> nn.Sequential:
    """Rows that two processes cannot share evenly, a bias and none."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 7, bias=False))
    prepare_qat_(model, spec)
    return model


def adamw(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=2e-2, weight_decay=0.1)


def zero(groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, lr=2e-2, weight_decay=0.1)


def sharded(model: nn.Sequential) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(spec: str, wrap: Callable[[nn.Sequential], nn.Module], optimizer: Any, rank: int, world: int) -> Trained:
    """A few steps on this process's part of each batch."""
    model = wrap(prepared(spec))
    optimizer = optimizer(qat_parameters(model))
    generator, losses = torch.Generator().manual_seed(4), []
    for _ in range(STEPS):
        x, target = torch.randn(BATCH, 24, generator=generator), torch.randn(BATCH, 7, generator=generator)
        part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        loss = (model(x[part]) - target[part]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen = loss.detach().clone()
        if world > 1:
            dist.all_reduce(seen)
        losses.append(float(seen) / world)
    whole = {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    one = prepared(spec)
    one(torch.zeros(1, 24))
    one.load_state_dict(whole, strict=False)
    convert_(one)
    return Trained(losses, whole, [layer.weight for layer in one if isinstance(layer, QuantLinear)])


def process(rank: int, folder: str) -> None:
    """One of the two."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS))
    ways: dict[str, tuple[Callable[[nn.Sequential], nn.Module], Any]] = {
        "ddp": (DistributedDataParallel, adamw),
        "fsdp2": (sharded, adamw),
        "zero": (DistributedDataParallel, zero),
        "alone": (lambda model: model, adamw),  # nobody averages the gradients: what the test has to tell apart
    }
    try:
        results = {(way, spec): train(spec, *ways[way], rank, WORLD) for way, spec in CASES}
        torch.save(results, f"{folder}/{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """What each of the two processes saw, by case."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    context = mp.start_processes(process, (str(folder),), nprocs=WORLD, join=False, start_method="spawn")
    end = time.monotonic() + SECONDS
    try:
        while not context.join(timeout=5):
            assert time.monotonic() < end, f"the processes still run after {SECONDS} s"
    finally:
        for worker in context.processes:
            if worker.is_alive():
                worker.kill()
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def one() -> dict[str, Trained]:
    """What one process makes of the same batches, by spec."""
    return {spec: train(spec, lambda model: model, adamw, 0, 1) for spec in SPECS}


def moved(trained: Trained, spec: str) -> bool:
    start = dict(prepared(spec).named_parameters())
    learned = [name for name in start if name.endswith(("scale_bias", "zero_point_bias"))]
    assert len(learned) == (4 if "affine" in spec else 2)
    assert all(start[name].dim() == 1 for name in learned), "FSDP2 shards no scalars"
    return not any(torch.equal(start[name], trained.parameters[name]) for name in learned)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "alone"])
def test_two_processes_train_what_one_does(way: str, both: Both, one: dict[str, Trained]) -> None:
    for spec, alone in one.items():
        assert alone.losses[-1] < alone.losses[0]
        assert moved(alone, spec)
        first, second = (results[way, spec] for results in both)
        assert first.losses == second.losses == pytest.approx(alone.losses, rel=1e-5)
        assert first.parameters.keys() == second.parameters.keys() == alone.parameters.keys()
        for name, value in first.parameters.items():
            torch.testing.assert_close(value, alone.parameters[name], rtol=1e-4, atol=1e-4, msg=f"{spec}: {name}")
            assert torch.equal(value, second.parameters[name]), f"{spec}: {name} differs between the processes"
        assert len(first.codes) == 2
        assert all(torch.equal(a, b) for a, b in zip(first.codes, second.codes, strict=True))


def test_the_test_bites(both: Both, one: dict[str, Trained]) -> None:
    for spec, alone in one.items():
        first, second = (results["alone", spec] for results in both)
        assert first.losses != pytest.approx(alone.losses, rel=1e-5)
        gains = [trained.parameters["0.weight_quantizer.scale_bias"] for trained in (first, second)]
        assert not torch.equal(*gains)
