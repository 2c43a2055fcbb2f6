"""FLOPs = 2 M N K of every product, for ``torch.utils.flop_counter.FlopCounterMode``."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

Shape = Sequence[int]
COUNTER = "torch.utils.flop_counter"
PRODUCTS = ("dequant_matmul", "dequant_matmul_backward", "scaled_matmul", "dynamic_matmul")
GROUPED = ("grouped_dequant_matmul", "grouped_dequant_matmul_backward", "grouped_dynamic_matmul")


def register() -> None:
    """Tell torch's counter the formulas of the products: the modes that are made from now on count them.

    An import of quantlib does so by itself where that costs nothing, and so does every layer of codes that is made
    while ``torch.utils.flop_counter`` is imported. That module imports Triton where it is installed, which takes longer
    than quantlib: a program that counts the ops alone, and imports the counter after quantlib, calls this.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas: dict[Any, Callable[..., int]] = {
        getattr(torch.ops.quantlib, op): product_flops for op in (*PRODUCTS, *GROUPED)
    }
    formulas[torch.ops.quantlib.dequant_matmul_backward_scale] = gradient_of_scale_flops
    for op, formula in formulas.items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)


def register_if_counting() -> None:
    """Call `register` if the counter has been imported."""
    if COUNTER in sys.modules:
        register()


def register_where_cheap() -> None:
    """Call `register` if the counter has been imported, or imports no Triton."""
    if COUNTER in sys.modules or "triton" in sys.modules or find_spec("triton") is None:
        register()


def product_flops(a: Shape, *_: Any, out_shape: Shape = (), out: Shape | None = None, **__: Any) -> int:
    """FLOPs of x [..., K] times a weight [N, K] to [..., N], or of dy [..., N] times it to [..., K]; of experts too."""
    return 2 * math.prod(out_shape if out is None else out) * (a[-1] if len(a) else 1)


def gradient_of_scale_flops(dy: Shape, x: Shape, *_: Any, **__: Any) -> int:
    """FLOPs of dy [..., N] and x [..., K] to [N, K]."""
    return 2 * math.prod(dy) * (x[-1] if len(x) else 1)
