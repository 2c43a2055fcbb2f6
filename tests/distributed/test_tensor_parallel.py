"""Layers of codes, LoRA and QAT layers, tables and experts cut over ranks compute and train as in one process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import far, message, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, parallel
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

from quantlib import prepare_qat_, quantize_
from quantlib.distributed import ColwiseParallel, ExpertParallel, RowwiseParallel
from quantlib.nn import LoRALinear
from quantlib.nn.forms import TransposedLinear

pytestmark = pytest.mark.slow

# A scale for each row, for all, for groups of packed codes, for tiles; in 16 bits; with zero points; FP8 and a code
# book; inputs that are quantized with a scale for each row, for all and for groups; and a cast.
SPECS = (
    "int8:row",
    "int8:tensor",
    "int4:group:16",
    "int4:group:16:affine",
    "int8:tile:16",
    "nf4_bf16:group:16:bfloat16",
    "float8_e4m3fn:row",
    "int8:row@int8:row",
    "int4:group:16@int8:row",
    "int8:row@int8:tensor",
    "int8:row@uint8:row:affine",
    "int8:row@float8_e4m3fn:group:16",
    "bfloat16",
)
TRAINED = (
    "int8:row",
    "int4:group:16:affine",
    "int8:tile:16",
    "int8:row@int8:row",
    "int8:row@int8:tensor:static",
    "int8:row@uint8:tensor:affine:static",
)
# A CPU that multiplies pairs of BF16 splits a float32 x from 64 columns on (C11): every rank has as many, and does too.
K, INNER, N = 64, 256, 96


def layers(prepare: Callable[[nn.Module], object]) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(K, INNER), nn.GELU(), nn.Linear(INNER, N))
    prepare(model)
    return model


def quantized(spec: str) -> nn.Sequential:
    return layers(lambda model: quantize_(model, spec))


def adapted(spec: str) -> nn.Sequential:
    model = quantized(spec)
    for name in ("0", "2"):
        setattr(model, name, adapter := LoRALinear(getattr(model, name), 4))
        nn.init.normal_(adapter.b, std=0.1)
    return model


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def own() -> dict[str, Any]:
    return {"0": ColwiseParallel(), "2": RowwiseParallel()}


def of_torch() -> dict[str, Any]:
    return {"0": parallel.ColwiseParallel(), "2": parallel.RowwiseParallel()}


def trained(one: nn.Module, cut: nn.Module, steps: int, x: torch.Tensor) -> dict[str, float]:
    """Return the distances of results, gradients of x and parameters from those of one process."""
    found: dict[str, float] = {"y": 0.0, "dx": 0.0}
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (one, cut)]
    for _ in range(steps):
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        ys = [model(own) for model, own in zip((one, cut), inputs, strict=True)]
        for y, optimizer in zip(ys, optimizers, strict=True):
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found["y"] = max(found["y"], far(*ys))
        found["dx"] = max(found["dx"], far(*(a.grad for a in inputs)))
    names = dict(cut.named_parameters())
    found["parameters"] = far(dict(one.named_parameters()), names)
    found["kept"] = max(whole(p).nbytes / p.to_local().nbytes for p in names.values() if p.numel() > N)
    return found


def products(mesh: DeviceMesh) -> dict[str, dict[str, float]]:
    return {
        f"{spec} {plan.__name__}": trained(
            quantized(spec), parallelize_module(quantized(spec), mesh, plan()), 1, batch(2, 3, K)
        )
        for spec in SPECS
        for plan in ((own, of_torch) if spec in SPECS[:4] else (own,))
    }


def adapters(mesh: DeviceMesh) -> dict[str, dict[str, float]]:
    return {
        spec: trained(adapted(spec), parallelize_module(adapted(spec), mesh, own()), 3, batch(5, K))
        for spec in ("int8:row", "int4:group:16", "int8:row@int8:row")
    }


def qat(mesh: DeviceMesh) -> dict[str, dict[str, float]]:
    def prepared(spec: str) -> nn.Sequential:
        return layers(lambda model: prepare_qat_(model, spec))

    return {
        spec: trained(prepared(spec), parallelize_module(prepared(spec), mesh, own()), 3, batch(2, 3, K))
        for spec in TRAINED
    }


def tables(mesh: DeviceMesh) -> dict[str, float]:
    """Make a table of 40 rows, which both ways of cutting look up without gathering them."""
    ids, found = torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(3)), {}
    for spec in ("int8:row", "int4:group:8:affine", "float8_e4m3fn:row", "int8:tensor"):
        for style in (ColwiseParallel, RowwiseParallel, parallel.ColwiseParallel, parallel.RowwiseParallel):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Embedding(40, 64))
            quantize_(model, spec, types=(nn.Embedding,))
            expected = model(ids)
            whole_rows = {"input_layouts": Replicate(), "output_layouts": Replicate()}
            found[f"{spec} {style}"] = far(parallelize_module(model, mesh, {"0": style(**whole_rows)})(ids), expected)
    return found


def sequence(mesh: DeviceMesh) -> dict[str, float]:
    """A norm on a part of each sequence, then W8A8 and its inverse on all of it, whose sums are scattered again."""

    def block() -> nn.Sequential:
        torch.manual_seed(4)
        model = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, INNER), nn.GELU(), nn.Linear(INNER, K), nn.LayerNorm(K))
        quantize_(model, "W8A8")
        return model

    plan = {
        "0": SequenceParallel(),
        "1": ColwiseParallel(input_layouts=Shard(1)),
        "3": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "4": SequenceParallel(),
    }
    n, rank = mesh.size(), mesh.get_local_rank()
    x = batch(2, 4 * n, K)
    y = parallelize_module(block(), mesh, plan)(x.chunk(n, 1)[rank])
    return {"sequence": far(y, block()(x)), "part": y.to_local().shape[1] / (4 * n)}


def transposed(mesh: DeviceMesh) -> float:
    from transformers.pytorch_utils import Conv1D

    def made() -> nn.Sequential:
        torch.manual_seed(4)
        model = nn.Sequential(Conv1D(INNER, K), nn.GELU(), Conv1D(N, INNER))
        quantize_(model, "int4:group:16", types=(Conv1D,))
        assert isinstance(model[0], TransposedLinear)
        return model

    x = batch(5, K)
    return far(parallelize_module(made(), mesh, own())(x), made()(x))


def experts(mesh: DeviceMesh) -> dict[str, float]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "nn"))
    from test_experts import inputs, made

    from quantlib.nn.experts import QuantExperts

    found = {}
    for spec in ("int8:row", "int4:group:16", "W8A8"):
        one, cut = (
            QuantExperts.from_float(made("transformers.models.mixtral.modeling_mixtral", "MixtralExperts"), spec)
            for _ in range(2)
        )
        cut = parallelize_module(cut, mesh, ExpertParallel())
        args = [[a.clone().requires_grad_(a.is_floating_point()) for a in inputs(one)] for _ in range(2)]
        ys = [model(*a) for model, a in zip((one, cut), args, strict=True)]
        for y in ys:
            y.square().sum().backward()
        found[spec] = far(*ys)
        found[f"{spec}, gradients"] = max(far(args[0][i].grad, args[1][i].grad) for i in (0, 2))
        codes = cut.gate_up_proj_codes
        found["kept"] = codes.numel() / codes.to_local().numel()
    return found


def nan_in_a_row(mesh: DeviceMesh) -> list[bool]:
    """NaN in one rank's part of a row of inputs makes the row NaN, and no other one."""
    model = parallelize_module(quantized("int8:row@int8:row"), mesh, own())
    last = model[2]
    found = []
    for column in (0, INNER - 1):
        x = batch(3, INNER)
        x[1, column] = float("nan")
        part = x.chunk(mesh.size(), 1)[mesh.get_local_rank()]
        y = last(part)
        found.append(bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all()))
    return found


