"""`calibrate`: less error than `quantize_` in a model, in the same format; what it refuses, and what it names."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from defaults import default_dtype
from torch import Tensor, nn

import quantlib
from quantlib.calibration import model as model_module
from quantlib.calibration import stages
from quantlib.calibration.gptq import gptq
from quantlib.nn import QuantLinear

K = 48


class Block(nn.Module):
    """Hidden states and something else, which a chain hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, 2 * K), nn.Linear(2 * K, K)

    def forward(self, x: Tensor, gain: Tensor) -> tuple[Tensor, None]:
        return x + gain * self.down(torch.tanh(self.up(x))), None


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, K)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(K, 8)
        self.never = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, gain = self.first(x), torch.full((), 0.5)
        for block in self.blocks:
            x, _ = block(x, gain=gain)
        y: Tensor = self.head(x)
        return y


def inputs(n: int = 4, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(9)) ** 3  # a few directions have the energy
    return [torch.randn(8, 16, 16, generator=generator) @ mix for _ in range(n)]


def error(model: nn.Module, float_model: nn.Module) -> float:
    x = torch.cat(inputs(2, seed=1))
    with torch.no_grad():
        return float((model(x) - float_model(x)).square().mean())


@pytest.mark.parametrize("spec", ["int4:group:16", "float4_e2m1fn:group:16", "int4:group:16:affine"])
def test_less_error_than_quantize_in_the_same_format(spec: str) -> None:
    model, plain = Model(), Model()
    float_model = copy.deepcopy(model)
    report = quantlib.calibrate(model, inputs(), spec)
    quantlib.quantize_(plain, spec)
    assert error(model, float_model) < 0.8 * error(plain, float_model)
    assert {n: str(m) for n, m in model.named_modules()} == {n: str(m) for n, m in plain.named_modules()}
    state = plain.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in model.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    plain.load_state_dict(model.state_dict())
    assert error(plain, model) == 0
    assert [layer.name for layer in report.layers] == [
        "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "blocks.2.up", "blocks.2.down", "first", "head",
    ]  # fmt: skip
    assert all(layer.loss < layer.rounding and layer.tokens == 4 * 8 * 16 for layer in report.layers)


def test_a_layer_without_a_token_is_named_and_has_the_codes_of_quantize() -> None:
    model, plain = Model(), Model()
    report = quantlib.calibrate(model, inputs(1), "int4:group:16")
    quantlib.quantize_(plain, "int4:group:16")
    assert report.data_free == {"never": "no token reached it"}
    assert isinstance(model.never, QuantLinear)
    assert torch.equal(model.never.weight_codes, plain.never.weight_codes)  # type: ignore[arg-type]
    assert "no token reached it" in str(report)


def test_a_chain_is_run_block_by_block_on_what_came_out_of_the_quantized_ones() -> None:
    model, calls, seen = Model(), stages.calls_of(inputs(2), Model()), []

    def finish(grams: dict[str, stages.Gram]) -> None:
        seen.append((list(grams), {name: gram.H for name, gram in grams.items()}))
        if "blocks.0.up" in grams:
            with torch.no_grad():
                model.blocks[0].down.weight.zero_()  # as if it were quantized very badly
                model.blocks[0].down.bias.zero_()

    stages.run(model, calls, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)], finish)
    assert [names for names, _ in seen] == [
        *([f"blocks.{b}.up", f"blocks.{b}.down"] for b in range(3)),
        ["first", "head"],
    ]
    with torch.no_grad():
        x = model.first(torch.cat([c.args[0] for c in calls])).reshape(-1, K)
    for b in (0, 1):  # the first block gives its input on
        torch.testing.assert_close(seen[b][1][f"blocks.{b}.up"], x.T @ x, rtol=1e-4, atol=1e-2)


