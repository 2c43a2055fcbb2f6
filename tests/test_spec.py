"""QuantSpec: what the words mean, what they default to, and what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

import quantlib
from quantlib.spec import SCHEMES, TARGETS, QuantSpec


@pytest.mark.parametrize(
    ("words", "text", "block", "scale_shape"),
    [
        ("int8", "int8:row", (1, 300), (200, 1)),
        ("W8A16", "int8:row", (1, 300), (200, 1)),
        ("w8a8", "int8:row@int8:row", (1, 300), (200, 1)),
        ("W4A16", "nf4_bf16:group:128:bfloat16:signed_magnitude", (1, 128), (200, 3)),
        ("nf4", "nf4:group:64", (1, 64), (200, 5)),
        ("W4A8", "int4:group:128@int8:row", (1, 128), (200, 3)),
        ("int4", "int4:group:128", (1, 128), (200, 3)),
        ("int4:group:32", "int4:group:32", (1, 32), (200, 10)),
        ("int4:group:4096", "int4:group:4096", (1, 300), (200, 1)),
        ("int8:tensor", "int8:tensor", (200, 300), (1, 1)),
        ("int8:tile:128", "int8:tile:128", (128, 128), (2, 3)),
        ("int8:tile:256", "int8:tile:256", (200, 256), (1, 2)),
        ("uint8", "uint8:row:affine", (1, 300), (200, 1)),
        ("int4:group:64:affine", "int4:group:64:affine", (1, 64), (200, 5)),
        ("int8:affine@uint8:tensor", "int8:row:affine@uint8:tensor:affine", (1, 300), (200, 1)),
        (torch.float8_e4m3fn, "float8_e4m3fn:row", (1, 300), (200, 1)),
        ("FP8", "float8_e4m3fn:row", (1, 300), (200, 1)),
        (torch.bfloat16, "bfloat16", (200, 300), (1, 1)),
        ("float16:row", "float16:row", (1, 300), (200, 1)),
    ],
)
def test_words(words: object, text: str, block: tuple[int, int], scale_shape: tuple[int, int]) -> None:
    spec = QuantSpec.parse(words)
    assert str(spec) == text
    assert spec.block((200, 300)) == block
    assert spec.scale_shape((200, 300)) == scale_shape


@pytest.mark.parametrize("words", [*SCHEMES, *TARGETS, "int4:group:32", "int8:affine@uint8:tensor"])
def test_text_is_an_inverse_of_parse(words: str) -> None:
    spec = QuantSpec.parse(words)
    assert QuantSpec.parse(str(spec)) == spec == QuantSpec.parse(spec) == pickle.loads(pickle.dumps(spec))
    assert eval(repr(spec)) == spec


def test_the_words_of_the_field() -> None:
    assert QuantSpec.parse("int8:channel@int8:token") == QuantSpec.parse("W8A8") == quantlib.W8A8
    assert QuantSpec("uint8", per="channel") == QuantSpec("uint8", per="row")
    assert QuantSpec("int4", per="group", group_size=32) == QuantSpec("int4", group_size=32)
    assert str(QuantSpec("int4", group_size=32).weight_only) == "int4:group:32"
    assert repr(quantlib.W4A16) == (
        "QuantSpec(format='nf4_bf16', per='group:128', symmetric=True, activation=None, static=False, "
        "scale='bfloat16', search='signed_magnitude', hadamard=False)"
    )
    assert [str(s) for s in (quantlib.W8A16, quantlib.W4A16)] == [SCHEMES["w8a16"], SCHEMES["w4a16"]]
    assert QuantSpec.parse("W4A8") == quantlib.W4A8


@pytest.mark.parametrize(
    "text",
    ["int4:group:32:mse", "uint8:row:affine:float16:magnitude", "int8:row:mse@int8:row", "nf4:group:64:signed_mse"],
)
def test_a_search_is_a_word_of_the_weight(text: str) -> None:
    spec = QuantSpec.parse(text)
    assert str(spec) == text
    assert spec != QuantSpec.parse(text.replace(f":{spec.search}", ""))
    assert QuantSpec.parse("W8A8:mse") == QuantSpec.parse("int8:row:mse@int8:row")
    assert str(QuantSpec.parse("w4a16:magnitude")) == "nf4_bf16:group:128:bfloat16:magnitude"  # in place of its own
    assert str(QuantSpec.parse("W4A16:mse@int8")) == "nf4_bf16:group:128:bfloat16:mse@int8:row"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"search": "hqq"}, "search must be minmax, mse, magnitude, signed_mse or signed_magnitude, got 'hqq'"),
        ({"activation": "int8:row:mse"}, "activation must have the scales of its range, got int8:row:mse"),
        ({"per": "row", "group_size": 32}, "per must be \"group\" where group_size is given, got 'row'"),
        ({"group_size": 0}, "group_size must be a whole number >= 1, got 0"),
        ({"group_size": "32"}, "group_size must be a whole number >= 1, got '32'"),
        ({"per": "group"}, "per must be tensor, row .* group:N or tile:N with N >= 1, got 'group'"),
    ],
)
def test_group_sizes_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantSpec("int4", **options)


def test_both_signs_are_for_values_that_are_not_symmetric() -> None:
    assert str(QuantSpec.parse("nf4:signed_mse")) == "nf4:group:64:signed_mse"
    assert QuantSpec.parse("W4A16:signed_magnitude") == quantlib.W4A16
    assert quantlib.W4A16.kept == QuantSpec.parse("nf4_bf16:group:128:bfloat16")  # files of before the search
    for text in ("int4:group:32:signed_mse", "uint8:row:affine:signed_mse", "fp8:signed_mse", "fp4:signed_mse"):
        with pytest.raises(
            ValueError, match=r"search must be mse or magnitude, got signed_mse for .*, whose values are"
        ):
            QuantSpec.parse(text)


def test_only_a_scale_can_be_searched() -> None:
    with pytest.raises(ValueError, match="search must be minmax for float16 without a scale, got mse"):
        QuantSpec.parse("float16:mse")


def test_the_constructor_and_the_text_agree() -> None:
    assert QuantSpec("int8", per="group:64", symmetric=False) == QuantSpec.parse("int8:group:64:affine")
    assert QuantSpec("int8", activation="int8") == QuantSpec.parse("W8A8")  # type: ignore[arg-type]
    assert QuantSpec.parse("W8A8").weight_only == QuantSpec.parse("W8A16")
    assert QuantSpec("int8", per="group:064") == QuantSpec("int8", per="group:64")
    assert len({QuantSpec("int8"), QuantSpec("int8", per="row"), QuantSpec("int8", symmetric=True)}) == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("W3A16", "W3A16"),
        ("int5", "int5"),
        ("", "''"),
        ("int8:column", "column"),
        ("int8:group", "group"),
        ("int8:group:0", "group:0"),
        ("int8:group:-1", "group:-1"),
        ("int8:group:x", "group:x"),
        ("int8:row:row", "row:row"),
        ("int8@", "activation must follow"),
        ("int8@bfloat16", "activation must have a scale"),
        ("int8@int8@int8", "activation must be"),
        ("float8_e4m3fn:affine", "symmetric must be True"),
        ("float32", "float32"),
        (torch.int64, "torch.int64"),
        (None, "None"),
        (8, "8"),
    ],
)
def test_refused(words: object, named: str) -> None:
    with pytest.raises(ValueError, match="spec must be") as error:
        QuantSpec.parse(words)
    assert named in str(error.value)


def test_refused_by_the_constructor() -> None:
    with pytest.raises(ValueError, match=r"per must be tensor, row \(or channel, token\), group:N or tile:N"):
        QuantSpec("int8", per=128)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="symmetric must be False for uint8"):
        QuantSpec("uint8", symmetric=True)
    with pytest.raises(TypeError, match="symmetric must be True, False or None"):
        QuantSpec("int8", symmetric="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "nbytes"),
    [
        ("int8", 7 * 9 + 7 * 4),
        ("uint8", 7 * 9 + 7 * 5),
        ("int4:group:4", 7 * 5 + 7 * 3 * 4),
        ("float16", 7 * 9 * 2),
        ("float8_e5m2:tensor", 7 * 9 + 4),
    ],
)
def test_nbytes(words: str, nbytes: int) -> None:
    assert QuantSpec.parse(words).nbytes((7, 9)) == nbytes


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices_have_a_block(shape: tuple[int, int]) -> None:
    for words in ("int8:tensor", "int8:row", "int8:group:4", "int8:tile:4"):
        assert min(QuantSpec.parse(words).block(shape)) >= 1


def test_needs_no_torch() -> None:
    program = """
import sys
from typing import Any
sys.argv, sys.modules["torch"] = ["quantlib"], None
from quantlib.spec import QuantSpec
print(QuantSpec.parse("W8A16"))
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "int8:row", done.stderr
