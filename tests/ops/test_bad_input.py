"""Bad calls: one clear error that names the argument, what was expected and what came; the same from Python and C++."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import quantlib
from quantlib import backends, formats, reference
from quantlib.testing import assert_same_bytes

quant = torch.ops.quantlib
f32, i32, i8, u8, f16, f64 = torch.float32, torch.int32, torch.int8, torch.uint8, torch.float16, torch.float64
INPUTS = "float32, float16 or bfloat16"
CASTS = "float32, float16, bfloat16, float8_e4m3fn or float8_e5m2"
TARGETS = "float16, bfloat16, float8_e4m3fn, float8_e5m2, float4_e2m1fn, nf4, nf4_bf16, int8, uint8 or int4"
INTEGERS = "int8, uint8 or int4"
ACTIVATIONS = "None, relu, gelu, gelu_tanh or silu"


def ones(*shape: int, dtype: torch.dtype = f32, device: str = "cpu") -> Tensor:
    return torch.ones(shape, dtype=dtype, device=device)


X, S, Z = ones(6, 35), ones(6, 5), ones(6, 5, dtype=i32)
B = [1, 8]
C8, C4 = ones(6, 35, dtype=i8), ones(6, 18, dtype=u8)

# what is said after the name of the op, and the call
CASTING: list[tuple[str, Callable[[], Any]]] = [
    (f"format must be {CASTS}, got int8", lambda: quant.cast(X, "int8", False)),
    (f"format must be {CASTS}, got float4_e2m1fn", lambda: quant.cast(X, "float4_e2m1fn", False)),
    (f"format must be {CASTS}, got ", lambda: quant.cast(X, "", False)),
    (f"format must be {CASTS}, got torch.float16", lambda: quant.cast(X, "torch.float16", False)),
    (f"format must be {CASTS}, got {'x' * 5000}", lambda: quant.cast(X, "x" * 5000, False)),
    (f"x must be {CASTS}, got float64", lambda: quant.cast(X.double(), "float16", False)),
    (f"x must be {CASTS}, got int8", lambda: quant.cast(C8, "float16", False)),
    (f"x must be {CASTS}, got bool", lambda: quant.cast(X.bool(), "float16", False)),
    (f"x must be {CASTS}, got complex64", lambda: quant.cast(X.to(torch.complex64), "float16", False)),
    (f"x must be {CASTS}, got float8_e4m3fnuz", lambda: quant.cast(X.to(torch.float8_e4m3fnuz), "float16", False)),
    (
        "out must be float16 [6, 35] on cpu, got float32 [6, 35] on cpu",
        lambda: quant.cast.out(X, "float16", False, out=ones(6, 35)),
    ),
    (
        "out must be float16 [6, 35] on cpu, got float16 [35, 6] on cpu",
        lambda: quant.cast.out(X, "float16", False, out=ones(35, 6, dtype=f16)),
    ),
    (
        "out must be float16 [6, 35] on cpu, got float16 [210] on cpu",
        lambda: quant.cast.out(X, "float16", False, out=ones(210, dtype=f16)),
    ),
    (
        "out must be float16 [] on cpu, got float16 [1] on cpu",
        lambda: quant.cast.out(ones(), "float16", False, out=ones(1, dtype=f16)),
    ),
]
SCALING = [
    (f"format must be {TARGETS}, got float32", lambda: quant.compute_scale(X, "float32", B)),
    (f"format must be {TARGETS}, got int2", lambda: quant.compute_scale(X, "int2", B)),
    (f"format must be {INTEGERS}, got float16", lambda: quant.compute_scale.affine(X, "float16", B)),
    (f"x must be {INPUTS}, got int32", lambda: quant.compute_scale(X.int(), "int8", B)),
    (f"x must be {INPUTS}, got float8_e5m2", lambda: quant.compute_scale(X.to(torch.float8_e5m2), "int8", B)),
    ("block must be two sizes >= 1, got [0, 8]", lambda: quant.compute_scale(X, "int8", [0, 8])),
    ("block must be two sizes >= 1, got [1, -1]", lambda: quant.compute_scale(X, "int8", [1, -1])),
    (
        "block must be two sizes >= 1, got [-9223372036854775808, 8]",
        lambda: quant.compute_scale(X, "int8", [-(2**63), 8]),
    ),
    ("block must be two sizes >= 1, got [8]", lambda: quant.compute_scale(X, "int8", [8])),
    ("block must be two sizes >= 1, got [1, 8, 8]", lambda: quant.compute_scale(X, "int8", [1, 8, 8])),
    ("block must be two sizes >= 1, got []", lambda: quant.compute_scale(X, "int8", [])),
    (
        "out must be float32 [6, 5] on cpu, got float32 [6, 4] on cpu",
        lambda: quant.compute_scale.out(X, "int8", B, out=ones(6, 4)),
    ),
    (
        "scale must be float32 [6, 5] on cpu, got float16 [6, 5] on cpu",
        lambda: quant.compute_scale.affine_out(X, "int8", B, scale=S.half(), zero_point=Z.clone()),
    ),
    (
        "zero_point must be int32 [6, 5] on cpu, got int64 [6, 5] on cpu",
        lambda: quant.compute_scale.affine_out(X, "int8", B, scale=S.clone(), zero_point=Z.long()),
    ),
]
QUANTIZING = [
    (f"format must be {TARGETS}, got foo", lambda: quant.quantize(X, S, "foo", B)),
    (f"x must be {INPUTS}, got float64", lambda: quant.quantize(X.double(), S, "int8", B)),
    ("block must be two sizes >= 1, got [1, 0]", lambda: quant.quantize(X, S, "int8", [1, 0])),
    (
        "scale must be float32 [6, 5] on cpu, got float32 [6, 4] on cpu",
        lambda: quant.quantize(X, ones(6, 4), "int8", B),
    ),
    ("scale must be float32 [6, 5] on cpu, got float32 [30] on cpu", lambda: quant.quantize(X, ones(30), "int8", B)),
    ("scale must be float32 [1, 1] on cpu, got float32 [] on cpu", lambda: quant.quantize(X, ones(), "int8", [6, 35])),
    (
        "scale must be float32 [1, 1] on cpu, got float32 [1] on cpu",
        lambda: quant.quantize(ones(), ones(1), "int8", [1, 1]),
    ),
    (
        "scale must be float32 [6, 5] on cpu, got float64 [6, 5] on cpu",
        lambda: quant.quantize(X, S.double(), "int8", B),
    ),
    (
        "scale must be float32 [6, 5] on cpu, got float64 [6, 5] on cpu",
        lambda: quant.quantize(X, S.double(), "int8", B),
    ),
    ("zero_point must be None for float16, got a tensor", lambda: quant.quantize(X, S, "float16", B, Z)),
    (
        "zero_point must be int32 [6, 5] on cpu, got int16 [6, 5] on cpu",
        lambda: quant.quantize(X, S, "int8", B, Z.to(torch.int16)),
    ),
    ("zero_point must be int32 [6, 5] on cpu, got float32 [6, 5] on cpu", lambda: quant.quantize(X, S, "int8", B, S)),
    (
        "zero_point must be int32 [6, 5] on cpu, got int32 [6, 1] on cpu",
        lambda: quant.quantize(X, S, "int8", B, Z[:, :1]),
    ),
    ("zero_point must be in -128..127, got 128", lambda: quant.quantize(X, S, "int8", B, Z + 127)),
    ("zero_point must be in -128..127, got -129", lambda: quant.quantize(X, S, "int8", B, Z - 130)),
    ("zero_point must be in 0..255, got -1", lambda: quant.quantize(X, S, "uint8", B, Z - 2)),
    ("zero_point must be in -8..7, got 2147483647", lambda: quant.quantize(X, S, "int4", B, Z + (2**31 - 2))),
    (
        "out must be int8 [6, 35] on cpu, got uint8 [6, 35] on cpu",
        lambda: quant.quantize.out(X, S, "int8", B, out=ones(6, 35, dtype=u8)),
    ),
    (
        "out must be uint8 [6, 18] on cpu, got uint8 [6, 35] on cpu",
        lambda: quant.quantize.out(X, S, "int4", B, out=ones(6, 35, dtype=u8)),
    ),
]
DEQUANTIZING = [
    (f"format must be {TARGETS}, got foo", lambda: quant.dequantize(C8, S, "foo", B)),
    ("codes must be int8, got uint8", lambda: quant.dequantize(C8.to(u8), S, "int8", B)),
    ("codes must be uint8, got int8", lambda: quant.dequantize(C8, S, "int4", B)),
    ("codes must be float8_e4m3fn, got int8", lambda: quant.dequantize(C8, S, "float8_e4m3fn", B)),
    (f"dtype must be {INPUTS}, got float64", lambda: quant.dequantize(C8, S, "int8", B, None, f64)),
    (f"dtype must be {INPUTS}, got int8", lambda: quant.dequantize(C8, S, "int8", B, None, i8)),
    ("size must be 35 or 36, got 34", lambda: quant.dequantize(C4, S, "int4", B, None, f32, 34)),
    ("size must be 35 or 36, got 37", lambda: quant.dequantize(C4, S, "int4", B, None, f32, 37)),
    ("size must be 35 or 36, got -1", lambda: quant.dequantize(C4, S, "int4", B, None, f32, -1)),
    ("size must be 35, got 36", lambda: quant.dequantize(C8, S, "int8", B, None, f32, 36)),
    (
        "scale must be float32 [6, 5] on cpu, got float32 [5, 6] on cpu",
        lambda: quant.dequantize(C8, S.mT, "int8", B),
    ),
    ("zero_point must be None for float4_e2m1fn, got a tensor", lambda: quant.dequantize(C4, S, "float4_e2m1fn", B, Z)),
    ("zero_point must be in -128..127, got 200", lambda: quant.dequantize(C8, S, "int8", B, Z + 199)),
    (
        "out must be float32 [6, 35] on cpu, got float16 [6, 35] on cpu",
        lambda: quant.dequantize.out(C8, S, "int8", B, out=ones(6, 35, dtype=f16)),
    ),
    (
        "out must be bfloat16 [6, 35] on cpu, got bfloat16 [6, 36] on cpu",
        lambda: quant.dequantize.out(C4, S, "int4", B, None, torch.bfloat16, 35, out=ones(6, 36, dtype=torch.bfloat16)),
    ),
]
IDS = torch.tensor([[0, 5], [5, 2]])
ROWS_OF_CODES = [
    (f"format must be {TARGETS}, got foo", lambda: quant.dequantize_rows(IDS, C8, S, "foo", B)),
    ("indices must be int64 or int32, got float32", lambda: quant.dequantize_rows(S, C8, S, "int8", B)),
    ("indices must be int64 or int32, got uint8", lambda: quant.dequantize_rows(C4, C8, S, "int8", B)),
    ("indices must be in 0..5, got 6", lambda: quant.dequantize_rows(IDS + 1, C8, S, "int8", B)),
    ("indices must be in 0..5, got -1", lambda: quant.dequantize_rows(IDS.int() - 1, C8, S, "int8", B)),
    (f"indices must be in 0..5, got {2**62}", lambda: quant.dequantize_rows(IDS * 0 + 2**62, C4, S, "int4", B)),
    ("codes must be int8 [N, 35] on cpu, got uint8 [6, 35] on cpu",
     lambda: quant.dequantize_rows(IDS, C8.to(u8), S, "int8", B)),
    ("codes must be int8 [N, 35] on cpu, got int8 [2, 3, 35] on cpu",
     lambda: quant.dequantize_rows(IDS, C8.view(2, 3, 35), S, "int8", B)),
    ("codes must be int8 [N, 35] on cpu, got int8 [35] on cpu",
     lambda: quant.dequantize_rows(IDS, C8[0], S, "int8", B)),
    (f"dtype must be {INPUTS}, got float64", lambda: quant.dequantize_rows(IDS, C8, S, "int8", B, None, f64)),
    ("size must be 35 or 36, got 34", lambda: quant.dequantize_rows(IDS, C4, S, "int4", B, None, f32, 34)),
    ("scale must be float32 [6, 5] on cpu, got float32 [5, 6] on cpu",
     lambda: quant.dequantize_rows(IDS, C8, S.mT, "int8", B)),
    ("zero_point must be None for float4_e2m1fn, got a tensor",
     lambda: quant.dequantize_rows(IDS, C4, S, "float4_e2m1fn", B, Z)),
    ("zero_point must be in -128..127, got 200", lambda: quant.dequantize_rows(IDS, C8, S, "int8", B, Z + 199)),
    ("out must be float32 [2, 2, 35] on cpu, got float32 [2, 35] on cpu",
     lambda: quant.dequantize_rows.out(IDS, C8, S, "int8", B, out=ones(2, 35))),
]  # fmt: skip
DYNAMIC = [
    (f"format must be {TARGETS}, got float32", lambda: quant.quantize_dynamic(X, "float32", B)),
    (f"format must be {INTEGERS}, got float8_e5m2", lambda: quant.quantize_dynamic.affine(X, "float8_e5m2", B)),
    (f"x must be {INPUTS}, got int64", lambda: quant.quantize_dynamic(X.long(), "int8", B)),
    ("block must be two sizes >= 1, got [-2, 8]", lambda: quant.quantize_dynamic(X, "int8", [-2, 8])),
    (
        "codes must be int8 [6, 35] on cpu, got int8 [6, 34] on cpu",
        lambda: quant.quantize_dynamic.out(X, "int8", B, codes=ones(6, 34, dtype=i8), scale=S.clone()),
    ),
    (
        "scale must be float32 [6, 5] on cpu, got float32 [6, 6] on cpu",
        lambda: quant.quantize_dynamic.out(X, "int8", B, codes=C8.clone(), scale=ones(6, 6)),
    ),
    (
        "zero_point must be int32 [6, 5] on cpu, got int32 [5, 6] on cpu",
        lambda: quant.quantize_dynamic.affine_out(
            X, "int8", B, codes=C8.clone(), scale=S.clone(), zero_point=ones(5, 6, dtype=i32)
        ),
    ),
]
ROWS, QX, SX = ones(4, 35), ones(4, 35, dtype=i8), ones(4, 1)
WEIGHT = (C8, S, "int8", B)
MULTIPLYING = [
    (f"x must be {INPUTS}, got float64", lambda: quant.dequant_matmul(ROWS.double(), *WEIGHT)),
    ("x must be [..., K], got float32 [] on cpu", lambda: quant.dequant_matmul(ones(), *WEIGHT)),
    (f"format must be {TARGETS}, got float32", lambda: quant.dequant_matmul(ROWS, C8, S, "float32", B)),
    ("block must be two sizes >= 1, got [1, -1]", lambda: quant.dequant_matmul(ROWS, C8, S, "int8", [1, -1])),
    (
        "codes must be int8 [N, 35] on cpu, got uint8 [6, 35] on cpu",
        lambda: quant.dequant_matmul(ROWS, C8.to(u8), S, "int8", B),
    ),
    (
        "codes must be uint8 [N, 18] on cpu, got uint8 [6, 35] on cpu",
        lambda: quant.dequant_matmul(ROWS, C8.to(u8), S, "int4", B),
    ),
    (
        "codes must be int8 [N, 34] on cpu, got int8 [6, 35] on cpu",
        lambda: quant.dequant_matmul(ROWS[:, 1:], *WEIGHT),
    ),
    (
        "codes must be int8 [N, 35] on cpu, got int8 [] on cpu",
        lambda: quant.dequant_matmul(ROWS, C8[0, 0], S, "int8", B),
    ),
    (
        "scale must be float32 [6, 5] on cpu, got float32 [6, 4] on cpu",
        lambda: quant.dequant_matmul(ROWS, C8, S[:, :4], "int8", B),
    ),
    (
        "zero_point must be None for float4_e2m1fn, got a tensor",
        lambda: quant.dequant_matmul(ROWS, C4, S, "float4_e2m1fn", B, Z),
    ),
    ("zero_point must be in -128..127, got 128", lambda: quant.dequant_matmul(ROWS, *WEIGHT, Z + 127)),
    (f"bias must be {INPUTS}, got int32", lambda: quant.dequant_matmul(ROWS, *WEIGHT, None, Z[:, 0])),
    (
        "bias must be float16 [6] on cpu, got float16 [5] on cpu",
        lambda: quant.dequant_matmul(ROWS, *WEIGHT, None, ones(5, dtype=f16)),
    ),
    (f"activation must be {ACTIVATIONS}, got tanh", lambda: quant.dequant_matmul(ROWS, *WEIGHT, None, None, "tanh")),
    (f"activation must be {ACTIVATIONS}, got ", lambda: quant.dequant_matmul(ROWS, *WEIGHT, None, None, "")),
    (
        "out must be float32 [4, 6] on cpu, got float32 [4, 5] on cpu",
        lambda: quant.dequant_matmul.out(ROWS, *WEIGHT, out=ones(4, 5)),
    ),
]
TRANSPOSED = [
    (f"dy must be {INPUTS}, got int8", lambda: quant.dequant_matmul_backward(QX, *WEIGHT)),
    ("dy must be [..., 6], got [4, 35]", lambda: quant.dequant_matmul_backward(ROWS, *WEIGHT)),
    ("dy must be [..., K], got float32 [] on cpu", lambda: quant.dequant_matmul_backward(ones(), *WEIGHT)),
    (f"format must be {TARGETS}, got int5", lambda: quant.dequant_matmul_backward(ROWS, C8, S, "int5", B, None, 7)),
    ("size must be 35, got 36", lambda: quant.dequant_matmul_backward(X[:, :6], *WEIGHT, None, 36)),
    ("size must be 35 or 36, got 37", lambda: quant.dequant_matmul_backward(X[:, :6], C4, S, "int4", B, None, 37)),
    (
        "out must be float32 [6, 35] on cpu, got float32 [6, 36] on cpu",
        lambda: quant.dequant_matmul_backward.out(X[:, :6], C4, S, "int4", B, None, 35, out=ones(6, 36)),
    ),
]
SCALED = [
    ("x_codes must be int8 or uint8, got float32", lambda: quant.scaled_matmul(ROWS, SX, *WEIGHT)),
    (f"dtype must be {INPUTS}, got float64", lambda: quant.scaled_matmul(QX, SX, *WEIGHT, dtype=f64)),
    ("x_codes must be [..., K], got int8 [] on cpu", lambda: quant.scaled_matmul(QX[0, 0], SX, *WEIGHT)),
    (f"format must be {INTEGERS}, got float16", lambda: quant.scaled_matmul(QX, SX, C8, S, "float16", B)),
    (
        "x_scale must be float32 [4, 1] or [1, 1] on cpu, got float32 [4] on cpu",
        lambda: quant.scaled_matmul(QX, SX[:, 0], *WEIGHT),
    ),
    (
        "x_scale must be float32 [4, 1] on cpu, got float16 [4, 1] on cpu",
        lambda: quant.scaled_matmul(QX, SX.half(), *WEIGHT),
    ),
    (
        "x_zero_point must be int32 [4, 1] on cpu, got int32 [1, 1] on cpu",
        lambda: quant.scaled_matmul(QX, SX, *WEIGHT, Z[:1, :1]),
    ),
    (
        "x_zero_point must be in -128..127, got 200",
        lambda: quant.scaled_matmul(QX, SX, *WEIGHT, torch.full_like(SX, 200, dtype=torch.int32)),
    ),
    (
        "zero_point must be in 0..255, got -1",
        lambda: quant.scaled_matmul(QX, SX, C8.to(u8), S, "uint8", B, None, Z - 2),
    ),
    (
        "K must be at most 33025, so that an int32 holds the sum, got 33026",
        lambda: quant.scaled_matmul(
            ones(1, 33026, dtype=i8),
            SX[:1],
            ones(1, 33026, dtype=i8),
            S[:1, :1],
            "int8",
            [1, 33026],
            Z[:1, :1],
            Z[:1, :1],
        ),
    ),
    (f"activation must be {ACTIVATIONS}, got Gelu", lambda: quant.scaled_matmul(QX, SX, *WEIGHT, activation="Gelu")),
    (
        "out must be float16 [4, 6] on cpu, got float32 [4, 6] on cpu",
        lambda: quant.scaled_matmul.out(QX, SX, *WEIGHT, dtype=f16, out=ones(4, 6)),
    ),
]
DYNAMICALLY = [
    (f"x must be {INPUTS}, got int8", lambda: quant.dynamic_matmul(QX, *WEIGHT)),
    (f"format must be {INTEGERS}, got float8_e5m2", lambda: quant.dynamic_matmul(ROWS, C8, S, "float8_e5m2", B)),
    (
        "K must be at most 2097151, so that an int32 holds the sum, got 2097152",
        lambda: quant.dynamic_matmul(
            ones(1, 1).expand(1, 2**21), C4[:1, :1].expand(1, 2**20), S[:1, :1], "int4", [1, 2**21]
        ),
    ),
    (
        "bias must be float32 [6] on cpu, got float32 [6, 1] on cpu",
        lambda: quant.dynamic_matmul(ROWS, *WEIGHT, None, ones(6, 1)),
    ),
    (
        "out must be float32 [4, 6] on cpu, got float16 [4, 6] on cpu",
        lambda: quant.dynamic_matmul.out(ROWS, *WEIGHT, out=ones(4, 6, dtype=f16)),
    ),
]
SEARCHING: list[tuple[str, Callable[[], Any]]] = [
    (f"format must be {TARGETS}, got int2", lambda: quant.search_scale(X, S, "int2", B, "mse", "float32")),
    (f"x must be {INPUTS}, got int32", lambda: quant.search_scale(X.int(), S, "int8", B, "mse", "float32")),
    (
        "scale must be float32 [6, 5] on cpu, got float32 [6, 4] on cpu",
        lambda: quant.search_scale(X, S[:, :4], "int8", B, "mse", "float32"),
    ),
    (
        "method must be mse, magnitude, signed_mse or signed_magnitude, got lsq",
        lambda: quant.search_scale(X, S, "int8", B, "lsq", "float32"),
    ),
    (f"kept must be {INPUTS}, got int8", lambda: quant.search_scale(X, S, "int8", B, "mse", "int8")),
    (
        "zero_point must be None for nf4, got a tensor",
        lambda: quant.search_scale(X, S, "nf4", B, "mse", "float32", Z),
    ),
    (
        "zero_point must be in -128..127, got 128",
        lambda: quant.search_scale(X, S, "int8", B, "mse", "float32", Z + 127),
    ),
    (
        "energy must be float32 [35] on cpu, got float32 [34] on cpu",
        lambda: quant.search_scale(X, S, "int8", B, "mse", "float32", None, ones(34)),
    ),
    (
        "energy must be float32 [35] on cpu, got float64 [35] on cpu",
        lambda: quant.search_scale(X, S, "int8", B, "mse", "float32", None, ones(35, dtype=f64)),
    ),
    *(
        (
            f"energy must be finite and >= 0, got {said}",
            lambda value=value: quant.search_scale(
                X, S, "int8", B, "mse", "float32", None, torch.where(torch.arange(35) == 9, value, 1.0)
            ),
        )
        for said, value in (("-0.5", -0.5), ("nan", float("nan")), ("inf", float("inf")))
    ),
    (
        "out must be float32 [6, 5] on cpu, got float16 [6, 5] on cpu",
        lambda: quant.search_scale.out(X, S, "int8", B, "mse", "float32", out=ones(6, 5, dtype=f16)),
    ),
]
STACK = (C8.expand(2, -1, -1), S.expand(2, -1, -1), "int8", B)
ENDS = torch.tensor([1, 4], dtype=i32)
OF_EXPERTS = [
    (f"x must be {INPUTS}, got int8", lambda: quant.grouped_dequant_matmul(QX, *STACK, ENDS)),
    (
        "x must be [T, K], the rows of all experts, got [1, 4, 35]",
        lambda: quant.grouped_dequant_matmul(ROWS[None], *STACK, ENDS),
    ),
    (
        "codes must be [E, N, K], a matrix of each expert, got [6, 35]",
        lambda: quant.grouped_dequant_matmul(ROWS, *WEIGHT, ENDS),
    ),
    (
        "codes must be int8 [E, N, 34] on cpu, got int8 [2, 6, 35] on cpu",
        lambda: quant.grouped_dequant_matmul(ROWS[:, 1:], *STACK, ENDS),
    ),
    (
        "scale must be float32 [2, 6, 5] on cpu, got float32 [6, 5] on cpu",
        lambda: quant.grouped_dequant_matmul(ROWS, STACK[0], S, "int8", B, ENDS),
    ),
    (
        "offsets must be int32 [2] on cpu, got int32 [3] on cpu",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, torch.zeros(3, dtype=i32)),
    ),
    (
        "offsets must be int32 [2] on cpu, got float32 [2] on cpu",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, ones(2)),
    ),
    (
        "offsets must be ascending ends of groups in 0..4, got 1 for expert 1, which begins at 3",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, torch.tensor([3, 1], dtype=i32)),
    ),
    (
        "offsets must be ascending ends of groups in 0..4, got 5 for expert 1, which begins at 1",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, torch.tensor([1, 5], dtype=i32)),
    ),
    (
        "offsets must be ascending ends of groups in 0..4, got -1 for expert 0, which begins at 0",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, torch.tensor([-1, 4], dtype=i32)),
    ),
    (
        "bias must be float32 [2, 6] on cpu, got float32 [6] on cpu",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, ENDS, None, ones(6)),
    ),
    (
        "zero_point must be in -128..127, got 300",
        lambda: quant.grouped_dequant_matmul(ROWS, *STACK, ENDS, torch.full((2, 6, 5), 300, dtype=i32)),
    ),
]
OF_EXPERTS_BACK = [
    ("dy must be [T, 6], got [4, 35]", lambda: quant.grouped_dequant_matmul_backward(ROWS, *STACK, ENDS)),
    (
        "dy must be [T, N], the rows of all experts, got [6]",
        lambda: quant.grouped_dequant_matmul_backward(ones(6), *STACK, ENDS),
    ),
]
OF_EXPERTS_DYNAMICALLY = [
    (
        f"format must be {INTEGERS}, got float8_e5m2",
        lambda: quant.grouped_dynamic_matmul(ROWS, *STACK[:2], "float8_e5m2", B, ENDS),
    ),
    (
        "K must be at most 2097151, so that an int32 holds the sum, got 2097152",
        lambda: quant.grouped_dynamic_matmul(
            ones(1, 1).expand(1, 2**21), C4[:1, :1].expand(1, 1, 2**20), S[None, :1, :1], "int4", [1, 2**21], ENDS[:1]
        ),
    ),
]
DIVIDES = "block must be a power of two, at most 1024, that divides the last size"
ROTATING = [
    ("x must be float32, float16 or bfloat16, got int8", lambda: quant.hadamard(ones(2, 4).to(torch.int8), 4)),
    (f"{DIVIDES} 6, got 4", lambda: quant.hadamard(ones(2, 6), 4)),
    (f"{DIVIDES} 6, got 3", lambda: quant.hadamard(ones(2, 6), 3)),
    (f"{DIVIDES} 6, got 0", lambda: quant.hadamard(ones(2, 6), 0)),
    (f"{DIVIDES} 6, got -2", lambda: quant.hadamard(ones(2, 6), -2)),
    (f"{DIVIDES} 4096, got 2048", lambda: quant.hadamard(ones(1, 4096), 2048)),
    (f"{DIVIDES} 1, got 2", lambda: quant.hadamard(torch.tensor(1.0), 2)),
    (
        "out must be float32 [2, 4] on cpu, got float32 [4, 2] on cpu",
        lambda: quantlib.hadamard(ones(2, 4), 4, out=ones(4, 2)),
    ),
]
BAD = {
    "cast": CASTING,
    "hadamard": ROTATING,
    "compute_scale": SCALING,
    "search_scale": SEARCHING,
    "quantize": QUANTIZING,
    "dequantize": DEQUANTIZING,
    "dequantize_rows": ROWS_OF_CODES,
    "quantize_dynamic": DYNAMIC,
    "dequant_matmul": MULTIPLYING,
    "dequant_matmul_backward": TRANSPOSED,
    "scaled_matmul": SCALED,
    "dynamic_matmul": DYNAMICALLY,
    "grouped_dequant_matmul": OF_EXPERTS,
    "grouped_dequant_matmul_backward": OF_EXPERTS_BACK,
    "grouped_dynamic_matmul": OF_EXPERTS_DYNAMICALLY,
}
EVERY = [(f"quantlib::{op}: {said}", call) for op, table in BAD.items() for said, call in table]
CPU = backends.order("cpu")


@pytest.fixture(params=CPU)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Python's checks, and C++'s."""
    if why := backends.refuses(request.param, "cpu"):
        pytest.skip(f"{request.param}: {why}")
    with quantlib.use_backend(request.param):
        yield request.param


