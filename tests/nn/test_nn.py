"""QuantLinear: what it computes, what it keeps through every way a module is moved, copied, saved and compiled."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import quantlib
from quantlib import quantize_, reference
from quantlib.nn import QuantLinear
from quantlib.nn.functional import project
from quantlib.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("device")

N, K = 12, 35
SPECS = (
    "float16",
    "bfloat16",
    "float16:row",
    "float8_e4m3fn",
    "float8_e5m2:tensor",
    "float4_e2m1fn:group:16",
    "int8",
    "int8:tile:8",
    "uint8",
    "int4:group:8",
    "int4:row:affine",
    "W8A8",
    "int8@uint8:tensor",
)


def linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(K, N, bias, dtype=dtype)


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(torch.uint8)


def same(a: nn.Module, b: nn.Module) -> bool:
    """The same parameters, byte for byte."""
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype and torch.equal(bits(left[n]), bits(right[n])) for n in left
    )


@pytest.mark.parametrize("words", SPECS)
def test_parameters_are_the_reference_bytes(words: str) -> None:
    spec, source = QuantSpec.parse(words), linear()
    q = QuantLinear.from_float(source, spec)
    x = source.weight.detach().numpy()
    if not spec.scaled:
        expected = [reference.cast(x, spec.format)]
    else:
        block = spec.block(x.shape)
        expected = [*reference.quantize_dynamic(x, spec.format, block=block, symmetric=spec.symmetric is True)]
        if not spec.symmetric:  # kept as codes
            expected[2] = (
                reference.pack(expected[2], spec.row) if spec.row.packed else expected[2].astype(spec.row.storage)
            )
    for parameter, array in zip((q.weight_codes, q.weight_scale, q.weight_zero_point), expected, strict=False):
        assert parameter is not None
        assert not parameter.requires_grad
        np.testing.assert_array_equal(bits(parameter).numpy(), np.ascontiguousarray(array).view(np.uint8))
    assert (q.weight_scale is None, q.weight_zero_point is None) == (not spec.scaled, spec.symmetric)
    assert sum(p.numel() * p.element_size() for n, p in q.named_parameters() if n != "bias") == spec.nbytes((N, K))
    assert q.bias is source.bias
    assert q.bias.requires_grad


@pytest.mark.parametrize("words", SPECS)
@pytest.mark.parametrize("shape", [(5, K), (K,), (2, 3, K), (0, K), (2, 0, K)])
def test_forward_is_that_of_the_dequantized_layer(words: str, shape: tuple[int, ...]) -> None:
    q = QuantLinear.from_float(linear(), words)
    x = torch.randn(shape)
    projected = x if q.spec.activation is None else project(x, q.spec.activation)
    torch.testing.assert_close(q(x), q.dequantize()(projected), rtol=2e-5, atol=2e-5)
    assert q(x).shape == (*shape[:-1], N)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("words", SPECS)
def test_forward_follows_the_dtype_of_its_input(words: str, dtype: torch.dtype) -> None:
    q = QuantLinear.from_float(linear(), words)
    y = q(torch.randn(4, K, dtype=dtype))
    assert y.dtype == dtype
    assert torch.isfinite(y).all()


def test_forward_refuses_an_integer_input() -> None:
    with pytest.raises(RuntimeError, match=r"input must be float32, bfloat16, float16 or float64 .*, got int8"):
        QuantLinear.from_float(linear(), "int8")(torch.ones(2, K, dtype=torch.int8))


@pytest.mark.parametrize("words", ["int8", "W8A8", "float16"])
def test_gradients(words: str) -> None:
    q = QuantLinear.from_float(linear(), words)
    x = torch.randn(5, K, requires_grad=True)
    dy = torch.randn(5, N)
    q(x).backward(dy)
    torch.testing.assert_close(x.grad, dy @ q.values())  # with an activation: straight through its projection
    torch.testing.assert_close(q.bias.grad, dy.sum(0))
    assert q.weight_codes.grad is None


def test_an_activation_is_projected_row_by_row() -> None:
    x = torch.randn(3, K) * torch.tensor([[1e-3], [1.0], [1e3]])
    y = project(x, QuantSpec.parse("int8"))
    codes, scale = reference.quantize_dynamic(x.numpy(), "int8", block=(1, K))
    np.testing.assert_array_equal(y.numpy(), reference.dequantize(codes, scale, "int8", block=(1, K)).view(np.float32))


@pytest.mark.parametrize("words", SPECS)
@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "float"])
def test_casting_the_module_leaves_codes_and_scales(words: str, cast: str) -> None:
    source = linear()
    q, kept = QuantLinear.from_float(source, words), QuantLinear.from_float(copy.deepcopy(source), words)
    getattr(nn.Sequential(q), cast)()
    expected = getattr(torch.zeros(1), cast)().dtype
    assert q.bias.dtype == expected
    assert q.dtype == expected
    assert q.dequantize().weight.dtype == expected
    q.bias = kept.bias
    assert same(q, kept)


def test_moving_the_module_moves_everything() -> None:
    q = QuantLinear.from_float(linear(), "int4:group:8:affine")
    dtypes = {n: p.dtype for n, p in q.named_parameters()}
    assert {p.device.type for p in q.to("meta", torch.bfloat16).parameters()} == {"meta"}
    assert {n: p.dtype for n, p in q.named_parameters()} == dtypes | {"bias": torch.bfloat16}
    assert not any(p.requires_grad for n, p in q.named_parameters() if n != "bias")


@pytest.mark.parametrize("words", ["int8", "float8_e4m3fn"])
def test_a_scale_that_is_not_float32_is_refused(words: str) -> None:
    q = QuantLinear.from_float(linear(), words)
    assert q.weight_scale is not None
    with pytest.raises(TypeError, match="data of a scale must be float32, got bfloat16"):
        q.weight_scale.data = q.weight_scale.data.bfloat16()  # what a mixed-precision policy does
    q._parameters["weight_scale"] = nn.Parameter(q.weight_scale.data.bfloat16())
    with pytest.raises(RuntimeError, match=r"weight_scale must be float32 for .*, got bfloat16"):
        q(torch.randn(2, K))


@pytest.mark.parametrize("words", SPECS)
def test_copy_and_save(words: str, tmp_path: Path) -> None:
    q = QuantLinear.from_float(linear(), words)
    assert same(copy.deepcopy(q), q)
    assert same(pickle.loads(pickle.dumps(q)), q)
    torch.save(q, tmp_path / "module.pt")
    assert same(torch.load(tmp_path / "module.pt", weights_only=False), q)
    safetensors.torch.save_file(q.state_dict(), tmp_path / "state.safetensors")
    torch.save(q.state_dict(), tmp_path / "state.pt")
    states = (
        q.state_dict(),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
        torch.load(tmp_path / "state.pt"),
    )
    for state in states:
        with torch.device("meta"):
            new = QuantLinear(K, N, spec=words)
        new.load_state_dict(state, assign=True)
        assert same(new.to(q.weight_codes.device), q)
        assert not new.weight_codes.requires_grad
        new = QuantLinear(K, N, spec=words)
        new.load_state_dict(state)
        assert same(new, q)


@pytest.mark.parametrize("words", SPECS)
@pytest.mark.parametrize("strict", [True, False])
def test_a_float_layer_cannot_load_codes(words: str, strict: bool) -> None:
    with pytest.raises(RuntimeError, match="weight must be a float weight, got codes: quantize_ the model"):
        linear().load_state_dict(QuantLinear.from_float(linear(), words).state_dict(), strict=strict)


@pytest.mark.parametrize("words", SPECS)
def test_a_state_of_version_1_loads(words: str) -> None:
    """Its codes are called weight, have one axis more where they need a scale, and FP8 has its own dtype."""
    q = QuantLinear.from_float(linear(), words)
    old = {name: tensor for name, tensor in q.state_dict().items() if name != "weight_codes"}
    for codes in (q.codes.detach().unsqueeze(-1), q.codes.detach()):
        if q.spec.scaled or codes.dim() == 2:
            fresh = QuantLinear(K, N, spec=words)
            fresh.load_state_dict(old | {"weight": codes})
            assert same(fresh, q)


@pytest.mark.parametrize(
    ("into", "message"),
    [
        ("uint8", "weight_codes must be uint8 for uint8:row:affine, got int8"),
        ("float8_e4m3fn", "weight_codes must be uint8 for float8_e4m3fn:row, got int8"),
        ("int8:group:8", "size mismatch for weight_scale"),
        ("int8:affine", "Missing key.*weight_zero_point"),
    ],
)
def test_codes_of_another_spec_are_refused(into: str, message: str) -> None:
    state = dict(QuantLinear.from_float(linear(), "int8").state_dict())  # as a file gives them, without metadata
    with pytest.raises(RuntimeError, match=message):
        QuantLinear(K, N, spec=into).load_state_dict(state)


def test_metadata_of_the_state_is_checked() -> None:
    state = QuantLinear.from_float(linear(), "int4:group:8").state_dict()
    with pytest.raises(RuntimeError, match="weight must be codes of float4_e2m1fn:group:8, got int4:group:8"):
        QuantLinear(K, N, spec="float4_e2m1fn:group:8").load_state_dict(state)
    QuantLinear(K, N, spec="int4:group:8@int8").load_state_dict(state)  # an activation leaves the codes as they are
    state._metadata[""]["version"] = 4
    with pytest.raises(RuntimeError, match="version 3 or older, got version 4"):
        QuantLinear(K, N, spec="int4:group:8").load_state_dict(state)


def test_a_state_without_metadata_says_once_what_it_is_taken_for(tmp_path: Path) -> None:
    """Formats of four bits have equal dtypes and shapes: without the metadata nobody can tell them apart."""
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(N, N))
    quantize_(model, "int4:group:8")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(torch.load(tmp_path / "state.pt"))
        model.load_state_dict({"0.bias": torch.zeros(N)}, strict=False)
    for again in (dict(model.state_dict()), {name: t.clone() for name, t in model.state_dict().items()}):
        with pytest.warns(UserWarning, match="no metadata .* taken for int4:group:8: torch.save") as found:
            model.load_state_dict(again)
        assert len({str(warning.message) for warning in found}) == 1  # which Python prints once


def test_float_weights_and_other_scales_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"weight must be codes of int8:row, got float32 \[12, 35\]: load floats into the float"
    ):
        QuantLinear(K, N, spec="int8").load_state_dict(linear().state_dict(), strict=False)
    state = QuantLinear.from_float(linear(), "int8").state_dict()
    state["weight_scale"] = state["weight_scale"].half()
    with pytest.raises(RuntimeError, match=r"weight_scale must be float32 for int8:row, got float16"):
        QuantLinear(K, N, spec="int8").load_state_dict(state)


@pytest.mark.parametrize("words", ["int8", "uint8", "int4:group:8", "float8_e4m3fn", "float16", "W8A8"])
def test_compile_and_export(words: str) -> None:
    torch._dynamo.reset()
    q = QuantLinear.from_float(linear(), words).eval()
    graphs = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(q, fullgraph=True, dynamic=True, backend=graphs)
    for batch in (4, 5, 9):
        x = torch.randn(batch, K)
        assert torch.equal(compiled(x), q(x))
    assert graphs.frame_count == 1
    program = torch.export.export(q, (x,), dynamic_shapes={"input": {0: torch.export.Dim.DYNAMIC}})
    assert torch.equal(program.module()(torch.ones(3, K)), q(torch.ones(3, K)))


def test_inductor() -> None:
    torch._dynamo.reset()
    q = QuantLinear.from_float(linear(), "W8A8").eval()
    x = torch.randn(4, K, requires_grad=True)
    compiled = torch.compile(q, fullgraph=True)
    torch.testing.assert_close(compiled(x), q(x))
    (dx,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(dx, torch.ones(4, N) @ q.values())


def test_autocast_and_inference_mode() -> None:
    q = QuantLinear.from_float(linear(), "int8").eval()
    x = torch.randn(4, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
    assert torch.equal(y, q(x.bfloat16()))
    torch.testing.assert_close(y, F.linear(x.bfloat16().float(), q.values(), q.bias).bfloat16(), rtol=0.01, atol=1e-3)
    with torch.inference_mode():
        assert torch.equal(q(x), q(x.clone()))


def test_from_float_and_back() -> None:
    source = linear(dtype=torch.bfloat16).eval()
    weight = source.weight.detach().clone()
    q = QuantLinear.from_float(source, "int8")
    assert torch.equal(source.weight, weight)
    assert not q.training
    back = q.dequantize()
    assert type(back) is nn.Linear
    assert not back.training
    assert back.bias is source.bias
    assert back.weight.dtype == torch.bfloat16
    assert back.weight.requires_grad
    assert same(QuantLinear.from_float(back.float(), "int8"), QuantLinear.from_float(q.dequantize().float(), "int8"))
    assert QuantLinear.from_float(linear(bias=False), "int8").bias is None


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 2, 1), QuantLinear(K, N, spec="int8"), None])
def test_from_float_refuses(layer: object) -> None:
    with pytest.raises(TypeError, match=r"layer must be an nn.Linear with float weights, got"):
        QuantLinear.from_float(layer, "int8")  # type: ignore[arg-type]


def test_the_words_of_a_layer() -> None:
    q = QuantLinear(K, N, spec="W4A16")
    assert repr(q) == f"QuantLinear(in_features={K}, out_features={N}, bias=True, spec={quantlib.W4A16})"
    q.bias.data.fill_(3)
    q.reset_parameters()
    assert torch.equal(q(torch.randn(2, K)), torch.zeros(2, N))


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)])
@pytest.mark.parametrize("words", ["int8", "int4:group:8", "int8:tensor", "uint8", "float16"])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_empty_layers(sizes: tuple[int, int], words: str) -> None:
    q = QuantLinear.from_float(nn.Linear(*sizes), words)
    torch.testing.assert_close(q(torch.randn(2, sizes[0])), q.bias.expand(2, -1))
