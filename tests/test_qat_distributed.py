"""Two processes over gloo train a prepared model as one does: DDP, FSDP2 and ZeRO."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from quantlib import prepare_qat_, qat_parameters

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch is built without gloo"),
]
RANKS, BATCH, STEPS = 2, 16, 5
KINDS = ("ddp", "fsdp2", "zero")


def prepared() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 7))
    prepare_qat_(model, "int4:group:8:affine@int8:row")
    return model


def train(model: nn.Module, optimizer: Any, rows: slice) -> Tensor:
    """The loss of each step on these rows of the batch."""
    generator, losses = torch.Generator().manual_seed(1), []
    x, y = (torch.randn(BATCH, size, generator=generator)[rows] for size in (40, 7))
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def learned(model: nn.Sequential) -> list[Tensor]:
    """The scales and zero points, whole on every rank."""
    quantizers = [layer.weight_quantizer for layer in model if isinstance(layer, nn.Linear)]
    values = [v.detach() for q in quantizers for v in (q.scale, q.zero_point)]
    return [v.full_tensor() if hasattr(v, "full_tensor") else v for v in values]


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    size, results = BATCH // RANKS, {}
    for kind in KINDS:
        model = prepared()
        wrapped: nn.Module = model
        if kind == "fsdp2":
            mesh = init_device_mesh("cpu", (RANKS,))
            for layer in (model[0], model[2], model):
                fully_shard(layer, mesh=mesh)
        else:
            wrapped = nn.parallel.DistributedDataParallel(model)
        if kind == "zero":
            optimizer = ZeroRedundancyOptimizer(qat_parameters(model), optimizer_class=torch.optim.AdamW, lr=1e-2)
        else:
            optimizer = torch.optim.AdamW(qat_parameters(model), lr=1e-2)
        losses = train(wrapped, optimizer, slice(rank * size, (rank + 1) * size))
        results[kind] = losses, learned(model)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[Tensor, list[Tensor]]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_and_the_scales_are_those_of_one_process(results: Any, kind: str) -> None:
    model = prepared()
    losses = train(model, torch.optim.AdamW(qat_parameters(model), lr=1e-2), slice(None))
    torch.testing.assert_close(sum(r[kind][0] for r in results) / RANKS, losses, rtol=1e-4, atol=1e-5)
    for one, first, second in zip(learned(model), results[0][kind][1], results[1][kind][1], strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, rtol=1e-3, atol=1e-4)
    assert any((layer.weight_quantizer.gain != 1).any() for layer in (model[0], model[2]))
