"""AWQ (AutoAWQ, GEMM layout): w[n, k] = (q[k, n] - z[g, n]) * s[g, n], g = k // group.

``qweight`` [K, N / 8] and ``qzeros`` [G, N / 8] int32 pack eight columns of N, in the order `ORDER`; ``scales`` [G, N].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.checkpoint.foreign.found import FLOATS, Found, Once, Tensors, bits_of, integer_weight, per
from quantlib.nn.functional import Weight
from quantlib.ops.check import dtype_name
from quantlib.spec import QuantSpec

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of an int32 is column ORDER[i] of its eight
INT = (torch.int32,)


def find(tensors: Tensors) -> Iterator[Found]:
    said = tensors.quantization("awq")
    for prefix in tensors.named("qweight"):
        parts = tuple(f"{prefix}{part}" for part in ("qweight", "qzeros", "scales"))
        G, N = tensors.get(parts[2], FLOATS, (None, None)).shape
        K, packed = tensors.get(parts[0], INT, (None, None)).shape
        if packed == N:  # GPTQ packs K
            continue
        tensors.get(parts[0], INT, (None, N // 8))
        tensors.get(parts[1], INT, (G, N // 8))
        if N % 8 or not G or K % G:
            raise ValueError(f"{parts[2]} must be of groups that divide {K}, for N a multiple of 8, got [{G}, {N}]")
        if type(size := said.get("group_size")) is int and 0 < size < K and size != K // G:
            raise ValueError(f"{parts[0]} must be of groups of {size}, as config.json says, got {K} columns in {G}")
        yield weight_of(tensors, prefix, parts, (N, K), K // G)


def weight_of(tensors: Tensors, prefix: str, parts: tuple[str, ...], shape: tuple[int, int], group: int) -> Found:
    whole = Once(lambda: tuple(tensors.read(part) for part in parts))

    def codes(rows: slice) -> Weight:
        q, z, s = whole()
        of_q, of_z = unpacked(q, rows), unpacked(z, rows)
        return integer_weight(of_q.T, s[:, rows].T, of_z.T, 4, symmetric=False)

    dtype = tensors.slot(parts[2]).dtype
    spec = QuantSpec("int4", per(group, shape[1]), False, scale=dtype_name(dtype))
    return Found(f"{prefix}weight", "AWQ", shape, dtype, parts, spec, codes, forget=whole.forget)


def unpacked(packed: Tensor, rows: slice) -> Tensor:
    """[K, R] uint8: columns ``rows`` of what ``packed`` [K, N / 8] holds."""
    first, last = rows.start // 8, -(-rows.stop // 8)
    nibbles = bits_of(packed[:, first:last], 4)
    columns = torch.empty_like(nibbles)
    columns[..., list(ORDER)] = nibbles
    return columns.flatten(1)[:, rows.start - 8 * first : rows.stop - 8 * first]