@pytest.mark.parametrize(("said", "call"), EVERY, ids=[said[:90] for said, _ in EVERY])
def test_says_what_was_expected_and_what_came(said: str, call: Callable[[], Any], backend: str) -> None:
    with pytest.raises(RuntimeError) as error:
        call()
    assert type(error.value) is RuntimeError
    assert str(error.value) == said


@pytest.mark.parametrize(
    "call",
    [
        lambda codes, scale: quant.quantize_dynamic.out(X, "int8", B, codes=codes, scale=scale[:, :4]),
        lambda codes, scale: quant.quantize_dynamic.out(X, "int8", B, codes=codes[:5], scale=scale),
        lambda codes, scale: quant.quantize_dynamic.out(X.double(), "int8", B, codes=codes, scale=scale),
        lambda codes, scale: quant.quantize_dynamic.out(X, "int4", B, codes=codes, scale=scale),
        lambda codes, scale: quant.quantize.out(X, S[:, :4], "int8", B, out=codes),
        lambda codes, scale: quant.quantize.out(X, S, "int8", B, Z + 500, out=codes),
        lambda codes, scale: quant.compute_scale.out(X, "int8", [1, 9], out=scale),
        lambda codes, scale: quant.dequantize.out(C8, S, "int8", B, Z + 500, out=scale),
        lambda codes, scale: quant.dequantize_rows.out(IDS, C8[:, :5], S, "int8", [1, 1], Z + 500, out=scale[:4]),
        lambda codes, scale: quant.dequantize_rows.out(IDS[0] + 4, C8[:, :5], S, "int8", [1, 1], out=scale[:2]),
    ],
)  # fmt: skip
def test_nothing_is_written_on_error(call: Callable[[Tensor, Tensor], Any], backend: str) -> None:
    codes, scale = torch.full((6, 35), 99, dtype=i8), torch.full((6, 5), 99.0)
    with pytest.raises(RuntimeError, match=r"^quantlib::"):
        call(codes, scale)
    assert bool((codes == 99).all())
    assert bool((scale == 99).all())


