"""Modules whose weights are codes, or are trained to become codes."""

from __future__ import annotations

from quantlib.nn.conv import QuantConv1d, QuantConv2d
from quantlib.nn.embedding import QuantEmbedding
from quantlib.nn.fake_quantize import FakeQuantize
from quantlib.nn.forms import QUANTIZED, form_of
from quantlib.nn.linear import QuantLinear
from quantlib.nn.lora import LoRALinear
from quantlib.nn.module import QuantModule
from quantlib.nn.observers import MinMaxObserver, MovingAverageObserver, MSEObserver, PercentileObserver
from quantlib.nn.qat import QATConv1d, QATConv2d, QATEmbedding, QATLinear

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
    "form_of",
]
