"""Models that transformers quantizes while it loads them, saves, and loads again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.nn import QuantModule
from quantlib.testing import assert_same_bytes

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from quantlib.hf import QuantlibConfig  # noqa: E402

SPECS = ("W8A16", "W8A8", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "int4:group:16:affine", "bfloat16")
DTYPES = (torch.float32, torch.bfloat16)
EVERY = (nn.Linear, nn.Embedding)
IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


def llama(tied: bool = False) -> Any:
    """The same small model each time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "max_position_embeddings": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=tied)).eval()


def saved(folder: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    llama(tied).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder: Path, config: QuantlibConfig | None = None, **options: Any) -> Any:
    options = options if config is None else {"quantization_config": config, **options}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        y: Tensor = model(input_ids=IDS).logits
    return y


def quantized_names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, QuantModule)}


@pytest.mark.parametrize("embeddings", [False, True], ids=["linear", "embeddings"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_quantized_while_loading_as_by_quantize_and_the_same_from_disk(
    spec: str, dtype: torch.dtype, tied: bool, embeddings: bool, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "floats", tied, dtype)
    include = ["lm_head"] if embeddings else []
    model = loaded(folder, QuantlibConfig(spec, embeddings=embeddings, include=include), dtype=dtype)
    names = quantized_names(model)
    assert len(names) == (16 if embeddings else 14)
    by_hand = loaded(folder, dtype=dtype)
    quantlib.quantize_(by_hand, spec, lambda module, name: name in names, types=EVERY)
    assert_same_bytes(logits(model), logits(by_hand))
    for number, source in enumerate((model, by_hand)):
        source.save_pretrained(tmp_path / str(number))
        again = loaded(tmp_path / str(number))
        assert quantized_names(again) == names
        assert again.dtype == dtype
        assert_same_bytes(logits(again), logits(model))