WRONG_TYPES: list[Callable[[], Any]] = [
    lambda: quant.cast("x", "float16", False),
    lambda: quant.cast(None, "float16", False),
    lambda: quant.cast([1.0], "float16", False),
    lambda: quant.cast(X, 16, False),
    lambda: quant.cast(X, "float16", "no"),
    lambda: quant.cast(X),
    lambda: quant.cast(X, "float16", False, 1),
    lambda: quant.quantize(X, 0.1, "int8", B),
    lambda: quant.quantize(X, S, "int8", "row"),
    lambda: quant.quantize(X, S, "int8", [1.5, 8]),
    lambda: quant.quantize(X, S, "int8", B, 3),
    lambda: quant.dequantize(C8, S, "int8", B, None, "float32"),
    lambda: quant.dequantize(C8, S, "int8", B, None, f32, 3.5),
    lambda: quant.quantize_dynamic(X, "int8", [2**70, 1]),
    lambda: quant.cast.out(X, "float16", False, out=None),
]


@pytest.mark.parametrize("number", range(len(WRONG_TYPES)))
def test_wrong_types_are_the_schemas_to_refuse(number: int, backend: str) -> None:
    with pytest.raises((RuntimeError, TypeError, OverflowError, AttributeError)):
        WRONG_TYPES[number]()


