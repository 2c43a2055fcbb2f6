"""The choice of tensors to quantize: the weights of linear layers, found by name, shape and dtype alone.

A tensor that is not a float matrix, or lies [in, out], cannot be quantized. The other rules go by names: tables that
are looked up, routers, heads and adapters stay floats unless they are asked for.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantlib.checkpoint.files import NAMES, Slot
from quantlib.checkpoint.stored import Stored
from quantlib.nn.functional import SOURCES
from quantlib.spec import QuantSpec

FLOATS = (*SOURCES, torch.float64)
COMPLEX = (torch.complex64,)
INTEGERS = tuple(dtype for dtype in NAMES if not dtype.is_floating_point and dtype not in (*COMPLEX, torch.bool))
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Rule:
    """Names that stay floats by default.

    Parameters
    ----------
    why : str
    last : str
        A regular expression of the name of the layer, which is the last word before ``.weight``; of the word before
        it where that is a number.
    any : str
        The same of any word of the name.
    but : str
        A regular expression of names that match but are not such layers.
    whole : str
        A regular expression of the whole name.
    """

    why: str
    last: str = "(?!)"
    any: str = "(?!)"
    but: str = "(?!)"
    whole: str = "(?!)"

    def matches(self, name: str) -> bool:
        words = name.split(".")
        owners = words[:-1] if words[-1] == "weight" and len(words) > 1 else words
        named = [word for word in owners if not word.isdigit()]
        last = named[-1] if named else ""
        if re.fullmatch(self.but, last):
            return False
        return bool(
            re.fullmatch(self.last, last)
            or re.fullmatch(self.whole, name)
            or any(re.fullmatch(self.any, word) for word in named)
        )


TABLE = "a table that is looked up"
RULES = (
    Rule(
        "an adapter",
        any=r"(\w+_)?(lora|loha|hada|lokr|ia3|oft|boft|vera|randlora|vblora|fourierft)(_\w+)?|adaption_\w+|"
        r"adapters?(_\w+)?|ranknum",
    ),
    Rule(
        "a router",
        any=r"gate(_net|_network|_logits)?|gating|routing|wg|(\w+_)?(router|expert_gate|experts_gate|moe_gate|top_k_gate)",
    ),
    Rule(
        "a head",
        any=r"(\w+_)?heads?|(\w+_)?classifier|(class|box|bbox)_(predictor|embed)|qa_outputs|vocab_proj(ector)?",
        last=r"score|(to_)?logits(_proj)?|output_projection|embed_out|unembed(ding)?|lm_(loss|output|proj)|pred_layer|"
        r"seq_relationship",
        whole=r"output\.weight|(.*\.)?transformer\.output_layer\.weight|"
        r"(.*\.)?(cls|predictions|lm_head)(\.predictions)?\.decoder\.weight",
    ),
    Rule(
        TABLE,
        last=r"wte|wpe|shared|emb|embeds?|embeddings?|embedding_table|relative_attention_bias|rel_pos_bias|embed_\w+|"
        r"\w+_embeds?|\w+_embeddings?|\w+_emb|emb_\w|\w+_embeds?_layers|(\w+_)?codebooks?|query_tokens",
        but=r"embed_(proj\w*|out)|(\w+_)?(patch|time|timestep|timesteps|time_text|t|x|add|guidance|image|pixel|vision|"
        r"context|label|aug|caption|cond)_(emb|embed|embedding|embeddings)",
    ),
    Rule("a norm", last=r"(?i:\w*norm\w*)|(ln|bn|gn|rms)\d*(_\w+)?"),
)

# Layers of transformers' Conv1D, whose weight lies [in, out], and the types of model that have them.
CONV1D = re.compile(r"c_attn|c_proj|c_fc|q_attn")
CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_encoder", "clvp_decoder")


def reasons(
    slots: Mapping[str, Slot],
    config: Mapping[str, Any],
    include: Sequence[str],
    exclude: Sequence[str],
    layouts: Mapping[str, str],
) -> dict[str, str | None]:
    """Return why each float tensor stays as it is; None for one that is quantized. Integer tensors are left out.

    ``layouts`` are those that `layouts_of` found.
    """
    lies, shaped = transposed(slots, config), by_shape(slots, config)
    return {
        name: unable(slot, lies, layouts) or unwanted(name, include, exclude, shaped, name in layouts)
        for name, slot in slots.items()
        if slot.dtype in (*FLOATS, *COMPLEX)
    }


def layouts_of(slots: Mapping[str, Slot], config: Mapping[str, Any]) -> dict[str, str]:
    """Return how each weight lies that is no matrix [N, K] but can be quantized: see `quantlib.checkpoint.stored`.

    A stack of experts is known by its name, and lies as its sizes say: ``gate_up_proj`` has two rows for each column of
    ``down_proj``. What sizes leave open, and ``Conv1D`` of transformers, the class of the model in ``config.json``
    decides, where transformers is installed and knows it. Without a ``config.json`` nothing says that a model computes
    with them as experts: they stay floats.
    """
    if not config:
        return {}
    found = {name: way for name in slots if (way := by_sizes(name, slots))}
    stacks = [name for name, slot in slots.items() if len(slot.shape) == 3 and EXPERTS.search(name)]
    unknown = {*stacks, *transposed(slots, config)} - found.keys()
    if unknown and isinstance(config.get("model_type"), str) and importlib.util.find_spec("transformers") is not None:
        of_class = importlib.import_module("quantlib.hf.skeleton").layouts_of(config, slots)
        found |= {name: of_class[name] for name in unknown if name in of_class}
    return found


def by_sizes(name: str, slots: Mapping[str, Slot]) -> str | None:
    """The layout of a stack of experts, by the one beside it: of [E, a, b] and [E, c, d] the inner sizes are equal."""
    match = re.fullmatch(r"(.*\bexperts\.(?:.+\.)?)(gate_up_proj|down_proj)(\.weight)?", name)
    if match is None:
        return None
    pair = [slots.get(f"{match[1]}{key}{match[3] or ''}") for key in ("gate_up_proj", "down_proj")]
    if not all(slot is not None and len(slot.shape) == 3 for slot in pair):
        return None
    (E, a, b), (F, c, d) = (slot.shape for slot in pair if slot is not None)
    if E != F:
        return None
    return "enk" if b == c and a == 2 * d else "ekn" if a == d and b == 2 * c else None


def stored_as(slot: Slot, spec: QuantSpec, layouts: Mapping[str, str]) -> Stored:
    """The weight as a file will have it. A cast leaves every value where it is, whatever it belongs to."""
    return Stored(str(spec), slot.shape, layouts.get(slot.name, "") if spec.scaled else "")


EXPERTS = re.compile(r"\b(\w*experts?|\w*moe)\.")  # of the name of a stack


def unable(slot: Slot, lies: Mapping[str, str], layouts: Mapping[str, str]) -> str | None:
    """Return why a tensor cannot be quantized, or None."""
    axes = len(slot.shape)
    if axes < 2:
        return f"{axes} axes: a matrix is quantized"
    if slot.name in layouts and slot.dtype in SOURCES:
        return None
    if axes > 2 and slot.name not in layouts:
        if axes == 3 and EXPERTS.search(slot.name):
            return "a stack of experts: neither its sizes nor the class in config.json tell how it lies"
        return f"{axes} axes: {'a convolution' if slot.name.endswith('weight') else 'a stack'}, not one matrix"
    if slot.dtype not in SOURCES:
        return f"{str(slot.dtype).removeprefix('torch.')}: float32, float16 or bfloat16 is quantized"
    return lies.get(slot.name)


def unwanted(
    name: str, include: Sequence[str], exclude: Sequence[str], shaped: Mapping[str, str], known: bool
) -> str | None:
    """Return why a weight is not to be quantized, or None; one of a ``known`` layout may have any name."""
    if pattern := next((p for p in exclude if fnmatch.fnmatchcase(name, p)), None):
        return f"matches {pattern}"
    if any(fnmatch.fnmatchcase(name, p) for p in include):
        return None
    if rule := next((rule for rule in RULES if rule.matches(name)), None):
        return rule.why
    if name in shaped:
        return shaped[name]
    return None if known or name.rpartition(".")[2] == "weight" else "not named *.weight"


def transposed(slots: Mapping[str, Slot], config: Mapping[str, Any]) -> dict[str, str]:
    """Matrices that lie [in, out], with how that is known: from the type of the model, or from their biases."""
    matrices = {name: slot.shape for name, slot in slots.items() if len(slot.shape) == 2 and name.endswith("weight")}
    told = next((kind for kind in CONV1D_MODELS for part in parts_of(config) if part.get("model_type") == kind), None)
    found: dict[str, str] = {}
    for name, (rows, columns) in matrices.items():
        bias = slots.get(f"{name.removesuffix('weight')}bias")
        if bias is not None and bias.shape == (columns,) != (rows,):
            found[name] = "its bias has an element for each column: it lies [in, out]"
    family = told or any(CONV1D.fullmatch(layer_of(name)) for name in found)
    for name in matrices:
        if family and CONV1D.fullmatch(layer_of(name)):
            found[name] = f"transformers' Conv1D{f' of {told}' if told else ''}: it lies [in, out]"
    return found


def by_shape(slots: Mapping[str, Slot], config: Mapping[str, Any]) -> dict[str, str]:
    """Routers, heads and tables under any name: a row for each of the experts beside it, or of the vocabulary."""
    experts: dict[str, int] = {}  # name of a layer of experts -> how many it has
    for name, slot in slots.items():
        if match := re.fullmatch(r"(.*?)\.?experts\.(?:(\d+)\.)?.+", name):
            count = int(match[2]) + 1 if match[2] else slot.shape[0] if len(slot.shape) == 3 else 0
            experts[match[1]] = max(experts.get(match[1], 0), count)
    sizes = (size for part in parts_of(config) for key, size in part.items() if key.endswith("vocab_size"))
    vocabularies = {size for size in sizes if type(size) is int}
    found: dict[str, str] = {}
    for name, slot in slots.items():
        if len(slot.shape) != 2 or slot.shape[0] == slot.shape[1] or not name.endswith("weight"):
            continue
        rows, prefix = slot.shape[0], name.rpartition(".")[0]
        for _ in range(2):  # its name is one word or two
            prefix = prefix.rpartition(".")[0]
            if experts.get(prefix) == rows and "experts" not in name:
                found[name] = f"a router: a row for each of {rows} experts"
        if rows in vocabularies and not re.search(r"\.\d+\.\D", name):  # a tensor in a numbered layer is not a head
            found[name] = f"a head or a table: a row for each of {rows} words"
    return found


def layer_of(name: str) -> str:
    """The word before the last."""
    return name.rpartition(".")[0].rpartition(".")[2]


def parts_of(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A configuration and those in it."""
    waiting = [config]
    while waiting:
        yield (found := waiting.pop())
        waiting += [value for value in found.values() if isinstance(value, dict)]


