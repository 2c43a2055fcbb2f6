"""Small models of transformers' architectures with random weights, and what quantizing them gives.

``PYTHONPATH=tests python -m architectures docs/models.md`` runs every architecture with every spec, and writes the
table into the document.
"""

from __future__ import annotations

import copy
import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when transformers is imported

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import quantlib
from quantlib import ops
from quantlib.nn import QuantModule
from quantlib.report import Report
from quantlib.spec import QuantSpec
from quantlib.testing import assert_same_bytes

SPECS = ("W8A16", "W8A8", "W4A16", "float8_e4m3fn:row", "uint8:row:affine", "bfloat16")
LINEAR = (nn.Linear,)
EVERY = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, Conv1D)

TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GQA = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
MOE = {**GQA, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
T5: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "eos_token_id": None,
}
BART: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 1,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
WAVES: dict[str, Any] = {
    **TEXT,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
    "apply_spec_augment": False,
}


def tokens(count: int = 9) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, 96, (2, count))}


def both() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, 96, (2, 5))}


def image(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def wave(length: int = 400) -> dict[str, Tensor]:
    return {"input_values": torch.randn(2, length)}


@dataclass(frozen=True)
class Architecture:
    """One kind of model: the class of transformers, its configuration, and what it is called with."""

    name: str
    model: str  # the class
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], dict[str, Tensor]] = tokens
    generates: bool = False
    every_spec: bool = False  # in `make test` too: its code asks a weight for its dtype
    parts: Callable[[Any], dict[str, Any]] = lambda transformers: {}  # configurations inside of the configuration

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options, **self.parts(transformers))
        model: nn.Module = getattr(transformers, self.model)(config).eval()
        for module in model.modules():  # what begins as zeros or ones would hide what is done to it
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) and module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        return model

    @functools.cached_property
    def base(self) -> nn.Module:
        return self.build()

    @functools.cached_property
    def given(self) -> dict[str, Tensor]:
        torch.manual_seed(1)
        return self.inputs()


def causal(name: str, stem: str, options: dict[str, Any], **more: Any) -> Architecture:
    return Architecture(name, f"{stem}ForCausalLM", f"{stem}Config", options, generates=True, **more)


def seq2seq(name: str, stem: str, options: dict[str, Any], **more: Any) -> Architecture:
    given = {"inputs": both, "generates": True, **more}
    return Architecture(name, f"{stem}ForConditionalGeneration", f"{stem}Config", options, **given)


