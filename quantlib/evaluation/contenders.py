"""What a model can become: the specs of quantlib, and beside them the packages that users would take instead."""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib import api, formats
from quantlib.evaluation.subjects import Subject, quiet
from quantlib.spec import SCHEMES, QuantSpec

GROUPS = (128, 64, 32)
NARROW = (64, 32, 16)  # of scales in 16 bits: 4.25, 4.5 and 5 bits a weight


@dataclass(frozen=True)
class Contender:
    """A way to quantize a copy of a model.

    Attributes
    ----------
    name : str
    apply : callable (model, subject) -> float
        Quantizes the linear layers of ``model`` in place; bits a weight, with scales and zero points as they are kept.
    package : str
        What has to be installed; "" for quantlib itself.
    """

    name: str
    apply: Callable[[nn.Module, Subject], float]
    package: str = ""

    @property
    def missing(self) -> bool:
        return bool(self.package) and importlib.util.find_spec(self.package) is None


def ours(text: str) -> Contender:
    """The spec ``text``.

    Raises
    ------
    ValueError
        For text that is no spec.
    """
    spec = QuantSpec.parse(text)

    def apply(model: nn.Module, subject: Subject) -> float:
        with quiet():
            report = api.quantize_(model, spec, lambda module, name: name not in subject.kept)
        if spec.activation is None:
            api.dequantize_(model)  # the values of the codes: what is measured is their loss, and floats are faster
        return 8 * report.bytes_after / sum(math.prod(layer.shape) for layer in report.layers)

    return Contender(titled(spec), apply)


def titled(spec: QuantSpec) -> str:
    """``spec``, and the shortest of the names in use elsewhere that mean it."""
    names = [name for name in SCHEMES if QuantSpec.parse(name) == spec and name != str(spec)]
    return f"{spec} ({min(names, key=len).upper()})" if names else str(spec)


def specs() -> list[str]:
    """Every named spec, then every 4-bit format in groups of 128, 64 and 32, and in fewer with scales of 16 bits.

    Equal ones come once, in this order.
    """
    named = [str(QuantSpec.parse(text)) for text in SCHEMES.values()]
    named = [text for text in named if QuantSpec.parse(text).scaled]
    four = [row for row in formats.TABLE if row.bits == 4]
    grouped = [f"{row.name}:group:{g}" for row in four for g in GROUPS if row.is_float or row.signed]
    grouped += [f"{row.name}:group:{g}:affine" for row in four if not row.is_float for g in GROUPS]
    grouped += [f"{row.name}:group:{g}:bfloat16" for row in four for g in NARROW if row.is_float or row.signed]
    return list(dict.fromkeys(str(QuantSpec.parse(text)) for text in [*named, *grouped]))


def peers() -> list[Contender]:
    """Other packages, whether they are installed or not; their weights are dequantized and multiplied as floats."""
    return [
        Contender("torchao int8, a scale a row", weights(torchao("int8", None), 8.0), "torchao"),
        Contender("torchao int8 weights and activations", torchao_dynamic, "torchao"),
        Contender("torchao int4, group 128", weights(torchao("int4", 128), 4.25), "torchao"),
        Contender("torchao int4, group 128, HQQ's scales", weights(torchao("int4", 128, hqq=True), 4.25), "torchao"),
        Contender("HQQ int4, group 64", weights(hqq(64), 4.5), "hqq"),
        Contender("HQQ int4, group 128", weights(hqq(128), 4.25), "hqq"),
        Contender("bitsandbytes nf4, blocks of 64", weights(bitsandbytes(False), 4.5), "bitsandbytes"),
        Contender(
            "bitsandbytes nf4, double quantization",
            weights(bitsandbytes(True), 4 + 8 / 64 + 32 / (64 * 256)),
            "bitsandbytes",
        ),
    ]


def layers_of(model: nn.Module, kept: Iterable[str]) -> dict[str, nn.Linear]:
    """The linear layers that are quantized, by name."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in kept and id(module.weight) not in tied
    }


def weights(project: Callable[[Tensor], Tensor], bits: float) -> Callable[[nn.Module, Subject], float]:
    """`Contender.apply` of what maps a weight [N, K] float32 to the values of its codes."""

    def apply(model: nn.Module, subject: Subject) -> float:
        with quiet():
            for layer in layers_of(model, subject.kept).values():
                layer.weight = nn.Parameter(project(layer.weight.detach().float()), requires_grad=False)
        return bits

    return apply


def torchao(dtype: str, group: int | None, hqq: bool = False) -> Callable[[Tensor], Tensor]:
    """IntxWeightOnlyConfig: symmetric codes, -8..7 for int4, FP32 scales; columns are padded to whole groups."""

    def project(weight: Tensor) -> Tensor:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerAxis, PerGroup

        K = weight.shape[1]
        padded = F.pad(weight, (0, -K % group)) if group else weight
        layer = nn.Linear(padded.shape[1], padded.shape[0], bias=False)
        layer.weight = nn.Parameter(padded, requires_grad=False)
        options = {"intx_choose_qparams_algorithm": "hqq_scale_only"} if hqq else {}
        granularity = PerGroup(group) if group else PerAxis(0)
        quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, dtype), granularity=granularity, **options))
        values: Tensor = layer.weight.dequantize()
        return values[:, :K].contiguous()

    return project


def torchao_dynamic(model: nn.Module, subject: Subject) -> float:
    """Int8DynamicActivationInt8WeightConfig."""
    with quiet():
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        names = layers_of(model, subject.kept)
        quantize_(model, Int8DynamicActivationInt8WeightConfig(), filter_fn=lambda module, name: name in names)
    return 8.0


def hqq(group: int) -> Callable[[Tensor], Tensor]:
    """Quantizer of hqq with its defaults: affine, optimized; scales and zero points count as FP16."""

    def project(weight: Tensor) -> Tensor:
        from hqq.core.quantize import Quantizer

        K = weight.shape[1]
        codes, meta = Quantizer.quantize(
            F.pad(weight, (0, -K % group)),
            nbits=4,
            group_size=group,
            axis=1,
            optimize=True,
            device="cpu",
            compute_dtype=torch.float32,
        )
        values: Tensor = Quantizer.dequantize(codes, meta)
        return values.float()[:, :K].contiguous()

    return project


def bitsandbytes(double: bool) -> Callable[[Tensor], Tensor]:
    """quantize_4bit of bitsandbytes: nf4 codes over FP32 scales, or over scales that are quantized themselves."""

    def project(weight: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        values: Tensor = dequantize_4bit(codes, state)
        return values

    return project


def made(contender: Contender, subject: Subject) -> tuple[nn.Module, float]:
    """A copy of the subject's model that ``contender`` quantized, and its bits a weight. What stays float is shared."""
    model = copy.deepcopy(subject.model, {id(p): p for p in subject.model.parameters()})
    return model, contender.apply(model, subject)