class Twice(nn.Module):
    """A model that is no chain: the second call of a block is given the sum of two results."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.parts[1](self.parts[0](x) + x)
        return y


def test_any_other_model_is_run_whole() -> None:
    model = Twice()
    assert stages.chained(model, list(model.parts), stages.calls_of(inputs(1), model)) is None
    float_model, plain = copy.deepcopy(model), copy.deepcopy(model)
    quantlib.calibrate(model, inputs(), "int4:group:16")
    quantlib.quantize_(plain, "int4:group:16")
    assert error(model, float_model) < error(plain, float_model)


def test_a_sequential_and_batches_of_each_kind() -> None:
    states = []
    for kind in (lambda x: x, lambda x: (x,), lambda x: {"input": x}):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
        quantlib.calibrate(model, (kind(x) for x in inputs(2)), "int4:group:16")
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], states[0][name]) for name in states[0])


def test_shared_weights_share_codes_and_specs_may_be_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4))
    model[2].weight = model[0].weight
    report = quantlib.calibrate(model, inputs(1), {"0": "int8:row", "2": "int8:row"})
    assert model[0].weight_codes is model[2].weight_codes
    assert type(model[3]) is nn.Linear
    assert report.report.skipped["3"] == "spec does not name it"


def test_weights_without_a_scale_and_activations() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    report = quantlib.calibrate(model, inputs(1), {"0": "bfloat16", "1": "W8A8"})
    assert report.data_free == {"0": "bfloat16 has no scale"}
    assert model[1].kernel == "dynamic_matmul"


class InterruptError(Exception):
    pass


@pytest.mark.parametrize("stages_done", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    stages_done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Model()
    expected = quantlib.calibrate(whole, inputs(1), "int4:group:16:affine")
    rounded: list[int] = []

    def stops(*args: Any) -> Any:
        if len(rounded) == 2 * stages_done + 1:
            raise InterruptError
        rounded.append(1)
        return gptq(*args)

    monkeypatch.setattr(model_module, "gptq", stops)
    with pytest.raises(InterruptError):
        quantlib.calibrate(Model(), inputs(1), "int4:group:16:affine", folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == stages_done

    def counts(*args: Any) -> Any:
        rounded.append(1)
        return gptq(*args)

    monkeypatch.setattr(model_module, "gptq", counts)
    rounded.clear()
    model = Model()
    report = quantlib.calibrate(model, inputs(1), "int4:group:16:affine", folder=tmp_path)
    assert len(rounded) == 2 * (4 - stages_done)
    assert report.layers == expected.layers
    state = whole.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_the_layers_of_another_run_are_not_taken(tmp_path: Path) -> None:
    quantlib.calibrate(Model(), inputs(1), "int4:group:16", folder=tmp_path)
    (tmp_path / "0001.safetensors").write_bytes(b"not whole")
    for batches, spec in ((inputs(1, seed=3), "int4:group:16"), (inputs(1), "float4_e2m1fn:group:16")):
        model, alone = Model(), Model()
        quantlib.calibrate(model, batches, spec, folder=tmp_path)
        quantlib.calibrate(alone, batches, spec)
        state = alone.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_the_mode_and_what_a_hook_sees_stay() -> None:
    model, seen = Model().train(), []
    model.blocks[0].up.register_forward_hook(lambda *_: seen.append(1))
    quantlib.calibrate(model, inputs(1), "int8:row")
    assert all(module.training for module in model.modules())
    before = len(seen)
    model(inputs(1)[0])
    assert len(seen) == before + 1


@pytest.mark.parametrize(
    ("batches", "error_type", "message"),
    [
        ([], ValueError, "inputs must hold at least one batch, got none"),
        ("text", TypeError, "inputs must be an iterable of batches, got str"),
        ([3.0], TypeError, "inputs must be tensors, tuples or mappings, got float in batch 0"),
        (
            [torch.zeros(2, 16, dtype=torch.float64)],
            ValueError,
            "inputs must be of float32, as the model is, got float64",
        ),
        ([torch.zeros(2, 16), torch.full((2, 16), torch.nan)], ValueError, "inputs must be finite, got nan in batch 1"),
    ],
)
def test_inputs_that_are_refused_leave_the_model_as_it_was(
    batches: Any, error_type: type[Exception], message: str
) -> None:
    model = Model()
    with pytest.raises(error_type, match=message):
        quantlib.calibrate(model, batches)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rounding"}, "method must be gptq, awq, smoothquant, .* got 'rounding'"),
        ({"damping": 0}, "damping must be a number > 0, got 0"),
        ({"spec": "int5"}, "spec must be"),
        ({"spec": "int8@int8:tensor:static"}, "spec must have activations whose scales follow the input"),
        ({"spec": {"nothing": "int8"}}, "spec must name layers of the model that can be quantized, got 'nothing'"),
        ({"filter_fn": lambda module, name: False}, "model must have an nn.Linear to quantize, got none"),
    ],
)
def test_arguments_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantlib.calibrate(Model(), inputs(1), **options)


def test_activations_that_overflow_are_named() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight.mul_(1e20)
    with pytest.raises(ValueError, match="layer 1: inputs must leave sums of squares that are finite"):
        quantlib.calibrate(model, [x * 1e10 for x in inputs(1)], "int8:row")


def test_a_language_model_of_transformers_with_a_cache() -> None:
    transformers = pytest.importorskip("transformers", reason="a Llama of transformers: not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(64, (4, 32))
    float_model, plain = copy.deepcopy(model), copy.deepcopy(model)
    report = quantlib.calibrate(
        model, [row[None] for row in tokens], "int4:group:16", filter_fn=lambda m, n: n != "lm_head"
    )
    assert [layer.name.split(".")[2] for layer in report.layers] == [b for b in "012" for _ in range(7)]
    assert model.config.use_cache
    quantlib.quantize_(plain, "int4:group:16", lambda module, name: name != "lm_head")
    losses = [quantlib.evaluate(m, float_model, tokens).kl.mean for m in (model, plain)]
    assert losses[0] < losses[1]


def test_a_bias_takes_the_mean_of_the_error() -> None:
    torch.manual_seed(0)
    x = inputs(1)[0].flatten(0, 1) + 2
    layer = nn.Linear(16, 24)
    for correct_bias in (True, False):
        model = nn.Sequential(copy.deepcopy(layer))
        report = quantlib.calibrate(model, [x], "int4:row", correct_bias=correct_bias)
        with torch.no_grad():
            off = (model(x) - layer(x)).mean(0).abs().max() / (model(x) - layer(x)).abs().max()
        assert (off < 1e-5) == correct_bias
        assert torch.equal(model[0].bias, layer.bias) != correct_bias
        assert report.biased == (["0"] if correct_bias else [])


def test_a_bias_that_is_not_a_layers_own_stays() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.Linear(16, 4, bias=False))
    model[2].bias = model[0].bias
    before = model[0].bias.detach().clone()
    report = quantlib.calibrate(model, inputs(1), "int4:row")
    assert report.biased == []
    assert torch.equal(model[0].bias, before)
    assert model[2].bias is model[0].bias
    assert model[3].bias is None


def test_a_bias_of_a_model_that_was_made_without_gradients() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    bias = model[0].bias
    assert quantlib.calibrate(model, inputs(1), "int4:row").biased == ["0", "1"]
    assert model[0].bias is bias


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_no_code(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    b, xs = copy.deepcopy(a), inputs()
    quantlib.calibrate(a, xs, "int4:group:8")
    with default_dtype(dtype):
        quantlib.calibrate(b, xs, "int4:group:8")
    assert torch.equal(a(xs[0]), b(xs[0]))
