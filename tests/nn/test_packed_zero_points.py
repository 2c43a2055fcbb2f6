"""Zero points are kept as codes are, two of int4 to a byte; what older versions kept as int32 loads as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quantlib import QuantSpec, backends, ops, use_backend
from quantlib.backends.packing import kept_zero_points, wide_zero_points
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.checkpoint.files import Reader, Slot, whole, write
from quantlib.nn import QuantConv2d, QuantEmbedding, QuantLinear

N, K = 12, 72
SPECS = ("int4:group:8:affine:bfloat16", "int4:row:affine", "int8:group:24:affine", "uint8:tile:8:affine")
BACKENDS = [name for name in ("cpp", "composite") if backends.refuses(name, "cpu") is None]


def layer(spec: str, seed: int = 0) -> QuantLinear:
    torch.manual_seed(seed)
    return QuantLinear.from_float(nn.Linear(K, N), spec)


def int32_of(module: QuantLinear) -> Tensor:
    """The zero points of ``module`` as older versions have them."""
    kept, scale = module.weight_zero_point, module.weight_scale
    assert kept is not None
    assert scale is not None
    return wide_zero_points(kept.data, module.spec.row, scale.shape[1])


def test_a_group_of_64_takes_five_sixteenths_of_a_bit_more() -> None:
    spec = QuantSpec.parse("int4:group:64:affine:bfloat16")
    assert spec.nbytes((128, 256)) * 8 == 128 * 256 * (4 + 16 / 64 + 4 / 64)
    module = QuantLinear.from_float(nn.Linear(256, 128, bias=False), spec)
    assert sum(p.nbytes for p in module.parameters()) == spec.nbytes((128, 256))


@pytest.mark.parametrize("spec", SPECS)
def test_kept_zero_points_are_those_of_the_op(spec: str) -> None:
    torch.manual_seed(0)
    x, parsed = torch.randn(N, K) + 0.3, QuantSpec.parse(spec)
    module = QuantLinear.from_float(with_weight(x), spec)
    block = parsed.block(x.shape)
    expected = ops.compute_scale(x, parsed.format, block=block, symmetric=False)[1]
    assert torch.equal(int32_of(module), expected)
    assert len(expected.unique()) > 3
    assert module.weight_zero_point is not None
    assert module.weight_zero_point.nbytes == expected.shape[0] * parsed.row.columns(expected.shape[1])


def with_weight(x: Tensor) -> nn.Linear:
    linear = nn.Linear(x.shape[1], x.shape[0])
    linear.weight.data.copy_(x)
    return linear


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_op_takes_both_forms(spec: str, backend: str) -> None:
    module, x = layer(spec), torch.randn(5, K)
    given = module.codes, module.weight_scale.detach(), module.spec.format  # type: ignore[union-attr]
    kept, wide = module.weight_zero_point, int32_of(module)
    calls = (
        lambda z: ops.dequantize(given[0], *given[1:], block=module.block, zero_point=z, size=K),
        lambda z: ops.dequant_matmul(x[:1], *given, block=module.block, zero_point=z),
        lambda z: ops.dequant_matmul(x, *given, block=module.block, zero_point=z),
        lambda z: ops.dynamic_matmul(x, *given, block=module.block, zero_point=z),
        lambda z: ops.quantize(torch.randn(N, K), *given[1:], block=module.block, zero_point=z),
        lambda z: torch.ops.quantlib.dequant_matmul_backward(torch.ones(3, N), *given, module.block, z, K),
        lambda z: ops.search_scale(torch.randn(N, K), *given[1:], block=module.block, zero_point=z),
    )
    for call in calls:
        with use_backend(backend):
            results = []
            for z in (kept, wide):
                torch.manual_seed(1)
                results.append(call(z))  # type: ignore[no-untyped-call]
            assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_points_of_another_shape_are_refused(backend: str) -> None:
    codes, scale, z = torch.zeros(4, 8, dtype=torch.uint8), torch.ones(4, 4), torch.zeros(4, 3, dtype=torch.uint8)
    said = r"zero_point must be uint8 \[4, 2\] on cpu, got uint8 \[4, 3\] on cpu"
    with use_backend(backend), pytest.raises(RuntimeError, match=said):
        ops.dequant_matmul(torch.ones(1, 16), codes, scale, "int4", block=(1, 4), zero_point=z)


@pytest.mark.parametrize("spec", SPECS)
def test_a_state_of_an_older_version_loads(spec: str) -> None:
    module = layer(spec)
    state = module.state_dict()
    assert state._metadata[""]["version"] == 3
    state["weight_zero_point"] = int32_of(module)
    state._metadata[""]["version"] = 2
    into = layer(spec, seed=1)
    into.load_state_dict(state)
    assert torch.equal(into.weight_zero_point, module.weight_zero_point)  # type: ignore[arg-type]
    assert torch.equal(into.values(), module.values())


def test_a_symmetric_state_is_of_the_version_that_older_ones_read() -> None:
    assert layer("int4:group:8").state_dict()._metadata[""]["version"] == 2


@pytest.mark.parametrize("spec", SPECS)
def test_a_file_of_an_older_version_loads(spec: str, tmp_path: Path) -> None:
    model = nn.Sequential(layer(spec))
    path, old = tmp_path / "new.safetensors", tmp_path / "old.safetensors"
    save_quantized(model, path)
    with Reader(path) as reader:
        tensors = {name: reader.read(name) for name in reader.slots}
        entry = json.loads(reader.metadata["quantlib"])
    assert entry["version"] == 3
    tensors["0.weight_zero_point"] = int32_of(model[0])
    batches = [whole([Slot(n, t.dtype, tuple(t.shape))], lambda t=t: [t]) for n, t in tensors.items()]
    write(old, batches, {"quantlib": json.dumps(entry | {"version": 1})})
    for skeleton in (nn.Sequential(nn.Linear(K, N)), nn.Sequential(layer(spec, seed=1))):
        load_quantized(skeleton, old)
        assert torch.equal(skeleton[0].weight_zero_point, model[0].weight_zero_point)
        assert torch.equal(skeleton[0].values(), model[0].values())


def test_embeddings_and_convolutions_keep_them_too() -> None:
    torch.manual_seed(0)
    table, conv = nn.Embedding(10, K), nn.Conv2d(8, 6, 3)
    embedding = QuantEmbedding.from_float(table, "int4:group:8:affine")
    ids = torch.tensor([[3, 0], [9, 3]])
    assert torch.equal(embedding(ids), embedding.values()[ids])
    quantized = QuantConv2d.from_float(conv, "int4:group:8:affine")
    assert quantized.weight_zero_point is not None
    assert quantized.weight_zero_point.dtype == torch.uint8
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(quantized(x), quantized.dequantize()(x))


def test_one_outside_the_codes_becomes_the_nearest() -> None:
    row = QuantSpec.parse("int4").row
    z = torch.tensor([[-9, 8, 3]], dtype=torch.int32)
    assert wide_zero_points(kept_zero_points(z, row), row, 3).tolist() == [[-8, 7, 3]]
