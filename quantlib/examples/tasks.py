"""Two small real tasks to train on: handwritten digits, and the next character of Python's own documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 48  # characters that the language model sees


@dataclass(frozen=True)
class Task:
    """A task to learn, and its data.

    Parameters
    ----------
    name : str
    origin : str
        A few words on the data.
    build : callable () -> nn.Module
        An untrained model: x -> logits [..., classes].
    draw : callable (Generator) -> (x, target [...])
        A batch to train on.
    tests : list of (x, target)
        The data that the model is tested on, and never trained on.
    rate : float
        AdamW's, at the start.
    """

    name: str
    origin: str
    build: Callable[[], nn.Module]
    draw: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    tests: list[tuple[Tensor, Tensor]]
    rate: float


@dataclass(frozen=True)
class Score:
    """The score over all of a task's tests."""

    loss: float  # mean cross-entropy in nats, less is better
    accuracy: float


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., classes]."""
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> Score:
    loss, right, count = 0.0, 0, 0
    for x, target in task.tests:
        logits = model(x)
        loss += float(loss_of(logits, target)) * target.numel()
        right += int((logits.argmax(-1) == target).sum())
        count += target.numel()
    return Score(loss / count, right / count)


def digits() -> Task:
    """The 1797 digits of 8 x 8 pixels that come with scikit-learn; a third of them are the tests.

    Raises
    ------
    ImportError
        Where scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(data.images).float()[order].unsqueeze(1) / 8 - 1  # [1797, 1, 8, 8]
    target = torch.from_numpy(data.target)[order]
    half = len(x) * 2 // 3

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        )

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(half, (64,), generator=generator)
        return x[rows], target[rows]

    return Task("digits", f"{half} digits, {len(x) - half} to test", build, draw, [(x[half:], target[half:])], 5e-3)


def characters() -> Task:
    """The next character of the language reference that ``help("lambda")`` prints from; a tenth of it is the tests."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    index = {character: i for i, character in enumerate(alphabet)}
    codes = torch.tensor([index[character] for character in text])
    split = len(codes) * 9 // 10
    windows = codes.unfold(0, CONTEXT + 1, 1)  # [starts, CONTEXT + 1]

    def build() -> nn.Module:
        return CharacterModel(len(alphabet), 48, 2, 4)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = windows[torch.randint(split - CONTEXT, (32,), generator=generator)]
        return chosen[:, :-1], chosen[:, 1:]

    held = windows[split :: (len(windows) - split) // 256]
    tests = [(part[:, :-1], part[:, 1:]) for part in held.split(128)]
    return Task("characters", f"{split:,} characters, {held[:, 1:].numel():,} to test", build, draw, tests, 4e-3)


class CharacterModel(nn.Module):
    """Characters [batch, length] -> logits [batch, length, alphabet]: a transformer of pre-normalized blocks."""

    def __init__(self, alphabet: int, width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(alphabet, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, alphabet)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        logits: Tensor = self.head(self.norm(h))
        return logits


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h)); [batch, length, width]"""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before_attention(h)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        mixed: Tensor = h + self.mlp(self.before_mlp(h))
        return mixed


TASKS = {"digits": digits, "characters": characters}
