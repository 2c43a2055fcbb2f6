"""(x / s) (w s)^T = x w^T: s goes into what makes x, so that channels that are hard to quantize become easier

Xiao et al., SmoothQuant, 2023: s[k] = max|x[k]|^a / max|w[:, k]|^(1 - a) shares outliers of activations with weights.
Lin et al., AWQ, 2024: s[k] = rms(x[k])^a keeps the weights of channels with energy more exact; a is searched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantlib.calibration.gptq import decoded, energy_of
from quantlib.calibration.stages import Call, Gram, evaluating, first_of, run
from quantlib.nn.functional import quantize_weight
from quantlib.spec import QuantSpec

# In a block: the source of x, and the layers that take it. Names are those of Llama, Mistral, Qwen, Gemma and others.
PATTERNS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
SMOOTH = 0.5  # a of SmoothQuant
EXPONENTS = tuple(i / 10 for i in range(11))  # the exponents that AWQ's search tries
SAME = 1e-3  # the most that an output may differ, of its norm, after what should not change it


class Pair(NamedTuple):
    """A module that makes x, and the layers that are given x."""

    source: nn.Module
    targets: list[nn.Linear]


def pairs_of(model: nn.Module, names: Mapping[str, Gram]) -> dict[str, Pair]:
    """Name of the first target -> its pair, for `PATTERNS` among the layers ``names``."""
    found = {}
    modules = dict(model.named_modules())
    for source, targets in PATTERNS:
        for name in names:
            if not f".{name}".endswith(f".{targets[0]}"):
                continue
            prefix = name[: len(name) - len(targets[0])]
            inside = [modules.get(f"{prefix}{target}") for target in targets]
            maker = modules.get(f"{prefix}{source}")
            linear = [layer for layer in inside if isinstance(layer, nn.Linear)]
            if maker is not None and len(linear) == len(targets) and all(f"{prefix}{t}" in names for t in targets):
                found[name] = Pair(maker, linear)
    return found


@torch.no_grad()
def scale_(pair: Pair, s: Tensor) -> None:
    """Divide what ``pair.source`` makes by s [K], and multiply the columns of the targets by it."""
    for name in ("weight", "bias"):
        p = getattr(pair.source, name, None)
        if p is not None:
            p.div_(s.view(-1, *[1] * (p.dim() - 1)))
    for layer in pair.targets:
        layer.weight.mul_(s)


@torch.no_grad()
def fold_(model: nn.Module, calls: Sequence[Call], specs: Mapping[str, QuantSpec], method: str) -> list[str]:
    """Scale every pair of ``model`` for the layers of ``specs``; return the names of the layers whose columns changed.

    Raises
    ------
    ValueError
        For a model without such pairs, or one that computes something else afterwards, which is put back first.
    """
    grams: dict[str, Gram] = {}
    run(model, calls, list(specs), grams.update)
    pairs = pairs_of(model, grams)
    if not pairs:
        raise ValueError(f"model must have norms and layers named as those of Llama for {method}, got none")
    with evaluating(model):
        before = output(model, calls[0])
        done: list[tuple[Pair, Tensor]] = []
        for name, pair in pairs.items():
            s = smooth(grams[name], pair) if method == "smoothquant" else aware(grams[name], pair, specs[name])
            scale_(pair, s)
            done.append((pair, s))
        after = output(model, calls[0])
        if not float((after - before).norm()) <= SAME * float(before.norm()):
            for pair, s in done:
                scale_(pair, 1 / s)
            raise ValueError(f"model must compute the same once {method} has scaled its channels, got something else")
    ids = {id(layer) for pair, _ in done for layer in pair.targets}
    return [name for name in specs if id(model.get_submodule(name)) in ids]


def output(model: nn.Module, call: Call) -> Tensor:
    result = call(model)
    y: Tensor = first_of(getattr(result, "logits", getattr(result, "last_hidden_state", result)))
    return y.float()


def smooth(gram: Gram, pair: Pair) -> Tensor:
    """max|x[k]|^a / max|w[:, k]|^(1 - a), whose geometric mean is 1."""
    w = torch.stack([layer.weight.detach().float().abs().amax(0) for layer in pair.targets]).amax(0)
    return balanced(gram.peak.clamp_min(1e-5) ** SMOOTH / w.clamp_min(1e-5) ** (1 - SMOOTH))


def aware(gram: Gram, pair: Pair, spec: QuantSpec) -> Tensor:
    """rms(x[k])^a with the exponent a that gives the least error of all targets together."""
    rms = (gram.H.diagonal() / gram.tokens).sqrt().clamp_min(1e-5)
    best, s = None, torch.ones_like(rms)
    for a in EXPONENTS:
        tried = balanced(rms**a)
        loss = 0.0
        for layer in pair.targets:
            w = layer.weight.detach().float()
            y = decoded(quantize_weight(w * tried, spec.weight_only), spec.weight_only, w) / tried
            loss += energy_of(y - w, gram.H)
        if best is None or loss < best:
            best, s = loss, tried
    return s


def balanced(s: Tensor) -> Tensor:
    return s / s.log().mean().exp()
