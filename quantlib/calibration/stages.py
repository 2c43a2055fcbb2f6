"""H[k, l] = sum over tokens of x[t, k] x[t, l] of every layer's input, one block of the model in memory at a time

A block is a child of the ``nn.ModuleList`` or ``nn.Sequential`` that holds most of the layers. Where each child is
called once, with the result of the one before it, the blocks are run one after the other and each sees what the blocks
before it give once they are quantized. Any other model is run whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.calibration.experts import expert_name, tell_rows
from quantlib.nn.experts import ways_of
from quantlib.ops.check import dtype_name


@dataclass
class Gram:
    """Sums over the inputs x [K] of a layer, float32: of x x^T, of x, and their number; and the largest magnitudes."""

    H: Tensor
    total: Tensor
    peak: Tensor
    tokens: int = 0

    @classmethod
    def of(cls, K: int, device: torch.device) -> Gram:
        """The sums over no input."""
        H, total, peak = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in ((K, K), (K,), (K,)))
        return cls(H, total, peak)

    def add(self, x: Tensor) -> None:
        """Add the rows of x [tokens, K]."""
        x = x.float()
        self.H.addmm_(x.T, x)
        self.total += x.sum(0)
        torch.maximum(self.peak, x.abs().amax(0), out=self.peak)
        self.tokens += len(x)


Finish = Callable[[dict[str, Gram]], None]  # quantizes the layers of a stage, by name


@dataclass
class Call:
    """The arguments of one call of a module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, module: nn.Module) -> Any:
        return module(*self.args, **self.kwargs)

    def holds(self, x: Any) -> int | str | None:
        """The argument that is the object ``x``."""
        found: list[int | str] = [i for i, a in enumerate(self.args) if a is x]
        return next(iter([*found, *(name for name, a in self.kwargs.items() if a is x)]), None)

    def with_argument(self, place: int | str, x: Any) -> Call:
        if isinstance(place, str):
            return Call(self.args, self.kwargs | {place: x})
        return Call((*self.args[:place], x, *self.args[place + 1 :]), self.kwargs)


def calls_of(inputs: Any, model: nn.Module) -> list[Call]:
    """Return the calls of the model, one a batch: a tensor, a tuple of arguments or a mapping of them.

    Raises
    ------
    TypeError
        For inputs that are none of these.
    ValueError
        For inputs without a batch, of a float dtype that is not the model's, or with a value that is not finite.
    """
    if isinstance(inputs, (str, bytes, Mapping)):
        raise TypeError(f"inputs must be an iterable of batches, got {type(inputs).__name__}")
    calls = []
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for i, batch in enumerate(inputs):
        if isinstance(batch, Mapping):
            call = Call((), dict(batch))
        else:
            call = Call(tuple(batch) if isinstance(batch, (tuple, list)) else (batch,))
        for x in (*call.args, *call.kwargs.values()):
            if not isinstance(x, Tensor):
                if x is batch:
                    raise TypeError(f"inputs must be tensors, tuples or mappings, got {type(x).__name__} in batch {i}")
                continue
            if x.is_floating_point() and x.dtype != dtype:
                got = dtype_name(x.dtype)
                raise ValueError(f"inputs must be of {dtype_name(dtype)}, as the model is, got {got} in batch {i}")
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise ValueError(f"inputs must be finite, got {float(x[~x.isfinite()][0])} in batch {i}")
        calls.append(call)
    if not calls:
        raise ValueError("inputs must hold at least one batch, got none")
    return calls


@torch.no_grad()
def run(model: nn.Module, calls: Sequence[Call], layers: Collection[str], finish: Finish) -> None:
    """Call ``finish`` for the layers of each stage, in the order of the model, with sums over their inputs."""
    left = set(layers)
    with evaluating(model):
        name, chain = chain_of(model, layers)
        replays = chained(model, chain, calls) if chain else None
        for b, block in enumerate(chain if replays else []):
            prefix = f"{name}.{b}" if name else str(b)
            inside = {n: n.removeprefix(prefix).removeprefix(".") for n in layers if f"{n}.".startswith(f"{prefix}.")}
            if inside:
                finish(grams(block, [r.call(b) for r in replays or ()], inside))
                left -= set(inside)
            now = model.get_submodule(prefix)  # the block may be a layer that was replaced
            for replay in replays or ():
                replay.x = first_of(replay.call(b)(now))
        if left:
            finish(grams(model, calls, {n: n for n in layers if n in left}))


