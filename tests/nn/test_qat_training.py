"""Training of a prepared model: starts from nothing, stops, resumes, evaluates, checkpoints, transforms."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from quantlib import convert_, prepare_qat_, qat_mode_, qat_parameters, quantize_
from quantlib.checkpoint import load_quantized, save_quantized
from quantlib.nn import FakeQuantize, MinMaxObserver, MovingAverageObserver, QATEmbedding, QATLinear
from quantlib.nn.fake_quantize import SMALLEST_GAIN
from quantlib.nn.observers import Observer

K, N = 16, 12
STATIC = ("int8:row@int8:tensor:static", "int8:row@uint8:tensor:affine:static")


@pytest.fixture(autouse=True)
def uncompiled() -> None:
    torch._dynamo.reset()  # the tests share code, of which only so many versions are compiled


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, 5))


def prepared(spec: str = STATIC[0], seed: int = 0, **options: Any) -> nn.Sequential:
    torch.manual_seed(seed)
    model = mlp()
    prepare_qat_(model, spec, **options)
    return model


def batches(count: int, seed: int = 1) -> list[Tensor]:
    """Each wider than the one before, so that every one of them moves an observer."""
    generator = torch.Generator().manual_seed(seed)
    return [(i + 1) * torch.randn(8, K, generator=generator) for i in range(count)]


def quantizers(model: nn.Module) -> list[FakeQuantize]:
    return [module for module in model.modules() if isinstance(module, FakeQuantize)]


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    """The names of a state that differ."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name].nan_to_num(), right[name].nan_to_num())]


# Zeros, and gains that training drives to them


