"""Quantization-aware training: what is trained is what is deployed, byte for byte; what is learned; what is refused."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib import convert_, ops, prepare_qat_, qat_mode_, qat_parameters, quantize_
from quantlib.backends.packing import wide_zero_points
from quantlib.nn import FakeQuantize, MovingAverageObserver, QATConv2d, QATEmbedding, QATLinear, QuantLinear
from quantlib.nn.functional import project
from quantlib.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("device")

N, K = 12, 35
SPECS = (
    "W8A16",
    "W8A8",
    "uint8",
    "int8:tile:8",
    "int8:tensor@uint8:tensor",
    "int4:group:8",
    "int4:row:affine",
    "float8_e4m3fn",
    "float4_e2m1fn:group:16",
    "bfloat16",
)
LEARNED = tuple(s for s in SPECS if QuantSpec.parse(s).scaled)
TYPES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 5))


def train(model: nn.Module, x: Tensor, steps: int = 5, lr: float = 1e-2) -> list[float]:
    """A few steps of AdamW towards a fixed target: the loss of each."""
    optimizer = torch.optim.AdamW(qat_parameters(model), lr=lr)
    losses = []
    for _ in range(steps):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained(spec: str, **options: Any) -> tuple[QATLinear, nn.Sequential]:
    """A prepared layer that has learned, its scales too, in the model it is in."""
    model = nn.Sequential(nn.Linear(K, N))
    prepare_qat_(model, spec, **options)
    train(model, torch.randn(64, K))
    assert isinstance(model[0], QATLinear)
    return model[0], model.eval()


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[n].flatten().view(torch.uint8), right[n].flatten().view(torch.uint8)) for n in left
    )


# What is trained is what is deployed


@pytest.mark.parametrize("scale", ["learned", "dynamic"])
@pytest.mark.parametrize("spec", SPECS)
def test_the_codes_are_those_of_the_last_forward(spec: str, scale: str) -> None:
    layer, model = trained(spec, scale=scale)
    used: list[Tensor] = []
    layer.weight_quantizer.register_forward_hook(lambda module, args, y: used.append(y.detach().clone()))
    model(torch.randn(4, K))
    convert_(model)
    deployed = model[0]
    assert isinstance(deployed, QuantLinear)
    assert torch.equal(deployed.values().view(torch.int32), used[-1].view(torch.int32))
    if deployed.spec.row.is_float:
        return
    # a value is its code times the scale, so the code is the value in scales, rounded
    assert deployed.weight_scale is not None
    block, z = deployed.block, deployed.weight_zero_point
    z = None if z is None else wide_zero_points(z, deployed.spec.row, deployed.weight_scale.shape[1])
    s, z = (
        torch.zeros(()) if t is None else t.repeat_interleave(block[0], 0)[:N].repeat_interleave(block[1], 1)[:, :K]
        for t in (deployed.weight_scale, z)
    )
    codes = deployed.codes if not deployed.spec.row.packed else ops.unpack(deployed.codes, "int4", size=K)
    assert torch.equal(codes.int(), (used[-1] / s).round().int() + z.int())


@pytest.mark.parametrize("spec", SPECS)
def test_the_deployed_forward_is_the_trained_one(spec: str) -> None:
    """Both lie within the bound of C11 of the product, in float64, of the same operands."""
    _, model = trained(spec)
    x = torch.randn(16, K)
    y = model(x).detach()
    convert_(model)
    layer = model[0]
    operand = x if layer.spec.activation is None else project(x, layer.spec.activation)
    w, bias = layer.values().double(), layer.bias.detach().double()
    exact = operand.double() @ w.T + bias
    bound = 2 * (K + 1) * 2.0**-23 * (operand.double().abs() @ w.abs().T + bias.abs()) + exact.abs() * 2.0**-24
    for got in (y, model(x).detach()):
        assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("spec", ["W8A16", "W8A8", "int4:group:8"])
def test_with_exact_operands_they_give_the_same_bytes(spec: str) -> None:
    model = nn.Sequential(nn.Linear(K, N))
    top = QuantSpec.parse(spec).row.max
    with torch.no_grad():  # small integers times a power of two, the largest code in every group
        model[0].weight.copy_(torch.randint(-5, 6, (N, K)) * 2.0**-9)
        model[0].weight[:, ::8] = top * 2.0**-9
        model[0].bias.copy_(torch.randint(-5, 6, (N,)))
    x = torch.randint(-5, 6, (16, K)).float()
    x[:, 0] = 127
    prepare_qat_(model, spec)
    y = model(x)
    convert_(model)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("scale", ["learned", "dynamic"])
@pytest.mark.parametrize("spec", SPECS)
def test_training_starts_from_what_quantizing_gives(spec: str, scale: str) -> None:
    prepared = mlp()
    quantized = copy.deepcopy(prepared)
    report, expected = prepare_qat_(prepared, spec, scale=scale), quantize_(quantized, spec)
    assert report == expected
    prepared(torch.randn(2, K))
    convert_(prepared)
    assert same(prepared, quantized)


def test_other_layers_land_on_their_codes_too() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 24, padding_idx=3)
            self.image = nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular", groups=3)
            self.signal = nn.Conv1d(6, 8, 3, padding="same")
            self.head = nn.Linear(24, 20)

        def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.head(self.table(ids)), self.signal(self.image(image).flatten(2))

    model, inputs = Net(), (torch.randint(0, 20, (4, 7)), torch.randn(2, 3, 5, 5))
    report = prepare_qat_(model, "int4:group:8@int8:row", types=TYPES)
    assert {layer.spec for layer in report.layers} == {"int4:group:8", "int4:group:8@int8:row"}
    assert isinstance(model.table, QATEmbedding)
    assert isinstance(model.image, QATConv2d)
    optimizer = torch.optim.AdamW(qat_parameters(model), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.square().mean() for y in model(*inputs)).backward()
        assert not model.table.weight.grad[3].any()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model(*inputs)
    convert_(model)
    for got, want in zip(model(*inputs), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_layers_that_share_a_weight_share_its_scale_and_its_codes() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(20, 24), "head": nn.Linear(24, 20), "other": nn.Linear(24, 20)})
    model["head"].weight = model["other"].weight = model["table"].weight
    report = prepare_qat_(model, "int8", types=(nn.Linear, nn.Embedding))
    assert len(report.layers) == 1
    assert model["head"].weight_quantizer is model["table"].weight_quantizer
    assert model["head"].weight is model["other"].weight is model["table"].weight
    model["head"](model["table"](torch.arange(20)))
    convert_(model)
    assert model["head"].weight_codes is model["other"].weight_codes is model["table"].weight_codes
    assert model["head"].weight_scale is model["table"].weight_scale


# What is learned


def test_gradients_are_those_of_the_contract_times_the_base() -> None:
    layer, _ = trained("int8:row")
    quantizer, w = layer.weight_quantizer, layer.weight.detach()
    layer.zero_grad()
    x, dy = torch.randn(9, K), torch.randn(9, N)
    layer(x).backward(dy)
    scale = quantizer.scale.detach().view(N, 1).requires_grad_()
    leaf = w.clone().requires_grad_()
    quantlib.fake_quantize(leaf, scale, "int8", block=(1, -1)).backward(dy.T @ x)
    torch.testing.assert_close(layer.weight.grad, leaf.grad)
    torch.testing.assert_close(quantizer.scale_bias.grad, quantizer.base * scale.grad.flatten())
    assert quantizer.base.grad is None
    assert quantizer.scale_bias.any()


@pytest.mark.parametrize("spec", LEARNED)
def test_scales_survive_an_optimizer_that_is_not_told_about_them(spec: str) -> None:
    model = mlp()
    prepare_qat_(model, spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    x, losses = torch.randn(64, K), []
    for _ in range(20):
        loss = (model(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all((m.scale > 0).all() for m in model.modules() if isinstance(m, FakeQuantize) and m.scale is not None)


def test_an_optimizer_made_before_still_trains_the_weights() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = dict(model.named_parameters())
    prepare_qat_(model, "W8A8")
    values = {n: p.detach().clone() for n, p in before.items()}
    model(torch.randn(8, K)).square().mean().backward()
    optimizer.step()
    now = dict(model.named_parameters())
    for name, parameter in before.items():
        assert now[name] is parameter
        assert not torch.equal(parameter, values[name])


def test_parameters_come_in_two_groups() -> None:
    model = mlp()
    prepare_qat_(model, "int4:row:affine")
    rest, learned = qat_parameters(model)
    assert {id(p) for p in rest["params"]} == {id(p) for m in (model[0], model[2]) for p in (m.weight, m.bias)}
    quantizers = [model[0].weight_quantizer, model[2].weight_quantizer]
    assert {id(p) for p in learned["params"]} == {id(p) for q in quantizers for p in (q.scale_bias, q.zero_point_bias)}
    assert learned["weight_decay"] == 0
    assert all(p.dim() == 1 for p in learned["params"])  # which FSDP2 can shard


@pytest.mark.parametrize("initial", ["mse", "lsq"])
def test_other_starts(initial: str) -> None:
    layer, plain = nn.Linear(64, 32), nn.Linear(64, 32)
    plain.weight = layer.weight
    start, widest = QATLinear.from_float(layer, "int4:row", initial=initial), QATLinear.from_float(plain, "int4:row")
    assert not torch.equal(start.weight_quantizer.scale, widest.weight_quantizer.scale)
    if initial == "mse":
        noise = [(q.fake_weight() - layer.weight).square().sum() for q in (start, widest)]
        assert noise[0] < noise[1]
    else:
        mean = layer.weight.detach().abs().mean(1)
        torch.testing.assert_close(start.weight_quantizer.scale, 2 * mean / math.sqrt(7))


# Switches


def test_switches() -> None:
    model, x = mlp(), torch.randn(8, K)
    floats = copy.deepcopy(model)
    prepare_qat_(model, "W8A8")
    projected = model(x)
    qat_mode_(model, fake_quantize=False)
    assert torch.equal(model(x), floats(x))
    qat_mode_(model, fake_quantize=True)
    assert torch.equal(model(x), projected)

    optimizer = torch.optim.Adam(qat_parameters(model), lr=1e-2)
    gains = [m.weight_quantizer.scale_bias for m in (model[0], model[2])]
    model(x).square().mean().backward()
    optimizer.step()
    model(x).square().mean().backward()
    qat_mode_(model, learn_scales=False)
    kept = [g.detach().clone() for g in gains]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(gains, kept, strict=True))
    qat_mode_(model, learn_scales=True)
    model(x).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(gains, kept, strict=True))


@pytest.mark.parametrize("source", ["observed", "learned"])
@pytest.mark.parametrize("spec", ["int8:tensor", "uint8:tensor"])
def test_an_activation_with_a_scale_of_its_own(source: Any, spec: str) -> None:
    quantizer = FakeQuantize((K,), spec, scale=source, observer=MovingAverageObserver((K,), spec))
    for _ in range(3):
        x = torch.randn(2, 7, K, requires_grad=True)
        y = quantizer(x)
        y.sum().backward()
    kept = quantizer.scale.detach().clone()
    assert torch.equal(kept, quantizer.observer.scale()[0].flatten())
    z = quantizer.zero_point
    weight = quantizer.codes(x)
    values = ops.dequantize(
        weight.codes, weight.scale, quantizer.spec.format, block=(-1, -1), zero_point=weight.zero_point
    )
    assert torch.equal(values, y)
    assert (z is None) == (spec == "int8:tensor")
    qat_mode_(quantizer, observers=False)
    assert quantizer(100 * torch.randn(5, K)).requires_grad == (source == "learned")
    assert torch.equal(quantizer.scale, kept)
    assert (quantizer.gain is None) == (source == "observed")
    assert quantizer(torch.empty(0, K)).shape == (0, K)
    assert "observed" in repr(quantizer) or "learned" in repr(quantizer)


def test_nan_activations_go_through_and_are_reported_once() -> None:
    observer = MovingAverageObserver((4,), "int8:tensor")
    quantizer = FakeQuantize((4,), "int8:tensor", scale="observed", observer=observer)
    x = torch.tensor([[1.0, math.nan, -0.5, 2.0]])
    with pytest.warns(RuntimeWarning, match="left 1 value that is not finite out of its range"):
        y = (quantizer(x), observer.report())[0]  # nothing waits for a GPU to be asked
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(quantizer(x).isnan(), x.isnan())  # and no second warning, which would be an error here
    dynamic = QATLinear.from_float(nn.Linear(4, 2), "W8A8")(torch.cat([x, torch.ones(1, 4)]))
    assert dynamic[0].isnan().all()
    assert dynamic[1].isfinite().all()


# What else a module goes through


def test_compiled_it_trains_the_same() -> None:
    model, x = mlp(), torch.randn(16, K)
    prepare_qat_(model, "int4:row:affine@int8:row")
    compiled = copy.deepcopy(model)
    losses = train(model, x, 3)
    torch.testing.assert_close(train(torch.compile(compiled, fullgraph=True), x, 3), losses)
    for a, b in zip(model.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert int(compiled[0].weight_quantizer.forwards) == 3


@pytest.mark.parametrize("spec", ["W8A8", "uint8"])
def test_copies_and_states(spec: str) -> None:
    layer, model = trained(spec)
    fresh = nn.Sequential(nn.Linear(K, N))
    prepare_qat_(fresh, spec)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert other[0].weight is not layer.weight
        assert same(other, model)
        convert_(other)  # a state remembers that there were forwards
    assert not isinstance(model[0], QuantLinear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_keep_wide_scales(dtype: torch.dtype) -> None:
    model = mlp()
    prepare_qat_(model, "W8A8")
    model.to(dtype)
    y = model(torch.randn(3, K, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    quantizer = model[0].weight_quantizer
    learned = quantizer.scale_bias
    assert quantizer.base.dtype == learned.dtype == learned.grad.dtype == torch.float32
    convert_(model)
    assert model[0].dtype == dtype


def test_on_meta_a_model_is_prepared_for_its_state() -> None:
    _, model = trained("int4:group:8")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(K, N))
    prepare_qat_(skeleton, "int4:group:8")
    skeleton.load_state_dict(model.state_dict(), assign=True)
    assert same(skeleton, model)
    convert_(skeleton)


def test_hooks_and_mode_stay() -> None:
    model, calls = mlp().eval(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    prepare_qat_(model, "int8")
    assert not model[0].training
    model(torch.randn(2, K))
    convert_(model)
    model(torch.randn(2, K))
    assert len(calls) == 2


# What is refused


def test_what_cannot_be_served_is_listed() -> None:
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict({
        "attention": nn.MultiheadAttention(8, 2),
        "own": Own(8, 8),
        "small": nn.Linear(8, 2),
        "codes": QuantLinear.from_float(nn.Linear(8, 8), "int8"),
        "prepared": QATLinear.from_float(nn.Linear(8, 8), "int4:row"),
        "capped": nn.Embedding(4, 8, max_norm=1.0),
        "served": nn.Linear(8, 8),
    })  # fmt: skip
    report = prepare_qat_(model, "int8", lambda m, name: name != "small", types=TYPES)
    assert [layer.name for layer in report.layers] == ["served"]
    assert report.skipped == {
        "attention.in_proj_weight": "nn.MultiheadAttention reads its weight directly",
        "attention.out_proj": "nn.MultiheadAttention reads its weight directly",
        "own": "Own, a subclass of nn.Linear, may compute something else",
        "small": "filter_fn said no",
        "codes": "already quantized to int8:row",
        "prepared": "already prepared for int4:row",
        "capped": "an nn.Embedding with max_norm=1.0",
    }


def broken(change: Callable[[QATLinear], object]) -> None:
    _, model = trained("int8")
    with torch.no_grad():
        change(model[0])
    before = model[0]
    try:
        convert_(model)
    finally:
        assert model[0] is before


def refused_weight(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 1] = value
    try:
        prepare_qat_(model, "int8")
    finally:
        assert type(model[0]) is nn.Linear


BAD: dict[str, Callable[[], object]] = {
    "layer 0: convert_ must come after a forward with fake quantization on, got none": lambda: convert_(
        nn.Sequential(QATLinear(4, 4, spec="int8"))
    ),
    "model must have been prepared by prepare_qat_, got one without": lambda: convert_(mlp()),
    "model must contain the layers to replace, got a single QATLinear": lambda: convert_(QATLinear(4, 4, spec="int8")),
    "model must have an nn.Linear to prepare, got none": lambda: prepare_qat_(nn.Sequential(nn.ReLU()), "int8"),
    "layer 0: scale must be finite and not 0, got 0": lambda: broken(lambda m: m.weight_quantizer.base[2].zero_()),
    "layer 0: scale must be finite and not 0, got nan": lambda: broken(
        lambda m: m.weight_quantizer.scale_bias[2].fill_(math.nan)
    ),
    "layer 0: scale must be finite and not 0, got inf": lambda: broken(
        lambda m: m.weight_quantizer.scale_bias[2].fill_(math.inf)
    ),
    "layer 0: weight must be finite, got inf": lambda: broken(lambda m: m.weight[0, 0].fill_(math.inf)),
    "weight of layer 2 must be finite.* got nan in row 1": lambda: refused_weight(math.nan),
    "spec must be": lambda: prepare_qat_(mlp(), "int3"),
    "types must be": lambda: prepare_qat_(mlp(), "int8", types=(nn.ReLU,)),
    "scale must be learned, observed or dynamic, got 'fixed'": lambda: prepare_qat_(mlp(), "int8", scale="fixed"),
    "scale must be learned or dynamic for a weight": lambda: prepare_qat_(mlp(), "int8", scale="observed"),
    "initial must be minmax, mse or lsq": lambda: prepare_qat_(mlp(), "int8", initial="best"),
    "mask must be rounded or lsq, got 'soft'": lambda: prepare_qat_(mlp(), "int8", mask="soft"),
    "observer must be given for a scale that is observed": lambda: FakeQuantize((4,), "int8:tensor", scale="observed"),
    "layer must be an nn.Linear, got Embedding": lambda: QATLinear.from_float(nn.Embedding(2, 2), "int8"),
    "quantlib::fake_quantize: scale must be a number other than 0, got 0.0": lambda: forward_with(
        lambda m: m.base.zero_()
    ),
    "quantlib::fake_quantize: scale must be a number other than 0, got nan": lambda: forward_with(
        lambda m: m.base.fill_(math.nan)
    ),
    r"quantlib::fake_quantize: scale must be float32 \[3, 1\]": lambda: FakeQuantize((2, 4), "int8")(torch.ones(3, 4)),
    "quantlib::fake_quantize: x must be float32, float16 or bfloat16, got int64": lambda: FakeQuantize((2, 4), "int8")(
        torch.ones(2, 4, dtype=torch.int64)
    ),
}


def forward_with(change: Callable[[FakeQuantize], object]) -> None:
    layer = QATLinear(4, 4, spec="int8")
    with torch.no_grad():
        change(layer.weight_quantizer)
    layer(torch.ones(2, 4))


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str, device: str) -> None:
    if device != "cpu" and message.startswith("quantlib::fake_quantize: scale must be above"):
        return  # nothing waits for a GPU to be asked for a value
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        BAD[message]()


def test_a_model_that_is_prepared_and_converted_in_inference_mode_trains_outside_of_it() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.inference_mode():
        prepare_qat_(model, "int8")
    model(x).sum().backward()
    with torch.inference_mode():
        convert_(model)
    model(x).sum().backward()
    assert x.grad is not None
