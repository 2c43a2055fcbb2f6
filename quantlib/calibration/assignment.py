"""`assign`: a spec for each layer, the least loss that a budget of bits allows."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from quantlib.api import Filter, check_root, quantize_, reasons_to_skip, weight_of
from quantlib.calibration.sensitivity import curvatures
from quantlib.calibration.stages import calls_of
from quantlib.measure import check_weight
from quantlib.nn.functional import dequantize_weight, quantize_weight
from quantlib.report import Report, aligned
from quantlib.spec import QuantSpec, check_dynamic

# 4.25 bits, 4.25, 4.5 and 8, before what short rows add
CANDIDATES = ("nf4:group:128", "nf4:group:64:bfloat16", "nf4:group:32:bfloat16", "int8:row")


@dataclass(frozen=True)
class Choice:
    """The loss and the bits of one spec for one layer."""

    spec: str
    bits: int  # of all its codes, scales and zero points
    loss: float


class Assignment(dict[str, str]):
    """Name of a layer -> its spec: `calibrate` takes it, and `apply_` applies it without inputs.

    Attributes
    ----------
    choices : dict
        Name of a layer -> each of its candidates, as a `Choice`.
    weights : dict
        Name of a layer -> how many weights it has.
    measure : str
        The measure of the losses.
    """

    choices: dict[str, list[Choice]]
    weights: dict[str, int]
    measure: str

    def chosen(self, name: str) -> Choice:
        return next(choice for choice in self.choices[name] if choice.spec == self[name])

    @property
    def bits(self) -> float:
        """Bits a weight, with scales and zero points."""
        return sum(self.chosen(name).bits for name in self) / sum(self.weights.values())

    @property
    def loss(self) -> float:
        """The sum of the losses of the layers."""
        return sum(self.chosen(name).loss for name in self)

    def apply_(self, model: nn.Module) -> list[Report]:
        """`quantize_` each layer of ``model`` to its spec; a report a spec."""
        return [
            quantize_(model, spec, lambda module, name, spec=spec: self.get(name) == spec)  # type: ignore[misc]
            for spec in dict.fromkeys(self.values())
        ]

    def uniform(self) -> list[tuple[str, float, float]]:
        """(spec, bits a weight, loss) of every candidate, as the spec of all layers."""
        total, found = sum(self.weights.values()), []
        for i, choice in enumerate(next(iter(self.choices.values()))):
            each = [choices[i] for choices in self.choices.values()]
            found.append((choice.spec, sum(c.bits for c in each) / total, sum(c.loss for c in each)))
        return found

    def __str__(self) -> str:
        rows = [("layer", "format", "bits", "loss")]
        for name in self:
            choice = self.chosen(name)
            rows.append((name, choice.spec, f"{choice.bits / self.weights[name]:.2f}", f"{choice.loss:.3g}"))
        rows.append((f"{len(self)} layers", "assigned", f"{self.bits:.2f}", f"{self.loss:.3g}"))
        rows += [("", spec, f"{bits:.2f}", f"{loss:.3g}") for spec, bits, loss in self.uniform()]
        return "\n".join([*aligned(rows, left=2), "", f"loss: {self.measure}"])

    def draw(self, path: str | Path) -> None:
        """Loss over bits: every budget, the one that was asked for, and each candidate for all layers.

        Raises
        ------
        ImportError
            Where matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        steps = frontier(self.choices)
        total = sum(self.weights.values())
        figure = Figure(figsize=(8, 5), dpi=140, layout="constrained")
        axes = figure.subplots()
        axes.plot(
            [bits / total for bits, _ in steps], [loss for _, loss in steps], color="#2458b8", label="a spec a layer"
        )
        axes.plot([self.bits], [self.loss], "o", color="#c2452d", label=f"assigned: {self.bits:.2f} bits")
        for spec, bits, loss in self.uniform():
            axes.plot([bits], [loss], "D", color="#c07a1a", markersize=4)
            axes.annotate(spec, (bits, loss), (5, 4), textcoords="offset points", fontsize=7)
        axes.set(xlabel="bits a weight, scales included", ylabel=self.measure, yscale="log")
        axes.grid(color="#e4e7eb", linewidth=0.8)
        axes.legend(edgecolor="none", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


@torch.inference_mode(False)  # it needs gradients
def assign(
    model: nn.Module,
    bits: float = 4.5,
    candidates: Sequence[Any] = CANDIDATES,
    inputs: Iterable[Any] | None = None,
    *,
    filter_fn: Filter | None = None,
    progress: bool | None = None,
) -> Assignment:
    """Choose a spec for each ``nn.Linear`` of ``model``, which stays as it is.

    Parameters
    ----------
    model : nn.Module
    bits : float
        The budget for codes, scales and zero points together, a weight of these layers.
    candidates : sequence of what `QuantSpec.parse` takes
        Among them one that fits the budget.
    inputs : iterable, optional
        Batches as `calibrate` takes them. With them the loss of a layer is the KL of the output that its error causes,
        to second order, from one forward and one backward pass; without them the squared error of the weight over its
        energy, times the number of weights.
    filter_fn : callable (module, name) -> bool, optional
        Which of the layers; all of them by default.
    progress : bool, optional
        A bar on stderr; by default on a terminal.

    Returns
    -------
    Assignment
        A dictionary from the names of layers to specs, for `calibrate`, or for its own ``apply_``; printed, a table.
        The losses of layers are taken to add up, and the choice is a point of the convex hull of loss over bits.

    Raises
    ------
    TypeError
        For a model that is not a module, or inputs that are no batches.
    ValueError
        For an unknown spec, a budget below the smallest candidate, inputs as `calibrate` refuses them, or a weight that
        is not finite.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> chosen = assign(model, 9.0, ["int4:group:32", "int8:row"])
    >>> chosen["0"], chosen.bits <= 9.0
    ('int8:row', True)
    """
    check_root(model)
    specs = [QuantSpec.parse(candidate) for candidate in candidates]
    if not specs:
        raise ValueError("candidates must hold at least one spec, got none")
    skipped = reasons_to_skip(model, filter_fn)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in skipped}
    if not layers:
        raise ValueError("model must have an nn.Linear to quantize, got none")
    for spec in specs:
        check_dynamic(spec)
        for name, layer in layers.items():
            check_weight(f"weight of layer {name}", weight_of(layer).flatten(1), spec, "raise")
    calls = None if inputs is None else calls_of(inputs, model)
    shown = None if progress is None else not progress
    with tqdm(total=len(layers) + len(calls or ()), file=sys.stderr, disable=shown) as bar:
        found = {} if calls is None else curvatures(model, calls, layers, bar.update)
        choices = {}
        for name, layer in layers.items():
            w = weight_of(layer).detach().float()

            def cost(error: Tensor, name: str = name, w: Tensor = w) -> float:
                if calls is None:
                    whole = float(w.square().sum(dtype=torch.float64))
                    return float(error.square().sum(dtype=torch.float64)) / whole * w.numel() if whole else 0.0
                return found[name].loss(error) if name in found else 0.0

            choices[name] = [Choice(str(s), 8 * s.nbytes(w.shape), cost(error_of(w, s))) for s in specs]
            bar.update()
    weights = {name: weight_of(layer).numel() for name, layer in layers.items()}
    total, least = sum(weights.values()), sum(min(c.bits for c in each) for each in choices.values())
    if not least <= bits * total:
        raise ValueError(
            f"bits must be at least {math.ceil(1000 * least / total) / 1000:g} for these candidates, got {bits}"
        )
    chosen = Assignment(choose(choices, bits * total))
    chosen.choices, chosen.weights = choices, weights
    chosen.measure = (
        "KL of the output, nats a token, to second order" if calls is not None else "squared error a weight"
    )
    return chosen


