"""A layer that is replaced keeps what hung on it: hooks, buffers, attributes, submodules, and how it is called."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib import convert_, dequantize_, prepare_qat_, quantize_
from quantlib.nn import QuantLinear

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(8, 8), lambda: torch.randn(2, 8)),
    "embedding": (lambda: nn.Embedding(8, 8), lambda: torch.arange(4)),
    "conv1d": (lambda: nn.Conv1d(8, 8, 3, padding=1, padding_mode="reflect"), lambda: torch.randn(2, 8, 9)),
    "conv2d": (lambda: nn.Conv2d(8, 8, (3, 1), groups=2, dilation=2), lambda: torch.randn(2, 8, 9, 9)),
}


def model_of(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(LAYERS[name][0]())


def quantized(model: nn.Module) -> None:
    quantize_(model, "int8", types=[type(model[0])])  # type: ignore[index]


def there_and_back(model: nn.Module) -> None:
    quantized(model)
    dequantize_(model)


def prepared(model: nn.Module) -> None:
    prepare_qat_(model, "int8", types=[type(model[0])])  # type: ignore[index]


VERBS = {"quantize_": quantized, "dequantize_": there_and_back, "prepare_qat_": prepared}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", LAYERS)
def test_buffers_attributes_and_submodules_stay(name: str, verb: str) -> None:
    model, x = model_of(name), LAYERS[name][1]()
    layer: Any = model[0]
    layer.register_buffer("mask", torch.ones(8))
    layer.register_buffer("unsaved", torch.zeros(1), persistent=False)
    layer.add_module("act", nn.ReLU())
    layer.tag, layer.settings = "router", {"top": 2}
    settings = layer.settings
    expected = model(x)
    VERBS[verb](model)
    new: Any = model[0]
    assert new is not layer
    assert torch.equal(new.mask, layer.mask)
    assert "0.mask" in model.state_dict()
    assert "0.unsaved" not in model.state_dict()
    assert new.act is layer.act
    assert new.tag == "router"
    assert new.settings is settings
    assert (model(x) - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("name", LAYERS)
def test_a_trained_layer_keeps_them_to_the_end(name: str) -> None:
    model, x = model_of(name), LAYERS[name][1]()
    model[0].register_buffer("mask", torch.ones(8))
    prepared(model)
    model(x)
    convert_(model)
    assert torch.equal(model[0].mask, torch.ones(8))  # type: ignore[arg-type]
    assert not [name for name, _ in model[0].named_modules() if "quantizer" in name]
    assert vars(model[0]).keys() <= vars(type(model[0]).from_float(LAYERS[name][0](), "int8")).keys()  # type: ignore[attr-defined]


HOOKS = (
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_hooks_of_every_kind_stay_and_can_be_removed(name: str, verb: str) -> None:
    model, x = model_of(name), LAYERS[name][1]()
    seen: dict[str, nn.Module] = {}
    handles = [getattr(model[0], kind)(lambda module, *_, kind=kind: seen.update({kind: module})) for kind in HOOKS]
    VERBS[verb](model)

    def exercise() -> set[str]:
        seen.clear()
        model(x.requires_grad_()).sum().backward()
        model.load_state_dict(model.state_dict())
        return set(seen)

    assert exercise() == set(HOOKS)
    assert all(module is model[0] for module in seen.values())
    for handle in handles:
        handle.remove()
    assert exercise() == set()


def test_a_hook_with_keywords_and_one_that_is_called_first() -> None:
    model, order = model_of("linear"), list[str]()
    model[0].register_forward_pre_hook(lambda m, args, kwargs: order.append("kwargs"), with_kwargs=True)
    model[0].register_forward_hook(lambda m, a, y: order.append("last"))
    model[0].register_forward_hook(lambda m, a, y: order.append("first"), prepend=True)
    quantized(model)
    model[0](input=torch.randn(2, 8))
    assert order == ["kwargs", "first", "last"]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_keyword_of_a_call_is_that_of_the_float_layer(name: str, verb: str) -> None:
    model, x = model_of(name), LAYERS[name][1]()
    VERBS[verb](model)
    assert torch.equal(model[0](input=x), model[0](x))


def test_an_attribute_that_a_quantized_layer_needs_itself_keeps_a_layer_float() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].spec = "mine"  # type: ignore[assignment]
    report = quantize_(model, "int8")
    assert report.skipped == {"0": "it has an attribute spec of its own"}
    assert model[0].spec == "mine"


def test_a_single_layer_takes_over_what_the_float_one_has_and_leaves_it_alone() -> None:
    layer = nn.Linear(8, 8)
    layer.register_buffer("mask", torch.ones(8))
    calls: list[nn.Module] = []
    layer.register_forward_hook(lambda module, *_: calls.append(module))
    q = QuantLinear.from_float(layer, "int8")
    q.register_forward_hook(lambda module, *_: calls.append(module))
    x = torch.randn(2, 8)
    q(x)
    assert calls == [q, q]
    layer(x)
    assert calls == [q, q, layer]
    assert isinstance(layer.weight, nn.Parameter)
    q.mask = torch.zeros(8)
    assert torch.equal(layer.mask, torch.ones(8))  # type: ignore[arg-type]


def accelerate_hooks() -> Any:
    return pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")


@pytest.mark.parametrize("verb", VERBS)
def test_a_forward_that_accelerate_replaced_runs_its_hook_around_the_new_layer(verb: str) -> None:
    hooks = accelerate_hooks()

    class Doubled(hooks.ModelHook):  # type: ignore[misc, name-defined]
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output * 2

    model, x = model_of("linear"), torch.randn(2, 8)
    plain = model_of("linear")
    VERBS[verb](plain)
    hooks.add_hook_to_module(model[0], Doubled())
    VERBS[verb](model)
    assert torch.equal(model(x), plain(x) * 2)
    hooks.remove_hook_from_module(model[0])
    assert torch.equal(model(x), plain(x))


def test_a_weight_that_accelerate_has_offloaded_is_left_alone() -> None:
    accelerate_hooks()
    import accelerate

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    accelerate.cpu_offload(model[0], torch.device("cpu"))
    report = quantize_(model, "int8")
    assert report.skipped == {"0": "accelerate has offloaded its weight: quantize the model before it is dispatched"}
    assert model(torch.randn(2, 8)).shape == (2, 8)


class Owner(nn.Module):
    """Writes itself what torch's own owners write: reads the weight of a layer that it also calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) + self.layer.weight[: x.shape[0]]
        return y


