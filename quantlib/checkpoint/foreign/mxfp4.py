"""MXFP4 experts (gpt-oss): w[e, k, n] = E2M1 of nibble k of row n * 2^(scales[e, n, k // 32] - 127).

``gate_up_proj_blocks`` [E, N, G, 16] uint8, two codes a byte, the first in the low bits, and ``gate_up_proj_scales``
[E, N, G] uint8, K = 32 G; ``down_proj`` alike. The float weight is [E, K, N]. They are the codes and the E8M0 scales of
``float4_e2m1fn:group:32:e8m0``, byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from quantlib import formats
from quantlib.checkpoint.foreign.found import Experts, Found, Tensors
from quantlib.nn.functional import Weight
from quantlib.spec import QuantSpec

BYTES = 16  # of a block of 32 codes
SPEC = QuantSpec("float4_e2m1fn", "group:32", scale="e8m0")
BIAS, NAN = 127, 255
LARGEST = BIAS + round(math.log2(SPEC.row.scale_max))
SMALLEST = BIAS + round(math.log2(formats.SCALE_MIN))


def find(tensors: Tensors) -> Iterator[Found]:
    for blocks in list(tensors):
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        if name == blocks or scales not in tensors:
            continue
        E, N, G, _ = tensors.get(blocks, (torch.uint8,), (None, None, None, BYTES)).shape
        tensors.get(scales, (torch.uint8,), (E, N, G))
        yield weight_of(tensors, name, (blocks, scales), (E, N, 2 * BYTES * G))


def weight_of(tensors: Tensors, name: str, parts: tuple[str, str], shape: tuple[int, int, int]) -> Found:
    E, N, K = shape
    blocks, scales = parts

    def codes(e: int, rows: slice) -> Weight:
        first, R = e * N + rows.start, rows.stop - rows.start
        q = tensors.part(blocks, first, (R, K // 2))
        s = tensors.part(scales, first, (R, K // (2 * BYTES)))
        if s.numel() and int(s.max()) > LARGEST:
            raise ValueError(f"{scales} must be at most {LARGEST}, 2^{LARGEST - BIAS}, got {int(s.max())}")
        if s.numel() and int(s.min()) < SMALLEST:  # values below 2^-97, which become zeros
            vanish = s < SMALLEST
            q = torch.where(vanish.repeat_interleave(BYTES, 1), 0, q).to(torch.uint8)
            s = torch.where(vanish, BIAS, s).to(torch.uint8)
        return Weight(q, s.view(torch.float8_e8m0fnu))

    return Experts(SPEC, "ekn", (E, K, N), codes).found(name, "MXFP4 experts", torch.bfloat16, parts)
