"""Peers that quantize the linear layers of a model: torch, torchao, optimum-quanto, bitsandbytes, on a GPU gemlite.

Each does it by its own rules and with its own codes. The layers of a model take turns with those of its copies, so
that none is found in a cache.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import quantlib
from quantlib.spec import QuantSpec

from .case import Call, Contender, Tensors
from .matmul import W4A16, W8A8, W8A16, itemsize, rotation, turns
from .peers import package


class Model(Protocol):
    """A recipe for a float model; equal recipes make equal models."""

    @property
    def spec(self) -> QuantSpec: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    def __call__(self) -> nn.Module: ...
    def takes(self, inputs: Tensors) -> Tensors: ...


@dataclass(frozen=True)
class Quantizer:
    """Somebody who quantizes a model, or runs it as it is.

    Parameters
    ----------
    name : str
    quantize : (model, spec) -> model
        May change the model that it is given.
    compiled : bool
        Run under torch.compile, for these shapes.
    dtype : str, optional
        The dtype of the float model and its inputs, if the case does not choose it.
    note : str
    copied : bool
        True if its models can be copied, which takes less time than to make them again.
    """

    name: str
    quantize: Callable[[nn.Module, QuantSpec], nn.Module]
    compiled: bool = False
    dtype: str | None = None
    note: str = ""
    copied: bool = True

    def contender(self, model: Model, nbytes: int, moved: int = 0) -> Contender:
        """Copies of the quantized model in turn, each of about ``nbytes``."""
        return Contender(self.name, functools.partial(self.bind, model, nbytes), note=self.note, moved=moved)

    def bind(self, model: Any, nbytes: int, inputs: Tensors, outs: Tensors) -> Call:
        if self.dtype is not None:
            model = dataclasses.replace(model, dtype=self.dtype)
        dtype = getattr(torch, model.dtype)
        x = [t.to(dtype) if t.is_floating_point() else t for t in model.takes(inputs)]
        models = copies(self, model, rotation(nbytes, model.device))
        run = torch.compile(forward, fullgraph=True, dynamic=False) if self.compiled else forward
        return turns([functools.partial(run, m, *x) for m in models])


def forward(model: nn.Module, *x: Tensor) -> Tensor:
    y: Tensor = model(*x)
    return y


@functools.lru_cache(maxsize=8)
def copies(quantizer: Quantizer, model: Model, count: int) -> tuple[nn.Module, ...]:
    """The quantized model, as often as its weights are to take turns."""
    source = model()
    first = quantizer.quantize(copy.deepcopy(source), model.spec)
    if quantizer.copied:
        return (first, *(copy.deepcopy(first) for _ in range(count - 1)))
    return (first, *(quantizer.quantize(copy.deepcopy(source), model.spec) for _ in range(count - 1)))


def by_quantlib(model: nn.Module, spec: QuantSpec) -> nn.Module:
    quantlib.quantize_(model, spec)
    return model


def as_it_is(model: nn.Module, spec: QuantSpec) -> nn.Module:
    return model


def by_torch(model: nn.Module, spec: QuantSpec) -> nn.Module:
    quantized: nn.Module = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return quantized


def by_torchao(model: nn.Module, spec: QuantSpec) -> nn.Module:
    quantization = package("torchao.quantization")
    config = "Int8WeightOnlyConfig" if spec.activation is None else "Int8DynamicActivationInt8WeightConfig"
    quantization.quantize_(model, getattr(quantization, config)())
    return model


def by_quanto(model: nn.Module, spec: QuantSpec) -> nn.Module:
    quanto = package("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint4 if spec.row.packed else quanto.qint8)
    quanto.freeze(model)
    return model


def by_bitsandbytes(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """Linear8bitLt, which quantizes its input too; Linear4bit with nf4."""
    modules = package("bitsandbytes.nn")

    def convert(linear: nn.Linear) -> nn.Module:
        (N, K), dtype = linear.weight.shape, linear.weight.dtype
        if spec.row.packed:
            new = modules.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4")
            new.load_state_dict({"weight": linear.weight})
        else:
            new = modules.Linear8bitLt(K, N, bias=False, has_fp16_weights=False)
            new.load_state_dict({"weight": linear.weight.half()})
        return new.to(linear.weight.device).eval()

    return replaced(model, convert)


def by_gemlite(model: nn.Module, spec: QuantSpec) -> nn.Module:
    """Its 4-bit layers take codes; they get quantlib's."""
    helper = package("gemlite.helper")

    def convert(linear: nn.Linear) -> nn.Module:
        w = linear.weight.detach()
        options = {"device": str(w.device), "dtype": w.dtype}
        if not spec.row.packed:
            kind = helper.A16W8_INT8 if spec.activation is None else helper.A8W8_int8_dynamic
            return kind(**options).from_linear(linear)
        codes, scale = quantlib.quantize_dynamic(w, spec.format, block=spec.block(w.shape))
        q = (quantlib.unpack(codes, spec.format) + 8).view(torch.uint8)
        return helper.A16W4_HQQ_INT(**options).from_weights(q, scale, torch.full_like(scale, 8))

    return replaced(model, convert)


def replaced(model: nn.Module, convert: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, convert(module))
    return model


QUANTLIB = Quantizer("quantlib", by_quantlib)
TORCHAO = Quantizer("torchao compiled", by_torchao, compiled=True)
QUANTO = Quantizer("optimum-quanto", by_quanto, copied=False)
TORCH = Quantizer("torch quantize_dynamic", by_torch, dtype="float32", note="float32 in and out")
NF4 = Quantizer("bitsandbytes nf4", by_bitsandbytes, note="codes of its own codebook")
INT8 = Quantizer("bitsandbytes int8", by_bitsandbytes, dtype="float16", note="float16 in and out")
GEMLITE = Quantizer("gemlite", by_gemlite, copied=False)

PEERS = {W8A16: (TORCHAO, QUANTO), W8A8: (TORCH, TORCHAO, INT8), W4A16: (QUANTO, NF4)}


def of(model: Model) -> tuple[Quantizer, ...]:
    """Return the peers that quantize as ``model.spec`` says, on its device."""
    peers = PEERS.get(model.spec, ())
    return peers if model.device == "cpu" else (*(p for p in peers if p is not TORCH), GEMLITE)


def floats(model: Model, dtypes: Iterable[str], weights: int, moved: Callable[[str], int]) -> list[Contender]:
    """The float model of so many weights in each dtype, which moves ``moved(dtype)`` bytes."""
    return [
        Quantizer(f"torch {dtype}", as_it_is, dtype=dtype).contender(model, weights * itemsize(dtype), moved(dtype))
        for dtype in dtypes
    ]