@pytest.mark.parametrize("scale", ["learned", "dynamic"])
@pytest.mark.parametrize("spec", ["int8", "uint8", "int4:group:8", "float8_e4m3fn:tensor"])
def test_a_layer_of_zeros_learns(spec: str, scale: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(128, K)
    target = x @ torch.randn(K, N)
    model = nn.Sequential(nn.Linear(K, N))
    nn.init.zeros_(model[0].weight)
    prepare_qat_(model, spec, scale=scale)  # type: ignore[arg-type]
    assert not model[0].fake_weight().any()
    optimizer = torch.optim.AdamW(qat_parameters(model), lr=2e-2)
    losses = []
    for _ in range(150):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("initial", ["minmax", "mse", "lsq"])
@pytest.mark.parametrize("spec", ["int8:row", "int4:group:8", "int8:row:affine"])
def test_zeros_among_others_start_as_wide_as_these(spec: str, initial: Any) -> None:
    if initial == "lsq" and "affine" in spec:
        return  # lsq is for symmetric specs
    layer = nn.Linear(K, N)
    with torch.no_grad():
        layer.weight[3] = 0
    start = QATLinear.from_float(layer, spec, initial=initial).weight_quantizer
    others = copy.deepcopy(layer)
    with torch.no_grad():
        others.weight[3] = layer.weight[4]
    without = QATLinear.from_float(others, spec, initial=initial).weight_quantizer
    assert start.scale is not None
    assert without.scale is not None
    row, expected = start.scale.view(N, -1), without.scale.view(N, -1)
    kept = torch.arange(N) != 3
    assert torch.equal(row[kept], expected[kept])
    assert ((row[3] > 0.2 * expected.mean()) & (row[3] < 5 * expected.mean())).all()


@pytest.mark.parametrize("spec", ["int8", "uint8", "int4:group:8"])
def test_zeros_become_codes_of_zero(spec: str) -> None:
    model = nn.Sequential(nn.Linear(K, N))
    nn.init.zeros_(model[0].weight)
    prepare_qat_(model, spec)
    x = torch.randn(4, K)
    expected = model(x)
    convert_(model)
    assert not model[0].values().any()
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("bias", [-1.0, -1.5, -1 - 1e-9])
def test_a_gain_goes_on_from_the_other_side_of_zero(bias: float) -> None:
    quantizer = FakeQuantize((4, K), "int8:row")
    x = torch.randn(4, K)
    quantizer.initialize(x)
    assert quantizer.scale_bias is not None
    with torch.no_grad():
        quantizer.scale_bias.fill_(bias)
    gain = quantizer.gain
    assert gain is not None
    assert (gain >= SMALLEST_GAIN).all()
    optimizer = torch.optim.SGD([quantizer.scale_bias], lr=1e-3)
    before = gain.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (quantizer(x) - x).square().sum().backward()
        optimizer.step()
    assert quantizer.gain is not None
    assert quantizer.gain.isfinite().all()
    assert bias == -1.5 or not torch.equal(quantizer.gain, before)  # it is not stuck where a scale means nothing


def test_weight_decay_leads_back_to_where_a_scale_started() -> None:
    model = prepared("uint8:row:affine")
    start = [(q.scale.detach().clone(), q.zero_point.detach().clone()) for q in quantizers(model)]  # type: ignore[union-attr]
    learned = [p for name, p in model.named_parameters() if "quantizer" in name and p.requires_grad]
    assert len(learned) == 4
    with torch.no_grad():
        for parameter in learned:
            parameter.fill_(0.5)
    optimizer = torch.optim.SGD(learned, lr=0.1, weight_decay=1.0)
    for _ in range(200):
        for parameter in learned:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    for quantizer, (scale, zero_point) in zip(quantizers(model), start, strict=True):
        torch.testing.assert_close(quantizer.scale, scale)
        torch.testing.assert_close(quantizer.zero_point, zero_point)


# States


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_keeps_the_switches(assign: bool) -> None:
    model, fresh = prepared(STATIC[1], activation_scale="learned"), prepared(STATIC[1], 5, activation_scale="learned")
    for x in batches(3):
        model(x)
    qat_mode_(model, observers=False, learn_scales=False)
    fresh.load_state_dict(model.state_dict(), assign=assign)
    x = 50 * batches(1)[0]
    assert torch.equal(fresh(x), model(x))
    assert not differing(fresh, model)
    assert not any(q.observing for q in quantizers(fresh))
    assert not any(p.requires_grad for n, p in fresh.named_parameters() if "quantizer" in n)
    qat_mode_(model, fake_quantize=False)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert not any(q.enabled for q in quantizers(fresh))


def test_a_state_can_be_called_with_and_written_as_tensors() -> None:
    model = prepared()
    x = batches(1)[0]
    model(x)
    qat_mode_(model, observers=False)
    state = model.state_dict()
    assert all(isinstance(value, Tensor) and value.numel() for value in state.values())
    assert torch.equal(functional_call(model, state, (x,)), model(x))


@pytest.mark.parametrize("spec", ["int8", "uint8"])
def test_older_states_load(spec: str) -> None:
    """They held a gain for what is learned, the zero point itself, and no switches."""
    model, fresh = prepared(spec), prepared(spec, 5)
    train_a_little(model)
    state = {}
    for name, value in model.state_dict().items():
        if name.endswith("scale_bias"):
            state[name.replace("scale_bias", "gain")] = 1 + value
        elif name.endswith("zero_point_bias"):
            base = model.get_parameter(name.replace("zero_point_bias", "base_zero"))
            state[name.replace("zero_point_bias", "zero_point")] = value + base
        elif not name.endswith(("_extra_state", "base_zero")):
            state[name] = value
    fresh.load_state_dict(state)
    for old, new in zip(quantizers(model), quantizers(fresh), strict=True):
        torch.testing.assert_close(new.scale, old.scale)
        torch.testing.assert_close(new.zero_point, old.zero_point)


def train_a_little(model: nn.Module) -> None:
    optimizer = torch.optim.Adam(qat_parameters(model), lr=1e-2)
    for x in batches(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("way", ["into", "assigned", "meta", "one by one"])
def test_scales_follow_float_weights_that_are_loaded(way: str) -> None:
    torch.manual_seed(3)
    floats = mlp()
    with torch.no_grad():
        for parameter in floats.parameters():
            parameter.mul_(20)
    expected = copy.deepcopy(floats)
    prepare_qat_(expected, STATIC[1])
    with torch.device("meta" if way == "meta" else "cpu"):
        model = mlp()
    prepare_qat_(model, STATIC[1])
    if way == "one by one":
        for name, value in floats.state_dict().items():
            module, _, key = name.rpartition(".")
            model.get_submodule(module).load_state_dict({key: value}, strict=False)
    else:
        missing, unexpected = model.load_state_dict(floats.state_dict(), strict=False, assign=way != "into")
        assert not unexpected
        assert all("quantizer" in name for name in missing)
    x = batches(1)[0]
    assert torch.equal(model(x), expected(x))
    assert not differing(model, expected)
    with pytest.raises(RuntimeError, match=r"Missing key.* \"0\.weight_quantizer\.base\""):
        model.load_state_dict(floats.state_dict())


@pytest.mark.parametrize("first", ["weight", "weight_quantizer"])
def test_a_state_in_two_parts_is_the_state(first: str) -> None:
    model, fresh = prepared("int8"), prepared("int8", 5)
    train_a_little(model)
    state = model.state_dict()
    scales = {name: value for name, value in state.items() if "weight_quantizer" in name}
    parts = [{name: value for name, value in state.items() if name not in scales}, scales]
    for part in parts if first == "weight" else reversed(parts):
        fresh.load_state_dict(part, strict=False)
    assert not differing(fresh, model)


def test_a_weight_that_is_drawn_again_has_its_scale_drawn_again() -> None:
    layer = QATLinear(K, N, spec="int8")
    with torch.no_grad():
        layer.weight.mul_(100)
    layer.reset_parameters()
    expected = nn.Linear(K, N, bias=False)
    expected.weight = layer.weight
    assert torch.equal(layer.weight_quantizer.base, QATLinear.from_float(expected, "int8").weight_quantizer.base)
    table = QATEmbedding(6, K, spec="int8")
    table.reset_parameters()
    assert float((table.fake_weight() - table.weight).detach().abs().max()) < 0.05


def test_a_file_of_codes_keeps_the_switches_of_projections(tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        observer = MovingAverageObserver((N,), "int8:tensor")
        return nn.Sequential(nn.Linear(K, N), FakeQuantize((N,), "int8:tensor", observer=observer))

    saved, x = model(), batches(1)[0]
    saved(x)
    qat_mode_(saved, observers=False)
    quantize_(saved, "int8")
    save_quantized(saved, tmp_path / "model.safetensors")
    loaded = load_quantized(model(), tmp_path / "model.safetensors")
    assert torch.equal(loaded(50 * x), saved(50 * x))
    assert not differing(loaded, saved)


# Evaluation and calibration


def observed(model: nn.Module) -> list[int]:
    return [int(module.batches) for module in model.modules() if isinstance(module, Observer)]


def test_evaluation_moves_no_observer_of_a_model_in_training() -> None:
    model = prepared()
    for x in batches(2):
        model(x)
    before, seen = copy.deepcopy(model.eval()), observed(model)
    with torch.no_grad():
        model(1000 * batches(1)[0])
    assert observed(model) == seen == [2, 2]
    assert [name for name in differing(model, before) if "forwards" not in name] == []
    model.train()(batches(1)[0])
    assert observed(model) == [3, 3]


@pytest.mark.parametrize("when", ["before", "after", "told"])
def test_a_model_in_evaluation_is_calibrated(when: str) -> None:
    model = mlp()
    if when == "before":
        model.eval()
    prepare_qat_(model, STATIC[0], observer=MinMaxObserver)
    if when == "told":
        model(batches(1)[0])
        model.eval()
        qat_mode_(model, observers=True)
    model.eval()
    xs = batches(3)
    for x in xs:
        model.eval()(x)
    assert observed(model) == [4, 4] if when == "told" else [3, 3]
    largest = max(float(x.abs().max()) for x in xs)
    torch.testing.assert_close(model[0].input_quantizer.scale, torch.tensor([largest / 127]))
    model.train().eval()(xs[0])
    assert observed(model)[0] in (3, 4)  # training ends the calibration
    convert_(model)


def test_training_forgets_a_validation_before_it() -> None:
    model, other = prepared(observer=MinMaxObserver), prepared(observer=MinMaxObserver)
    model.eval()(1000 * batches(1)[0])
    model.train().eval().train()
    assert observed(model) == [1, 1]  # convert_ would still take what was seen
    model(batches(1)[0])
    other(batches(1)[0])
    assert not [name for name in differing(model, other) if "forwards" not in name]
    asked = prepared(observer=MinMaxObserver).eval()
    qat_mode_(asked, observers=True)
    asked(1000 * batches(1)[0])
    asked.train()(batches(1)[0])
    assert observed(asked) == [2, 2]


def test_a_loaded_scale_stays_in_evaluation() -> None:
    model, fresh = prepared(), prepared().eval()
    model(batches(1)[0])
    fresh.load_state_dict(model.state_dict())
    fresh(1000 * batches(1)[0])
    assert observed(fresh) == [1, 1]


def test_a_scale_that_nothing_was_seen_for_is_an_error() -> None:
    model = prepared()
    qat_mode_(model, observers=False)
    for mode in (True, False):
        with pytest.raises(RuntimeError, match="must have observed a batch before its scale is used, got none"):
            model.train(mode)(batches(1)[0])
    qat_mode_(model, fake_quantize=False)
    assert model(batches(1)[0]).isfinite().all()


def test_an_observer_that_has_seen_something_brings_its_scale() -> None:
    observer = MinMaxObserver((K,), "int8:tensor")
    observer(torch.full((2, K), 127.0))
    quantizer = FakeQuantize((K,), "int8:tensor", scale="observed", observer=observer)
    qat_mode_(quantizer, observers=False)
    x = torch.randint(-127, 128, (3, K)).float()
    assert torch.equal(quantizer(x), x)


def test_an_empty_batch_is_no_batch() -> None:
    model = prepared()
    assert model(torch.empty(0, K)).shape == (0, 5)
    qat_mode_(model, observers=False)
    with pytest.raises(RuntimeError, match="must have observed a batch"):
        model(torch.ones(1, K))


# Checkpointed forwards


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


Call = Callable[[Tensor], Tensor]


def compiled_outside(model: nn.Module, reentrant: bool) -> Call:
    def whole(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=reentrant)
        return y

    compiled: Call = torch.compile(whole, fullgraph=not reentrant, backend="aot_eager")
    return compiled


def compiled_inside(model: nn.Module, reentrant: bool) -> Call:
    compiled = torch.compile(model, backend="aot_eager")
    return lambda x: checkpoint(compiled, x, use_reentrant=reentrant)


WAYS: dict[str, Callable[[nn.Module], Call]] = {
    "reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model: lambda x: checkpoint(model, x, use_reentrant=False),
    "of compiled, reentrant": lambda model: compiled_inside(model, True),
    "of compiled": lambda model: compiled_inside(model, False),
    "compiled": lambda model: compiled_outside(model, False),
}


@pytest.mark.parametrize(
    ("way", "spec", "source"),
    [
        (way, spec, source)
        for way in WAYS
        for spec in STATIC
        for source in ("observed", "learned")
        if "compiled" not in way or (spec, source) == (STATIC[1], "learned")
    ],
)
def test_a_checkpointed_forward_is_observed_once(way: str, spec: str, source: Any) -> None:
    plain, other = (prepared(spec, activation_scale=source) for _ in range(2))
    call = WAYS[way](other)
    for x in batches(3):
        for model, f in ((plain, plain), (other, call)):
            model.zero_grad()
            f(x.clone().requires_grad_()).square().sum().backward()
        left, right = gradients(plain), gradients(other)
        assert left.keys() == right.keys()
        if "compiled" in way:  # which may add in another order
            torch.testing.assert_close(right, left)
        else:
            assert all(torch.equal(left[name], right[name]) for name in left)
    assert observed(other) == observed(plain) == [3, 3]
    assert not [name for name in differing(plain, other) if "compiled" not in way]
    forwards = [[int(q.forwards) for q in quantizers(model)] for model in (plain, other)]
    assert forwards[0] == forwards[1] or way.startswith("of compiled")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), None])
