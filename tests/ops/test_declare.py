"""The arguments of an op's schema as one record for a weight and one for its epilogue."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantlib import backends, formats, ops
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.declare import Binder

INT4, CODES, SCALE = formats.get("int4"), torch.zeros(6, 4, dtype=torch.uint8), torch.ones(6, 2)
Z = torch.zeros(6, 2, dtype=torch.int32)


def bound(overload: str, *args: Any) -> dict[str, Any]:
    return Binder(overload)(args)


def test_arguments_of_a_weight_and_of_what_follows_are_records() -> None:
    x, x_scale, bias = torch.zeros(3, 7, dtype=torch.int8), torch.ones(3, 1), torch.zeros(6)
    got = bound("scaled_matmul", x, x_scale, CODES, SCALE, "int4", [1, 4], None, Z, bias, "relu", torch.float16)
    assert list(got) == ["x_codes", "x_scale", "weight", "x_zero_point", "epilogue"]
    assert got["x_codes"] is x
    assert got["weight"] == QuantizedWeight(CODES, SCALE, INT4, (1, 4), Z, (6, 7))
    assert got["epilogue"] == Epilogue(bias, "relu", torch.float16)
    assert not got["weight"].tiled


def test_what_is_left_out_has_its_default() -> None:
    got = bound("dequant_matmul", torch.zeros(3, 8), CODES, SCALE, "int4", [1, 4])
    assert got["weight"].zero_point is None
    assert got["epilogue"] == Epilogue()
    assert got["batch_invariant"] is False


@pytest.mark.parametrize("size", [7, 8])
def test_size_is_k_and_the_rows_of_tiles_are_n(size: int) -> None:
    assert bound("dequantize", CODES, SCALE, "int4", [1, 4], None, None, size)["weight"].shape == (6, size)
    assert bound("dequantize", CODES.view(2, 3, 4), SCALE, "int4", [1, 4])["weight"].shape == (6, 8)
    tiles = ops.tile(CODES, "int4", size=size)
    weight = bound("dequant_matmul.tiled", torch.zeros(2, 3, size), tiles, SCALE, "int4", [1, 4], 6)["weight"]
    assert weight.shape == (6, size)
    assert weight.tiled
    assert torch.equal(weight.plain().codes, CODES)
    assert weight.plain().arguments[2:] == ("int4", (1, 4), None)


def test_a_kernel_is_given_what_is_contiguous_and_a_block_inside_its_matrix() -> None:
    codes = torch.zeros(4, 3, 2, dtype=torch.int8).mT
    weight = bound("dequantize", codes, torch.ones(1, 4)[:, ::2], "int8", [50, 2])["weight"].for_kernel()
    assert weight.block == (8, 2)
    assert weight.codes.shape == (8, 3)
    assert all(t.is_contiguous() for t in (weight.codes, weight.scale))
    bias = Epilogue(torch.ones(6).half()[::2]).for_kernel().bias
    assert bias is not None
    assert bias.dtype == torch.float32
    assert bias.is_contiguous()


def test_every_op_that_reads_codes_is_given_the_record() -> None:
    for overload in backends.SCHEMAS:
        if not overload.endswith("out"):
            names, reads = (
                {name for name, _ in Binder(overload).order},
                {"codes", "tiles"} & set(Binder(overload).names),
            )
            assert ("weight" in names) == bool(reads), overload
            assert not names & {"codes", "tiles", "size", "bias", "activation"}, overload
