"""y[t, n] = dynamic_matmul(x[t], codes[e], scale[e])[n], e the expert that row t belongs to

A launch an expert: the host waits for the offsets.
"""

from __future__ import annotations

from torch import Tensor

from quantlib.backends.composite.grouped_dequant_matmul import groups
from quantlib.backends.triton.dynamic_matmul import dynamic_matmul
from quantlib.backends.weight import Epilogue, QuantizedWeight


def grouped_dynamic_matmul(x: Tensor, weight: QuantizedWeight, offsets: Tensor, epilogue: Epilogue, y: Tensor) -> None:
    for e, rows in groups(offsets, y):
        dynamic_matmul(x[rows], weight.expert(e), epilogue.expert(e), y[rows])