@pytest.mark.parametrize("reentrant", [True, False])
def test_forwards_before_their_backwards_keep_their_scales(reentrant: bool, order: tuple[int, ...] | None) -> None:
    plain, other = prepared(STATIC[1]), prepared(STATIC[1])
    for f in (plain, lambda x: checkpoint(other, x, use_reentrant=reentrant)):
        losses = [f(x.clone().requires_grad_()).square().sum() for x in batches(3)]
        if order is None:
            sum(losses).backward()
        for i in order or ():
            losses[i].backward()
    left, right = gradients(plain), gradients(other)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not differing(plain, other)


def test_a_forward_too_long_ago_is_an_error() -> None:
    model = prepared()
    loss = checkpoint(model, torch.ones(8, K), use_reentrant=False).sum()
    for x in batches(64):
        model(x)
    with pytest.raises(RuntimeError, match="must have been one of the last 64 forwards that were observed"):
        loss.backward()


@pytest.mark.parametrize("spec", STATIC[1:])
def test_compiled_static_activations_train_the_same(spec: str) -> None:
    plain, other = prepared(spec), prepared(spec)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for i, x in enumerate(batches(4)):
        for model in (plain, other):
            qat_mode_(model, observers=i < 2, fake_quantize=i != 1)
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(dict(other.state_dict()), dict(plain.state_dict()))


