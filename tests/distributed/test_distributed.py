"""Two gloo processes train what one does: DDP, FSDP2 and ZeroRedundancyOptimizer over learned scales.

Both processes start once and go through every case; each leaves what it saw in a file of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from quantlib import convert_, prepare_qat_, qat_mode_, qat_parameters, quantize_
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.nn import FakeQuantize, MinMaxObserver, QuantLinear

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
]

WORLD, STEPS, BATCH, SECONDS = 2, 6, 16, 1200
# A scale a row, activations projected too, and groups with zero points, which are learned as the scales are.
# Static activations: their observers see the parts of a batch as one.
SPECS = (
    "int8:row",
    "int4:row@int8:row",
    "int8:group:8:affine",
    "int8:row@int8:tensor:static",
    "int8:row@uint8:tensor:affine:static",
)
OBSERVED = 4  # steps, of those that train static activations
WAYS = ("ddp", "fsdp2", "zero", "alone")
CASES = tuple(product(WAYS, SPECS))


@dataclass
class Trained:
    """Return the results of a process at its end."""

    losses: list[float]  # of the whole batch, before each step
    parameters: dict[str, Tensor]  # whole, by the names that they have in one process
    buffers: dict[str, Tensor]
    codes: list[Tensor]  # of each layer, converted


Both = list[dict[tuple[str, str], Trained]]


def prepared(spec: str) -> nn.Sequential:
    """Rows that two processes cannot share evenly, a bias and none."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 7, bias=False))
    learned = {"activation_scale": "learned"} if spec.endswith("affine:static") else {}
    prepare_qat_(model, spec, **learned)
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
    for step in range(STEPS):
        qat_mode_(model, observers=step < OBSERVED)
        x, target = torch.randn(BATCH, 24, generator=generator), torch.randn(BATCH, 7, generator=generator)
        x *= torch.linspace(0.2, 2, BATCH).view(-1, 1)  # the processes see other ranges
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
    buffers = {name.removeprefix("module."): buffer.clone() for name, buffer in model.named_buffers()}
    one = prepared(spec)
    one.load_state_dict(whole | buffers)
    convert_(one)
    return Trained(losses, whole, buffers, [layer.weight_codes for layer in one if isinstance(layer, QuantLinear)])


def scales(model: nn.Module) -> list[float]:
    """Return the scales of the activations, to compare between the processes."""
    return [float(m.scale) for m in model.modules() if isinstance(m, FakeQuantize) and m.observer is not None]


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def uneven_ranks(rank: int, folder: str) -> list[float]:
    """The first process has no row of the second batch."""
    layers = nn.Sequential(nn.Linear(4, 2))
    prepare_qat_(layers, "int8:row@int8:tensor:static", observer=MinMaxObserver)
    model = DistributedDataParallel(layers)
    for size in (127.0, 254.0):
        rows = 2 if size == 127 else 2 * rank
        model(torch.full((rows, 4), size * rank))
    return scales(model)


def schedule(rank: int, folder: str) -> list[float]:
    """The one of docs/qat.md, where DDP looks for parameters that took no part."""
    model = prepared(SPECS[3])
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = adamw(qat_parameters(wrapped))
    for epoch in range(4):
        qat_mode_(wrapped, fake_quantize=epoch >= 1, observers=epoch < 2, learn_scales=epoch < 3)
        for step in range(2):
            optimizer.zero_grad()
            wrapped(torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * step + rank))).sum().backward()
            optimizer.step()
    return [float(p.double().sum()) for p in model.parameters()] + scales(model)


def mixed_precision(rank: int, folder: str) -> list[float]:
    """Scales shard in float32 by themselves, the layers around them compute in bfloat16."""
    model, mesh = prepared(SPECS[4]), init_device_mesh("cpu", (WORLD,))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for quantizer in [m for m in model.modules() if isinstance(m, FakeQuantize)]:
        fully_shard(quantizer, mesh=mesh)
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = adamw(qat_parameters(model))
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 24, generator=torch.Generator().manual_seed(10 * step + rank))
        model(x).float().square().mean().backward()
        optimizer.step()
    whole = [p.full_tensor() for p in model.parameters() if isinstance(p, DTensor)]
    assert all(p.dtype == torch.float32 for p in whole)
    return [float(p.double().sum()) for p in whole]


def resumed(rank: int, folder: str) -> list[float]:
    """A sharded model takes the values and switches that rank 0 alone has read from a file."""
    trained, fresh = prepared(SPECS[3]), sharded(prepared(SPECS[3]))
    trained(torch.ones(2, 24))
    qat_mode_(trained, observers=False)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(fresh, trained.state_dict() if rank == 0 else {}, options=options)
    fresh(1000 * torch.ones(2, 24))
    same = get_model_state_dict(fresh, options=StateDictOptions(full_state_dict=True))
    return [*scales(fresh), *(float(v.double().sum()) for k, v in same.items() if "forwards" not in k)]


