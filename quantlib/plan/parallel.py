"""The split of a model over devices, and the part that one device holds."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

DATA = ("ddp", "zero1", "zero2", "zero3")
GRAMMAR = "one of ddp, zero1, zero2, zero3, with tp:N and pp:N beside it where layers are split, e.g. tp:2,pp:2,zero1"
# Of 34 bytes an element of a layer's activations, 10 are of norms, residual sums and their dropouts, which tensor
# parallelism does not split: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models, 2022.
WHOLE, ALL = 10, 34

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parallel:
    """A split over ``data * tensor * pipeline`` devices.

    Attributes
    ----------
    kind : str
        The kind of the copies: "ddp", "zero1", "zero2" or "zero3".
    data, tensor, pipeline : int
        How many copies there are, in how many parts each layer is split, in how many stages the layers.
    """

    kind: str = "ddp"
    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    @classmethod
    def parse(cls, text: str | None, gpus: int) -> Parallel:
        """Parse ``text`` for so many devices.

        Raises
        ------
        ValueError
            For other words, for sizes below 1, and for devices that the sizes do not divide.
        """
        if type(gpus) is not int or gpus < 1:
            raise ValueError(f"gpus must be a whole number >= 1, got {gpus!r}")
        kinds, sizes = [], {"tp": 1, "pp": 1}
        for word in filter(None, (text or "").lower().split(",")):
            match = re.fullmatch(r"(tp|pp):0*([1-9][0-9]*)", word.strip())
            if match:
                sizes[match[1]] = int(match[2])
            elif word.strip() in DATA:
                kinds.append(word.strip())
            else:
                raise ValueError(f"parallel must be {GRAMMAR}, got {text!r}")
        if len(kinds) > 1:
            raise ValueError(f"parallel must name one of {', '.join(DATA)}, got {text!r}")
        split = sizes["tp"] * sizes["pp"]
        if gpus % split:
            raise ValueError(f"parallel must split {gpus} devices evenly, got {text!r}: {split} parts of a copy")
        return cls(kinds[0] if kinds else "ddp", gpus // split, sizes["tp"], sizes["pp"])

    def check(self, layers: int, heads: int | None) -> None:
        """Raise ValueError where the model has fewer layers than stages, or heads that cannot be shared out."""
        if self.pipeline > max(layers, 1):
            raise ValueError(
                f"parallel must have at most {layers} stages, the layers of the model, got pp:{self.pipeline}"
            )
        if heads is not None and heads % self.tensor:
            raise ValueError(f"parallel must divide {heads} attention heads, got tp:{self.tensor}")

    def __str__(self) -> str:
        sizes = [f"{name}:{n}" for name, n in (("tp", self.tensor), ("pp", self.pipeline)) if n > 1]
        return ",".join([*sizes, self.kind])


def unit_of(name: str) -> str:
    """The numbered layer in which a parameter is; empty for what is in none."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else ""


def layers_of(shapes: Shapes) -> int:
    """The number of numbered layers."""
    return len({unit_of(name) for name in shapes} - {""})


def units_of(nbytes: Mapping[str, int]) -> tuple[int, int]:
    """Bytes of the largest numbered layer, and of everything in none: what FSDP gathers at a time."""
    units: dict[str, int] = {}
    for name, size in nbytes.items():
        units[unit_of(name)] = units.get(unit_of(name), 0) + size
    rest = units.pop("", 0)
    return max(units.values(), default=0), rest


def stage_share(nbytes: Mapping[str, int], stages: int) -> float:
    """The share of the bytes in the fullest stage: layers dealt out evenly, tables before the first, a head after."""
    total = sum(nbytes.values())
    if stages == 1 or not total:
        return 1.0
    units: dict[str, int] = {}
    first = last = 0
    for name, size in nbytes.items():
        unit = unit_of(name)
        if unit:
            units[unit] = units.get(unit, 0) + size
        elif units:
            last += size
        else:
            first += size
    sizes = list(units.values())
    cuts = [len(sizes) * i // stages for i in range(stages + 1)]
    loads = [sum(sizes[a:b]) for a, b in itertools.pairwise(cuts)]
    loads[0] += first
    loads[-1] += last
    return max(loads) / total


def sharded(shapes: Shapes, nbytes: Mapping[str, int], parts: int) -> int:
    """Bytes of the largest shard where each tensor is cut along its first axis, as FSDP2 does."""
    total = 0
    for name, size in nbytes.items():
        shape = shapes[name]
        if not shape or not shape[0]:
            total += size
        else:
            total += math.ceil(shape[0] / parts) * (size // shape[0])
    return total


def dealt(shapes: Shapes, nbytes: Mapping[str, int], parts: int) -> int:
    """Bytes of the fullest rank where each tensor goes to the emptiest one, the largest first, as in torch's ZeRO."""
    elements, held = [0] * parts, [0] * parts
    for name in sorted(nbytes, key=lambda name: math.prod(shapes[name]), reverse=True):
        emptiest = elements.index(min(elements))
        elements[emptiest] += math.prod(shapes[name])
        held[emptiest] += nbytes[name]
    return max(held)
