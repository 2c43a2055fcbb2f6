"""A layer knows the size of its input, which its codes do not tell: they are padded to bytes, or viewed as a matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quantlib.nn import QUANTIZED

SPECS = ["int8", "W8A8", "W4A16", "int4:group:32", "float8_e4m3fn", "uint8", "bfloat16", "float16"]
LAYERS: dict[str, tuple[nn.Module, str, list[tuple[int, ...]]]] = {
    "linear": (nn.Linear(64, 8), "[..., 64]", [(2, 63), (2, 65), (2, 0), (), (64, 1)]),
    "conv1d": (nn.Conv1d(4, 8, 3), "[..., 4, _]", [(2, 5, 9), (2, 3, 9), (5, 9)]),
    "conv1x1": (nn.Conv1d(3, 8, 1), "[..., 3, _]", [(2, 4, 9), (4, 9)]),
    "conv2d": (nn.Conv2d(4, 8, 3, groups=2), "[..., 4, _, _]", [(2, 5, 9, 9), (2, 2, 9, 9), (6, 9, 9)]),
}


def quantized(layer: nn.Module, spec: str) -> Any:
    return QUANTIZED[type(layer)].from_float(layer, spec)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_input_of_another_size_is_refused_by_the_layer(kind: str, spec: str) -> None:
    layer, expected, shapes = LAYERS[kind]
    module = quantized(layer, spec)
    for shape in shapes:
        with pytest.raises(RuntimeError) as error:
            module(torch.randn(shape))
        assert f"input must be float32, bfloat16, float16 or float64 {expected}" in str(error.value)
        assert f"got float32 {list(shape)}" in str(error.value)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_input_that_is_no_floats_is_refused_by_the_layer(kind: str, spec: str) -> None:
    layer, _, _ = LAYERS[kind]
    shape = {"linear": (2, 64), "conv1d": (2, 4, 9), "conv1x1": (2, 3, 9), "conv2d": (2, 4, 9, 9)}[kind]
    module = quantized(layer, spec)
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(RuntimeError, match=f"input must be float32.* got {str(dtype)[6:]} "):
            module(torch.ones(shape).to(dtype))
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        module(torch.ones(shape).tolist())


@pytest.mark.parametrize("spec", SPECS)
def test_indices_that_are_no_tensor_are_refused_by_the_embedding(spec: str) -> None:
    module = quantized(nn.Embedding(10, 64), spec)
    given: list[Any] = [None, [1, 2], 3]
    for rows in given:
        with pytest.raises(TypeError, match=f"input must be a tensor of int64 or int32, got {type(rows).__name__}"):
            module(rows)


def test_a_layer_that_lies_the_other_way_knows_its_size_too() -> None:
    utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    from quantlib import quantize_

    model = nn.Sequential(utils.Conv1D(8, 64))
    quantize_(model, "W4A16", types=[utils.Conv1D])
    x: Tensor = torch.randn(2, 63)
    with pytest.raises(RuntimeError, match=r"input must be .*\[\.\.\., 64\], got float32 \[2, 63\]"):
        model(x)
