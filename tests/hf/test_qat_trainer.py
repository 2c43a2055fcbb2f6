"""Quantization-aware training with the Trainer of transformers: what it decays, checkpoints and resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib import convert_, prepare_qat_, qat_parameters
from quantlib.nn import FakeQuantize, QuantLinear
from quantlib.nn.observers import Observer

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

SPEC = "int8:row:affine@uint8:tensor:affine:static"
STEPS = 4


class Sentences(torch.utils.data.Dataset):
    """The same ones each time."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 32, (6,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def prepared() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_hidden_layers=2, max_position_embeddings=8, **sizes)
    model = transformers.LlamaForCausalLM(config)
    prepare_qat_(model, SPEC, lambda module, name: name != "lm_head", activation_scale="learned")
    return model


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    settings = transformers.TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(model, settings, train_dataset=Sentences(), eval_dataset=Sentences())


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def test_what_is_learned_of_scales_is_not_decayed(tmp_path: Path) -> None:
    model = prepared()
    learned = {id(p) for p in qat_parameters(model)[1]["params"]}
    assert len(learned) == 4 * 14
    of_trainer = trainer(model, tmp_path)
    decayed = of_trainer.get_decay_parameter_names(model)
    assert "model.layers.0.mlp.up_proj.weight" in decayed
    assert not [name for name in decayed if id(model.get_parameter(name)) in learned]
    groups = of_trainer.create_optimizer().param_groups
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {decays[i] for i in learned} == {0.0}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")  # the name that older versions know too
@pytest.mark.parametrize("reentrant", [True, False])
def test_it_trains_checkpointed_resumes_and_evaluates(reentrant: bool, tmp_path: Path) -> None:
    plain, checkpointed, resumed = prepared(), prepared(), prepared()
    trainer(plain, tmp_path / "plain").train()
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    of_checkpointed = trainer(checkpointed, tmp_path / "model", **options)
    of_checkpointed.train()
    assert not differing(plain, checkpointed)
    trainer(resumed, tmp_path / "model", **options).train(
        resume_from_checkpoint=str(tmp_path / "model" / f"checkpoint-{STEPS // 2}")
    )
    assert not differing(plain, resumed)
    assert {int(m.batches) for m in checkpointed.modules() if isinstance(m, Observer)} == {STEPS}
    of_checkpointed.evaluate()
    assert not [name for name in differing(plain, checkpointed) if "forwards" not in name]
    assert any((m.gain != 1).any() for m in checkpointed.modules() if isinstance(m, FakeQuantize))
    convert_(checkpointed)
    assert any(isinstance(module, QuantLinear) for module in checkpointed.modules())