@pytest.mark.parametrize("spec", ["int8", "int4:group:8", "float8_e4m3fn"])
def test_an_owner_that_reads_the_weight_gets_values(spec: str) -> None:
    torch.manual_seed(0)
    model, x = Owner(), torch.randn(4, 8)
    quantize_(model, spec)
    y = model(x)
    dequantize_(model)
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)


class Holder(nn.Module):
    """Calls its layer by something else than the name of the submodule."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8, bias=False)
        self.how = how
        self.layers, self.by_name, self.nested = [self.fc], {"fc": self.fc}, {"all": [[self.fc]]}
        vars(self)["alias"] = self.fc
        if how == "tuple":
            self.fixed = (self.fc,)
        elif how == "method":
            self.call = self.fc.forward
        elif how == "partial":
            self.call = functools.partial(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        ways: dict[str, Callable[[], Any]] = {
            "list": lambda: self.layers[0],
            "dict": lambda: self.by_name["fc"],
            "nested": lambda: self.nested["all"][0][0],
            "attribute": lambda: self.alias,
            "tuple": lambda: self.fixed[0],
        }
        y: Tensor = ways.get(self.how, lambda: self.call)()(x)
        return y


@pytest.mark.parametrize("how", ["list", "dict", "nested", "attribute"])
def test_a_layer_is_replaced_wherever_its_owner_holds_it(how: str) -> None:
    model, x = Holder(how), torch.randn(2, 8)
    expected = model(x)
    quantize_(model, "int8")
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
    model.fc.weight_codes.data.zero_()
    assert not model(x).any()
    dequantize_(model)
    model.fc.weight.data.fill_(1)
    assert torch.equal(model(x), nn.functional.linear(x, torch.ones(8, 8)))


@pytest.mark.parametrize("how", ["tuple", "method", "partial"])
def test_a_layer_that_would_still_be_called_stays(how: str) -> None:
    model = nn.Sequential(Holder(how), nn.Linear(8, 8))
    name = "fixed" if how == "tuple" else "call"
    assert quantize_(model, "int8").skipped["0.fc"] == f"Holder holds it in its attribute {name}, a {how}"
    assert type(model[0].fc) is nn.Linear


@pytest.mark.parametrize("verb", VERBS)
def test_a_compiled_layer_computes_with_what_took_its_place(verb: str) -> None:
    torch._dynamo.reset()
    model, x = nn.Sequential(torch.compile(nn.Linear(8, 8, bias=False), backend="eager"), nn.ReLU()), torch.randn(2, 8)
    model(x)
    if verb == "prepare_qat_":
        prepare_qat_(model, "int8")
    else:
        quantize_(model, "int8")
        model(x)
    if verb == "dequantize_":
        dequantize_(model)
    new: Any = model[0]
    torch._dynamo.reset()
    new._orig_mod.forward = torch.zeros_like
    assert not model(x).any()


def test_a_layer_that_was_compiled_in_place() -> None:
    """``layer.compile()`` leaves a call of that very layer on it."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8)
    model[0].compile(backend="eager")
    report = quantize_(model, "int8")
    assert report.skipped == {"0": "it has been compiled: quantize the model before layer.compile()"}
    model[1].compile(backend="eager")
    y = model(x)
    dequantize_(model)
    torch.testing.assert_close(model(x), y)
    model[1].weight.data.zero_()
    assert torch.equal(model(x), model[1].bias.expand(2, 8))


def test_a_weight_of_another_layout_stays() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].weight = nn.Parameter(torch.eye(8).to_sparse())
    assert quantize_(model, "int8").skipped == {"0": "its weight has the layout sparse_coo"}


def test_layers_without_a_shape_and_scripted_ones_are_named() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    assert quantize_(lazy, "int8").skipped == {"0": "its weight has no shape before the first forward"}
    lazy(torch.randn(2, 5))
    assert len(quantize_(lazy, "int8").layers) == 1
    with pytest.raises(ValueError, match=r"nn.Linear to quantize, got 0: RecursiveScriptModule has no quantized form"):
        quantize_(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), "int8")
