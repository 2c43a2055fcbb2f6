"""Static activations: what an observer finds, or training learns, is what `QuantLinear` projects its input with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from quantlib import QuantSpec, convert_, prepare_qat_, qat_mode_, qat_parameters, quantize_
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.nn import FakeQuantize, MinMaxObserver, QuantLinear
from quantlib.nn.qat import QATLinear

K, HIDDEN = 24, 40
SPECS = (
    "int8:row@int8:tensor:static",
    "int8:row@uint8:tensor:affine:static",
    "int4:group:16@int8:tensor:affine:static",
    "uint8:row:affine@int8:tensor:static",
    "int8:row@float8_e4m3fn:tensor:static",
)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(K, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 8))


def trained(spec: str, source: str | None = None) -> nn.Sequential:
    """Eight steps, the observers off after four."""
    model, generator = mlp(), torch.Generator().manual_seed(1)
    prepare_qat_(model, spec, activation_scale=source)
    optimizer = torch.optim.Adam(qat_parameters(model), lr=3e-2)
    for step in range(8):
        qat_mode_(model, observers=step < 4)
        optimizer.zero_grad()
        model(torch.randn(32, K, generator=generator)).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("source", [None, "learned"])
@pytest.mark.parametrize("spec", SPECS)
def test_codes_of_inputs_are_those_of_the_last_forward(spec: str, source: str | None) -> None:
    model = trained(spec, source)
    x = 1.5 * torch.randn(17, K)  # beyond what was seen
    deployed = copy.deepcopy(model)
    convert_(deployed)
    layer, training = deployed[0], model[0]
    assert isinstance(layer, QuantLinear)
    assert isinstance(training, QATLinear)
    quantizer = training.input_quantizer
    assert quantizer is not None
    kept = quantizer.static()
    assert torch.equal(layer.input_scale, kept.scale)
    assert (layer.input_zero_point is None) == bool(quantizer.spec.symmetric)
    z = None if layer.input_zero_point is None else layer.input_zero_point.float()
    values = quantizer.codes(x).codes.float() - (0 if z is None else z)
    assert torch.equal(quantizer(x), values * kept.scale)
    torch.testing.assert_close(deployed(x), model(x), atol=2e-6, rtol=2e-6)
    moved = source == "learned"
    assert (quantizer.gain is not None and not torch.equal(quantizer.gain, torch.ones(1))) == moved


def test_products_of_whole_numbers_are_the_same_bytes() -> None:
    layer = nn.Linear(K, 8)
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, (8, K)))
        layer.weight[:, 0] = 127  # scales of 1
        layer.bias.copy_(torch.arange(8))
    model = nn.Sequential(layer)
    prepare_qat_(model, SPECS[0], observer=MinMaxObserver)
    x = torch.randint(-127, 128, (9, K)).float()
    x[0, 0] = 127
    expected = model(x)
    convert_(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(100 * x), model((100 * x).clamp(-127, 127)))  # the scale does not follow the input


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_stop_where_the_input_is_out_of_range(spec: str) -> None:
    model = trained(spec)
    deployed = copy.deepcopy(model)
    convert_(deployed)
    x = (4 * torch.randn(17, K)).requires_grad_()
    (expected,) = torch.autograd.grad(model[0](x).sum(), x)
    (got,) = torch.autograd.grad(deployed[0](x).sum(), x)
    assert torch.equal(got == 0, expected == 0)
    assert 0 < int((got == 0).sum()) < got.numel()
    torch.testing.assert_close(got, expected)


def test_a_static_scale_survives_what_is_done_to_a_model(tmp_path) -> None:
    spec = SPECS[1]
    model = trained(spec)
    convert_(model)
    x = torch.randn(5, K)
    y = model(x)
    save_quantized(model, tmp_path / "model.safetensors")
    loaded = load_quantized(mlp(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(x), y)
    assert spec in repr(loaded)
    with torch.device("meta"):
        skeleton = mlp()
    quantize_(skeleton, spec)
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(skeleton(x), y)
    half = copy.deepcopy(model).bfloat16()
    assert half[0].input_scale.dtype == torch.float32
    assert half[0].input_zero_point.dtype == torch.int32
    assert torch.equal(torch.compile(model, fullgraph=True)(x), y)
    for layer in (model[0], model[2]):
        layer.batch_invariant = True  # which a scale of all rows allows where it is static
    assert torch.equal(model(x[2:3]), y[2:3])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("shape", [(0, K), (2, 0, K)])
def test_no_rows_are_no_rows(spec: str, shape: tuple[int, ...]) -> None:
    model = trained(spec)
    convert_(model)
    x = torch.empty(shape, requires_grad=True)
    y = model(x)
    assert y.shape == (*shape[:-1], 8)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_layers_that_share_a_weight_keep_scales_of_their_own() -> None:
    model = nn.Sequential(nn.Linear(K, K), nn.ReLU(), nn.Linear(K, K))
    model[2].weight = model[0].weight
    prepare_qat_(model, SPECS[0], observer=MinMaxObserver)
    model(torch.randn(9, K))
    convert_(model)
    assert model[0].weight_codes is model[2].weight_codes
    assert not torch.equal(model[0].input_scale, model[2].input_scale)


def unseen() -> nn.Sequential:
    model = mlp()
    prepare_qat_(model, SPECS[0])
    qat_mode_(model, observers=False)
    for layer in (model[0], model[2]):
        layer.fake_weight()
    return model


ERRORS = {
    "spec must have activations whose scales follow the input": lambda: quantize_(mlp(), SPECS[0]),
    "spec must have activations whose scales follow": lambda: QuantLinear.from_float(nn.Linear(K, 8), SPECS[0]),
    "spec must be static in its activation only, got int8:tensor:static": lambda: quantize_(
        mlp(), "int8:tensor:static"
    ),
    "spec must be static in its activation only": lambda: prepare_qat_(mlp(), "int8:tensor:static"),
    "static must be False but for an activation with one scale, per tensor, got per row": (
        lambda: QuantSpec.parse("int8@int8:row:static")
    ),
    "activation_scale must be None unless activations are static, got 'learned' for int8:row@int8:row": (
        lambda: prepare_qat_(mlp(), "W8A8", activation_scale="learned")
    ),
    "activation_scale must be None unless activations are static, got 'observed' for int8:row": (
        lambda: QATLinear(K, 8, spec="int8:row", activation_scale="observed")
    ),
    "activation_scale must be observed or learned, got 'dynamic'": (
        lambda: prepare_qat_(mlp(), SPECS[0], activation_scale="dynamic")
    ),
    "layer 0: convert_ must come after a forward with observers on, got none": lambda: convert_(unseen()),
    "FakeQuantize must have observed a batch before its scale is used, got none": lambda: unseen()(torch.ones(1, K)),
    "scale must be learned or observed, got dynamic": lambda: FakeQuantize(
        (K,), "int8:tensor", scale="dynamic"
    ).static(),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_say_what_was_expected(message: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        ERRORS[message]()
    assert message in str(error.value)