def refused(mesh: DeviceMesh) -> list[str]:
    odd, group = nn.Sequential(nn.Linear(6 * mesh.size() // 2, 8)), nn.Sequential(nn.Linear(24 * mesh.size(), 32))
    quantize_(odd, "int4:row")
    trained = nn.Sequential(nn.Linear(24 * mesh.size(), 32))
    prepare_qat_(trained, "int4:group:16")
    quantize_(group, "int4:group:16")
    models = (odd, group, trained)
    return [message(functools.partial(parallelize_module, m, mesh, {"0": RowwiseParallel()})) for m in models]


def unsynchronized(mesh: DeviceMesh) -> float:
    """Compute what a rank alone makes of its columns, to see that the bounds of this file tell it apart."""
    model = parallelize_module(quantized("int8:row"), mesh, {"0": ColwiseParallel()})
    y = model[0](x := batch(5, K))
    one = quantized("int8:row")[0](x)
    return far(one, torch.cat([y] * mesh.size(), 1))


CASES = (
    products,
    adapters,
    qat,
    tables,
    sequence,
    transposed,
    experts,
    nan_in_a_row,
    refused,
    unsynchronized,
)


@pytest.mark.parametrize(("case", "bound"), [(products, 1e-6), (adapters, 5e-6), (qat, 2e-3)])
def test_layers_compute_and_train_as_in_one_process(found: Callable[[Any], list[Any]], case: Any, bound: float) -> None:
    """Sums in another order may move a value to the next code in QAT."""
    for of_rank in found(case):
        for spec, errors in of_rank.items():
            assert errors["y"] <= bound, (spec, errors)
            assert errors["dx"] <= 1e-6, (spec, errors)
            assert errors["parameters"] <= bound, (spec, errors)
            assert errors["kept"] >= 2, (spec, errors)


def test_tables_look_up_the_same_bytes(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(tables):
        assert set(of_rank.values()) == {0.0}, of_rank


def test_sequences_are_cut(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(sequence):
        assert of_rank["sequence"] <= 1e-5
        assert of_rank["part"] <= 0.5


def test_conv1d_of_transformers(found: Callable[[Any], list[Any]]) -> None:
    assert max(found(transposed)) <= 1e-6


def test_experts_are_dealt_out(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(experts):
        assert of_rank.pop("kept") >= 2
        assert max(of_rank.values()) <= 1e-5, of_rank


def test_nan_reaches_its_row_from_every_rank(found: Callable[[Any], list[Any]]) -> None:
    assert all(all(of_rank) for of_rank in found(nan_in_a_row))


def test_cuts_through_bytes_and_groups_are_refused(found: Callable[[Any], list[Any]]) -> None:
    for odd, group, qat_group in found(refused):
        assert odd.startswith("weight must be cut between bytes of 2 codes, got ")
        assert group.startswith("weight must be cut between blocks of 16 columns, got ")
        assert "24 each: cut rows (ColwiseParallel), or " in group
        assert qat_group == group


def test_the_bounds_bite(found: Callable[[Any], list[Any]]) -> None:
    assert min(found(unsynchronized)) > 0.1
