"""quantize_ and dequantize_: which layers, in which order, and nothing at all when something is wrong."""

from __future__ import annotations

import copy
import gc
import json
import math
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib import dequantize_, prepare_qat_, quantize_
from quantlib.nn import QATLinear, QuantConv1d, QuantEmbedding, QuantLinear, functional
from quantlib.spec import QuantSpec
from quantlib.testing import assert_same_bytes

pytestmark = pytest.mark.usefixtures("device")


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.ReLU(), nn.Sequential(nn.Linear(24, 8, bias=False)))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = dict(model.named_parameters())
    same_names = before.keys() == after.keys()
    return same_names and all(torch.equal(before[n].nan_to_num(7), after[n].nan_to_num(7)) for n in before)


class Tied(nn.Module):
    """An embedding with a head of the same weight, and two layers that share theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.again = self.first
        self.head = nn.Linear(16, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.again(self.second(self.first(self.embedding(ids)))))
        return y


@pytest.mark.parametrize("words", ["W8A16", "W8A8", "W4A16", "fp8", torch.bfloat16, QuantSpec("int8", "group:16")])
def test_every_linear_is_replaced(words: object) -> None:
    model = mlp()
    expected = {name: QuantLinear.from_float(model.get_submodule(name), words) for name in ("0", "3.0")}  # type: ignore[arg-type]
    x = torch.randn(5, 40)
    before = model(x)
    report = quantize_(model, words)
    for name, layer in expected.items():
        new = model.get_submodule(name)
        assert isinstance(new, QuantLinear)
        assert new.spec == layer.spec
        assert torch.equal(new(x[:, : new.in_features]), layer(x[:, : new.in_features]))
    assert [layer.name for layer in report.layers] == ["0", "3.0"]
    assert report.skipped == {}
    assert (model(x) - before).norm() < 0.2 * before.norm()
    assert report.bytes_before == 4 * (40 * 24 + 24 * 8)
    assert report.bytes_after == sum(QuantSpec.parse(words).nbytes(shape) for shape in ((24, 40), (8, 24)))


def test_the_report_prints_as_a_table() -> None:
    report = quantize_(mlp(), "W8A16", lambda module, name: name == "0")
    assert str(report).splitlines() == [
        "layer            shape    format    bytes  to bytes          SNR dB",
        f"0                24 x 40  int8:row  3,840     1,056            {report.layers[0].snr_db:.1f}",
        "1 layers                            3,840     1,056  3.64 x smaller",
        "with the floats                     4,896     2,112  2.32 x smaller",
        "",
        "not quantized  parameters  because",
        "3.0            192         filter_fn said no",
        "",
        "78.4% of 1,224 parameters are quantized",
        "warning: only 78.4% of the parameters are quantized, the rest stay floats: 3.0 (192): filter_fn said no",
    ]
    assert json.loads(json.dumps(report.as_dict()))["layers"][0]["shape"] == [24, 40]


class Experts(nn.Module):
    """Experts as transformers keeps them: parameters with an axis of experts, of no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 16))
        self.act = nn.SiLU()


def test_layers_of_torch_without_a_form_are_named_with_the_reason() -> None:
    layers = [nn.GRU(4, 4), nn.GRUCell(4, 4), nn.EmbeddingBag(4, 4), nn.ConvTranspose2d(4, 4, 3), nn.Conv3d(4, 4, 3)]
    words = {
        "0.weight_ih_l0": "nn.GRU gives its weights to a kernel",
        "0.weight_hh_l0": "nn.GRU gives its weights to a kernel",
        "1.weight_ih": "nn.GRUCell gives its weights to a kernel",
        "1.weight_hh": "nn.GRUCell gives its weights to a kernel",
        "2": "nn.EmbeddingBag sums its rows in a kernel",
        "3": r"nn.ConvTranspose2d has its weight as [in, out, ...]",
        "4": "Conv3d has no quantized form",
    }
    model = nn.Sequential(*layers, nn.Linear(4, 4))
    for report in (quantize_(copy.deepcopy(model), "int8"), prepare_qat_(copy.deepcopy(model), "int8")):
        assert report.skipped.keys() == words.keys()
        assert all(report.skipped[name].startswith(why) for name, why in words.items())
    for layer in layers[:4]:
        with pytest.raises(ValueError, match=rf"to quantize, got 0.*nn\.{type(layer).__name__} "):
            quantize_(nn.Sequential(layer), "int8")
        with pytest.raises(ValueError, match=rf"types must be nn.Linear.*, got {type(layer).__name__}, which "):
            quantize_(model, "int8", types=[type(layer)])


