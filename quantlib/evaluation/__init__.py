"""Measure how far a quantized model is from the float model it was made of: `evaluate` and `quantlib eval`."""

from quantlib.evaluation.scores import Estimate, LanguageReference, Scores, evaluate

__all__ = ["Estimate", "LanguageReference", "Scores", "evaluate"]
