"""Copies and shards of quantized, LoRA and QAT models train on parts of a batch what one process does on all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import far, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from quantlib import prepare_qat_, qat_mode_, qat_parameters, quantize_
from quantlib.nn import LoRALinear, QuantLinear

pytestmark = pytest.mark.slow

K, INNER, N, BATCH, STEPS = 24, 33, 7, 16, 4  # 33 rows and 7 rows are shared unevenly by 2 and by 4 ranks
KINDS = {
    "int8:row": "codes",  # of which the biases are trained
    "W8A8": "codes",
    "float8_e4m3fn:row": "codes",
    "int4:group:8:affine": "lora",
    "nf4_bf16:group:8:bfloat16": "lora",
    "int4:row@int8:row": "qat",
}
SPECS = (
    "int8:row",
    "int8:tensor",
    "int4:row",
    "int4:group:8:affine",
    "int8:tile:8",
    "float8_e4m3fn:row",
    "W8A8",
    "W4A16",
)
Wrap = Callable[[nn.Module, DeviceMesh], nn.Module]
Optimizer = Callable[[Any, DeviceMesh], torch.optim.Optimizer]


def floats() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(K, INNER), nn.GELU(), nn.Linear(INNER, N))


def made(spec: str, kind: str) -> nn.Sequential:
    model = floats()
    if kind == "qat":
        prepare_qat_(model, spec)
        return model
    quantize_(model, spec)
    if kind == "lora":
        model[0], model[2] = LoRALinear(model[0], 4), LoRALinear(model[2], 4)
        for adapter in (model[0], model[2]):
            nn.init.normal_(adapter.b, std=0.1)
    return model


def steps_of(rank: int, world: int, parts: int = 1) -> Any:
    """This rank's part of each batch, in so many parts of its own, and the target."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        x, target = torch.randn(BATCH, K, generator=generator), torch.randn(BATCH, N, generator=generator)
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        yield list(zip(x[mine].chunk(parts), target[mine].chunk(parts), strict=True))


def adamw(parameters: Any, mesh: DeviceMesh | None = None) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def zero(parameters: Any, mesh: DeviceMesh) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, process_group=mesh.get_group(), lr=1e-2)