def test_a_report_accounts_for_every_parameter(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict({
        "table": nn.Embedding(10, 16), "norm": nn.LayerNorm(16), "experts": Experts(), "rnn": nn.LSTM(16, 4),
        "q": nn.Linear(16, 16), "k": nn.Linear(16, 16, bias=False),
    })  # fmt: skip
    model["k"].weight = model["q"].weight
    report = quantize_(model, "int8")
    assert report.skipped == {
        "table": "an nn.Embedding, which types= does not name",
        "experts.gate_up_proj": "a parameter of Experts, which is not a layer that quantlib knows",
        "rnn.weight_ih_l0": "nn.LSTM gives its weights to a kernel of torch for all steps, which takes floats",
        "rnn.weight_hh_l0": "nn.LSTM gives its weights to a kernel of torch for all steps, which takes floats",
    }
    assert report.sizes == {"table": 160, "experts.gate_up_proj": 512, "rnn.weight_ih_l0": 256, "rnn.weight_hh_l0": 64}
    assert report.quantized == 256
    assert report.floats == 160 + 512 + 256 + 64 + 2 * 16 + 32 + 16
    assert report.coverage == 256 / (256 + report.floats)
    assert report.float_bytes == 4 * report.floats
    assert report.warning is not None
    assert "experts.gate_up_proj (512)" in report.warning
    assert report.warning in caplog.text
    again = quantize_(model, "int8", types=[nn.Linear, nn.Embedding])
    assert again.quantized == 256 + 160
    assert again.skipped["q"] == "already quantized to int8:row"
    assert [layer.name for layer in again.layers] == ["table"]


def test_no_warning_where_nearly_everything_is_quantized(caplog: pytest.LogCaptureFixture) -> None:
    report = quantize_(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), "int8")
    assert report.coverage > 0.9
    assert report.warning is None
    assert caplog.text == ""


def test_signal_to_noise() -> None:
    model = mlp()
    weight = model[0].weight.detach().double()
    report = quantize_(model, "int8")
    noise = model[0].values().double() - weight
    assert report.layers[0].snr_db == pytest.approx(10 * math.log10(weight.square().sum() / noise.square().sum()))
    assert report.worst in report.layers
    assert quantize_(mlp().bfloat16(), "bf16").layers[0].snr_db == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "spec", ["int8", "uint8", "W4A16", "int4:group:8:affine", "int8:tile:5", "int8:tensor", "fp8", "bf16"]
)
def test_values_are_seen_where_codes_are_made(spec: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "SLAB", 100)
    weight, parsed = torch.randn(17, 23).to(dtype), QuantSpec.parse(spec)
    xs, ys = [], []

    def seen(x: Tensor, part: functional.Weight, spec: QuantSpec) -> None:
        xs.append(x.clone())
        ys.append(functional.dequantize_weight(part, spec, 23, torch.float32))

    got, want = functional.quantize_weight(weight, parsed, seen), functional.quantize_weight(weight, parsed)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert_same_bytes(a, b)
    assert len(xs) > 1 or spec == "int8:tensor"
    assert torch.equal(torch.cat(xs), weight)
    assert torch.equal(torch.cat(ys), functional.dequantize_weight(want, parsed, 23, torch.float32))


