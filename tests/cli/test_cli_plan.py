"""``quantlib plan``: its table, JSON, page, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlib.cli import main
from quantlib.spec import QuantSpec


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "1e9", "--to", "int8", "--train", "full", "--device", "RTX4090"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1,000,000,000 parameters"
    assert "int8:row: fits RTX4090, 1.00 GB of 25.22 GB" in lines
    assert any(line.startswith("  rule of thumb") and " 24.000 GB " in line for line in lines)
    assert not any(line.lstrip().startswith("= ") for line in lines)


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "1e9", "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    formulas = [line for line in lines if line.lstrip().startswith("= ")]
    assert len(formulas) == len([line for line in lines if line.startswith("  ")]) - len(formulas)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--params", "1e9", "--json", "--to", "W4A16"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = {line["name"]: line["value"] for section in found["sections"] for line in section["lines"]}
    assert [lines[name] for name in ("float32", "float16", "bfloat16")] == [4e9, 2e9, 2e9]
    assert found["options"]["to"] == [str(QuantSpec.parse("W4A16"))]


def test_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "plan.html"
    assert main(["plan", "--params", "1e9", "--train", "full", "--html", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("<!doctype html>")
    assert "24.000 GB" in text
    assert "http" not in text


def test_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "plan.png"
    assert main(["plan", "--params", "1e9", "--train", "full", "--png", str(chart)]) == 0
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "MODEL or --params must be given, and not both, got None and None"),
        (["x", "--params", "1"], "MODEL or --params must be given, and not both, got 'x' and 1.0"),
        (["--params", "-3"], "--params must be a number above 0, got '-3'"),
        (["--params", "1e9", "--context", "0"], "--context must be a whole number >= 1, got '0'"),
        (["--params", "1e9", "--train", "half"], "--train must be full, lora or qat, got 'half'"),
        (["--params", "1e9", "--to", "int9"], "--to must be "),
        (["--params", "1e9", "--device", "X1"], "device must be B200, "),
        (["--params", "1e9", "--gpus", "3", "--parallel", "pp:2"], "parallel must split 3 devices evenly, got 'pp:2'"),
        (["/absent"], "model must be a folder, a safetensors file or a config.json, got '/absent', not there"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    told = capsys.readouterr()
    assert not told.out
    assert told.err.startswith(f"quantlib plan: {message}")
    assert told.err.count("\n") == 1
