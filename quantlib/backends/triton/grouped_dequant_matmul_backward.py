"""dx[t, k] = sum over n of dy[t, n] * w[e, n, k], e the expert that row t belongs to

A launch an expert: the host waits for the offsets.
"""

from __future__ import annotations

from torch import Tensor

from quantlib.backends.composite.grouped_dequant_matmul import groups
from quantlib.backends.triton.dequant_matmul_backward import dequant_matmul_backward
from quantlib.backends.weight import QuantizedWeight


def grouped_dequant_matmul_backward(dy: Tensor, weight: QuantizedWeight, offsets: Tensor, dx: Tensor) -> None:
    for e, rows in groups(offsets, dx):
        dequant_matmul_backward(dy[rows], weight.expert(e), dx[rows])
