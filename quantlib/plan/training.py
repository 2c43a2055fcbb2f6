"""The memory of a training step: weights, gradients, the states of the optimizer, activations, and what is gathered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from quantlib.optim.adamw import states_nbytes
from quantlib.optim.groups import embeddings_of
from quantlib.plan.lines import Line, Section
from quantlib.plan.parallel import ALL, WHOLE, Parallel, Shapes, dealt, sharded, stage_share, units_of

BLOCK = 128  # values of an 8-bit state that share a scale
SLACK = 0.05  # of gradients and activations: what the caching allocator of a GPU rounds up and cannot join
RULE = {"weights": 4, "gradients": 4, "optimizer": 8, "activations and temporaries": 8}  # bytes a parameter: 24


@dataclass(frozen=True)
class Optimizer:
    """The bytes that an optimizer keeps for a parameter of ``itemsize`` bytes, and the temporary ones of its step.

    Attributes
    ----------
    name : str
    states : float
        Bytes a parameter; a negative one is a multiple of ``itemsize``.
    counter : int
        Bytes a tensor: the number of the step.
    how : str
        The formula.
    by_shape : callable (shape, whether of an embedding) -> int, optional
        Bytes of the states of a tensor, where they depend on its shape.
    """

    name: str
    states: float
    counter: int
    how: str
    by_shape: Callable[[tuple[int, ...], bool], int] | None = None

    def nbytes(self, shape: tuple[int, ...], itemsize: float, embedding: bool, shapeless: bool) -> int:
        """Bytes of the states of a tensor of ``shape``; ``shapeless``: of as many parameters in unknown tensors."""
        each = self.states if self.states >= 0 else -self.states * itemsize
        if self.by_shape is None or shapeless:
            return round(count(shape) * each) + self.counter
        return self.by_shape(shape, embedding) + self.counter


def _in_8_bits(shape: tuple[int, ...], embedding: bool) -> int:
    return states_nbytes(torch.Size(shape), bits=32 if embedding else 8)


OPTIMIZERS = {
    "adamw": Optimizer("adamw", -2, 4, "2 states in the dtype of the parameter, and 4 bytes a tensor"),
    "adamw8bit": Optimizer(
        "adamw8bit",
        2 * (1 + 4 / BLOCK),
        4,
        f"2 states x (1 byte + 4 / {BLOCK}) in matrices, 2 x 4 bytes in embeddings, vectors and small matrices; "
        "what quantlib.optim.AdamW8bit has",
        _in_8_bits,
    ),
    "sgd": Optimizer("sgd", 0, 0, "no state without momentum"),
}


def optimizer_of(name: str) -> Optimizer:
    """The row of `OPTIMIZERS`.

    Raises
    ------
    ValueError
        For another name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    return OPTIMIZERS[name]


