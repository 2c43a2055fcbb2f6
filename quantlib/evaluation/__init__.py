"""How far a quantized model is from the float model that it was made of: `evaluate`, and what `quantlib eval` runs."""

from quantlib.evaluation.scores import Estimate, LanguageReference, Scores, evaluate

__all__ = ["Estimate", "LanguageReference", "Scores", "evaluate"]
