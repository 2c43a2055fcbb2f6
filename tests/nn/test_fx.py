"""torch.fx takes a quantized layer, or one that is trained as codes, as a leaf: one node that calls the module."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.nn import LoRALinear, QATLinear, QuantConv2d, QuantEmbedding, QuantLinear

LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Linear": (lambda: nn.Linear(8, 6), torch.randn(2, 3, 8)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), torch.randn(2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"), torch.randn(4, 9, 9)),
    "Embedding": (lambda: nn.Embedding(9, 8), torch.tensor([[0, 8, 3]])),
}
SPECS = ("int8:row", "int4:group:4", "bfloat16", "float8_e4m3fn:row")


def model(kind: str, spec: str, how: Callable[..., Any] = quantlib.quantize_) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[kind][0](), nn.Flatten(0), nn.ReLU())
    how(net, spec, types=[type(net[0])])
    return net.eval()


def assert_same(traced: nn.Module, net: nn.Module, x: Tensor) -> None:
    assert torch.equal(traced(x), net(x))


@pytest.mark.parametrize("how", [quantlib.quantize_, quantlib.prepare_qat_], ids=["quantized", "qat"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_one_node(kind: str, spec: str, how: Callable[..., Any]) -> None:
    net, x = model(kind, spec, how), LAYERS[kind][1]
    traced = torch.fx.symbolic_trace(net)
    assert_same(traced, net, x)
    node = next(n for n in traced.graph.nodes if n.op == "call_module")
    assert node.target == "0"
    assert traced.get_submodule("0") is net[0]
    assert list(node.meta["nn_module_stack"]) == ["0"]
    assert_same(torch.fx.symbolic_trace(traced), net, x)
    assert_same(copy.deepcopy(traced), net, x)
    assert torch.equal(torch.fx.Interpreter(traced).run(x), net(x))


@pytest.mark.parametrize("spec", ["int8:row@int8:row", "int8:row@int8:tensor"])
def test_a_traced_model_is_trained_and_converted(spec: str) -> None:
    net, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), LAYERS["Linear"][1]
    quantlib.prepare_qat_(net, spec)
    traced = torch.fx.symbolic_trace(net)
    traced(x).sum().backward()
    assert net[0].weight.grad is not None
    quantlib.convert_(traced)
    assert isinstance(traced.get_submodule("0"), QuantLinear)
    assert_same(torch.fx.symbolic_trace(traced), traced, x)


def test_a_traced_model_is_pickled() -> None:
    net, x = model("Linear", "int8:row"), LAYERS["Linear"][1]
    traced = torch.fx.symbolic_trace(net)
    assert_same(pickle.loads(pickle.dumps(traced)), net, x)
    file = io.BytesIO()
    torch.save(traced, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), net, x)


class Several(nn.Module):
    """A layer that is called twice, once by keyword, and one that is a leaf inside of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(input=x) + self.first(x).relu())


def test_keywords_hooks_and_calls_in_turn() -> None:
    net, x = Several().eval(), LAYERS["Linear"][1]
    quantlib.quantize_(net, "int8:row")
    net.first.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    net.first.register_forward_hook(lambda module, args, y: y + 1)  # once: where the graph runs, not where it is made
    traced = torch.fx.symbolic_trace(net)
    assert_same(traced, net, x)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["first", "first", "inner.0"]


def test_an_adapter_is_traced() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(QuantLinear.from_float(nn.Linear(8, 6), "int8:row"), rank=2)
    nn.init.normal_(layer.b)
    net, x = nn.Sequential(layer), LAYERS["Linear"][1]
    traced = torch.fx.symbolic_trace(net)
    assert_same(traced, net, x)
    traced(x).sum().backward()
    assert layer.a.grad is not None
    assert_same(torch.fx.symbolic_trace(layer), layer, x)


class OwnTracer(torch.fx.Tracer):
    """A tracer with leaves of its own, as those of quantization tools are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.ReLU)


class Running(torch.fx.Tracer):
    """A tracer that runs each module on values while it traces, as that of transformers did."""

    values = False

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.values else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(m, QuantLinear):
            self.values = True
            self.ran = forward(LAYERS["Linear"][1])
            self.values = False
        return super().call_module(m, forward, args, kwargs)


@pytest.mark.parametrize("tracer", [OwnTracer, Running])
def test_tracers_of_others(tracer: type[torch.fx.Tracer]) -> None:
    net, x = model("Linear", "int8:row"), LAYERS["Linear"][1]
    own = tracer()
    traced = torch.fx.GraphModule(net, own.trace(net))
    assert_same(traced, net, x)
    if isinstance(own, Running):
        assert torch.equal(own.ran, net[0](x))


def test_a_layer_alone() -> None:
    """A graph cannot call the module that it is of."""
    for layer in (
        QuantLinear.from_float(nn.Linear(8, 6), "int8"),
        QuantEmbedding.from_float(nn.Embedding(9, 8), "int8"),
        QuantConv2d.from_float(nn.Conv2d(4, 6, 3), "int8"),
    ):
        with pytest.raises(TypeError, match=r"layer must be inside of the model .* trace nn.Sequential\(layer\)"):
            torch.fx.symbolic_trace(layer)
    trained, x = QATLinear.from_float(nn.Linear(8, 6), "int8"), LAYERS["Linear"][1]
    assert_same(torch.fx.symbolic_trace(trained), trained, x)


def test_an_op_is_a_node_through_torch_ops() -> None:
    codes, scale = quantlib.quantize_dynamic(torch.randn(6, 8), "int8", block=(1, -1))

    def run(x: Tensor) -> Any:
        return torch.ops.quantlib.dequant_matmul(x, codes, scale, "int8", [1, 8])

    def public(x: Tensor) -> Any:
        return quantlib.dequant_matmul(x, codes, scale, "int8", block=(1, -1))

    x = LAYERS["Linear"][1]
    assert torch.equal(torch.fx.symbolic_trace(run)(x), public(x))
    with pytest.raises(RuntimeError, match="dequant_matmul: x must be a tensor, got Proxy"):
        torch.fx.symbolic_trace(public)


@pytest.mark.parametrize("how", [quantlib.quantize_, quantlib.prepare_qat_], ids=["quantized", "qat"])
def test_a_model_is_not_scripted_but_traced(how: Callable[..., Any]) -> None:
    for kind, (_, x) in LAYERS.items():
        net = model(kind, "int8:row", how)
        with pytest.raises(TypeError, match=r"without quantized layers, got a .*: use torch\.export\.export, or"):
            torch.jit.script(net)
        if how is quantlib.quantize_:
            assert_same(torch.jit.trace(net, x), net, x)


def test_fp8_is_not_traced() -> None:
    net = model("Linear", "fp8", quantlib.quantize_)
    with pytest.raises(RuntimeError, match=r"layer must have no codes of FP8 for torch\.jit\.trace, got float8_e4m3fn"):
        torch.jit.trace(net, LAYERS["Linear"][1])