@dataclass(frozen=True)
class Trained:
    """The part of a model that is trained.

    Attributes
    ----------
    shapes : dict of str to tuple of int
        The shapes of the parameters that are trained, by name.
    gradients : dict of str to int
        Bytes of their gradients.
    weights : dict of str to int
        Bytes of all parameters, trained or not.
    all_shapes : dict of str to tuple of int
        The shapes of ``weights``.
    buffers : dict of str to int
        Bytes of buffers, which are on every rank.
    step : int, optional
        Peak of forward and backward beside the parameters, the gradients in it; None where it is not known.
    alone : int, optional
        The same where a gradient goes as soon as it is made, as with sharded gradients.
    embeddings : frozenset of str
        Those of ``shapes`` that belong to an embedding.
    shapeless : bool
        Whether ``shapes`` is a count and not the shape of a tensor.
    """

    shapes: Shapes
    gradients: Mapping[str, int]
    weights: Mapping[str, int]
    all_shapes: Shapes
    buffers: Mapping[str, int] = field(default_factory=dict)
    step: int | None = None
    alone: int | None = None
    embeddings: frozenset[str] = frozenset()
    shapeless: bool = False

    @classmethod
    def of(cls, skeleton: nn.Module, step: int | None = None, alone: int | None = None) -> Trained:
        """Describe a model on meta."""
        named, tables = dict(skeleton.named_parameters()), embeddings_of(skeleton)
        return cls(
            {n: tuple(p.shape) for n, p in named.items() if p.requires_grad},
            {n: p.numel() * p.element_size() for n, p in named.items() if p.requires_grad},
            {n: p.numel() * p.element_size() for n, p in named.items()},
            {n: tuple(p.shape) for n, p in named.items()},
            {n: t.numel() * t.element_size() for n, t in skeleton.named_buffers()},
            step,
            alone,
            frozenset(n for n, p in named.items() if id(p) in tables),
        )

    @classmethod
    def of_count(cls, parameters: int, itemsize: int) -> Trained:
        """Describe so many parameters of which nothing else is known."""
        nbytes, shapes = {"parameters": parameters * itemsize}, {"parameters": (parameters,)}
        return cls(shapes, nbytes, nbytes, shapes, shapeless=True)


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, at the moment with the most.

    Attributes
    ----------
    parts : dict of str to int
        The terms of `total`.
    how : dict of str to str
        The formula of each part.
    """

    parts: Mapping[str, int]
    how: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory_of(trained: Trained, optimizer: Optimizer, parallel: Parallel, on_gpu: bool) -> Memory:
    """The memory of one rank; ``on_gpu`` adds the caching allocator's slack and the temporaries of foreach steps."""
    how: dict[str, str] = {}
    sizes = {n: (size, size // max(count(trained.shapes[n]), 1)) for n, size in trained.gradients.items()}
    states = {
        n: optimizer.nbytes(trained.shapes[n], item, n in trained.embeddings, trained.shapeless)
        for n, (_, item) in sizes.items()
    }
    values = {n: size - optimizer.counter for n, size in states.items()}
    weights, gradients, state = (sum(m.values()) for m in (trained.weights, trained.gradients, states))
    how["weights"] = "bytes of every parameter and buffer as it is trained"
    how["gradients"] = "bytes of every trained parameter"
    how["optimizer"] = optimizer.how
    share = stage_share(trained.weights, parallel.pipeline) / parallel.tensor
    if parallel.pipeline * parallel.tensor > 1:
        split = f"; the fullest of {parallel.pipeline} stages, a {parallel.tensor}th of each layer: x {share:.4f}"
        for name in how:
            how[name] += split
    gathered = buckets = 0
    N, kind = parallel.data, parallel.kind
    largest, rest = units_of(trained.weights)
    unit_gradient = max(units_of(trained.gradients))
    held, whole_gradients = weights, True
    if kind == "ddp" and N > 1:
        buckets = gradients
    elif kind == "zero1":
        state, buckets = dealt(trained.shapes, states, N), gradients if N > 1 else 0
        how["optimizer"] += f"; whole tensors dealt to the emptiest of {N} ranks, the largest first"
    elif kind in ("zero2", "zero3") and N > 1:
        held = sharded(trained.all_shapes, trained.weights, N)
        gradients = sharded(trained.shapes, trained.gradients, N)
        state = sharded(trained.shapes, values, N) + optimizer.counter * len(states)
        gathered = (weights if kind == "zero2" else min(2 * largest + rest, weights)) + unit_gradient
        whole_gradients = False
        for name in ("weights", "gradients", "optimizer"):
            how[name] += f"; each tensor cut along its first axis over {N} ranks, rounded up"
        kept = (
            "all weights, kept from forward to backward"
            if kind == "zero2"
            else "2 of the largest layer, and what is in no layer"
        )
        how["gathered"] = f"{kept}, and the gradient of the largest layer before it is reduced"
    if buckets:
        how["buckets"] = (
            "a second copy of the gradients, which DistributedDataParallel sends (gradient_as_bucket_view=False)"
        )
    held += sum(trained.buffers.values())
    held, gradients, state, gathered, buckets = (round(b * share) for b in (held, gradients, state, gathered, buckets))
    parts = {"weights": held, "gradients": gradients, "optimizer": state, "gathered": gathered, "buckets": buckets}
    if trained.step is not None and trained.alone is not None:
        temporary = step_temporary(trained, optimizer, on_gpu)
        if whole_gradients:
            beside = trained.step - sum(trained.gradients.values())
            temporary = round(temporary * share)
        else:
            beside, temporary = trained.alone, round(temporary * share / N)
        beside = round(beside * (WHOLE + (ALL - WHOLE) / parallel.tensor) / ALL) if parallel.tensor > 1 else beside
        parts["activations and temporaries"] = max(beside, temporary - gathered, 0)
        how["activations and temporaries"] = (
            "the largest of: forward and backward on fake tensors, less the gradients at their end; the step of the "
            f"optimizer, {'one more value a parameter (foreach)' if on_gpu else '2 x the largest parameter'}"
            + (f"; x ({WHOLE} + {ALL - WHOLE} / {parallel.tensor}) / {ALL}" if parallel.tensor > 1 else "")
            + (
                f"; {parallel.pipeline} batches in flight over 1/{parallel.pipeline} of the layers"
                if parallel.pipeline > 1
                else ""
            )
        )
    if on_gpu:
        parts["slack"] = round(SLACK * (parts["gradients"] + parts.get("activations and temporaries", 0)))
        how["slack"] = f"{SLACK:.0%} of gradients and activations: blocks that the caching allocator rounds up; assumed"
    return Memory({name: size for name, size in parts.items() if size}, how)


def step_temporary(trained: Trained, optimizer: Optimizer, on_gpu: bool) -> int:
    """Bytes that torch's AdamW needs for a moment: foreach, of all parameters at once, or of one at a time."""
    if optimizer.name != "adamw":
        return 0
    if on_gpu:
        return sum(trained.gradients.values())
    return 2 * max(trained.gradients.values(), default=0)


def count(shape: tuple[int, ...]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n


def section(title: str, memory: Memory, parameters: int, ranks: int) -> Section:
    """The parts of a rank, their sum, and the rule of thumb beside it."""
    lines = [Line(name, size, "bytes", memory.how.get(name, "")) for name, size in memory.parts.items()]
    of = "a rank" if ranks > 1 else "in all"
    lines.append(Line(of, memory.total, "bytes", "sum of the above", dict(memory.parts)))
    rule = {name: each * parameters for name, each in RULE.items()}
    text = " + ".join(f"{each} {name}" for name, each in RULE.items())
    lines.append(
        Line("rule of thumb", sum(rule.values()), "bytes", f"24 bytes a parameter in FP32 with AdamW: {text}", rule)
    )
    return Section(title, lines)