# ---- devices --------------------------------------------------------------------------------------------------------


def test_another_device() -> None:
    """Mixed devices raise torch's error or ours where no kernel takes both; foreign memory is never read."""
    meta = ones(6, 35, device="meta")
    for call in (
        lambda: quant.quantize(X, S.to("meta"), "int8", B),
        lambda: quant.quantize(meta, S, "int8", B),
        lambda: quant.quantize(X, S, "int8", B, Z.to("meta")),
        lambda: quant.cast.out(X, "float16", False, out=ones(6, 35, dtype=f16, device="meta")),
        lambda: quant.dequantize(C8, S.to("meta"), "int8", B),
    ):
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", [b.name for b in backends.BACKENDS.values() if "cuda" in b.devices])
def test_a_scale_on_the_other_device(name: str) -> None:
    if why := backends.refuses(name, "cuda"):
        pytest.skip(f"{name}: {why}")
    said = r"^quantlib::quantize: scale must be float32 \[6, 5\] on cuda:0, got float32 \[6, 5\] on cpu"
    with quantlib.use_backend(name), pytest.raises(RuntimeError, match=said):
        quant.quantize(X.cuda(), S, "int8", B)


@pytest.mark.parametrize("name", [b.name for b in backends.BACKENDS.values() if "quantize" in b.kernels])
def test_a_kernel_clamps_a_zero_point_that_nobody_looked_at(name: str) -> None:
    """A kernel stays inside the format by itself: on a device, a check would have to wait for the values."""
    if why := backends.refuses(name, "cpu"):
        pytest.skip(f"{name}: {why}")
    kernel = backends.BACKENDS[name].kernels["quantize"]
    f = formats.get("int8")
    for z in (1000, -1000, 2**31 - 1, -(2**31)):
        codes = torch.empty(6, 35, dtype=i8)
        kernel(X, S, f, (1, 8), torch.full((6, 5), z, dtype=i32), codes)
        inside = np.full((6, 5), min(max(z, -128), 127), np.int32)
        assert_same_bytes(codes, reference.quantize(X.numpy(), S.numpy(), "int8", block=(1, 8), zero_point=inside))