def test_a_copy_has_an_observer_of_its_own() -> None:
    model = prepared()
    other = copy.deepcopy(model)
    torch.compile(other, backend="aot_eager")(batches(1)[0])
    assert (observed(model), observed(other)) == ([0, 0], [1, 1])


def test_observers_under_a_transform_are_an_error() -> None:
    observer = MovingAverageObserver((K,), "int8:tensor")
    quantizer = FakeQuantize((K,), "int8:tensor", scale="observed", observer=observer)
    with pytest.raises(RuntimeError, match=r"observers must be off under the transforms of torch\.func"):
        grad(lambda x: quantizer(x).sum())(torch.ones(2, K))
    assert math.isnan(float(quantizer.base))  # type: ignore[arg-type]
    assert int(observer.batches) == 0


def test_scales_start_from_the_weights_that_floats_were_trained_to() -> None:
    """A schedule that begins with floats: what was set at first is of weights that are gone."""
    model = prepared("int8")
    qat_mode_(model, fake_quantize=False)
    with torch.no_grad():
        model[0].weight.mul_(10)
    qat_mode_(model, fake_quantize=True)
    fresh = mlp()
    fresh.load_state_dict({name: t for name, t in model.state_dict().items() if "quantizer" not in name})
    prepare_qat_(fresh, "int8")
    assert torch.equal(model[0].weight_quantizer.scale, fresh[0].weight_quantizer.scale)
    x = batches(1)[0]
    assert torch.equal(model(x), fresh(x))


