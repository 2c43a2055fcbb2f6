"""(x / s) (w s)^T = x w^T: s goes into what makes x, so that channels that are hard to quantize become easier

Xiao et al., SmoothQuant, 2023: s[k] = max|x[k]|^a / max|w[:, k]|^(1 - a) shares outliers of activations with weights.
Lin et al., AWQ, 2024: s[k] = rms(x[k])^a keeps the weights of channels with energy more exact; a is searched.
Müller et al., SINQ, 2025: the spreads of rows and columns are made equal by turns (Sinkhorn), without inputs. What
makes x takes the spread of a column, the scales of its blocks that of a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quantlib.calibration.gptq import decoded, energy_of
from quantlib.calibration.stages import Call, Gram, evaluating, first_of, run
from quantlib.nn.functional import quantize_weight
from quantlib.nn.module import QuantModule
from quantlib.spec import QuantSpec

Pattern = tuple[str, tuple[str, ...]]

# In a block: the source of x, and the layers that take it. Names are those of Llama, Mistral, Qwen, Gemma and others.
PATTERNS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
# Attention is linear in its values. In BERT nothing else is: the residual reads the norms too, and GELU is not linear.
VALUES = (
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("attention.self.value", ("attention.output.dense",)),
)
SMOOTH = 0.5  # a of SmoothQuant
ROUNDS = 8  # of Sinkhorn's, after which spreads are equal to a few parts in a thousand
EXPONENTS = tuple(i / 10 for i in range(11))  # the exponents that AWQ's search tries
SAME = 1e-3  # the most that an output may differ, of its norm, after what should not change it


class Pair(NamedTuple):
    """A module that makes x, and the layers that are given x."""

    source: nn.Module
    targets: list[nn.Linear]
    channels: Tensor | None = None  # [K], which channel of the source a column takes; by default its own

    def columns(self, s: Tensor) -> Tensor:
        """Return what is known of each channel of the source for each column [K]."""
        return s if self.channels is None else s[self.channels]


def pairs_of(model: nn.Module, names: Collection[str], patterns: Sequence[Pattern] = PATTERNS) -> dict[str, Pair]:
    """Name of the first target -> its pair, for ``patterns`` among the layers ``names``."""
    found = {}
    modules = dict(model.named_modules())
    for source, targets in patterns:
        for name in names:
            if not f".{name}".endswith(f".{targets[0]}"):
                continue
            prefix = name[: len(name) - len(targets[0])]
            inside = [modules.get(f"{prefix}{target}") for target in targets]
            maker = modules.get(f"{prefix}{source}")
            linear = [layer for layer in inside if isinstance(layer, nn.Linear)]
            if maker is None or len(linear) < len(targets) or not all(f"{prefix}{t}" in names for t in targets):
                continue
            if not isinstance(maker._parameters.get("weight"), nn.Parameter) or isinstance(maker, QuantModule):
                continue
            found[name] = Pair(maker, linear)
            if (source, targets) in VALUES:
                attention = modules[f"{prefix}{source}".rpartition(".")[0]]
                if (channels := channels_of(maker, linear[0], getattr(attention, "head_dim", None))) is None:
                    del found[name]
                else:
                    found[name] = Pair(maker, linear, channels)
    return found


def channels_of(value: nn.Module, out: nn.Linear, head: int | None) -> Tensor | None:
    """[K] of ``out``, where several heads may take the values of one; None where the sizes do not tell."""
    weight = value.weight
    assert isinstance(weight, Tensor)
    N, K = len(weight), out.in_features
    if N == K:
        return torch.arange(K, device=weight.device)
    if K % N or head is None or N % head:
        return None
    return torch.arange(N, device=weight.device).view(-1, 1, head).expand(-1, K // N, head).flatten()


@torch.no_grad()
def scale_(pair: Pair, s: Tensor) -> None:
    """Divide what ``pair.source`` makes by s [channels of the source], and multiply the columns that take it by s."""
    for name in ("weight", "bias"):
        p = getattr(pair.source, name, None)
        if p is not None:
            p.div_(s.view(-1, *[1] * (p.dim() - 1)))
    for layer in pair.targets:
        layer.weight.mul_(pair.columns(s))


@torch.no_grad()
def fold_(model: nn.Module, calls: Sequence[Call], specs: Mapping[str, QuantSpec], method: str) -> list[str]:
    """Scale every pair of ``model`` for the layers of ``specs``; return the names of the layers whose columns changed.

    Raises
    ------
    ValueError
        For a model without such pairs, or one that computes something else afterwards, which is put back first.
    """
    grams: dict[str, Gram] = {}
    if method == "sinkhorn":
        pairs = pairs_of(model, specs, (*PATTERNS, *VALUES))
    else:
        run(model, calls, list(specs), grams.update)
        pairs = pairs_of(model, grams)
    if not pairs:
        raise ValueError(f"model must have norms and layers named as those of Llama for {method}, got none")
    with evaluating(model):
        before = output(model, calls[0])
        done: list[tuple[Pair, Tensor]] = []
        for name, pair in pairs.items():
            if method == "sinkhorn":
                s = sinkhorn(pair)
            else:
                s = smooth(grams[name], pair) if method == "smoothquant" else aware(grams[name], pair, specs[name])
            scale_(pair, s)
            done.append((pair, s))
        after = output(model, calls[0])
        if not float((after - before).norm()) <= SAME * float(before.norm()):
            for pair, s in reversed(done):
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


def sinkhorn(pair: Pair) -> Tensor:
    """1 / spread(w[:, k]), whose geometric mean is 1.

    Rows and columns are divided by their root mean squares by turns, until all have the same; the spread of a column is
    what it was divided by.
    """
    w = torch.cat([layer.weight.detach().float() for layer in pair.targets])
    spread = torch.ones_like(w[0])
    for _ in range(ROUNDS):
        w = w / rms(w, 1)
        columns = rms(w, 0)
        w, spread = w / columns, spread * columns[0]
    s = spread.log()
    if pair.channels is not None:  # the geometric mean of the columns of a channel
        n = int(pair.channels.max()) + 1
        s = torch.zeros_like(s[:n]).index_add_(0, pair.channels, s) * (n / len(s))
    return balanced((-s).exp())


def rms(w: Tensor, dim: int) -> Tensor:
    return w.square().mean(dim, keepdim=True).sqrt().clamp_min(1e-8)


def balanced(s: Tensor) -> Tensor:
    return s / s.log().mean().exp()