def test_dequantize_restores_the_values() -> None:
    model = mlp()
    quantize_(model, "int8")
    quantized, x = copy.deepcopy(model), torch.randn(5, 40)
    assert dequantize_(model) == ["0", "3.0"]
    assert [type(m) for m in model.modules()].count(nn.Linear) == 2
    torch.testing.assert_close(model(x), quantized(x))  # the values, in the order of another sum
    assert dequantize_(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_of_another_dtype_stays_one(dtype: torch.dtype) -> None:
    model = mlp().to(dtype)
    quantize_(model, "int8")
    assert model(torch.randn(5, 40, dtype=dtype)).dtype == dtype
    dequantize_(model)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_changes_nothing(bad: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[3][0].weight[5, 7] = bad
        model[3][0].weight[6, 0] = bad
    before = state(model)
    with pytest.raises(
        ValueError, match=rf"weight of layer 3\.0 must be finite.*got {bad} in row 5 and in 1 more rows"
    ):
        quantize_(model, "int8")
    assert unchanged(model, before)
    report = quantize_(model, "int8", on_nonfinite="propagate")
    row = model[3][0].values()[5]
    assert row.isnan().all() if math.isnan(bad) else row[7] == math.copysign(127 * 2.0**120, bad)
    assert report.worst is not None
    assert report.worst.name == "3.0"


def test_a_cast_that_overflows_is_not_silent() -> None:
    model = mlp()
    with torch.no_grad():
        model[3][0].weight[2, 3] = 1e5
    before = state(model)
    with pytest.raises(ValueError, match=r"layer 3\.0 must be at most 65504 in magnitude.*got 100000 in row 2"):
        quantize_(model, "float16")
    assert unchanged(model, before)
    quantize_(model, "float16:row")
    assert float(model[3][0].values()[2, 3]) == pytest.approx(1e5, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "options", "error", "message"),
    [
        ("int9", {}, ValueError, "spec must be .* got 'int9'"),
        ("int8", {"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be raise or propagate, got 'ignore'"),
    ],
)
def test_refused_words(words: str, options: dict[str, str], error: type[Exception], message: str) -> None:
    model = mlp()
    before = state(model)
    with pytest.raises(error, match=message):
        quantize_(model, words, **options)  # type: ignore[arg-type]
    assert unchanged(model, before)


def test_refused_models() -> None:
    with pytest.raises(ValueError, match=r"got a single Linear: use QuantLinear\.from_float"):
        quantize_(nn.Linear(4, 4), "int8")
    with pytest.raises(ValueError, match="got a single QuantLinear"):
        dequantize_(QuantLinear(4, 4, spec="int8"))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        quantize_({}, "int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"model must have an nn\.Linear to quantize, got 0: an nn\.Conv1d, which"):
        quantize_(nn.Sequential(nn.Conv1d(2, 2, 1)), "int8")
    model = mlp().double()
    before = state(model)
    for verb in (quantize_, prepare_qat_):
        with pytest.raises(ValueError, match="its weight is of float64, not float32, float16 or bfloat16"):
            verb(model, "int8")
    assert unchanged(model, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("verb", [quantize_, prepare_qat_])
def test_a_layer_of_a_dtype_that_has_no_codes_stays_and_is_named(verb: Any, dtype: torch.dtype) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = weight = nn.Parameter(model["b"].weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"got a: filter_fn said no; b: its weight is of \w+, not float32, float16"):
        quantize_(model, "int8", lambda module, name: name == "b")
    report = verb(model, "int8")
    assert [layer.name for layer in report.layers] == ["a"]
    word = str(dtype).removeprefix("torch.")
    assert report.skipped == {"b": f"its weight is of {word}, not float32, float16 or bfloat16"}
    assert report.sizes == {"b": 64}
    assert model["b"].weight is weight


def test_a_weight_that_a_module_reads_from_elsewhere_stays_and_is_named() -> None:
    class Readers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third, self.free = (nn.Linear(8, 8) for _ in range(4))
            self.kept, self.named = [self.first.weight], {"w": self.second.weight}
            object.__setattr__(self, "alias", self.third.weight)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.kept[0].t() + self.first(x)

    model, x = Readers(), torch.randn(3, 8)
    expected = model(x)
    report = quantize_(model, "int4:row")
    held = "Readers holds its weight in its attribute"
    assert report.skipped == {
        "first": f"{held} kept, a list",
        "second": f"{held} named, a dict",
        "third": f"{held} alias",
    }
    assert [layer.name for layer in report.layers] == ["free"]
    assert torch.equal(model(x), expected)
    report = prepare_qat_(model, "int8")  # the parameters stay what they are
    assert [layer.name for layer in report.layers] == ["first", "second", "third"]


@pytest.mark.parametrize("spec", ["int8", "int4:group:8:affine", "W8A8", "float8_e4m3fn", "bfloat16"])
def test_a_default_device_that_is_not_the_models_changes_nothing(spec: str) -> None:
    """``with torch.device("meta")`` is where a skeleton is made; a model with values may be quantized there too."""
    expected, model = mlp(), mlp()
    quantize_(expected, spec)
    with torch.device("meta"):
        report = quantize_(model, spec)
    assert all(math.isfinite(layer.snr_db) for layer in report.layers)
    for name, tensor in expected.state_dict().items():
        assert_same_bytes(model.state_dict()[name], tensor, name)


def test_a_model_that_something_else_has_taken_apart_is_refused() -> None:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = nn.Sequential(nn.Linear(8, 8))
    for verb in (lambda m: quantize_(m, "int8"), dequantize_, lambda m: prepare_qat_(m, "int8")):
        with pytest.raises(
            ValueError, match=r"model must not hold a DistributedDataParallel, .*: this must come before"
        ):
            verb(wrapped)

    class FullyShardedDataParallel(nn.Sequential):  # the name of the older one of the two
        pass

    with pytest.raises(ValueError, match="model must not be sharded, got one that is at 0: this must come before"):
        quantize_(nn.Sequential(FullyShardedDataParallel(nn.Linear(8, 8))), "int8")


@pytest.mark.parametrize("words", ["int8", "W8A8", "int4:group:8", "bfloat16"])
def test_a_model_that_is_quantized_in_inference_mode_trains_outside_of_it(words: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    for verb in (lambda: quantize_(model, words), lambda: dequantize_(model)):
        with torch.inference_mode():
            verb()
            model(x)
        assert not any(p.is_inference() for p in model.parameters())
        model(x.clone().requires_grad_()).sum().backward()


def test_a_second_time_is_refused_with_the_reason() -> None:
    model = mlp()
    quantize_(model, "int8", lambda module, name: name == "0")
    report = quantize_(model, "int4")
    assert report.skipped == {"0": "already quantized to int8:row"}
    with pytest.raises(ValueError, match=r"3\.0: already quantized to int4:group:128"):
        quantize_(model, "int4")


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(10)
    before = model(ids)
    report = quantize_(model, "int8")
    assert [layer.name for layer in report.layers] == ["first"]
    assert report.skipped == {
        "head": "shares its weight with embedding.weight, which stays as it is: types= can name nn.Embedding too",
        "embedding": "an nn.Embedding, which types= does not name",
    }
    assert model.head.weight is model.embedding.weight
    assert model.again is model.first
    assert isinstance(model.second, QuantLinear)
    assert model.second.weight_codes is model.first.weight_codes
    assert model.second.weight_scale is model.first.weight_scale
    assert model.second.bias is not model.first.bias
    assert (model(ids) - before).norm() < 0.02 * before.norm()
    quantized = model(ids)
    assert dequantize_(model) == ["first", "second"]
    assert model.second.weight is model.first.weight
    assert model.again is model.first
    torch.testing.assert_close(model(ids), quantized)


def test_a_weight_shared_with_a_layer_that_is_left_out_stays() -> None:
    model = Tied()
    report = quantize_(nn.ModuleList([model, nn.Linear(4, 4)]), "int8", lambda module, name: name != "0.second")
    assert report.skipped["0.first"] == "shares its weight with 0.second.weight, which stays as it is"
    assert [layer.name for layer in report.layers] == ["1"]


@pytest.mark.parametrize("training", [True, False])
def test_layers_that_are_read_directly_are_left_alone(training: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 1), "head": nn.Linear(16, 4)}).train(training)
    x = torch.randn(2, 3, 16)
    report = quantize_(model, "int8")
    assert report.skipped == {
        "encoder.layers.0.self_attn.in_proj_weight": "nn.MultiheadAttention reads its weight directly",
        "encoder.layers.0.self_attn.out_proj": "nn.MultiheadAttention reads its weight directly",
        "encoder.layers.0.linear1": "nn.TransformerEncoderLayer reads its weight directly",
        "encoder.layers.0.linear2": "nn.TransformerEncoderLayer reads its weight directly",
    }
    with torch.no_grad():
        assert model["head"](model["encoder"](x)).shape == (2, 3, 4)


def test_layers_that_are_not_plain_are_left_alone() -> None:
    class Mine(nn.Linear):
        pass

    computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x  # type: ignore[method-assign, assignment]
    biased, prepared = nn.Linear(4, 4), QATLinear.from_float(nn.Linear(4, 4), "int4:row")
    nn.utils.parametrize.register_parametrization(biased, "bias", nn.Identity())
    model = nn.ModuleList([Mine(4, 4), computed, replaced, biased, prepared, nn.Linear(4, 4)])
    report = quantize_(model, "int8")
    assert list(report.skipped) == ["0", "1", "2", "3", "4"]
    assert {name: report.sizes[name] for name in "012"} == {
        "0": 16,
        "1": 16 + 4,
        "2": 16,
    }  # a norm has the magnitudes beside the directions
    assert "Mine, a subclass of nn.Linear" in report.skipped["0"]
    assert report.skipped["1"] == "its weight is computed from other parameters"
    assert report.skipped["2"] == "its forward has been replaced"
    assert report.skipped["3"] == "its bias is computed from other parameters"
    assert report.skipped["4"] == "already prepared for int4:row: convert_ makes its codes"


def test_hooks_and_modes_are_kept() -> None:
    model = mlp().eval()
    seen: list[str] = []
    handle = model[0].register_forward_hook(lambda *_: seen.append("after"))
    model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    quantize_(model, "int8")
    assert not model[0].training
    model(torch.randn(1, 40))
    assert seen == ["before", "after"]
    handle.remove()
    model(torch.randn(1, 40))
    assert seen == ["before", "after", "before"]


def test_float_layers_are_freed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    alive = [weakref.ref(layer.weight) for layer in model]
    counts: list[int] = []
    from_float = QuantLinear.from_float

    def counting(layer: nn.Linear, spec: object, **options: Any) -> QuantLinear:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        return from_float(layer, spec, **options)

    monkeypatch.setattr(QuantLinear, "from_float", counting)
    quantize_(model, "int8")
    assert counts == [6, 5, 4, 3, 2, 1]


def test_a_skeleton_on_meta() -> None:
    filled = mlp()
    quantize_(filled, "int4:group:8:affine")
    with torch.device("meta"):
        model = mlp()
    report = quantize_(model, "int4:group:8:affine")
    assert math.isnan(report.layers[0].snr_db)
    assert report.bytes_after == sum(QuantSpec.parse("int4:group:8:affine").nbytes(s) for s in ((24, 40), (8, 24)))
    model.load_state_dict(filled.state_dict(), assign=True)
    x = torch.randn(3, 40)
    assert torch.equal(model(x), filled(x))


def test_a_trained_bias_and_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = mlp()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(3, 40)
    compiled(x)
    quantize_(model, "int8")
    assert torch.equal(compiled(x), model(x))
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {"0.bias", "1.weight", "1.bias"}


class Mixed(nn.Module):
    """A layer of every type, one of them refused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(10, 16)
        self.bounded = nn.Embedding(10, 16, max_norm=1.0)
        self.line = nn.Conv1d(16, 16, 3, padding=1, groups=4)
        self.plane = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.line((self.table(ids) + self.bounded(ids)).mT)
        y: Tensor = self.head(self.plane(x.unsqueeze(-1)).flatten(2).mT)
        return y


TYPES = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


def test_types_that_are_asked_for() -> None:
    report = quantize_(Mixed(), "W8A8")
    assert [layer.name for layer in report.layers] == ["head"]
    assert report.skipped == {
        "table": "an nn.Embedding, which types= does not name",
        "bounded": "an nn.Embedding, which types= does not name",
        "line": "an nn.Conv1d, which types= does not name",
        "plane": "an nn.Conv2d, which types= does not name",
    }
    model, ids = Mixed(), torch.arange(10).reshape(2, 5)
    expected = model(ids)
    report = quantize_(model, "W8A8", types=TYPES)
    assert [(layer.name, layer.spec, layer.shape) for layer in report.layers] == [
        ("table", "int8:row", (10, 16)),
        ("line", "int8:row", (16, 4, 3)),
        ("plane", "int8:row", (16, 16, 1, 1)),
        ("head", "int8:row@int8:row", (10, 16)),
    ]
    assert report.skipped == {"bounded": "an nn.Embedding with max_norm=1.0"}
    assert all(layer.snr_db > 35 for layer in report.layers)
    y = model(ids)
    assert (y - expected).norm() < 0.03 * expected.norm()
    assert dequantize_(model) == ["table", "line", "plane", "head"]
    assert [type(m) for m in model.children()] == [nn.Embedding, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Linear]
    assert (model(ids) - y).norm() < 0.02 * y.norm()


def test_types_in_several_calls() -> None:
    model = Mixed()
    quantize_(model, "int4:group:8", types=[nn.Embedding])
    report = quantize_(model, "W8A16", types=[nn.Embedding, nn.Conv1d])
    assert [layer.name for layer in report.layers] == ["line"]
    assert report.skipped["table"] == "already quantized to int4:group:8"
    assert isinstance(model.table, QuantEmbedding)
    assert isinstance(model.line, QuantConv1d)
    assert type(model.plane) is nn.Conv2d


def test_types_that_there_are_not() -> None:
    known = "nn.Linear, nn.Embedding, nn.Conv1d or nn.Conv2d"
    with pytest.raises(ValueError, match=rf"types must be {known}, got Conv3d"):
        quantize_(Mixed(), "int8", types=[nn.Linear, nn.Conv3d])
    with pytest.raises(
        ValueError, match=r"model must have an nn.Embedding or nn.Conv1d to quantize, got .*an nn.Linear, which"
    ):
        quantize_(mlp(), "int8", types=[nn.Embedding, nn.Conv1d])
    with pytest.raises(ValueError, match=r"got a single Embedding: use QuantEmbedding\.from_float"):
        quantize_(nn.Embedding(3, 3), "int8", types=[nn.Embedding])


@pytest.mark.parametrize("words", ["W8A16", "W8A8", "bf16"])
def test_an_embedding_and_its_head_share_their_codes(words: str) -> None:
    model, ids = Tied(), torch.arange(10)
    report = quantize_(model, words, types=[nn.Linear, nn.Embedding])
    assert [layer.name for layer in report.layers] == ["embedding", "first"]
    assert isinstance(model.embedding, QuantEmbedding)
    assert isinstance(model.head, QuantLinear)
    assert model.head.spec == QuantSpec.parse(words)
    for name in ("weight_codes", "weight_scale"):
        assert getattr(model.head, name) is getattr(model.embedding, name)
    assert torch.equal(model.embedding(ids), model.head.values())
    names = ("embedding", "first", "second", "again", "head")
    assert {name for name in model.state_dict() if "codes" in name} == {f"{name}.weight_codes" for name in names}
    assert dequantize_(model) == ["embedding", "first", "second", "head"]
    assert model.head.weight is model.embedding.weight


def test_an_embedding_whose_head_stays_stays() -> None:
    model = Tied()
    report = quantize_(model, "int8", lambda module, name: name != "head", types=[nn.Linear, nn.Embedding])
    assert report.skipped == {
        "head": "filter_fn said no",
        "embedding": "shares its weight with head.weight, which stays as it is",
    }
    assert model.head.weight is model.embedding.weight


def test_a_weight_of_any_type_is_checked_first() -> None:
    model = Mixed()
    with torch.no_grad():
        model.plane.weight[3, 2] = math.nan
    before = state(model)
    with pytest.raises(ValueError, match=r"weight of layer plane must be finite, .* got nan in row 3"):
        quantize_(model, "int8", types=TYPES)
    assert unchanged(model, before)


def test_the_code_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, scope)
    assert {path.name for path in tmp_path.iterdir()} == {
        "model-int8.safetensors",
        "float.safetensors",
        "int4.safetensors",
        "float-again.safetensors",
        "layer.onnx",
    }


@pytest.mark.parametrize("call", [quantize_, prepare_qat_])
@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"types": nn.Linear}, TypeError, "types must be a list of nn.Linear, .*, got <class 'torch.nn.*Linear'>"),
        ({"types": "Linear"}, TypeError, "types must be a list of nn.Linear, .*, got 'Linear'"),
        ({"types": None}, TypeError, "types must be a list of nn.Linear, .*, got None"),
        ({"types": ()}, ValueError, "types must be at least one of nn.Linear, .*, got none"),
        ({"filter_fn": "0"}, TypeError, r"filter_fn must be a function \(module, name\) -> bool, got '0'"),
        ({"filter_fn": ["0"]}, TypeError, r"filter_fn must be a function .*, got \['0'\]"),
    ],
)
def test_what_selects_layers_is_checked(call: Any, options: Any, error: type[Exception], words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(error, match=words):
        call(model, "int8", **options)
    assert type(model[0]) is nn.Linear
