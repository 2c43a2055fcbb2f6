"""The module of codes that stands for a float one: of those of torch, and of layers of transformers like them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from quantlib.nn.conv import QuantConv1d, QuantConv2d
from quantlib.nn.embedding import QuantEmbedding
from quantlib.nn.experts import Matrix, Stack
from quantlib.nn.leaf import check_input, check_inside
from quantlib.nn.linear import QuantLinear
from quantlib.nn.module import QuantModule

QUANTIZED: dict[type[nn.Module], type[QuantModule]] = {
    nn.Linear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}  # float module -> the one of codes that stands for it

MADE: dict[type[nn.Module], type[QuantModule]] = {}  # the same for subclasses, made when they are met
CONV1D = "transformers.pytorch_utils.Conv1D"


def form_of(cls: type[nn.Module]) -> type[QuantModule] | None:
    """The class of codes for modules of class ``cls``; None where it is not known what they compute.

    Layers of the models of transformers that derive from one of torch, such as an embedding that scales its result,
    compute by the forward of torch's layer or with its weight: both work over codes. Of other subclasses this is not
    known. Routers, which few of them are, stay floats.
    """
    if cls in QUANTIZED:
        return QUANTIZED[cls]
    if cls not in MADE:
        if f"{cls.__module__}.{cls.__name__}" == CONV1D:
            MADE[cls] = type("QuantConv1D", (TransposedLinear, cls), {"FLOAT": cls, **words_of(TransposedLinear)})
        elif cls.__module__.startswith("transformers.models.") and "Router" not in cls.__name__:
            base = next((t for t in QUANTIZED if issubclass(cls, t)), None)
            if base is None or issubclass(cls, QuantModule):
                return None
            form = QUANTIZED[base]
            plain = "forward" not in vars(cls) or cls.__name__ in SAME
            bases = (form, cls) if plain else (cls, form)
            MADE[cls] = type(f"Quant{cls.__name__}", bases, {"FLOAT": cls, **words_of(form)})
        else:
            return None
    return MADE[cls]


SAME = ("FalconLinear",)  # whose forward is torch's, written with the weight itself


def words_of(form: type[QuantModule]) -> dict[str, Any]:
    return {"__doc__": form.__doc__, "__module__": __name__, "__reduce_ex__": reduced}


def reduced(module: QuantModule, protocol: Any) -> Any:
    """Return what pickle writes for a module; its class is made at run time and cannot be found by name."""
    state = module.__getstate__() if isinstance(module, QuantLinear) else vars(module)
    return remade, (module.FLOAT, state)


def remade(cls: type[nn.Module], state: dict[str, Any]) -> QuantModule:
    form = form_of(cls)
    assert form is not None
    new = form.__new__(form)
    new.__setstate__(state)  # type: ignore[no-untyped-call]
    return new


def with_likes(types: tuple[type[nn.Module], ...]) -> tuple[type[nn.Module], ...]:
    """``types``, and what transformers has in place of ``nn.Linear``."""
    module = sys.modules.get(CONV1D.rpartition(".")[0])
    return (*types, module.Conv1D) if module is not None and nn.Linear in types else types


class TransposedLinear(QuantModule):
    """``Conv1D`` of transformers, a linear layer whose float weight lies [K, N], with codes [N, K] and their scales.

    ``weight`` reads as the float weight [K, N]. Everything else is as in `QuantLinear`.
    """

    nf: int  # N
    nx: int  # K
    bias: nn.Parameter

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.nx, self.nf

    @property
    def _matrix(self) -> tuple[int, int]:
        return self.nf, self.nx

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        return weight.t().contiguous()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return Stack(1, *self._matrix, "(ek)n").stored_shape(self.spec, experts=False)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return Matrix(self.plain, self.spec, self.nx).values(dtype).t()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, spec={self.spec}"

    __repr__ = nn.Module.__repr__

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any float dtype -> [..., N] of the same."""
        check_inside(x)
        check_input(x, self.nx)
        return Matrix(self.plain, self.spec, self.nx).multiply(x, self.bias)
