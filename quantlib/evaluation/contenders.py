"""The contenders for a model: the specs of quantlib, and the packages that users would take instead."""

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
from quantlib.calibration import METHODS, assign, calibrate
from quantlib.evaluation.subjects import Subject, quiet
from quantlib.spec import SCHEMES, QuantSpec

GROUPS = ("group:128", "group:64:bfloat16", "group:32:bfloat16")  # 4.25, 4.25 and 4.5 bits
AFFINE = "group:128:affine"  # 4.5 bits
NARROW = ("int4:group:64:affine:bfloat16", "float4_e2m1fn:group:32:e8m0")
SEARCHED = (
    *("nf4_bf16:group:128:bfloat16", "W4A16:magnitude", "W4A16:signed_mse"),  # W4A16 is searched itself
    *("nf4_bf16:group:64:bfloat16:magnitude", "nf4_bf16:group:64:bfloat16:signed_magnitude"),
    *("nf4_bf16:group:32:bfloat16:magnitude", "nf4_bf16:group:32:bfloat16:signed_magnitude"),
    *("nf4_bf16:group:32:bfloat16:signed_mse", "fp8:mse"),
    "nf4_bf16:group:16:bfloat16:signed_magnitude",  # 5 bits
)
ROTATED = ("W8A8:hadamard",)
CALIBRATED = (
    "W4A16+sinkhorn",
    *(f"nf4_bf16:group:{n}:bfloat16:signed_magnitude+sinkhorn" for n in (64, 32, 16)),
    "W4A16+gptq",
    "W4A16+awq+gptq",
    "fp8+gptq",
    "int4:group:128+gptq",
    "int4:group:128:affine+gptq",
    "nf4_bf16:group:32:bfloat16:signed_magnitude+gptq",
    "4.5+gptq",
    "W8A8+smoothquant",
)
SCALED = ("awq+gptq", "smoothquant")  # methods that need the layers of Llama


@dataclass(frozen=True)
class Contender:
    """A way to quantize a copy of a model.

    Attributes
    ----------
    name : str
    apply : callable (model, subject) -> float
        Quantizes the linear layers of ``model`` in place; bits a weight, with scales and zero points as they are kept.
    package : str
        The package that has to be installed; "" for quantlib itself.
    """

    name: str
    apply: Callable[[nn.Module, Subject], float]
    package: str = ""

    @property
    def missing(self) -> bool:
        return bool(self.package) and importlib.util.find_spec(self.package) is None


def ours(text: str) -> Contender:
    """The spec ``text``, or a number of bits a weight to be assigned; calibrated with a method, as ``+gptq``, after it.

    Raises
    ------
    ValueError
        For text that is none of these.
    """
    name, plus, method = text.partition("+")
    if plus and method not in METHODS:
        raise ValueError(f"--to must be a spec, or one with a method behind it, +{' or +'.join(METHODS)}, got {text!r}")
    budget = number(name)
    spec = QuantSpec.parse(name) if budget is None else None

    def apply(model: nn.Module, subject: Subject) -> float:
        def chosen(module: nn.Module, name: str) -> bool:
            return name not in subject.kept

        with quiet():
            if budget is not None:
                found = assign(model, budget, inputs=subject.calibration, filter_fn=chosen, progress=False)
                reports = [] if plus else found.apply_(model)
            else:
                found = None
                reports = [] if plus else [api.quantize_(model, spec, chosen)]
            if plus:
                to = spec if found is None else found
                reports = [calibrate(model, subject.calibration, to, method, filter_fn=chosen, progress=False).report]
        if spec is None or spec.activation is None:
            api.dequantize_(model)  # the values of the codes: what is measured is their loss, and floats are faster
        layers = [layer for report in reports for layer in report.layers]
        if not layers:
            raise ValueError(f"MODEL must have layers to quantize beside its head, got {subject.name!r}")
        return 8 * sum(layer.bytes_after for layer in layers) / sum(math.prod(layer.shape) for layer in layers)

    title = f"assigned, {budget:g} bits" if spec is None else titled(spec)
    return Contender(f"{title}, {method.upper()}" if plus else title, apply)


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def titled(spec: QuantSpec) -> str:
    """``spec``, and the shortest of the names in use elsewhere that mean it."""
    names = [name for name in SCHEMES if QuantSpec.parse(name) == spec and name != str(spec)]
    return f"{spec} ({min(names, key=len).upper()})" if names else str(spec)


def specs(encoder: bool = False) -> list[str]:
    """Return the specs that are measured by default: `plain_specs`, and narrow, searched, rotated, calibrated ones.

    Of an encoder without those that scale the inputs of a layer, which its norms do not make alone.
    """
    calibrated = [text for text in CALIBRATED if not (encoder and text.partition("+")[2] in SCALED)]
    return [*plain_specs(), *NARROW, *SEARCHED, *ROTATED, *calibrated]


def plain_specs() -> list[str]:
    """Every named spec, then every 4-bit format in `GROUPS`: equal ones once, in this order."""
    named = [text for text in SCHEMES.values() if QuantSpec.parse(text).scaled]
    four = [row for row in formats.TABLE if row.bits == 4]
    grouped = [f"{row.name}:{group}" for row in four for group in GROUPS if row.is_float or row.signed]
    grouped += [f"{row.name}:{AFFINE}" for row in four if not row.is_float]
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
    """Make a `Contender.apply` of a function from a weight [N, K] float32 to the values of its codes."""

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
    """A copy of the subject's model that ``contender`` quantized, and its bits a weight."""
    model = copy.deepcopy(subject.model)
    return model, contender.apply(model, subject)
