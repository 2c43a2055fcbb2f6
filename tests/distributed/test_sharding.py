"""Every op on DTensors: each placement of its arguments gives what one process computes, or one error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import fresh
import pytest
import torch
from gloo import far, message, whole
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

from quantlib import backends, ops
from quantlib.ops.sharding import RULES, Matrix, refusal
from quantlib.spec import SEARCHES

slow = pytest.mark.slow
Call = tuple[str, list[Any]]  # overload, arguments
M, N, K = 8, 16, 64


def calls() -> Iterator[Call]:
    """One of every overload that returns its results, and more of those whose blocks differ."""
    g = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, M // 2, K, generator=g), torch.randn(2, M // 2, N, generator=g)
    flat, w = x.view(M, K), torch.randn(N, K, generator=g)
    yield "cast", [x, "bfloat16", False]
    for block in ((1, K), (1, 16), (M, K), (2, 16)):
        scale = ops.compute_scale(x, "int8", block)
        affine, zero = ops.compute_scale(x, "uint8", block, symmetric=False)
        yield "compute_scale", [x, "int8", block]
        yield "search_scale", [x, scale, "int8", block, "mse", "bfloat16", None, torch.arange(K) / K]
        yield "search_scale", [x, affine, "uint8", block, "magnitude", "float32", zero]
        yield "compute_scale.affine", [x, "uint8", block]
        yield "search_scale", [x, scale, "int8", block, SEARCHES[0], "float32", None, x.view(M, K).square().mean(0)]
        yield "quantize_dynamic", [x, "int4", block]
        yield "quantize_dynamic.affine", [x, "uint8", block]
        yield "quantize", [x, affine, "uint8", block, zero]
        yield "quantize", [x, ops.compute_scale(x, "int4", block), "int4", block]
        yield "dequantize", [ops.quantize(x, scale, "int8", block=block), scale, "int8", block]
        yield "dequantize", [ops.quantize(flat, scale, "int4", block=block), scale, "int4", block, None, torch.bfloat16]
        yield "fake_quantize", [x, scale, "int8", block]
        yield "fake_quantize", [x, affine, "uint8", block, zero.float()]
        yield "fake_quantize_backward", [x.flip(0), x, scale, "int8", block]
        yield "fake_quantize_backward.affine", [x.flip(0), x, affine, zero.float(), "uint8", block]
    # A CPU that multiplies pairs of BF16 splits a float32 x from 64 columns on (C11), the part of a rank or not: here
    # of 11 bits, of which the split loses none.
    x = x.half().float()
    ids = torch.tensor([[0, N - 1, 3, 1], [2, 2, 5, 0]])
    for format, block in (("int8", (1, K)), ("int4", (1, 16)), ("float8_e4m3fn", (N, K)), ("uint8", (4, 32))):
        affine = format == "uint8"
        codes, scale, *zero_point = ops.quantize_dynamic(w, format, block=block, symmetric=not affine)
        z = zero_point[0] if affine else None
        weight = [codes, scale, format, block, z]
        yield "dequantize_rows", [ids, *weight]
        yield "dequantize_rows", [ids, *weight, torch.bfloat16, K]
        yield "dequant_matmul", [x, *weight, torch.randn(N, generator=g)]
        yield "dequant_matmul", [x, *weight, None, "relu"]
        yield "dequant_matmul_backward", [dy, *weight]
        yield "dequant_matmul_backward", [dy, *weight, K]
        yield "dequant_matmul_backward_scale", [dy, x, *weight]
        if format in ("int8", "int4"):
            yield "dynamic_matmul", [x, *weight, torch.randn(N, generator=g)]
            rows = ops.quantize_dynamic(x, "int8", block=(1, K))
            yield "scaled_matmul", [*rows, *weight[:4], None, z, torch.randn(N, generator=g)]
    codes, scale = ops.quantize_dynamic(w, "int8", block=(1, K))
    yield "dequant_matmul.tiled", [x, ops.tile(codes, "int8"), scale, "int8", (1, K), N]


def op_of(overload: str) -> Any:
    name, _, kind = overload.partition(".")
    return getattr(getattr(torch.ops.quantlib, name), kind or "default")


def placed(args: list[Any], mesh: DeviceMesh) -> Iterator[list[Any]]:
    """``args`` as DTensors: all of them whole, and each of them cut along each axis."""
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    for cut, dim in ((None, 0), *((i, dim) for i in tensors for dim in range(args[i].dim()))):
        yield [
            distribute_tensor(a, mesh, [Shard(dim) if i == cut else Replicate()], src_data_rank=None)
            if i in tensors
            else a
            for i, a in enumerate(args)
        ]


def every_op(mesh: DeviceMesh) -> dict[str, tuple[float, int, int]]:
    """Return for each overload the largest relative difference to one process, results not whole, and all results."""
    found: dict[str, tuple[float, int, int]] = {}
    for overload, args in calls():
        expected = op_of(overload)(*args)
        for given in placed(args, mesh):
            try:
                results = op_of(overload)(*given)
            except RuntimeError as error:  # gloo gathers no FP8
                if "Invalid scalar type" in str(error) or "must be cut between" in str(error):
                    continue
                raise
            pairs = list(zip(results, expected, strict=True)) if isinstance(results, tuple) else [(results, expected)]
            error = max(far(got, want) / max(1.0, float(want.float().abs().max())) for got, want in pairs)
            cut = sum(not got.placements[0].is_replicate() for got, _ in pairs)
            worst, cuts, n = found.get(overload, (0.0, 0, 0))
            found[overload] = max(worst, error), cuts + cut, n + len(pairs)
    return found


def columns_and_rows(mesh: DeviceMesh) -> dict[str, Any]:
    """Placements of products: columns give a part of the result, rows a sum, a dynamic scale needs whole rows."""
    n, found = mesh.size(), {}
    x, w = torch.randn(M, 16 * n), torch.randn(4 * n, 16 * n)
    codes, scale = ops.quantize_dynamic(w, "int4", block=(1, 16))
    d = lambda t, *p: distribute_tensor(t, mesh, list(p))  # noqa: E731
    everywhere = Replicate()
    y = ops.dequant_matmul(d(x, everywhere), d(codes, Shard(0)), d(scale, Shard(0)), "int4", block=(1, 16))
    found["columns"] = y.placements[0] == Shard(1)
    y = ops.dequant_matmul(d(x, Shard(1)), d(codes, Shard(1)), d(scale, Shard(1)), "int4", block=(1, 16))
    found["rows"] = y.placements[0] == Partial()
    y = ops.dequant_matmul(d(x, Shard(0)), d(codes, everywhere), d(scale, everywhere), "int4", block=(1, 16))
    found["batch"] = y.placements[0] == Shard(0)
    y = ops.dynamic_matmul(d(x, Shard(1)), d(codes, everywhere), d(scale, everywhere), "int4", block=(1, 16))
    found["dynamic"] = y.placements[0] != Partial()
    bad, at = ops.quantize_dynamic(w, "int4", block=(1, 24))
    found["block"] = message(
        lambda: ops.dequant_matmul(d(x, Shard(1)), d(bad, Shard(1)), d(at, everywhere), "int4", block=(1, 24))
    )
    odd, s = ops.quantize_dynamic(torch.randn(4 * n, 3 * n), "int4", block=(1, 3 * n))
    found["byte"] = message(
        lambda: ops.dequant_matmul(
            d(torch.randn(2, 3 * n), Shard(1)), d(odd, Shard(1)), d(s, everywhere), "int4", block=(1, 3 * n)
        )
    )
    return found


def blocks_of_calls(mesh: DeviceMesh) -> bool:
    """Calls that differ in a block, a format or a dtype alone do not share placements or dtypes."""
    x = distribute_tensor(torch.randn(4, 64), mesh, [Shard(1)])
    first = [ops.compute_scale(x, "int8", (1, b)) for b in (16, 17)]
    codes = ops.quantize(x, first[0], "int8", block=(1, 16))
    second = [ops.dequantize(codes, first[0], "int8", block=(1, 16), dtype=t) for t in (torch.float32, torch.bfloat16)]
    return (
        first[0].placements[0] == Shard(1)
        and first[1].placements[0].is_replicate()
        and [t.dtype for t in second] == [torch.float32, torch.bfloat16]
        and far(ops.compute_scale(whole(x), "int8", (1, 17)), first[1]) == 0
    )


CASES = (every_op, columns_and_rows, blocks_of_calls)


def test_rules_are_of_overloads() -> None:
    assert set(RULES) <= {name for name in backends.SCHEMAS if not name.endswith("out")}


@slow
def test_ops_give_what_one_process_gives(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(every_op):
        assert RULES.keys() <= of_rank.keys()
        for overload, (error, cut, results) in of_rank.items():
            sums = overload.startswith(("dequant_matmul", "scaled_matmul", "fake_quantize_backward"))
            assert error <= (1e-6 if sums else 0), (overload, error)
            assert results > 2, overload
            assert bool(cut) == (overload in RULES), overload


@slow
def test_products_follow_their_cuts(found: Callable[[Any], list[Any]]) -> None:
    for of_rank in found(columns_and_rows):
        assert all(of_rank[name] for name in ("columns", "rows", "batch", "dynamic")), of_rank
        assert of_rank["block"].startswith("quantlib::dequant_matmul: codes must be cut between blocks of 24 columns, ")
        assert "16 each: cut rows (ColwiseParallel)" in of_rank["block"]
        assert of_rank["byte"].startswith("quantlib::dequant_matmul: codes must be cut between bytes of 2 codes, got ")


@slow
def test_calls_do_not_share_placements(found: Callable[[Any], list[Any]]) -> None:
    assert all(found(blocks_of_calls))


@pytest.mark.parametrize(
    ("shape", "block", "per_byte", "dim", "parts", "axis"),
    [
        ((8, 64), (1, 64), 1, 0, 4, 0),
        ((8, 64), (1, 64), 1, 1, 4, -1),
        ((8, 64), (1, 16), 2, 1, 4, 1),
        ((8, 64), (1, 32), 2, 1, 4, None),  # a group is cut
        ((8, 12), (1, 12), 2, 1, 4, None),  # 3 columns each: a byte is cut
        ((8, 12), (1, 12), 1, 1, 4, -1),
        ((8, 7), (1, 7), 2, 1, 2, None),  # the last byte holds one code
        ((33, 64), (1, 64), 1, 0, 4, 0),
        ((33, 64), (16, 16), 1, 0, 2, None),
        ((48, 64), (16, 16), 1, 0, 3, 0),
        ((2, 4, 64), (1, 64), 1, 0, 2, 0),
        ((3, 4, 64), (1, 64), 1, 0, 2, None),  # 2 of 3 sequences are 8 of 12 rows, torch.chunk of 12 rows gives 6
        ((2, 4, 64), (1, 64), 1, 1, 2, None),
        ((1, 4, 64), (1, 64), 1, 1, 2, 0),
        ((2, 4, 64), (8, 64), 1, 1, 2, -1),
    ],
)
def test_scales_are_cut_with_their_blocks(
    shape: tuple[int, ...], block: tuple[int, int], per_byte: int, dim: int, parts: int, axis: int | None
) -> None:
    assert Matrix(shape, block, per_byte).scale(dim, parts) == axis
    if len(shape) == 2:
        assert (refusal(Matrix(shape, block, per_byte), dim, parts) is None) == (axis is not None)


def test_a_refusal_says_what_to_do() -> None:
    assert refusal(Matrix((64, 96), (1, 16), 2), 1, 4) == (
        "cut between blocks of 16 columns",
        (
            "96 columns over 4 ranks, 24 each: cut rows (ColwiseParallel), or use 3 ranks, "
            "or quantize with blocks that divide 24, or leave the layer whole"
        ),
    )


def test_rules_come_with_dtensor_and_not_before() -> None:
    """An import of quantlib does not import DTensor, which takes longer; whichever comes first, there are rules."""
    code = (
        "import sys, torch, quantlib\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"
        "import torch.distributed as dist\n"
        "from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "x = distribute_tensor(torch.ones(2, 4), init_device_mesh('cpu', (1,)), [Shard(0)])\n"
        "print(quantlib.quantize_dynamic(x, 'int8', block=(1, 4))[0].placements)\n"
    )
    done = fresh.run(["-c", code])
    assert done.stdout.startswith("(Shard(dim=0),)"), done.stderr
