"""Modules whose weights are codes, or are trained to become codes."""

from __future__ import annotations

from torch import nn

from quantlib.nn.conv import QuantConv1d, QuantConv2d
from quantlib.nn.embedding import QuantEmbedding
from quantlib.nn.fake_quantize import FakeQuantize
from quantlib.nn.linear import QuantLinear
from quantlib.nn.lora import LoRALinear
from quantlib.nn.module import QuantModule
from quantlib.nn.observers import MinMaxObserver, MovingAverageObserver, MSEObserver, PercentileObserver
from quantlib.nn.qat import QATConv1d, QATConv2d, QATEmbedding, QATLinear

QUANTIZED: dict[type[nn.Module], type[QuantModule]] = {
    nn.Linear: QuantLinear,
    nn.Embedding: QuantEmbedding,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
}  # float module -> the one of codes that stands for it

__all__ = [
    "QUANTIZED",
    "FakeQuantize",
    "LoRALinear",
    "MSEObserver",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "QATConv1d",
    "QATConv2d",
    "QATEmbedding",
    "QATLinear",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantModule",
]
