"""onnxruntime and ggml multiply by the weight that they are given: nobody wins by another product."""

from __future__ import annotations

import ctypes
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

import quantlib
from benchmarks import dequant_matmul, matmul, measure, peer_runtimes, peers, scaled_matmul
from benchmarks.case import Row

SHAPE = (5, 64, 512)  # M, N, K
CASES = [
    dequant_matmul.DequantMatmul(SHAPE, "bfloat16", spec=matmul.W8A16),
    dequant_matmul.DequantMatmul(SHAPE, "bfloat16", spec=matmul.W4A16),
    scaled_matmul.DynamicMatmul(SHAPE, "float32", spec=matmul.W8A8),
    scaled_matmul.DynamicMatmul(SHAPE, "float32", spec=matmul.W4A8),
]


def error(one: Any, y: torch.Tensor) -> float:
    """Return the distance of y from the product in float64, as a share of that."""
    x, codes, scale = one.inputs()
    exact = x.double() @ one.values(codes, scale).double().t()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("one", CASES, ids=lambda one: str(one.spec))
def test_onnxruntime_multiplies_by_the_codes_of_quantlib(one: Any) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx", reason="onnx is not installed")
    for contender in peer_runtimes.of(one):
        if contender.name.startswith("onnxruntime"):
            call = contender.bind(one.inputs(), one.outs(*one.inputs()))
            assert len(call) > 1, "weights that take turns"
            exact = contender.name.endswith("MatMulNBits 0")
            for _ in range(len(call) + 1):
                assert error(one, call()) <= (0 if exact else 0.03), contender.name
            (y,) = contender.results(call(), ())
            assert y.dtype == getattr(torch, one.dtype)


@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="xllamacpp is not installed")
@pytest.mark.parametrize("one", CASES, ids=lambda one: str(one.spec))
def test_ggml_multiplies_by_the_values(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = peer_runtimes.of(one)[-1]
    api, made = peer_runtimes.library(), []
    multiply = api.ggml_mul_mat

    def remembered(*arguments: Any) -> Any:
        made.append(multiply(*arguments))
        return made[-1]

    monkeypatch.setattr(api, "ggml_mul_mat", remembered)
    call = contender.bind(one.inputs(), ())
    M, N, _ = one.shape
    assert len(call) > 1, "weights that take turns"
    get = api.ggml_backend_tensor_get
    get.restype, get.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    for y_in in made[-len(call) + 1 :]:
        for _ in range(len(call)):
            call()
        y = np.zeros((M, N), np.float32)
        get(y_in, y.ctypes.data, 0, y.nbytes)
        assert error(one, torch.from_numpy(y)) < (0.1 if one.spec.row.packed else 0.02)


def test_those_that_are_missing_are_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str = "xllamacpp") -> Any:
        raise peers.MissingError(f"not installed: no {name}")

    monkeypatch.setattr(peer_runtimes, "package", missing)
    monkeypatch.setattr(peer_runtimes, "library", missing)
    rows: list[Row] = []
    measure.measure(CASES[1], rows, seconds=0.0)
    found = {row.backend: row.error for row in rows}
    for name in ("onnxruntime MatMulNBits 0", "onnxruntime MatMulNBits 4", "ggml q4_0"):
        assert "not installed: no" in found[name]


def test_a_gpu_has_none() -> None:
    assert peer_runtimes.of(dequant_matmul.DequantMatmul(SHAPE, "bfloat16", "cuda", spec=matmul.W8A16)) == []
    assert quantlib.QuantSpec.parse("W4A8") == matmul.W4A8