# Names that tell of codes: of GPTQ and AWQ, bitsandbytes, compressed-tensors, FP8 and MX checkpoints, and others.
CODES = {
    "quantlib": r"(.*\.)?weight_codes",  # a state that was saved as it is, which load_quantized reads
    "GPTQ or AWQ": r"(.*\.)?(qweight|qzeros|g_idx)",
    "bitsandbytes": r".*\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|quant_state\..*)",
    "compressed-tensors": r"(.*\.)?weight_packed",
    "FP8": r".*(weight_scale_inv|\.scale_weight|scaled_fp8)",
    "NVFP4": r".*\.weight_scale_2",
    "HQQ": r".*\.W_q",
    "Marlin": r".*\.(B_24|B_meta)",
    "SpQR": r".*\.dense_weights",
    "VPTQ": r".*\.(res_)?centroids(\.weight)?",
    "torch.ao": r"(.*\.)?_packed_params(\..*)?",
    "quanto": r".*\.weight\._(data|scale|qtype)|.*\.weight\._data\..*",
    "torchao": r".*_weight_(qdata|scale)",
    "EXL2 or EXL3": r".*\.(q_weight|q_invperm|trellis)",
    "AQLM": r".*\.codebooks",
}
SCALES = re.compile(r"(.*weight)_(scale|zero_point)|(.*)\.(input_scale)")
BESIDE = ("{}_scale", "{}_scales", "{}.scale", "{owner}.scale", "{owner}.scales", "{owner}.s")  # of codes of any name
CONFIGS = ("quantization_config", "compression_config", "quantization")


