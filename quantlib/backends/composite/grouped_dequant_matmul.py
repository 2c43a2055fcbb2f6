"""y[t, n] = activation(sum over k of x[t, k] * w[e, n, k] + bias[e, n]), e the expert that row t belongs to"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.backends.composite.dequant_matmul import dequant_matmul
from quantlib.backends.weight import Epilogue, QuantizedWeight


def grouped_dequant_matmul(
    x: Tensor, weight: QuantizedWeight, offsets: Tensor, epilogue: Epilogue, batch_invariant: bool, y: Tensor
) -> None:
    for e, rows in groups(offsets, y):
        dequant_matmul(x[rows], weight.expert(e), epilogue.expert(e), batch_invariant, y[rows])


def groups(offsets: Tensor, y: Tensor) -> Iterator[tuple[int, slice]]:
    """Each expert that has rows, and which they are; what belongs to none becomes 0 in y.

    Raises
    ------
    RuntimeError
        Where a CUDA graph is captured: the host reads where the rows of an expert end.
    """
    if offsets.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "pure torch reads offsets on the host, which a CUDA graph cannot capture: use triton or cuda"
        )
    start = 0
    for e, end in enumerate(offsets.view(-1).clamp(max=len(y)).cpu().tolist()):
        if start < end:
            yield e, slice(start, end)
            start = end
    y[start:] = 0
