"""Peers of each op: torch eager, torch.compile, torch's quantized tensors, torchao and bitsandbytes.

A peer gets the same tensors as quantlib and writes into the same ready memory where it can. One that is not installed,
or raises, becomes a row that says so; one that does not do a case at all is not listed there.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from quantlib.spec import QuantSpec

from .case import Call, Contender, Tensors

FRESH = "fresh output"  # the time includes the page faults of new memory
CODEBOOK = f"{FRESH}; codes of its own codebook"

Formula = Callable[[Tensors, Tensors], None]  # (inputs, outs)


class MissingError(Exception):
    """A peer that is not installed."""


def eager(formula: Formula, name: str = "torch eager") -> Contender:
    """The formula, one torch op after the other."""
    return Contender(name, lambda inputs, outs: functools.partial(formula, inputs, outs))


def compiled(formula: Formula) -> Contender:
    """The formula, fused by Inductor for these very shapes."""

    run = functools.cache(lambda: torch.compile(formula, fullgraph=True, dynamic=False))
    return Contender("torch.compile", lambda inputs, outs: functools.partial(run(), inputs, outs))


def forget_compiled() -> None:
    """Drop what torch.compile made for earlier cases: it counts against a function's limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def torch_quantize(spec: QuantSpec, dtype: str) -> list[Contender]:
    """torch.quantize_per_tensor, torch.quantize_per_channel, which take float32 only"""
    if not _has_quantized_tensors(spec, dtype):
        return []
    per_tensor, codes = spec.per == "tensor", getattr(torch, f"q{spec.format}")

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        x, scale, zero_point = _with_zero_point(inputs)
        if per_tensor:
            return functools.partial(torch.quantize_per_tensor, x, scale.item(), int(zero_point), codes)
        return functools.partial(torch.quantize_per_channel, x, scale[:, 0].double(), zero_point[:, 0], 0, codes)

    name = "torch.quantize_per_tensor" if per_tensor else "torch.quantize_per_channel"
    return [Contender(name, bind, read=lambda q: (q.int_repr(),), note=FRESH)]


def torch_dequantize(spec: QuantSpec, dtype: str) -> list[Contender]:
    """dequantize() of a quantized tensor, which gives float32 only"""
    if not _has_quantized_tensors(spec, dtype):
        return []

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        codes, scale, zero_point = _with_zero_point(inputs)
        if spec.per == "tensor":
            q = torch._make_per_tensor_quantized_tensor(codes, scale.item(), int(zero_point))
        else:
            q = torch._make_per_channel_quantized_tensor(codes, scale[:, 0].double(), zero_point[:, 0].long(), 0)
        return q.dequantize

    return [Contender("torch dequantize", bind, note=FRESH)]


def _has_quantized_tensors(spec: QuantSpec, dtype: str) -> bool:
    return dtype == "float32" and spec.format in ("int8", "uint8") and spec.per in ("tensor", "row")


def torchao_quantize(spec: QuantSpec) -> list[Contender]:
    """quantize_affine, as torchao's modules call it"""

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        x, scale, zero_point = _with_zero_point(inputs)
        quantize = package("torchao.quantization.quant_primitives").quantize_affine
        return functools.partial(quantize, x, spec.block(x.shape), scale, zero_point, *_codes(spec))

    return _torchao(spec, bind)


def torchao_compute_scale(spec: QuantSpec) -> list[Contender]:
    """choose_qparams_affine"""

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        find = _choose_parameters(spec, inputs[0])
        return lambda: find()[: len(outs)]

    return _torchao(spec, bind)


def torchao_quantize_dynamic(spec: QuantSpec) -> list[Contender]:
    """choose_qparams_affine, then quantize_affine"""

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        (x,) = inputs
        find, block, codes = _choose_parameters(spec, x), spec.block(x.shape), _codes(spec)
        quantize = package("torchao.quantization.quant_primitives").quantize_affine

        def call() -> Tensors:
            scale, zero_point = find()
            return (quantize(x, block, scale, zero_point, *codes), scale, zero_point)[: len(outs)]

        return call

    return _torchao(spec, bind)