@pytest.mark.parametrize("how", ["learned", "frozen"])
def test_scales_in_use_stay_when_projection_is_switched(how: str) -> None:
    model = prepared("int8")
    if how == "frozen":
        qat_mode_(model, learn_scales=False)
    train_a_little(model)
    before = model[0].weight_quantizer.scale.clone()
    qat_mode_(model, fake_quantize=False)
    model(batches(1)[0])
    qat_mode_(model, fake_quantize=True)
    assert torch.equal(model[0].weight_quantizer.scale, before)


def test_what_a_loaded_observer_has_seen_stays() -> None:
    """The model was put into evaluation before its state came: that it had seen nothing then says nothing."""
    model, resumed = prepared(), prepared(seed=1).eval()
    train_a_little(model)
    resumed.load_state_dict(model.state_dict())
    resumed.train()
    x = 3 * batches(1)[0]
    assert torch.equal(resumed(x), model(x))
    assert not differing(resumed, model)


def test_scales_that_were_set_stay_though_all_is_asked_for_a_gradient() -> None:
    """Unfreezing a model leaves its set scales without a gradient: a step would take a bare one below 0."""
    model = prepared("int8").requires_grad_(True)
    before = [q.base.clone() for q in quantizers(model) if q.base is not None]
    for parameters in (model.parameters(), qat_parameters(model)):
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
        for x in batches(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert all(torch.equal(q.base, b) for q, b in zip(quantizers(model), before, strict=True))
    assert not any(p is q.base for group in qat_parameters(model) for p in group["params"] for q in quantizers(model))


def test_a_weight_that_is_computed_is_not_converted() -> None:
    model = prepared("int8")
    prune.l1_unstructured(model[0], "weight", 0.5)
    train_a_little(model)
    with pytest.raises(ValueError, match="layer 0: weight must be a parameter, got one that is computed"):
        convert_(model)
    prune.remove(model[0], "weight")
    convert_(model)


@pytest.mark.parametrize("assign", [False, True])
def test_scales_stay_float32_where_a_state_is_half(assign: bool) -> None:
    model, resumed = prepared(), prepared(seed=1)
    train_a_little(model)
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    resumed.load_state_dict(state, assign=assign)
    x = batches(1)[0].to(resumed[0].weight.dtype)
    resumed(x)
    kept = [t for q in quantizers(resumed) for t in (*q.parameters(), *q.buffers()) if t.is_floating_point()]
    assert {t.dtype for t in kept} == {torch.float32}
