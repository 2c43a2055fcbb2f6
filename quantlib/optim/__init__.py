"""Optimizers with states in 8 bits: `AdamW8bit` and `Adam8bit`.

>>> import torch, quantlib
>>> model = torch.nn.Linear(256, 64)
>>> optimizer = quantlib.optim.AdamW8bit(quantlib.optim.parameter_groups(model), lr=1e-3)
"""

from quantlib.optim.adamw import Adam8bit, AdamW8bit
from quantlib.optim.groups import parameter_groups

__all__ = ["Adam8bit", "AdamW8bit", "parameter_groups"]
