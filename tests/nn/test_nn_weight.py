"""layer.weight of a quantized layer: whoever reads it gets the weight, whoever writes to it an error, at no cost."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.utils import parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from quantlib import dequantize_, quantize_
from quantlib.nn import QUANTIZED, QuantLinear, QuantModule
from quantlib.nn.weight import DecodedWeight, QuantParameter

SPECS = ["int8", "uint8", "int4:group:8", "float8_e4m3fn", "float4_e2m1fn:group:8", "bfloat16", "float16:row", "W8A8"]
N, K = 12, 20


def layer(spec: str = "int8", dtype: torch.dtype = torch.float32) -> QuantLinear:
    torch.manual_seed(0)
    return QuantLinear.from_float(nn.Linear(K, N, dtype=dtype), spec)


READS: dict[str, Callable[[Any, Tensor], Any]] = {
    "x @ w.T": lambda w, x: x @ w.T,
    "F.linear": lambda w, x: F.linear(x, w),
    "w @ x.T": lambda w, x: w @ x.T,
    "sum": lambda w, x: w.sum(0),
    "norm": lambda w, x: torch.linalg.norm(w, dim=1),
    "rows": lambda w, x: w[:3] + 1,
    "columns": lambda w, x: w[:, 4:9].mean(),
    "lookup": lambda w, x: F.embedding(torch.tensor([1, 5]), w),
    "view": lambda w, x: w.view(-1)[7:9] * 2,
    "split": lambda w, x: w.split([5, 7])[1] + 0,
    "unbind": lambda w, x: w.unbind()[3] + 0,
    "expand": lambda w, x: w.expand(2, N, K).sum(0),
    "iterate": lambda w, x: torch.stack([row + 0 for row in w]),
    "data": lambda w, x: w.data.T + 0,
    "cast": lambda w, x: w.to(torch.float64),
    "stack": lambda w, x: torch.stack([w, w]),
    "vmap": lambda w, x: torch.vmap(lambda row: row.sum())(w),
    "numpy": lambda w, x: torch.from_numpy(np.asarray(w.float().numpy())),
    "list": lambda w, x: torch.tensor(w.tolist(), dtype=torch.float64),
    "clone": lambda w, x: w.clone(),
    "deepcopy": lambda w, x: copy.deepcopy(w),
    "format": lambda w, x: torch.tensor([float(f"{w[0, n]:.9e}") for n in range(K)]),
    "pickle": lambda w, x: pickle.loads(pickle.dumps(w)),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("spec", SPECS)
def test_whoever_reads_gets_the_weight(spec: str, read: str) -> None:
    q, x = layer(spec), torch.randn(3, K)
    assert torch.equal(READS[read](q.weight, x), READS[read](q.values(), x))


@pytest.mark.parametrize("float_type", [nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_it_looks_like_the_float_weight(float_type: type[nn.Module], dtype: torch.dtype, spec: str) -> None:
    sizes = (6, 4) if float_type in (nn.Linear, nn.Embedding) else (6, 4, 3)
    source = float_type(*sizes, dtype=dtype)
    q = QUANTIZED[float_type].from_float(source, spec)
    w, expected = q.weight, source.weight
    assert isinstance(expected, Tensor)
    assert (w.dtype, w.shape, w.device, w.stride()) == (dtype, expected.shape, expected.device, expected.stride())
    assert (w.numel(), w.dim(), w.element_size()) == (expected.numel(), expected.dim(), expected.element_size())
    assert isinstance(w, nn.Parameter)
    assert w.is_floating_point()
    assert not w.requires_grad
    assert torch.equal(w + 0, q.values(dtype))
    assert q.half().weight.dtype == torch.float16
    assert q.to("meta").weight.is_meta


WRITES: dict[str, Callable[[Any], Any]] = {
    "add_": lambda w: w.add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(N, K)),
    "copy_ into a view": lambda w: w.data[:2].copy_(torch.zeros(2, K)),
    "detach.zero_": lambda w: w.detach().zero_(),
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "into a view": lambda w: w[:2].add_(1),
    "into a transposed view": lambda w: w.T.mul_(2),
    "into a part": lambda w: w.chunk(2)[0].zero_(),
    "into a flat view": lambda w: w.view(-1)[3:5].fill_(0),
    "init": nn.init.normal_,
    "out=": lambda w: torch.mul(torch.ones(N, K), 2, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "resize_": lambda w: w.resize_(3),
    "set_": lambda w: w.set_(torch.zeros(2)),
    "a view's data": lambda w: setattr(w[:2], "data", torch.zeros(2, K)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("spec", ["int8", "int4:group:8", "bfloat16"])
def test_whoever_writes_gets_an_error(spec: str, write: str) -> None:
    q = layer(spec)
    before = q.values()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"weight must not be written to, .* use|set_weight_"):
        WRITES[write](q.weight)
    assert torch.equal(q.values(), before)


def test_what_a_tensor_without_memory_cannot_do() -> None:
    w = layer().weight
    for call in (w.data_ptr, w.storage, w.untyped_storage, w.share_memory_, lambda: w.apply_(abs)):
        with pytest.raises(RuntimeError, match=r"weight must be read by operations of torch, .* weight\.clone\(\)"):
            call()
    for call in (w.requires_grad_, lambda: nn.Parameter(w), lambda: setattr(w, "requires_grad", True)):
        with pytest.raises(RuntimeError, match="weight must not require a gradient, it is decoded from codes"):
            call()
    assert repr(w) == "DecodedWeight(shape=[12, 20], dtype=torch.float32, device='cpu')"


def test_assigning_a_weight() -> None:
    q = layer()
    with pytest.raises(RuntimeError, match=r"weight must not be assigned, .* set_weight_\(float_weight\) quantizes"):
        q.weight = nn.Parameter(torch.zeros(N, K))
    q.weight = q.weight  # tied to itself
    other = QuantLinear.from_float(nn.Linear(K, N), "int8")
    other.weight = q.weight
    assert other.weight_codes is q.weight_codes
    assert other.weight_scale is q.weight_scale
    with pytest.raises(ValueError, match=r"weight must be int8:row \[12, 20\] to be shared, got int4:row \[12, 20\]"):
        other.weight = layer("int4:row").weight


@pytest.mark.parametrize("spec", ["int8", "int4:group:8", "uint8", "W8A8", "bfloat16"])
def test_another_weight_is_quantized_into_the_layer(spec: str) -> None:
    q, w = layer(spec), torch.randn(N + 3, K)
    with pytest.raises(ValueError, match=rf"weight must be \[{N}, {K}\], got \[{N + 3}, {K}\]"):
        q.weight.data = w  # which the bias does not fit
    q.bias = None
    codes = q.weight_codes
    q.weight.data = w  # as transformers does where a table of tokens grows
    expected = QuantLinear.from_float(nn.Linear(K, N + 3), spec).set_weight_(w)
    assert q.weight_codes is codes
    assert q.out_features == N + 3
    assert torch.equal(q.weight_codes.view(torch.uint8), expected.weight_codes.view(torch.uint8))
    linear = nn.Linear(K, N + 3)
    linear.weight.data = w
    assert torch.equal(q.values(), QuantLinear.from_float(linear, spec).values())
    q.weight.data.copy_(2 * w[:1])  # as OFT of PEFT does where it is merged
    linear.weight.data.copy_(2 * w[:1])
    assert torch.equal(q.values(), QuantLinear.from_float(linear, spec).values())
    for wrong, message in (
        (torch.randn(N, K + 1), rf"weight must be \[N, {K}\], got \[{N}, {K + 1}\]"),
        (torch.full((N, K), torch.nan), "weight must be finite, got nan"),
        (torch.zeros(N, K, dtype=torch.int32), "weight must be a tensor of float32, float16 or bfloat16, got int32"),
        (torch.zeros(N, K).numpy(), "weight must be a tensor of float32, float16 or bfloat16, got ndarray"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            q.set_weight_(wrong)


class Caller(nn.Module):
    """Casts what it has to the dtype of the weight, as T5 and eighty others do."""

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.wo = layer(spec)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.wo(x.to(self.wo.weight.dtype))
        return y


@pytest.mark.parametrize("spec", ["int8", "int4:group:8", "float8_e4m3fn", "W8A8"])
def test_compiled_asking_for_the_dtype_costs_nothing(spec: str) -> None:
    torch._dynamo.reset()
    model, x, seen = Caller(spec), torch.randn(3, K, dtype=torch.float16), list[str]()

    def keep(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    assert torch.equal(compiled(x), model(x))
    assert not any("dequantize" in name for name in seen)
    assert sum("quantlib" in name for name in seen) == 1
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(exported(x), model(x))


def test_compiled_the_values_are_decoded() -> None:
    torch._dynamo.reset()
    q, x = layer(), torch.randn(3, K)
    compiled = torch.compile(lambda x: x @ q.weight.T, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), x @ q.values().T)


def test_gradients_pass_through_a_product_with_it() -> None:
    q, x = layer(), torch.randn(3, K, requires_grad=True)
    (dx,) = torch.autograd.grad((x @ q.weight.T).sum(), x)
    assert torch.equal(dx, torch.ones(3, N) @ q.values())


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_of_a_state_are_those_of_the_layer(spec: str) -> None:
    q = layer(spec)
    named = dict(q.named_parameters())
    assert {name: (t.dtype, t.shape) for name, t in q.state_dict().items()} == {
        name: (p.dtype, p.shape) for name, p in named.items()
    }
    x = torch.randn(3, K)
    assert torch.equal(torch.func.functional_call(q, q.state_dict(), (x,)), q(x))
    for name, tensor in q.state_dict().items():  # a running average of weights
        named[name].data.copy_(tensor)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_float_parameter_tells_the_dtype_of_the_model(spec: str, dtype: torch.dtype) -> None:
    def dtype_of(model: nn.Module) -> torch.dtype:
        return next(p.dtype for p in model.parameters() if p.is_floating_point())

    source = nn.Sequential(nn.Linear(K, N, bias=False), nn.LayerNorm(N)).to(dtype)
    quantize_(source, spec)
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    fresh = copy.deepcopy(source)
    fresh.load_state_dict(source.state_dict(), assign=True)
    copies = (copy.deepcopy(source), torch.load(file, weights_only=False), fresh, copy.deepcopy(source).to("meta"))
    for model in (source, *copies):
        assert dtype_of(model) == dtype
    assert dtype_of(source.half()) == torch.float16
    assert dtype_of(source.to("meta").to_empty(device="cpu")) == torch.float16


def test_requiring_gradients_of_a_whole_model() -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.LayerNorm(N))
    quantize_(model, "int8:row:affine")
    model.requires_grad_(False)
    model.requires_grad_(True)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"0.bias", "0.weight_scale", "1.weight", "1.bias"}
    assert all(isinstance(p, QuantParameter) for n, p in model[0].named_parameters() if n != "bias")


@pytest.mark.parametrize("spec", SPECS)
def test_parameters_are_loaded_as_weights_only(spec: str) -> None:
    q, file = layer(spec), io.BytesIO()
    torch.save(dict(q.named_parameters()), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert all(type(p) is type(loaded[name]) and torch.equal(p, loaded[name]) for name, p in q.named_parameters())


@pytest.mark.parametrize("how", ["swap_module_params_on_conversion", "overwrite_module_params_on_conversion"])
def test_the_other_ways_of_torch_to_convert_a_module(how: str) -> None:
    q = layer("int4:group:8")
    before = q.values()
    switch = getattr(torch.__future__, f"set_{how}")
    switch(True)
    try:
        q.half().load_state_dict(layer("int4:group:8").half().state_dict())
        assert q.float().bias.dtype == torch.float32
    finally:
        switch(False)
    assert torch.equal(q.values(), before)
    assert isinstance(q.weight_codes, QuantParameter)


@pytest.mark.parametrize("spec", SPECS)
def test_asking_for_gradients_one_by_one(spec: str) -> None:
    q = layer(spec)
    for p in q.parameters():
        p.requires_grad = True
    scales = {"weight_scale"} if q.weight_scale is not None else set()
    assert {name for name, p in q.named_parameters() if p.requires_grad} == {"bias"} | scales
    for p in q.parameters():
        p.requires_grad = False
    assert not any(p.requires_grad for p in q.parameters())


@pytest.mark.parametrize("spec", ["int8", "bfloat16", "W4A16"])
def test_what_was_frozen_is_frozen_as_floats(spec: str) -> None:
    """A layer that was frozen stays frozen as codes and as floats again, as the base of adapters has to."""

    def trains(change: Callable[[nn.Module], Any], after: Callable[[nn.Module], Any]) -> bool:
        model = nn.Sequential(nn.Linear(K, N))
        change(model)
        quantize_(model, spec)
        after(model)
        model = copy.deepcopy(model)
        assert not model[0].weight_codes.requires_grad
        dequantize_(model)
        return bool(model[0].weight.requires_grad)

    assert trains(nn.Module.train, nn.Module.eval)
    assert not trains(lambda m: m.requires_grad_(False), nn.Module.eval)
    assert not trains(nn.Module.train, lambda m: m.requires_grad_(False))
    assert trains(lambda m: m.requires_grad_(False), lambda m: m.requires_grad_(True))


@pytest.mark.parametrize("options", [{}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {"avg_fn": get_ema_avg_fn(0.9)}])
@pytest.mark.parametrize("spec", [*SPECS, "int8:row:affine"])
def test_a_running_average_of_a_model_leaves_codes_as_they_are(spec: str, options: dict[str, Any]) -> None:
    """torch averages integers by multiplying and cutting off, which takes 1 from many a code."""
    q = layer(spec)
    average, bias = AveragedModel(q, **options), q.bias.detach().clone()
    for _ in range(4):
        average.update_parameters(q)
        q.bias.data.add_(1)
    for name, tensor in average.module.state_dict().items():
        if name != "bias":
            torch.testing.assert_close(tensor, q.state_dict()[name])
    assert (average.module.bias > bias).all()


@pytest.mark.parametrize("spec", SPECS)
def test_an_optimizer_that_is_given_all_parameters_moves_no_codes(spec: str) -> None:
    q, x = layer(spec), torch.randn(5, K)
    optimizer, before = torch.optim.LBFGS(q.parameters(), lr=0.1), {n: t.clone() for n, t in q.state_dict().items()}

    def loss() -> Tensor:
        optimizer.zero_grad()
        y: Tensor = q(x).square().mean()
        y.backward()
        return y

    first = float(loss())
    optimizer.step(loss)  # type: ignore[no-untyped-call]
    assert float(loss()) < first
    assert all(torch.equal(t, before[n]) for n, t in q.state_dict().items() if n != "bias")
    if not q.weight_codes.dtype.is_floating_point:
        with torch.no_grad(), pytest.raises(TypeError, match="codes or zero points must not be trained"):
            q.weight_codes.add_(torch.ones(q.weight_codes.shape), alpha=0.1)


def test_codes_take_no_floats() -> None:
    q = layer("int4:group:8")
    before = q.values()
    flat = torch.nn.utils.parameters_to_vector(q.parameters())
    with pytest.raises(TypeError, match="data of codes or zero points must be uint8, got float32"):
        torch.nn.utils.vector_to_parameters(flat, q.parameters())
    with (
        torch.no_grad(),
        pytest.raises(TypeError, match=r"codes or zero points must be copied from .*, got float32 in"),
    ):
        q.weight_codes.copy_(q.weight_codes * 0.7)
    assert torch.equal(q.values(), before)
    assert type(q.state_dict()["weight_codes"]) is Tensor


@pytest.mark.parametrize("name", ["weight_codes", "weight_scale"])
@pytest.mark.parametrize(
    "change",
    [
        lambda q, name: prune.l1_unstructured(q, name, 0.5),
        lambda q, name: parametrize.register_parametrization(q, name, nn.Identity()),
        delattr,
        lambda q, name: setattr(q, name, None),
    ],
    ids=["pruned", "parametrized", "deleted", "None"],
)
def test_what_would_take_codes_or_scales_away_gets_an_error(change: Callable[[Any, str], Any], name: str) -> None:
    """A layer without its scales would multiply by codes."""
    q, x = layer(), torch.randn(2, K)
    names, y = list(q.state_dict()), q(x)
    with pytest.raises(RuntimeError, match=rf"{name}.* must .*dequantize_\(model\)"):
        change(q, name)
    assert type(q) is QuantLinear
    assert list(q.state_dict()) == names
    assert torch.equal(q(x), y)


def test_codes_without_a_scale_that_are_gone_are_named() -> None:
    q = layer("bfloat16")
    del q.weight_codes
    with pytest.raises(RuntimeError, match="weight_codes must be a parameter of the layer, got none"):
        q(torch.randn(2, K))


def test_a_scale_is_made_a_parameter_that_is_trained() -> None:
    q = layer()
    q.weight_scale = nn.Parameter(q.weight_scale)  # type: ignore[arg-type]
    q(torch.randn(2, K)).sum().backward()
    assert isinstance(q.weight_scale, QuantParameter)
    assert q.weight_scale.grad is not None


def test_a_layer_whose_bias_is_computed_is_not_dequantized() -> None:
    """Its class is that of the parametrization, and a float layer would have no bias."""
    model = nn.Sequential(layer(), nn.Linear(N, N))
    quantize_(model, "int8")
    parametrize.register_parametrization(model[0], "bias", nn.Identity())
    x = torch.randn(2, K)
    y = model(x)
    with pytest.raises(ValueError, match=r"layer 0: bias must be a parameter, got one that is computed: .*permanent"):
        dequantize_(model)
    assert torch.equal(model(x), y)
    parametrize.remove_parametrizations(model[0], "bias")
    assert dequantize_(model) == ["0", "1"]
    assert torch.allclose(model(x), y, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda q: prune.l1_unstructured(q, "weight", 0.5),
        lambda q: q.register_parameter("weight", nn.Parameter(torch.zeros(N, K))),
        lambda q: delattr(q, "weight"),
    ],
)
def test_what_would_take_the_weight_away_gets_an_error(change: Callable[[Any], Any]) -> None:
    q = layer()
    names = list(q.state_dict())
    with pytest.raises(RuntimeError, match=r"weight must not be .*, it is decoded from codes: .*dequantize_\(model\)"):
        change(q)
    assert list(q.state_dict()) == names


def test_a_subclass_of_a_float_module_is_asked_of_none() -> None:
    """The check of floats that are given codes leaves all other states alone."""
    source, target = nn.Linear(3, 3), nn.Linear(3, 3)
    target.load_state_dict(source.state_dict() | {"weight_codes_of_another": torch.zeros(1)}, strict=False)
    assert torch.equal(target.weight, source.weight)
    assert isinstance(QuantLinear(3, 3, spec="int8").weight, DecodedWeight)
    assert issubclass(QuantLinear, QuantModule)


@pytest.mark.parametrize("spec", ["int8", "uint8", "float8_e4m3fn", "int4:group:8:bfloat16", "float16"])
def test_a_parameter_is_made_anew_of_a_parameter(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = layer(spec).requires_grad_(False)
    for name, p in frozen.named_parameters():
        if name != "bias":
            assert isinstance(nn.Parameter(p, requires_grad=False), QuantParameter)
            assert isinstance(p.detach(), QuantParameter) != p.dtype.is_floating_point  # plain for `torch.func`
            new = QuantParameter(p, requires_grad=False)
            assert (new.data_ptr(), new.asked) == (p.data_ptr(), False)
    plain = nn.Module.register_parameter

    def register_anew(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        plain(module, name, param)
        if param is not None:  # as `init_empty_weights` of accelerate does
            words = vars(param) | {"requires_grad": param.requires_grad}
            module._parameters[name] = type(param)(param.to("meta"), **words)

    monkeypatch.setattr(nn.Module, "register_parameter", register_anew)
    skeleton = nn.Sequential(nn.Linear(K, N), nn.ReLU(), nn.Linear(N, N), nn.Linear(N, N))
    skeleton[3].weight = skeleton[2].weight
    quantize_(skeleton.requires_grad_(False), spec)
    assert all(isinstance(p, QuantParameter) for n, p in skeleton.named_parameters() if "bias" not in n)
    assert all(p.is_meta for p in skeleton.parameters())
    dequantize_(skeleton)
    assert not any(p.requires_grad for p in skeleton.parameters())


def test_a_pickle_remembers_that_no_gradient_was_asked_for() -> None:
    for asked in (True, False):
        model = nn.Sequential(layer()).requires_grad_(asked)
        file = io.BytesIO()
        torch.save(model[0].weight_codes, file)
        file.seek(0)
        assert torch.load(file, weights_only=True).asked is asked
        again = pickle.loads(pickle.dumps(model))
        dequantize_(again)
        assert again[0].weight.requires_grad is asked


def test_a_pickle_holds_scales_that_are_powers_of_two() -> None:
    q = layer("float4_e2m1fn:group:8:e8m0")
    for again in (pickle.loads(pickle.dumps(q)), copy.deepcopy(q)):
        assert torch.equal(again.values(), q.values())
        assert isinstance(again.weight_scale, QuantParameter)
    file = io.BytesIO()
    torch.save(q.state_dict(keep_vars=True), file)
    file.seek(0)
    q.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("spec", ["int8", "int4:group:8", "bfloat16"])
@pytest.mark.parametrize(
    "apply",
    [
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
        torch.nn.utils.parametrizations.weight_norm,
        torch.nn.utils.parametrizations.spectral_norm,
        torch.nn.utils.parametrizations.orthogonal,
        lambda m: parametrize.register_parametrization(m, "weight", nn.Identity()),
        lambda m: parametrize.register_parametrization(module=m, tensor_name="weight", parametrization=nn.Identity()),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_what_has_torch_compute_the_weight_is_refused_with_a_way_out(apply: Callable[[Any], Any], spec: str) -> None:
    q = layer(spec)
    before, kept = set(q.state_dict()), list(vars(q))
    with pytest.raises(RuntimeError, match=r"weight must not be computed from other tensors.*dequantize_"):
        apply(q)
    assert set(q.state_dict()) == before
    assert list(vars(q)) == kept
    plain = nn.Linear(K, N)
    apply(plain)  # a float layer takes it as before
    plain(torch.randn(2, K))


@pytest.mark.parametrize("rows", [N, N + 3, N - 2])
@pytest.mark.parametrize(
    "spec", [*SPECS, "W4A16", "uint8:tile:4", "int8:tile:5", "float8_e4m3fn:tile:4", "int4:group:8:affine"]
)
def test_rows_that_stay_keep_their_codes(spec: str, rows: int) -> None:
    torch.manual_seed(0)
    q = QUANTIZED[nn.Embedding].from_float(nn.Embedding(N, K), spec)
    before, w = copy.deepcopy(q), torch.randn(rows, K)
    kept, changed = min(rows, N), [2, 7]
    stay = [n for n in range(kept) if n not in changed]
    w[stay] = q.values()[stay]
    q.set_weight_(w)
    br = q.block[0]
    whole = [n for n in stay if n // br not in {m // br for m in changed} and (n // br + 1) * br <= kept]
    assert whole or br > 1
    for n in whole:
        assert torch.equal(q.plain.codes[n].view(torch.uint8), before.plain.codes[n].view(torch.uint8)), n
        if q.weight_scale is not None:
            assert torch.equal(q.weight_scale[n // br], before.weight_scale[n // br]), n
    assert torch.equal(q.values()[whole], before.values()[whole])
    error = (q.values() - w).abs().max()
    assert error < 2.5 * (QUANTIZED[nn.Embedding].from_float(embedding_of(w), q.spec).values() - w).abs().max() + 1e-6


def embedding_of(w: Tensor) -> nn.Embedding:
    return nn.Embedding.from_pretrained(w)
