"""FP8 blocks (DeepSeek-V3 and its like): w[n, k] = value of the code * scale_inv[n // br, k // bk].

``weight`` F8_E4M3 [N, K], ``weight_scale_inv`` [ceil(N / br), ceil(K / bk)]; ``weight_block_size`` in config.json, or
128 x 128.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from quantlib.checkpoint.foreign.found import FLOATS, Found, Tensors
from quantlib.nn.functional import Weight
from quantlib.ops.check import dtype_name
from quantlib.spec import QuantSpec

BLOCK = [128, 128]


def find(tensors: Tensors) -> Iterator[Found]:
    block = tensors.quantization("fp8").get("weight_block_size") or BLOCK
    sizes = isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    if not sizes or block[0] not in (1, block[1]):
        raise ValueError(f"weight_block_size must be [n, n] or [1, n], got {block!r}")
    for prefix in tensors.named("weight_scale_inv"):
        name, scale = f"{prefix}weight", f"{prefix}weight_scale_inv"
        N, K = tensors.get(name, (torch.float8_e4m3fn,), (None, None)).shape
        shape = tensors.slot(scale).shape
        if shape in ((), (1,), (1, 1)) and (N, K) != (1, 1):
            per, br = "tensor", N
        elif block[0] == block[1]:
            per, br = f"tile:{block[0]}", block[0]
        else:
            per, br = f"group:{block[1]}", 1
        spec = QuantSpec("float8_e4m3fn", per, scale=dtype_name(tensors.get_float(scale)))
        if per != "tensor":
            tensors.get(scale, FLOATS, spec.scale_shape((N, K)))

        def codes(rows: slice, name: str = name, scale: str = scale, br: int = br) -> Weight:
            s = tensors.read(scale)
            if s.dim() == 2:
                s = s[rows.start // br : -(-rows.stop // br)]
            return Weight(tensors.rows(name, rows), s.reshape(-1, s.shape[-1] if s.dim() else 1).contiguous())

        yield Found(name, "FP8 blocks", (N, K), torch.bfloat16, (name, scale), spec, codes)