ARCHITECTURES = (
    causal("Llama", "Llama", {**GQA, "tie_word_embeddings": False}),
    causal("Llama, tied", "Llama", {**GQA, "tie_word_embeddings": True}),
    causal("Mistral", "Mistral", GQA),
    causal("Qwen2", "Qwen2", GQA),
    causal("Qwen3", "Qwen3", GQA),
    causal("Phi-3", "Phi3", GQA),
    causal("Gemma 2", "Gemma2", {**GQA, "query_pre_attn_scalar": 8}),
    Architecture(
        "Gemma 3", "Gemma3ForCausalLM", "Gemma3TextConfig", {**GQA, "query_pre_attn_scalar": 8}, tokens, True, True
    ),
    Architecture(
        "GPT-2", "GPT2LMHeadModel", "GPT2Config", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4}, tokens, True
    ),
    causal("GPT-J", "GPTJ", {**TEXT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}),
    causal("GPT-Neo", "GPTNeo", {**TEXT, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}),
    causal("GPT-NeoX", "GPTNeoX", TEXT),
    causal("OPT", "OPT", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    causal("BLOOM", "Bloom", {**TEXT, "n_layer": 2, "n_head": 4}),
    causal("Falcon", "Falcon", TEXT, every_spec=True),
    causal("Mamba", "Mamba", {**TEXT, "state_size": 4, "time_step_rank": 4}, every_spec=True),
    causal("Falcon-Mamba", "FalconMamba", {**TEXT, "state_size": 4, "time_step_rank": 4}, every_spec=True),
    causal(
        "Mamba-2",
        "Mamba2",
        {**TEXT, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
        every_spec=True,
    ),
    causal("Mixtral", "Mixtral", MOE),
    causal("Qwen3-MoE", "Qwen3Moe", MOE),
    causal(
        "DeepSeek-V3",
        "DeepseekV3",
        {
            **TEXT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    Architecture(
        "Llama 4", "Llama4ForCausalLM", "Llama4TextConfig", {**MOE, "intermediate_size_mlp": 48}, tokens, True
    ),
    causal("gpt-oss", "GptOss", {**MOE, "sliding_window": 8}),
    seq2seq("T5", "T5", T5, every_spec=True),
    seq2seq("FLAN-T5", "T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, every_spec=True),
    seq2seq("mT5", "MT5", T5, every_spec=True),
    seq2seq("UMT5", "UMT5", T5, every_spec=True),
    seq2seq("LongT5", "LongT5", {**T5, "local_radius": 4}, every_spec=True),
    seq2seq(
        "Switch Transformers",
        "SwitchTransformers",
        {**T5, "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 64},
        every_spec=True,
    ),
    seq2seq("BART", "Bart", BART),
    Architecture("Marian", "MarianMTModel", "MarianConfig", BART, both, True, True),
    seq2seq("Pegasus", "Pegasus", BART, every_spec=True),
    seq2seq(
        "NLLB-MoE",
        "NllbMoe",
        {**BART, "num_experts": 2, "expert_capacity": 64, "encoder_sparse_step": 1, "decoder_sparse_step": 1},
        every_spec=True,
    ),
    Architecture("BERT", "BertForMaskedLM", "BertConfig", TEXT),
    Architecture("RoBERTa", "RobertaForSequenceClassification", "RobertaConfig", TEXT),
    Architecture(
        "DeBERTa-v2",
        "DebertaV2ForMaskedLM",
        "DebertaV2Config",
        {
            **TEXT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "conv_kernel_size": 3,
        }
        | {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False, "conv_act": "gelu"},
        every_spec=True,
    ),
    Architecture("ModernBERT", "ModernBertForMaskedLM", "ModernBertConfig", {**TEXT, "reference_compile": False}),
    Architecture("ALBERT", "AlbertForMaskedLM", "AlbertConfig", {**TEXT, "embedding_size": 16}),
    Architecture("RoFormer", "RoFormerForMaskedLM", "RoFormerConfig", TEXT, every_spec=True),
    Architecture("ViT", "ViTForImageClassification", "ViTConfig", VISION, image, every_spec=True),
    Architecture(
        "Swin",
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        image,
    ),
    Architecture(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        image,
    ),
    Architecture("DINOv2", "Dinov2Model", "Dinov2Config", {**VISION, "mlp_ratio": 2}, image, every_spec=True),
    Architecture(
        "CLIP",
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**TEXT, "eos_token_id": 2}, "vision_config": VISION, "projection_dim": 16},
        lambda: tokens() | image(),
        every_spec=True,
    ),
    Architecture(
        "SigLIP",
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**TEXT, "projection_size": 32}, "vision_config": VISION},
        lambda: tokens() | image(),
        every_spec=True,
    ),
    Architecture(
        "DETR",
        "DetrForObjectDetection",
        "DetrConfig",
        {
            **{k: v for k, v in BART.items() if k not in ("vocab_size", "max_position_embeddings")},
            "num_queries": 4,
            "use_pretrained_backbone": False,
            "use_timm_backbone": False,
            "backbone": None,
        },
        lambda: image(64),
        parts=lambda t: {
            "backbone_config": t.ResNetConfig(
                embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"]
            )
        },
    ),
    seq2seq(
        "Whisper",
        "Whisper",
        {**BART, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "suppress_tokens": None}
        | {"begin_suppress_tokens": None},
        inputs=lambda: {
            "input_features": torch.randn(2, 8, 32),
            "decoder_input_ids": torch.randint(3, 96, (2, 5)),
        },
    ),
    Architecture(
        "Kosmos-2",
        "Kosmos2ForConditionalGeneration",
        "Kosmos2Config",
        {
            "text_config": {
                "vocab_size": 96,
                "embed_dim": 32,
                "layers": 1,
                "ffn_dim": 48,
                "attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "vision_config": VISION,
            "latent_query_num": 4,
        },
        lambda: {**tokens(), **image(), "image_embeds_position_mask": (torch.arange(9) < 4).long().expand(2, 9)},
        every_spec=True,
    ),
    Architecture(
        "BLIP",
        "BlipForConditionalGeneration",
        "BlipConfig",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 32, "projection_dim": 16},
            "vision_config": {**VISION, "projection_dim": 16},
            "projection_dim": 16,
        },
        lambda: tokens() | image(),
        every_spec=True,
    ),
    Architecture("wav2vec 2.0", "Wav2Vec2ForCTC", "Wav2Vec2Config", WAVES, wave, every_spec=True),
    Architecture(
        "Pix2Struct",
        "Pix2StructForConditionalGeneration",
        "Pix2StructConfig",
        {
            "text_config": {
                **TEXT,
                "d_kv": 8,
                "d_ff": 48,
                "num_layers": 1,
                "num_heads": 4,
                "decoder_start_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 32,
                "d_ff": 48,
                "d_kv": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
            }
            | {"patch_embed_hidden_size": 12, "seq_len": 16},
        },
        lambda: {
            "flattened_patches": torch.cat([torch.ones(2, 4, 2), torch.randn(2, 4, 12)], -1),
            "decoder_input_ids": torch.randint(3, 96, (2, 5)),
        },
        every_spec=True,
    ),
)


