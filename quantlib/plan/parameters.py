"""Parameters by purpose, and the number that a token uses: known from names, shapes and config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlib.checkpoint.choose import RULES, TABLE, parts_of
from quantlib.plan.lines import Line, Section

KINDS = ("embedding", "attention", "MLP", "experts", "router", "norm", "head", "adapter", "other")
OF_RULES = {"an adapter": "adapter", "a router": "router", "a head": "head", TABLE: "embedding", "a norm": "norm"}
ATTENTION = re.compile(
    r"(\w+_)?(attn|attention|attentions|selfattention|encdecattention|mixer|mamba|ssm)\d?(_\w+)?|[qkvo]_proj|qkv(_proj)?"
    r"|query|key|value|query_key_value|c_attn|out_proj|in_proj",
    re.IGNORECASE,
)
MLP = re.compile(
    r"(\w+_)?(mlp|ffn?|feed_?forward|densereludense|intermediate)\d?|fc\d?|wi(_\d)?|wo|(gate|up|down)_proj|gate_up_proj"
    r"|w[123]|linear[12]|dense(_h_to_4h|_4h_to_h)?|output|shared_experts?",
    re.IGNORECASE,
)
COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True)
class Parameters:
    """The number of parameters, by kind.

    Attributes
    ----------
    kinds : dict of str to int
        The number of each of `KINDS`; shared parameters count once.
    chosen, experts : int
        The experts of a layer that a token uses, and all of them; 1 and 1 where there are none.
    tied : int
        Those of a head that shares the embedding table: they are counted as embeddings, and multiplied by as a head.
    """

    kinds: Mapping[str, int]
    chosen: int = 1
    experts: int = 1
    tied: int = 0

    @property
    def total(self) -> int:
        return sum(self.kinds.values())

    @property
    def active(self) -> int:
        """The number of parameters that one token uses."""
        idle = self.kinds.get("experts", 0) * (self.experts - self.chosen) // self.experts
        return self.total - idle

    @property
    def multiplied(self) -> int:
        """N of 6 N D: the parameters of `active` that a token is multiplied by. A row of a table is only looked up."""
        return self.active - self.kinds.get("embedding", 0) + self.tied

    def section(self) -> Section:
        lines = [
            Line(kind, n, "parameters", f"sum of the sizes of the tensors whose names are those of {kind}")
            for kind in KINDS
            if (n := self.kinds.get(kind, 0))
        ]
        share = f"experts x {self.chosen}/{self.experts}" if self.experts > 1 else "all of them"
        lines.append(Line("all", self.total, "parameters", "sum of the kinds; a shared tensor counts once"))
        lines.append(
            Line("active a token", self.active, "parameters", f"all - experts + {share}" if self.experts > 1 else share)
        )
        lines.append(
            Line("multiplied a token", self.multiplied, "parameters", "active - embedding (looked up) + a tied head")
        )
        return Section("parameters", lines)


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Return the kind, one of `KINDS`, of the tensor ``name``."""
    words = name.split(".")
    if "experts" in words[:-1] or words[-1].startswith("experts_"):
        return "experts"
    if any(re.fullmatch(r"layer_?norm\d?|norm\d?|(\w+_)?(layer)?norm(\d|_\w+)?|ln_?\w*", w, re.I) for w in words[-2:]):
        return "norm"
    named = name.rpartition(".")[0] + ".weight" if words[-1] in ("weight", "bias") else name
    rule = next((OF_RULES[rule.why] for rule in RULES if rule.matches(named) and rule.why in OF_RULES), None)
    if rule is not None:
        return rule
    for word in reversed(words):  # the nearest module decides: attention.output.dense is attention
        if MLP.fullmatch(word) and word.lower() not in ("dense", "output", "wo"):
            return "MLP"
        if ATTENTION.fullmatch(word):
            return "attention"
    if any(MLP.fullmatch(word) for word in words):
        return "MLP"
    return "norm" if len(shape) == 1 and words[-1] == "weight" else "other"


def experts_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """(experts that a token uses, experts of a layer); (1, 1) if config.json names none."""
    for part in parts_of(config):
        count = next((n for key in COUNTS if type(n := part.get(key)) is int and n > 1), None)
        chosen = next((n for key in CHOSEN if type(n := part.get(key)) is int and n > 0), None)
        if count and chosen:
            return min(chosen, count), count
    return 1, 1


def count(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Parameters:
    """`Parameters` of tensors by their names and shapes, each of which counts."""
    kinds: dict[str, int] = {}
    for name, shape in shapes.items():
        kind = kind_of(name, shape)
        kinds[kind] = kinds.get(kind, 0) + math.prod(shape)
    chosen, experts = experts_of(config) if "experts" in kinds else (1, 1)
    tied = 0
    if "head" not in kinds:
        sizes = {size for part in parts_of(config) for key, size in part.items() if key == "vocab_size"}
        tables = [s for n, s in shapes.items() if kind_of(n, s) == "embedding" and s and s[0] in sizes]
        tied = max((math.prod(shape) for shape in tables), default=0) if generates(config) else 0
    return Parameters(kinds, chosen, experts, tied)


def generates(config: Mapping[str, Any]) -> bool:
    """True if the model has a head over the vocabulary, by the name of its class."""
    names = config.get("architectures") or ()
    return any(re.search(r"CausalLM|LMHead|ConditionalGeneration|MaskedLM", str(name)) for name in names)
