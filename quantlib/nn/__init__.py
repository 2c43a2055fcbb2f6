"""Modules whose weights are codes."""

from quantlib.nn.linear import QuantLinear

__all__ = ["QuantLinear"]