# ---- what quantizing one gives --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """The result of `quantize_` on a model: a refusal with its reason, or the share of its parameters as codes."""

    refused: str = ""
    coverage: float = 0.0
    error: float = 0.0  # of the outputs, against those of the float model with the same values


def check(architecture: Architecture, spec: str, types: tuple[type[nn.Module], ...]) -> Outcome:
    """Quantize a copy of the model, and hold it to the float model that has the values of its codes.

    Raises
    ------
    AssertionError
        For an output, a token, a byte of the state, or a line of the report that is not right.
    """
    base, given = architecture.base, architecture.given
    model = copy.deepcopy(base)
    try:
        report = quantlib.quantize_(model, spec, types=types)
    except ValueError as error:
        assert_equal_states(model, base)
        return Outcome(refused=str(error))
    assert model.dtype == base.dtype, f"dtype must be {base.dtype}, got {model.dtype}"
    accounts(report, model, base)

    parsed = QuantSpec.parse(spec)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        y = outputs(model, given)
        quantlib.dequantize_(plain)
        with projected(plain, model, parsed):
            error = difference(y, outputs(plain, given))
    limit = 0.02 if parsed.activation else 1e-4  # a projected activation that lies on a tie may round to either side
    assert error <= limit, f"output is off by {error:.2g}, at most {limit:g} is allowed"
    if architecture.generates:
        with torch.no_grad():
            text = generated(model, given)
            if not parsed.activation:
                assert torch.equal(text, generated(plain, given)), "generates other tokens than the dequantized model"

    again = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(0.5)
    quantlib.quantize_(again, spec, types=types)
    again.load_state_dict(model.state_dict(), strict=True)
    assert_equal_states(again, model)
    return Outcome(coverage=report.coverage, error=error)


def outputs(model: nn.Module, given: dict[str, Tensor]) -> list[Tensor]:
    """Every float tensor that a forward returns, but what it keeps for the next token."""
    result = model(**given, use_cache=False) if "use_cache" in forward_arguments(type(model)) else model(**given)
    return list(floats({k: v for k, v in result.items() if "past" not in k and "cache" not in k}))


@functools.cache
def forward_arguments(model: type[nn.Module]) -> frozenset[str]:
    import inspect

    return frozenset(inspect.signature(model.forward).parameters)