def torchao_dequantize(spec: QuantSpec) -> list[Contender]:
    """dequantize_affine"""

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        codes, scale, zero_point = _with_zero_point(inputs)
        dequantize = package("torchao.quantization.quant_primitives").dequantize_affine
        arguments = (codes, spec.block(codes.shape), scale, zero_point, *_codes(spec))
        return functools.partial(dequantize, *arguments, output_dtype=outs[0].dtype)

    return _torchao(spec, bind)


def _torchao(spec: QuantSpec, bind: Callable[[Tensors, Tensors], Call]) -> list[Contender]:
    """Its affine primitives, in eager mode; they have no packed or float codes."""
    return [] if spec.row.is_float or spec.row.packed else [Contender("torchao", bind, note=FRESH)]


def _choose_parameters(spec: QuantSpec, x: Tensor) -> Callable[[], Tensors]:
    primitives = package("torchao.quantization.quant_primitives")
    mapping = primitives.MappingType.SYMMETRIC if spec.symmetric else primitives.MappingType.ASYMMETRIC
    arguments = (x, mapping, spec.block(x.shape), *_codes(spec))
    return functools.partial(primitives.choose_qparams_affine, *arguments, scale_dtype=torch.float32)


def _codes(spec: QuantSpec) -> tuple[torch.dtype, int, int]:
    return (getattr(torch, spec.row.dtype_name), *spec.row.range(not spec.symmetric))


def bitsandbytes_quantize_dynamic(spec: QuantSpec) -> list[Contender]:
    """int8 row-wise; 8 and 4 bits block-wise, on codebooks of its own"""
    row_wise = spec.per == "row"

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        functional = package("bitsandbytes.functional")
        if row_wise:
            return functools.partial(functional.int8_vectorwise_quant, *inputs)
        quantize = functional.quantize_nf4 if spec.row.packed else functional.quantize_blockwise
        return functools.partial(quantize, *inputs, blocksize=_group(spec))

    return _bitsandbytes(spec, bind, results=1)  # its row statistics are the largest magnitudes, not scales


def bitsandbytes_dequantize(spec: QuantSpec, dtype: str) -> list[Contender]:
    """The way back from each of `bitsandbytes_quantize_dynamic`; row-wise int8 gives float32 only"""
    row_wise = spec.per == "row"

    def bind(inputs: Tensors, outs: Tensors) -> Call:
        codes, scale = inputs
        functional = package("bitsandbytes.functional")
        if row_wise:
            return functools.partial(functional.int8_vectorwise_dequant, codes, scale[:, 0] * 127)
        y = torch.zeros_like(outs[0])
        if spec.row.packed:
            return functools.partial(functional.dequantize_nf4, *functional.quantize_nf4(y, blocksize=_group(spec)))
        return functools.partial(
            functional.dequantize_blockwise, *functional.quantize_blockwise(y, blocksize=_group(spec))
        )

    return [] if row_wise and dtype != "float32" else _bitsandbytes(spec, bind, results=1)


def _bitsandbytes(spec: QuantSpec, bind: Callable[[Tensors, Tensors], Call], results: int) -> list[Contender]:
    """``results`` is how many of those that its row-wise int8 returns mean what quantlib's mean."""
    if spec.row.is_float or not spec.symmetric:
        return []
    if spec.format == "int8" and spec.per == "row":
        read = lambda made: ((made,) if isinstance(made, Tensor) else made)[:results]  # noqa: E731
        return [Contender("bitsandbytes row-wise", bind, read=read, note=FRESH)]
    if spec.per is not None and spec.per.startswith("group:"):
        name = "bitsandbytes nf4" if spec.row.packed else "bitsandbytes block-wise"
        return [Contender(name, bind, read=lambda _: (), note=CODEBOOK)]
    return []


def _group(spec: QuantSpec) -> int:
    return int((spec.per or "").removeprefix("group:"))


def _with_zero_point(inputs: Tensors) -> Tensors:
    """x or codes, scale, and zeros where there is no zero point"""
    return inputs if len(inputs) == 3 else (*inputs, torch.zeros_like(inputs[1], dtype=torch.int32))


def package(name: str) -> ModuleType:
    """A peer's package, without what it logs at import.

    Raises
    ------
    MissingError
        Where it is not installed or does not load.
    """
    previous = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"not installed: {error}") from error
    finally:
        logging.disable(previous)