def check_float(path: object, slots: Mapping[str, Slot], config: Mapping[str, Any]) -> None:
    """Raise ValueError where a model holds codes of any kind: half of it would be converted, with scales left over."""
    if (found := codes_of_others(slots, config)) is not None:
        raise ValueError(
            f"{path} must hold float weights, got {found}: convert_file (quantlib convert) reads most formats of codes"
        )


def codes_of_others(slots: Mapping[str, Slot], config: Mapping[str, Any]) -> str | None:
    """Return the evidence that a model is quantized already, or None."""
    for name in slots:
        if kind := next((kind for kind, names in CODES.items() if re.fullmatch(names, name)), None):
            return f"{kind} codes ({name})"
    for name, slot in slots.items():
        if name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in slots:
            return f"MX codes ({name})"
        owner, _, last = name.rpartition(".")
        scaled = any(scale.format(name, owner=owner) in slots for scale in BESIDE)
        is_codes = slot.dtype in FLOAT8 or (slot.dtype in INTEGERS and (scaled or last == "weight"))
        if is_codes and len(slot.shape) > 1:
            return f"codes of {NAMES[slot.dtype]} ({name})"
    for name in slots:
        if match := SCALES.fullmatch(name):
            weight = slots.get(match[1] or f"{match[3]}.weight")
            if weight is None or weight.dtype not in FLOATS:
                return f"scales of codes ({name})"
    for mapping in parts_of(config):
        for key in CONFIGS:
            if isinstance(quantization := mapping.get(key), dict) and quantization:
                method = quantization.get("quant_method", quantization.get("library", "unnamed"))
                return f"a config.json with {key} of {method}"
    return None
