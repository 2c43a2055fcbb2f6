"""A plan beside measurements: bytes of files exactly, peaks as the CPU's allocator reports them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import quantlib
from quantlib.api import places_of, put
from quantlib.checkpoint import quantize_file, save_quantized
from quantlib.nn import LoRALinear, QuantLinear
from quantlib.optim import AdamW8bit, parameter_groups
from quantlib.plan import Plan, plan
from quantlib.plan.runs import training_step
from quantlib.plan.sizes import of_files
from quantlib.plan.source import source_of
from quantlib.spec import QuantSpec

transformers = pytest.importorskip("transformers")

BATCH, CONTEXT = 2, 96
CLOSE = 0.001  # of the measured peak: the bound that is promised is 0.03
TEXT = {
    "vocab_size": 500,
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
T5 = {"vocab_size": 500, "d_model": 128, "d_ff": 256, "num_layers": 1, "num_heads": 4, "d_kv": 32}


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT))  # type: ignore[no-any-return]


def t5() -> nn.Module:
    told = {**T5, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**told))  # type: ignore[no-any-return]


def mixture() -> nn.Module:
    told = {**TEXT, "num_local_experts": 4}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**told))  # type: ignore[no-any-return]


MODELS = {"llama": llama, "t5": t5, "mixture": mixture}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = MODELS[request.param]()
    return made.eval()


def measured(run: Callable[[], Any]) -> int:
    """The peak of what the CPU's allocator hands out while ``run`` runs, above what there was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        run()
    now = peak = 0
    for event in events.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def inputs(model: nn.Module) -> dict[str, Any]:
    ids = torch.randint(0, 500, (BATCH, CONTEXT))
    encodes = model.config.is_encoder_decoder  # type: ignore[union-attr]
    return {"input_ids": ids, "decoder_input_ids": ids.clone()} if encodes else {"input_ids": ids}


def planned(model: nn.Module, **options: Any) -> Plan:
    found = plan(model, context=CONTEXT, batch=BATCH, **options)
    assert not [why for why in found.missing if "activations" in why]
    return found


def close(predicted: float, found: float) -> None:
    assert abs(predicted / found - 1) < CLOSE, f"planned {predicted:,.0f}, measured {found:,.0f}"


@pytest.mark.parametrize("spec", [None, "W8A16", "W4A16", "W8A8", "uint8:group:32:affine"])
def test_the_peak_of_a_forward(model: nn.Module, spec: str | None) -> None:
    ran = copy.deepcopy(model)
    if spec is not None:
        quantlib.quantize_(ran, spec)
    given = inputs(ran) | {"use_cache": False}
    if not ran.config.is_encoder_decoder:  # type: ignore[union-attr]
        given["logits_to_keep"] = 1

    @torch.no_grad()
    def forward() -> None:
        ran(**given)

    forward()
    name = "as stored" if spec is None else str(QuantSpec.parse(spec))
    section = planned(model, to=[] if spec is None else [spec])[f"inference, {BATCH} x {CONTEXT} tokens"]
    close(section[name].parts["activations"], measured(forward))
    if spec is not None:
        state = {id(t): t.nbytes for t in (*ran.parameters(), *ran.buffers())}
        buffers = {id(t): t.nbytes for name, t in ran.named_buffers() if name not in ran.state_dict()}
        assert section[name].parts["weights"] == sum(state.values()) - sum(buffers.values())


def prepared(model: nn.Module, train: str) -> nn.Module:
    """``model``, as it is trained."""
    ran = copy.deepcopy(model)
    if train == "qat":
        quantlib.prepare_qat_(ran, "W8A8")
    if train == "lora":
        quantlib.quantize_(ran, "W4A16")
        ran.requires_grad_(False)
        places = places_of(ran)
        for layer in [m for m in ran.modules() if isinstance(m, QuantLinear)]:
            put(LoRALinear(layer, 8), layer, places)
    return ran.train()


TRAININGS = {
    "full": {"train": "full"},
    "checkpointing": {"train": "full", "checkpointing": True},
    "autocast": {"train": "full", "precision": "autocast"},
    "bfloat16": {"train": "full", "precision": "bfloat16"},
    "sgd": {"train": "full", "optimizer": "sgd"},
    "8-bit states": {"train": "full", "optimizer": "adamw8bit"},
    "lora": {"train": "lora", "to": ["W4A16"]},
    "qat": {"train": "qat", "to": ["W8A8"]},
}


