"""dx[i, j] = m ? dy[i, j] : 0, dscale[I, J] = sum(dy * (m ? k - t : c)), dzero_point[I, J] = sum(m ? 0 : -dy * s)"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.composite.fake_quantize import Limits, project
from quantlib.backends.composite.numerics import Block, reduce_blocks
from quantlib.formats import Format


def fake_quantize_backward(
    dy: Tensor,
    x: Tensor,
    scale: Tensor,
    format: Format,
    block: Block,
    zero_point: Tensor | None,
    limits: Limits,
    lsq_mask: bool,
    grad_factor: float,
    dx: Tensor,
    dscale: Tensor,
    dzero_point: Tensor | None = None,
) -> None:
    t, c, m, s = project(x, scale, format, block, zero_point, limits, lsq_mask)
    dx.copy_(torch.where(m, dy, 0))
    dy = dy.float()
    dscale.copy_(reduce_blocks(dy * torch.where(m, c - t, c), block, torch.sum) * grad_factor)
    if dzero_point is not None:
        dzero_point.copy_(reduce_blocks(torch.where(m, 0, -(dy * s)), block, torch.sum) * grad_factor)