def refusals(rank: int, folder: str) -> list[str]:
    def layers() -> nn.Sequential:
        return nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 7))

    quantized, floats, path = layers(), sharded(layers()), f"{folder}/{rank}.safetensors"
    quantize_(quantized, "int8")
    save_quantized(quantized, path)
    prepared_, of_codes = sharded(prepared("int8:row")), sharded(quantized)
    found = []
    for _ in range(2):
        found += [
            message(lambda: quantize_(floats, "int8")),
            message(lambda: prepare_qat_(floats, "int8")),
            message(lambda: load_quantized(floats, path)),
            message(lambda: load_quantized(of_codes, path)),
            message(lambda: save_quantized(of_codes, path, overwrite=True)),
            message(lambda: convert_(prepared_)),
        ]
        for model in (floats, of_codes, prepared_):
            model(torch.ones(2, 24))  # the parameters of the root stay whole until the backward
    return found


CHECKS = {check.__name__: check for check in (uneven_ranks, schedule, mixed_precision, resumed, refusals)}


def process(rank: int, folder: str) -> None:
    """One of the two."""
    warnings.simplefilter("ignore")
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
        checks = {name: check(rank, folder) for name, check in CHECKS.items()}
        torch.save((results, checks), f"{folder}/{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return the results of each of the two processes, by case and by check."""
    return gloo.saved(process, tmp_path_factory.mktemp("ranks"), WORLD)


@pytest.fixture(scope="module")
def both(results: list[Any]) -> Both:
    return [trained for trained, _ in results]


@pytest.fixture(scope="module")
def one() -> dict[str, Trained]:
    """Return the results of one process on the same batches, by spec."""
    return {spec: train(spec, lambda model: model, adamw, 0, 1) for spec in SPECS}


def moved(trained: Trained, spec: str) -> bool:
    start = dict(prepared(spec).named_parameters())
    learned = [name for name in start if name.endswith(("scale_bias", "zero_point_bias"))]
    assert len(learned) == (6 if spec.endswith("affine:static") else 4 if "affine" in spec else 2)
    assert all(start[name].dim() == 1 for name in learned), "FSDP2 shards no scalars"
    return not any(torch.equal(start[name], trained.parameters[name]) for name in learned)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "alone"])
def test_two_processes_train_what_one_does(way: str, both: Both, one: dict[str, Trained]) -> None:
    for spec, alone in one.items():
        assert alone.losses[-1] < alone.losses[0]
        assert moved(alone, spec)
        first, second = (results[way, spec] for results in both)
        # Sums add in another order. Static scales make that a code more or less where a value is between two codes.
        near = {"rtol": 1e-2, "atol": 1e-2} if "static" in spec else {"rtol": 1e-4, "atol": 1e-4}
        assert first.losses == second.losses == pytest.approx(alone.losses, rel=near["rtol"] / 10)
        assert first.parameters.keys() == second.parameters.keys() == alone.parameters.keys()
        for name, value in first.parameters.items():
            torch.testing.assert_close(value, alone.parameters[name], **near, msg=f"{spec}: {name}")
            assert torch.equal(value, second.parameters[name]), f"{spec}: {name} differs between the processes"
        for name, value in first.buffers.items():
            torch.testing.assert_close(value, alone.buffers[name], **near, msg=f"{spec}: {name}")
            assert torch.equal(value, second.buffers[name]), f"{spec}: {name} differs between the processes"
        assert len(first.codes) == 2
        assert all(torch.equal(a, b) for a, b in zip(first.codes, second.codes, strict=True))


def test_the_test_bites(both: Both, one: dict[str, Trained]) -> None:
    for spec, alone in one.items():
        first, second = (results["alone", spec] for results in both)
        assert first.losses != pytest.approx(alone.losses, rel=1e-5)
        gains = [trained.parameters["0.weight_quantizer.scale_bias"] for trained in (first, second)]
        assert not torch.equal(*gains)


def test_a_process_without_rows_learns_what_the_other_saw(results: list[Any]) -> None:
    assert [checks["uneven_ranks"] for _, checks in results] == [[2.0]] * WORLD


@pytest.mark.parametrize("check", ["schedule", "mixed_precision", "resumed"])
def test_the_processes_stay_the_same(check: str, results: list[Any]) -> None:
    first, second = (checks[check] for _, checks in results)
    assert first == second
    assert first
    if check == "resumed":
        model = prepared(SPECS[3])
        model(torch.ones(2, 24))
        assert first[:2] == scales(model)


def test_what_needs_whole_weights_refuses_sharded_ones(results: list[Any]) -> None:
    for _, checks in results:
        for found in checks["refusals"]:
            assert found.startswith("model must not be sharded, got one that is at its root: ")
        first = [found.partition("root: ")[2] for found in checks["refusals"][:6]]
        assert (
            first[:4]
            == ["this must come before fully_shard or parallelize_module"] * 2 + ["load before fully_shard"] * 2
        )
        assert all("full_state_dict=True" in found for found in first[4:])