def floats(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict) or hasattr(value, "items"):
        for item in value.values():
            yield from floats(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from floats(item)


def generated(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    prompt = {name: value for name, value in given.items() if name != "decoder_input_ids"}
    text: Tensor = model.generate(**prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    return text


def difference(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest error of any output, relative to the largest magnitude in it."""
    assert len(got) == len(want) > 0
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        finite = b.isfinite()
        assert torch.equal(finite, a.isfinite())
        if finite.any():
            size = float(b[finite].abs().max())
            worst = max(worst, float((a - b)[finite].abs().max()) / (size or 1.0))
    return worst


@contextmanager
def projected(plain: nn.Module, model: nn.Module, spec: QuantSpec) -> Iterator[None]:
    """The activations of ``plain`` projected where those of ``model`` are."""

    def project(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        codes, scale = ops.quantize_dynamic(x, "int8", block=(1, -1))
        return (ops.dequantize(codes, scale, "int8", block=(1, -1), dtype=x.dtype), *args[1:])

    layers = dict(plain.named_modules())
    linear = [n for n, m in model.named_modules() if isinstance(m, QuantModule) and isinstance(m, nn.Linear)]
    hooks = [layers[n].register_forward_pre_hook(project) for n in linear] if spec.activation else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def assert_equal_states(got: nn.Module, want: nn.Module) -> None:
    a, b = got.state_dict(), want.state_dict()
    assert list(a) == list(b)
    for name, value in a.items():
        other = b[name]
        assert value.dtype == other.dtype, name
        assert value.shape == other.shape, name
        assert_same_bytes(value, other, name)


def accounts(report: Report, model: nn.Module, base: nn.Module) -> None:
    """The report counts every parameter of the float model, and names each matrix that stays a float."""
    everything = sum(p.numel() for p in base.parameters())
    assert report.quantized + report.floats == everything, f"{report}\nmust count {everything} parameters"
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1
        and parameter.is_floating_point()
        and not any(f"{name}.".startswith(f"{skipped}.") for skipped in report.skipped)
    ]
    assert not silent, f"the report says nothing of {silent}"
    assert all(report.skipped.values())


# ---- the table of docs/models.md ------------------------------------------------------------------------------------

BEGIN, END = "<!-- architectures -->", "<!-- /architectures -->"
Outcomes = dict[tuple[str, bool], Outcome]  # (spec, whether of every type)


def quick(architecture: Architecture) -> list[tuple[str, bool]]:
    """The part of the product that `make test` runs: each spec, and each choice of types."""
    if architecture.every_spec:
        return [(spec, number % 2 == 0) for number, spec in enumerate(SPECS)]
    return [("W4A16", False), ("W8A8", True)]


def row(architecture: Architecture, outcomes: Outcomes) -> list[str]:
    """One line of the table; a cell that ``outcomes`` does not decide is empty."""
    shares = []
    for every in (False, True):
        found = [o for (_, of_every), o in outcomes.items() if of_every == every]
        shares.append("refused" if found and found[0].refused else f"{found[0].coverage:.0%}" if found else "")
    results = ["/".join(_result(outcomes.get((spec, every))) for every in (False, True)) for spec in SPECS]
    return [architecture.name, layers(architecture.base), *shares, *results]


def _result(outcome: Outcome | None) -> str:
    return "" if outcome is None else "-" if outcome.refused else "="


def layers(model: nn.Module) -> str:
    """Count the modules of each type that hold a parameter of two or more axes."""
    kinds = Counter(
        re.sub("^Parametrized", "", type(module).__name__)
        for module in model.modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def table() -> str:
    """Every architecture with every spec."""
    import transformers

    head = ["architecture", "layers", "codes, Linear", "codes, all types", *SPECS]
    lines = [
        f"transformers {transformers.__version__}",
        "",
        _line(head),
        _line(["---"] * 2 + ["--:"] * 2 + ["---"] * 6),
    ]
    for architecture in ARCHITECTURES:
        outcomes = {
            (spec, every): check(architecture, spec, EVERY if every else LINEAR)
            for spec in SPECS
            for every in (False, True)
        }
        lines.append(_line(row(architecture, outcomes)))
        print(lines[-1], flush=True)
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def recorded(text: str) -> tuple[str, dict[str, list[str]]]:
    """The version of transformers of the table in a document, and the lines of it by architecture."""
    inside = text.partition(BEGIN)[2].partition(END)[0]
    version = re.search(r"transformers (\S+)", inside)
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in inside.splitlines() if "|" in line]
    return version[1] if version else "", {cells[0]: cells for cells in rows[2:]}


def main(path: Path) -> None:
    """Write the table between its marks in the document at ``path``."""
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