@pytest.mark.parametrize("options", TRAININGS.values(), ids=TRAININGS)
def test_the_peak_of_a_training_step(model: nn.Module, options: dict[str, Any]) -> None:
    precision = options.get("precision")
    ran = prepared(model, options["train"])
    ran = ran.to(torch.bfloat16) if precision == "bfloat16" else ran
    autocast = torch.bfloat16 if precision == "autocast" else None
    step = training_step(ran, inputs(ran), bool(options.get("checkpointing")), autocast)
    learned = [p for p in ran.parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer
    if options.get("optimizer") == "adamw8bit":
        optimizer = AdamW8bit(parameter_groups(ran), lr=1e-4)
    else:
        kind = torch.optim.SGD if options.get("optimizer") == "sgd" else torch.optim.AdamW
        optimizer = kind(learned, lr=1e-4, foreach=False)

    def train() -> None:
        step(ran)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    train()  # the states are there from the first step on
    there = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(ran, optimizer)}
    section = next(s for s in planned(model, **options).sections if s.title.startswith("training"))
    parts = section["in all"].parts
    assert parts["gradients"] == sum(p.nbytes for p in learned)
    assert parts["weights"] + parts.get("optimizer", 0) == sum(there.values())
    close(section["in all"].value, sum(there.values()) + measured(train))


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return [*model.parameters(), *model.buffers(), *states]


def test_a_fault_in_the_tracker_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantlib.plan import fakes

    monkeypatch.setattr(fakes.Tracker, "_free", lambda self, size: None)
    with pytest.raises(AssertionError, match=r"^planned "):
        test_the_peak_of_a_forward(llama().eval(), None)


SPECS = (
    "W8A16",
    "W4A16",
    "W8A8",
    "uint8:group:32:affine",
    "float8_e4m3fn:row",
    "int8:tensor",
    "int8:tile:64",
    "int4:group:32:bfloat16",
    "nf4_bf16:group:64:bfloat16",
    "bfloat16",
)


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_of_files(tmp_path: Path, spec: str) -> None:
    model = MODELS["llama" if spec != "W8A16" else "t5"]()
    source, target = tmp_path / "in", tmp_path / "out"
    model.to(torch.bfloat16).save_pretrained(source)
    quantize_file(source, target, spec)
    (size,) = (path.stat().st_size for path in target.iterdir() if path.suffix == ".safetensors")
    found = plan(source, to=[spec], activations=False)
    line = next(line for line in found["weights"].lines if line.name.startswith(str(QuantSpec.parse(spec))))
    sizes = of_files(source_of(source), QuantSpec.parse(spec))
    assert line.value == sizes.weights
    assert sizes.files == size
    written = json.loads((target / "config.json").read_text())
    assert written["model_type"] == json.loads((source / "config.json").read_text())["model_type"]


def test_bytes_of_shards(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    llama().save_pretrained(source, max_shard_size="1MB")
    quantize_file(source, target, "W4A16")
    written = [path.stat().st_size for path in target.iterdir() if path.suffix == ".safetensors"]
    assert len(written) > 1
    assert of_files(source_of(source), QuantSpec.parse("W4A16")).files == sum(written)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bytes_of_a_model_that_is_saved(tmp_path: Path, name: str) -> None:
    model = MODELS[name]()
    found = plan(model, to=["W4A16"], activations=False)
    quantlib.quantize_(model, "W4A16")
    save_quantized(model, tmp_path / "model.safetensors")
    spec = str(QuantSpec.parse("W4A16"))
    line = next(line for line in found["weights"].lines if line.name.startswith(spec))
    size = (tmp_path / "model.safetensors").stat().st_size
    headers = int(line.formula.rpartition("headers are ")[2].split()[0].replace(",", ""))
    assert line.value + headers == size


def test_files_alone_are_enough_for_their_bytes(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    found = plan(tmp_path / "model.safetensors", to=["W8A16"])
    assert found["parameters"]["all"].value == sum(p.numel() for p in model.parameters())
    assert found.missing == ["activations, cache and training: a single file has no config.json"]
    (tmp_path / "config.json").unlink()
    without = plan(tmp_path, to=["W8A16"])
    assert without["weights"]["as stored"].value == found["weights"]["as stored"].value
    assert "has no config.json" in without.missing[0]


def test_an_unknown_architecture_falls_back_to_headers(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "nobody", "architectures": ["Nobody"]}))
    found = plan(tmp_path, to=["W8A16"], train="full", context=64)
    assert found["cache"]["a token, 16 bits"].value == 2 * 2 * 4 * 16 * 2
    assert any("does not know the model_type 'nobody'" in why for why in found.missing)
    assert any(why.startswith("training: no module") for why in found.missing)


def test_what_is_quantized_already_is_counted_by_its_floats(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "in")
    quantize_file(tmp_path / "in", tmp_path / "out", "W4A16")
    found = plan(tmp_path / "out", to=["W8A16"], activations=False)
    assert found["parameters"]["all"].value == sum(p.numel() for p in model.parameters())
    assert any("must hold float weights to be planned as int8:row" in why for why in found.missing)
