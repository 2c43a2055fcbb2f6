"""Quantization kernels for PyTorch: one numeric contract, the same bytes on every backend.

>>> import torch, quantlib
>>> codes, scale = quantlib.quantize_dynamic(torch.randn(4, 64), "int8", block=(1, -1))
>>> quantlib.dequantize(codes, scale, "int8", block=(1, -1)).shape
torch.Size([4, 64])
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantlib import nn, optim, plan, reference
    from quantlib.api import dequantize_, quantize_
    from quantlib.backends import library_path, use_backend
    from quantlib.calibration import assign, calibrate
    from quantlib.evaluation import evaluate
    from quantlib.ops.adamw_step import adamw_step
    from quantlib.ops.cast import cast
    from quantlib.ops.compute_scale import compute_scale
    from quantlib.ops.dequant_matmul import dequant_matmul
    from quantlib.ops.dequantize import dequantize
    from quantlib.ops.dynamic_matmul import dynamic_matmul
    from quantlib.ops.fake_quantize import fake_quantize
    from quantlib.ops.grouped_dequant_matmul import grouped_dequant_matmul
    from quantlib.ops.grouped_dynamic_matmul import grouped_dynamic_matmul
    from quantlib.ops.hadamard import hadamard
    from quantlib.ops.packing import pack, unpack
    from quantlib.ops.quantize import quantize
    from quantlib.ops.quantize_dynamic import quantize_dynamic
    from quantlib.ops.scaled_matmul import scaled_matmul
    from quantlib.qat import convert_, prepare_qat_, qat_mode_, qat_parameters
    from quantlib.spec import W4A8, W4A16, W8A8, W8A16, QuantSpec

_HOME = {
    "adamw_step": "ops",
    "assign": "calibration",
    "calibrate": "calibration",
    "cast": "ops",
    "compute_scale": "ops",
    "convert_": "qat",
    "dequant_matmul": "ops",
    "dequantize": "ops",
    "dequantize_": "api",
    "dynamic_matmul": "ops",
    "evaluate": "evaluation",
    "fake_quantize": "ops",
    "grouped_dequant_matmul": "ops",
    "grouped_dynamic_matmul": "ops",
    "hadamard": "ops",
    "library_path": "backends",
    "pack": "ops",
    "prepare_qat_": "qat",
    "qat_mode_": "qat",
    "qat_parameters": "qat",
    "quantize": "ops",
    "quantize_": "api",
    "quantize_dynamic": "ops",
    "scaled_matmul": "ops",
    "QuantSpec": "spec",
    "W4A16": "spec",
    "W4A8": "spec",
    "W8A16": "spec",
    "W8A8": "spec",
    "unpack": "ops",
    "use_backend": "backends",
}  # name -> the module it lives in
_MODULES = ("nn", "optim", "plan", "reference")

__all__ = [
    "W4A8",
    "W4A16",
    "W8A8",
    "W8A16",
    "QuantSpec",
    "adamw_step",
    "assign",
    "calibrate",
    "cast",
    "compute_scale",
    "convert_",
    "dequant_matmul",
    "dequantize",
    "dequantize_",
    "dynamic_matmul",
    "evaluate",
    "fake_quantize",
    "grouped_dequant_matmul",
    "grouped_dynamic_matmul",
    "hadamard",
    "library_path",
    "nn",
    "optim",
    "pack",
    "plan",
    "prepare_qat_",
    "qat_mode_",
    "qat_parameters",
    "quantize",
    "quantize_",
    "quantize_dynamic",
    "reference",
    "scaled_matmul",
    "unpack",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    value = None
    if name in _HOME or _is_op(name):
        value = getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'ops')}"), name)
    if value is None or isinstance(value, type(sys)):  # the module of an op without a public function
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _is_op(name: str) -> bool:
    """Return True for an op of ops.def: its public function is one of this module's, listed above or not."""
    with open(os.path.join(os.path.dirname(__file__), "ops.def")) as schemas:
        return f'\nDEF("{name}(' in schemas.read()


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _interrupted(number: int, frame: Any) -> None:
    """End the command line without a traceback: numpy takes Ctrl-C in its import for a broken installation."""
    os._exit(130)


# A program that imports quantlib gets torch.ops.quantlib with it. The command line does not: `quantlib bits 3.14`
# needs the table of formats and not the second or two that torch takes to import.
if os.path.basename(sys.argv[0] if sys.argv else "") != "quantlib" and sys.orig_argv[1:3] != ["-m", "quantlib"]:
    importlib.import_module("quantlib.ops")
elif signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)  # until `cli.main` reports it