def fit(
    model: nn.Module,
    optimizer: Any,
    rank: int,
    world: int,
    accumulate: int = 1,
    modes: bool = False,
    alone: bool = False,
) -> dict[str, Tensor]:
    """Every parameter after a few steps."""
    for step, parts in enumerate(steps_of(rank, world, accumulate)):
        if modes:  # scales and projections come and go
            qat_mode_(model, fake_quantize=step != 1, learn_scales=step != 2)
        optimizer.zero_grad()
        for i, (x, target) in enumerate(parts):
            last = i == len(parts) - 1
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(last)
            waits = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
            with waits:
                ((model(x) - target).square().mean() / accumulate).backward()
        optimizer.step()
    return {name.removeprefix("module."): whole(p).clone() for name, p in model.named_parameters()}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def ddp(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    return DistributedDataParallel(model, process_group=mesh.get_group(), **options)


def fsdp(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    for layer in (model[0], model[2]):  # type: ignore[index]
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


WAYS: dict[str, tuple[Wrap, Optimizer, dict[str, Any]]] = {
    "DDP": (ddp, adamw, {}),
    "DDP, accumulated with no_sync": (ddp, adamw, {"accumulate": 2}),
    "DDP, static graph": (lambda m, mesh: ddp(m, mesh, static_graph=True), adamw, {}),
    "DDP, unused looked for": (lambda m, mesh: ddp(m, mesh, find_unused_parameters=True), adamw, {}),
    "DDP, views of buckets": (lambda m, mesh: ddp(m, mesh, gradient_as_bucket_view=True), adamw, {}),
    "ZeRO-1": (ddp, zero, {}),
    "FSDP2, resharded after forward (ZeRO-3)": (fsdp, adamw, {}),
    "FSDP2, kept after forward (ZeRO-2)": (lambda m, mesh: fsdp(m, mesh, reshard_after_forward=False), adamw, {}),
    "FSDP2, accumulated": (fsdp, adamw, {"accumulate": 2}),
    "FSDP2, offloaded to the CPU": (
        lambda m, mesh: fsdp(m, mesh, offload_policy=CPUOffloadPolicy(pin_memory=False)),
        adamw,
        {},
    ),
}


def trained(mesh: DeviceMesh) -> dict[str, float]:
    """Return the distances of the parameters from those of one process, by way and spec.

    Of two meshes each does half, in which are every way and every spec.
    """
    found, rank, world = {}, mesh.get_local_rank(), mesh.size()
    meshes, this = dist.get_world_size() // world, dist.get_rank() // world
    for i, (spec, kind) in enumerate(KINDS.items()):
        one = made(spec, kind)
        expected = fit(one, adamw(trainable(one)), 0, 1)
        for j, (way, (wrap, optimizer, options)) in enumerate(WAYS.items()):
            if (i + j) % meshes != this:
                continue
            model = wrap(made(spec, kind), mesh)
            found[f"{way}; {kind} {spec}"] = far(
                expected, fit(model, optimizer(trainable(model), mesh), rank, world, **options)
            )
        alone = made(spec, kind)
        found[f"alone; {kind} {spec}"] = far(expected, fit(alone, adamw(trainable(alone)), rank, world))
    return found


def switched(mesh: DeviceMesh) -> dict[str, float]:
    """Fake quantization and the learning of scales come and go between steps."""
    found, rank, world = {}, mesh.get_local_rank(), mesh.size()
    spec = "int4:group:8:affine"
    one = made(spec, "qat")
    expected = fit(one, adamw(qat_parameters(one)), 0, 1, modes=True)
    for way, wrap in (
        ("DDP, unused looked for", lambda m: ddp(m, mesh, find_unused_parameters=True)),
        ("FSDP2", lambda m: fsdp(m, mesh)),
    ):
        model = wrap(made(spec, "qat"))
        found[way] = far(expected, fit(model, adamw(qat_parameters(model)), rank, world, modes=True))
    return found


def inference(mesh: DeviceMesh) -> dict[str, float]:
    """Each rank has a shard of the codes, gathers them for its batch, and multiplies as one process does."""
    found, x = {}, torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    for spec in SPECS:
        one, model = made(spec, "codes"), fsdp(made(spec, "codes"), mesh)
        found[spec] = far(one(x), model(x))
        codes = model[0].weight_codes  # type: ignore[index]
        assert codes.to_local().numel() < codes.numel()
    return found


class Tied(nn.Module):
    """A table whose rows the head multiplies by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table, self.middle, self.head = nn.Embedding(33, K), nn.Linear(K, K), nn.Linear(K, 33, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.middle(self.table(ids))))
        return y


def tied(mesh: DeviceMesh) -> dict[str, Any]:
    ids, found = torch.arange(12).view(3, 4), {}
    for spec in ("int8:row", "int4:group:8"):
        one, model = Tied(), Tied()
        for m in (one, model):
            quantize_(m, spec, types=(nn.Linear, nn.Embedding))
        fully_shard(model.middle, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[spec] = far(one(ids), model(ids))
        found[f"{spec}, one weight"] = float(model.table.weight_codes is not model.head.weight_codes)
    one, model = Tied(), Tied()
    for m in (one, model):
        prepare_qat_(m, "int8:row", types=(nn.Linear, nn.Embedding))
    fully_shard(model, mesh=mesh)
    for m in (one, model):
        optimizer = adamw(trainable(m))
        for _ in range(2):
            m(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    found["QAT"] = far(dict(one.named_parameters()), dict(model.named_parameters()))
    return found


def on_meta(mesh: DeviceMesh) -> dict[str, float]:
    """A skeleton is sharded first, then filled from what rank 0 has read."""
    found, x = {}, torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    for spec, kind in (("int8:row", "codes"), ("int4:group:8:affine", "lora"), ("int8:row", "qat")):
        one = made(spec, kind)
        if kind == "qat":
            one(x)
        with torch.device("meta"):
            model = made(spec, kind)
        fsdp(model, mesh).to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # every rank of the process group, of which the mesh may be a part, gets what rank 0 has
        set_model_state_dict(model, one.state_dict(), options=options)
        found[f"{kind} {spec}"] = far(one(x), model(x))
    return found


def mixed(mesh: DeviceMesh) -> dict[str, float]:
    """Adapters in bfloat16 beside frozen scales that stay float32, and a policy that would cast the scales."""
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(1))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model, one = made("int8:row", "lora"), made("int8:row", "lora").bfloat16()
    scales = {p for layer in model.modules() if isinstance(layer, QuantLinear) for p in (layer.weight_scale,)}
    fsdp(model, mesh, mp_policy=policy, ignored_params=scales)
    y = model(x)
    y.float().square().mean().backward()
    return {
        "bfloat16": float(y.dtype != torch.bfloat16),
        "y": far(y, one(x.bfloat16())),
        "gradients": float(not all(whole(p.grad).isfinite().all() for p in trainable(model))),
    }


def scales_cast(mesh: DeviceMesh) -> str:
    model = fsdp(made("int8:row", "lora"), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    try:
        model(torch.ones(2, K))
    except RuntimeError as error:
        return str(error)
    return "no error"


CASES = (trained, switched, inference, tied, on_meta, mixed, scales_cast)


def test_ranks_train_what_one_process_does(found: Callable[[Any], list[Any]]) -> None:
    of_ranks = found(trained)
    assert len({way for of_rank in of_ranks for way in of_rank}) == len(KINDS) * (len(WAYS) + 1)
    for of_rank in of_ranks:
        for way, error in of_rank.items():
            if way.startswith("alone"):
                assert error > 1e-2, (way, error)
            else:
                assert error <= (2e-5 if "qat" in way else 5e-6), (way, error)


def test_switches_between_steps(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(switched):
        assert max(of_rank.values()) <= 1e-4, of_rank


def test_inference_gives_the_same_bytes(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(inference):
        assert set(of_rank.values()) == {0.0}, of_rank


def test_tied_weights_stay_tied(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(tied):
        assert of_rank.pop("QAT") <= 1e-4
        assert set(of_rank.values()) == {0.0}, of_rank


def test_skeletons_are_filled(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(on_meta):
        assert set(of_rank.values()) == {0.0}, of_rank


def test_mixed_precision_leaves_scales_alone(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(mixed):
        assert of_rank == {"bfloat16": 0.0, "y": 0.0, "gradients": 0.0}
    for error in found(scales_cast):
        assert error.startswith("weight_scale must be float32 for int8:row, got bfloat16")