def grams(module: nn.Module, calls: Sequence[Call], layers: Mapping[str, str]) -> dict[str, Gram]:
    """name -> sums over the layer's inputs while ``module`` is called; ``layers`` has the names inside ``module``.

    Of experts the names are those of `expert_name`.
    """
    found: dict[str, Gram] = {}
    handles = []

    def add(name: str, x: Tensor) -> None:
        if name not in found:
            found[name] = Gram.of(x.shape[-1], x.device)
        found[name].add(x.detach().reshape(-1, x.shape[-1]))

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if ways_of(layer):
                tell_rows(layer, lambda key, e, x: add(expert_name(name, key, e), x), args, kwargs)
            else:
                add(name, args[0] if args else kwargs["input"])

        return hook

    for name, inside in layers.items():
        layer = module.get_submodule(inside) if inside else module
        handles.append(layer.register_forward_pre_hook(watch(name), with_kwargs=True))
    try:
        for call in calls:
            call(module)
    finally:
        for handle in handles:
            handle.remove()
    return found


def chain_of(model: nn.Module, layers: Collection[str]) -> tuple[str, list[nn.Module]]:
    """The name and the children of the container that holds most layers; of equal ones that with most children."""
    best: tuple[tuple[int, int], str, list[nn.Module]] = ((1, 0), "", [])
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            prefix = f"{name}." if name else ""
            held = [n for n in layers if n.startswith(prefix)]
            if (count := (len(held), len(module))) > best[0]:
                best = (count, name, list(module))
    return best[1], best[2]


@dataclass
class Replay:
    """A batch on its way through the chain: what the next block is given, and all else that each is called with."""

    x: Any
    places: list[int | str]
    rest: list[Call]

    def call(self, b: int) -> Call:
        return self.rest[b].with_argument(self.places[b], self.x)


def chained(model: nn.Module, chain: Sequence[nn.Module], calls: Sequence[Call]) -> list[Replay] | None:
    """A replay for each batch; None where a block is not called once with the result of the one before."""
    replays = []
    for call in calls:
        seen, results = watched(model, chain, call)
        if [b for b, _ in seen] != list(range(len(chain))):
            return None
        places = [c.holds(x) for (_, c), x in zip(seen[1:], results, strict=False)]
        start = places[0] if places else 0
        first = seen[0][1]
        if start is None or any(place is None for place in places):
            return None
        found = first.kwargs.get(start) if isinstance(start, str) else (*first.args, None)[start]
        if not isinstance(found, Tensor):
            return None
        every = [start, *(place for place in places if place is not None)]
        rest = [c.with_argument(place, None) for (_, c), place in zip(seen, every, strict=True)]
        replays.append(Replay(found, every, rest))
    return replays


def watched(model: nn.Module, chain: Sequence[nn.Module], call: Call) -> tuple[list[tuple[int, Call]], list[Any]]:
    """Run the model; return its calls of the blocks in order, each with the block's number, and their results."""
    seen: list[tuple[int, Call]] = []
    results: list[Any] = []

    def before(b: int) -> Callable[..., None]:
        return lambda module, args, kwargs: seen.append((b, Call(args, kwargs)))

    def after(module: nn.Module, args: Any, result: Any) -> None:
        results.append(first_of(result))

    handles = [block.register_forward_pre_hook(before(b), with_kwargs=True) for b, block in enumerate(chain)]
    handles += [block.register_forward_hook(after) for block in chain]
    try:
        call(model)
    finally:
        for handle in handles:
            handle.remove()
    return seen, results


def first_of(result: Any) -> Any:
    """Return what a block hands on: its result, or the first of several."""
    return result[0] if isinstance(result, (tuple, list)) and result else result


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and without a cache of keys and values, which a second call would add to."""
    training = {name: module.training for name, module in model.named_modules()}  # some are replaced meanwhile
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)
        if cached:
            config.use_cache = cached
