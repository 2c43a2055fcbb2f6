"""kl[t] = sum over v of p[t, v] (log p[t, v] - log q[t, v]): the next token by the float p and the quantized q"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RUN = 64  # tokens whose mean counts as one sample of a standard error: neighbours are not independent


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor, run: int = 1) -> Estimate:
        """Return the mean of values [n] and its standard error over means of ``run`` neighbours (NaN with one)."""
        values = values.double()
        means = torch.stack([part.mean() for part in values.split(run)])
        error = float(means.std()) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return cls(float(values.mean()), error)


@dataclass(frozen=True)
class Scores:
    """A quantized language model beside its float model, over the tokens of a text.

    Attributes
    ----------
    tokens : int
        Tokens whose next-token distributions were compared.
    perplexity : Estimate
        exp of the mean of -log q of the token that follows in the text.
    kl : Estimate
        Nats, KL(float || quantized) of the next-token distributions.
    top1 : Estimate
        The share of positions at which both find the same token most likely.
    parts : dict
        Name of a text -> the scores of its tokens alone.
    """

    tokens: int
    perplexity: Estimate
    kl: Estimate
    top1: Estimate
    parts: dict[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class PerToken:
    """The values that are averaged: nll [n - windows], of the tokens that have a successor; kl and top1 [n]."""

    nll: Tensor
    kl: Tensor
    top1: Tensor

    @classmethod
    def join(cls, parts: Sequence[PerToken]) -> PerToken:
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("nll", "kl", "top1")))

    def scores(self, parts: dict[str, Scores]) -> Scores:
        nll = Estimate.of(self.nll, RUN)
        perplexity = Estimate(math.exp(nll.mean), math.exp(nll.mean) * nll.error)
        return Scores(len(self.kl), perplexity, Estimate.of(self.kl, RUN), Estimate.of(self.top1.double(), RUN), parts)


class LanguageReference:
    """The next-token distributions of a float model, which quantized ones are held against.

    Parameters
    ----------
    model : nn.Module
        Tokens [1, L] int64 -> logits [1, L, V], or an object with them in its attribute ``logits``.
    texts : mapping of str to sequence of Tensor [L] int64
        Windows of tokens, by the name of the text.

    Notes
    -----
    Keeps 4 V bytes a token: 0.8 GB for 4096 tokens of a vocabulary of 49152.
    """

    def __init__(self, model: nn.Module, texts: Mapping[str, Sequence[Tensor]]) -> None:
        if not any(len(windows) for windows in texts.values()):
            raise ValueError("texts must hold a window of tokens, got none")
        for name, windows in texts.items():
            for window in windows:
                if window.dim() != 1 or len(window) < 2 or window.dtype != torch.int64:
                    got = f"{str(window.dtype).removeprefix('torch.')} {list(window.shape)}"
                    raise ValueError(f"texts must hold windows [L] of int64 tokens with L >= 2, {name} has {got}")
        self.texts = {name: list(windows) for name, windows in texts.items() if len(windows)}
        self.known = {name: [log_probabilities(model, w) for w in windows] for name, windows in self.texts.items()}

    def own(self) -> Scores:
        """The scores of the float model itself: its perplexity, and a KL of 0."""
        return self._scores(lambda name, i: self.known[name][i])

    def score(self, model: nn.Module) -> Scores:
        """The scores of ``model``, which takes the same tokens."""
        return self._scores(lambda name, i: log_probabilities(model, self.texts[name][i]))

    def _scores(self, q_of: Callable[[str, int], Tensor]) -> Scores:
        found: dict[str, PerToken] = {}
        for name, windows in self.texts.items():
            parts = []
            for i, window in enumerate(windows):
                p, q = self.known[name][i], q_of(name, i)
                kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
                nll = F.nll_loss(q[:-1], window[1:].to(q.device), reduction="none")
                parts.append(PerToken(nll.cpu(), kl.cpu(), (p.argmax(-1) == q.argmax(-1)).cpu()))
            found[name] = PerToken.join(parts)
        alone = {name: part.scores({}) for name, part in found.items()} if len(found) > 1 else {}
        return PerToken.join(list(found.values())).scores(alone)


def evaluate(model: nn.Module, reference: nn.Module, inputs: Iterable[Tensor]) -> Scores:
    """Perplexity of a language model, and KL and top-1 agreement with the float model it was made of.

    Parameters
    ----------
    model : nn.Module
        The quantized model: tokens [1, L] int64 -> logits [1, L, V], or an object with an attribute ``logits``.
    reference : nn.Module
        The float model, for the same tokens. It may be ``model`` itself, whose perplexity that gives.
    inputs : iterable of Tensor [L] or [B, L] int64, or one such tensor
        Windows of tokens, L at least 2.

    Returns
    -------
    Scores
        Means over all tokens, each with its standard error.

    Raises
    ------
    ValueError
        For inputs without a window, or of another shape or dtype.

    Examples
    --------
    >>> model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8))
    >>> evaluate(model, model, torch.arange(8).view(1, 8)).kl.mean
    0.0
    """
    windows = [row for x in inputs for row in (x.view(1, -1) if x.dim() < 2 else x)]
    known = LanguageReference(reference, {"inputs": windows})
    return known.own() if model is reference else known.score(model)


@torch.inference_mode()
def log_probabilities(model: nn.Module, window: Tensor) -> Tensor:
    """Tokens [L] -> [L, V] float32."""
    device = next((p.device for p in model.parameters()), window.device)
    output: Any = model(window.to(device)[None])
    logits: Tensor = getattr(output, "logits", output)
    if logits.dim() != 3 or logits.shape[:2] != (1, len(window)):
        raise ValueError(f"model must give logits [1, {len(window)}, V], got {list(logits.shape)}")
    return logits[0].float().log_softmax(-1)


class EncoderReference:
    """The sentence embeddings of a float model, unit vectors [sentences, features].

    Parameters
    ----------
    model : nn.Module
    embed : callable (model) -> Tensor [sentences, features]
    """

    def __init__(self, model: nn.Module, embed: Callable[[nn.Module], Tensor]) -> None:
        self.embed, self.known = embed, embed(model)

    def score(self, model: nn.Module) -> Estimate:
        """1 - cosine of the embeddings of ``model`` with the float model's."""
        return Estimate.of(1 - F.cosine_similarity(self.embed(model).double(), self.known.double()))
