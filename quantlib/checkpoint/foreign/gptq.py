"""GPTQ (AutoGPTQ, GPTQModel): w[n, k] = (q[k, n] - z[g, n]) * s[g, n], g = g_idx[k].

``qweight`` [K * bits / 32, N] int32 packs K, ``qzeros`` [G, N * bits / 32] packs N, both from the lowest bits;
``scales`` [G, N]; ``g_idx`` [K] int32. A file of the first version has z - 1 in its zero points; ``checkpoint_format``
"gptq_v2" has z. With act-order ``g_idx`` is no row of runs: no block of columns shares a scale then.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from quantlib.checkpoint.foreign.found import FLOATS, Found, Once, Tensors, bits_of, integer_weight, per
from quantlib.nn.functional import Weight
from quantlib.ops.check import dtype_name
from quantlib.spec import QuantSpec

INT = (torch.int32,)


def find(tensors: Tensors) -> Iterator[Found]:
    said = tensors.quantization("gptq")
    for prefix in tensors.named("qweight"):
        names = tuple(f"{prefix}{part}" for part in ("qweight", "qzeros", "scales"))
        G, N = tensors.get(names[2], FLOATS, (None, None)).shape
        if tensors.get(names[0], INT, (None, None)).shape[1] != N:  # AWQ packs N
            continue
        zeros = tensors.get(names[1], INT, (G, None)).shape[1]
        bits = 32 * zeros // max(N, 1)
        K = tensors.slot(names[0]).shape[0] * 32 // max(bits, 1)
        if bits not in (2, 4, 8) or 32 * zeros != bits * N or not G or not K:
            raise ValueError(f"{names[0]} must be of 2, 4 or 8 bits, got {bits} (qzeros {zeros} for {N} rows)")
        parts = (*names, f"{prefix}g_idx") if f"{prefix}g_idx" in tensors else names
        if parts is names and said.get("desc_act") is True and G > 1:
            raise ValueError(f"{prefix}g_idx must be there for desc_act of config.json, got no such tensor")
        yield weight_of(tensors, prefix, parts, bits, (N, K), G, said.get("checkpoint_format") != "gptq_v2")


def weight_of(
    tensors: Tensors, prefix: str, parts: tuple[str, ...], bits: int, shape: tuple[int, int], G: int, first: bool
) -> Found:
    """``first``: of the first version, whose zero points are one less."""
    K, group = shape[1], -(-shape[1] // G)
    qweight, qzeros, scales = parts[:3]

    def zero_points() -> Tensor:
        """[G, N], 0..2^bits - 1"""
        return (bits_of(tensors.read(qzeros), bits).flatten(1).to(torch.int32) + first) & ((1 << bits) - 1)

    columns = torch.arange(K, device="cpu") // group
    if len(parts) > 3:
        tensors.get(parts[3], INT, (K,))
        columns = tensors.read(parts[3]).long()
        if bool((columns < 0).any()) or bool((columns >= G).any()):
            raise ValueError(f"{parts[3]} must be of 0..{G - 1}, got {int(columns.min())}..{int(columns.max())}")
    ordered = torch.equal(columns, torch.arange(K, device="cpu") // group)
    symmetric = bits >= 4 and bool((zero_points() == 1 << (bits - 1)).all())
    dtype = tensors.slot(scales).dtype
    whole = Once(lambda: (tensors.read(qweight), zero_points(), tensors.read(scales)))

    def integers(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [R, K] uint8, scales and zero points [R, G]."""
        q, z, s = whole()
        codes = bits_of(q[:, rows], bits).transpose(1, 2).reshape(K, -1).T
        return codes, s[:, rows].T, z[:, rows].T

    def codes(rows: slice) -> Weight:
        q, s, z = integers(rows)
        return integer_weight(q, s, z, bits, symmetric)

    def values(rows: slice) -> Tensor:
        q, s, z = integers(rows)
        return (q.to(torch.int32) - z[:, columns]).to(dtype) * s[:, columns]

    name, method = f"{prefix}weight", f"GPTQ, {bits} bits"
    if not ordered:
        why = "act-order: g_idx gives neighbouring columns scales of different groups"
        return Found(name, f"{method}, act-order", shape, dtype, parts, values=values, why=why, forget=whole.forget)
    spec = QuantSpec("int4" if bits <= 4 else "int8", per(group, K), symmetric, scale=dtype_name(dtype))
    return Found(name, method, shape, dtype, parts, spec, codes, forget=whole.forget)