def error_of(w: Tensor, spec: QuantSpec) -> Tensor:
    """decode(codes) - w, of w [N, K] float32."""
    weight_only = spec.weight_only
    return dequantize_weight(quantize_weight(w, weight_only), weight_only, w.shape[1], torch.float32) - w


def hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the lower convex hull of loss over bits, by rising bits: each point is best for some price of a bit."""
    best: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.bits, c.loss)):
        if best and choice.loss >= best[-1].loss:
            continue
        while len(best) > 1 and slope(best[-2], choice) <= slope(best[-2], best[-1]):
            best.pop()
        best.append(choice)
    return best


def slope(a: Choice, b: Choice) -> float:
    """The change of the loss for each additional bit: negative."""
    return (b.loss - a.loss) / (b.bits - a.bits)


def steps_of(choices: dict[str, list[Choice]]) -> tuple[dict[str, Choice], list[tuple[str, Choice, Choice]]]:
    """The smallest candidate of each layer, and the steps from one to the next, those that gain most a bit first."""
    hulls = {name: hull(each) for name, each in choices.items()}
    steps = [(name, a, b) for name, each in hulls.items() for a, b in itertools.pairwise(each)]
    return {name: each[0] for name, each in hulls.items()}, sorted(steps, key=lambda step: slope(step[1], step[2]))


def choose(choices: dict[str, list[Choice]], budget: float) -> dict[str, str]:
    """name -> spec by the steps that fit the budget, in bits; one that does not ends those of its layer."""
    chosen, steps = steps_of(choices)
    used, stopped = sum(choice.bits for choice in chosen.values()), set()
    for name, a, b in steps:
        if used + b.bits - a.bits > budget:
            stopped.add(name)
        elif name not in stopped:
            chosen[name] = b
            used += b.bits - a.bits
    return {name: choice.spec for name, choice in chosen.items()}


def frontier(choices: dict[str, list[Choice]]) -> list[tuple[float, float]]:
    """(bits, loss) of all layers after each step, from the smallest."""
    chosen, steps = steps_of(choices)
    found = [(float(sum(c.bits for c in chosen.values())), sum(c.loss for c in chosen.values()))]
    for _, a, b in steps:
        found.append((found[-1][0] + b.bits - a.bits, found[-1][1] + b.loss - a.loss))
    return found
