"""``quantlib quantize``: files and folders, the report, and everything that can be wrong with the arguments."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib import reference
from quantlib.cli import main


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.randn(24, 40),
        "embed.weight": torch.randn(10, 40),
        "lm_head.weight": torch.randn(8, 40),
        "layer.bias": torch.randn(24),
    }


@pytest.fixture
def file(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    save_file(weights, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Two shards with their index, a configuration and a subfolder."""
    path = tmp_path / "model"
    (path / "extra").mkdir(parents=True)
    names = sorted(weights)
    index = {}
    for k, part in enumerate((names[:2], names[2:])):
        shard = f"model-{k + 1:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path / shard)
        index |= dict.fromkeys(part, shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text('{"hidden_size": 40}')
    (path / "extra/notes.txt").write_text("kept")
    return path


def test_a_file(file: Path, weights: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    out = file.with_name("out.safetensors")
    argv = [
        "quantize",
        str(file),
        str(out),
        "--to",
        "int8",
        "--per",
        "row",
        "--exclude",
        "lm_h*",
        "--include",
        "lm_head*",
    ]
    assert main(argv) == 0
    printed, err = capsys.readouterr()
    assert "layer.weight" in printed
    assert "matches lm_h*" in printed
    assert "x smaller" in printed
    assert err == ""  # no progress bar where stderr is no terminal
    got = load_file(out)
    codes, scale = reference.quantize_dynamic(weights["layer.weight"].numpy(), "int8", block=(1, 40))
    assert np.array_equal(got["layer.weight"].squeeze(-1).numpy(), codes)
    assert np.array_equal(got["layer.weight_scale"].numpy(), scale)
    assert torch.equal(got["lm_head.weight"], weights["lm_head.weight"])


def test_a_folder_and_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.with_name("out")
    assert (
        main(["quantize", str(folder), str(out), "--to", "int4", "--per", "group:16", "--include", "lm_*", "--json"])
        == 0
    )
    report = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert report["spec"] == "int4:group:16"
    assert {layer["name"] for layer in report["layers"]} == {"layer.weight", "lm_head.weight"}
    assert report["skipped"] == {"embed.weight": "a table that is looked up"}
    assert report["sizes"] == {"embed.weight": 10 * 40}
    assert (report["quantized"], report["floats"]) == (24 * 40 + 8 * 40, 10 * 40 + 24)
    assert report["coverage"] == report["quantized"] / (report["quantized"] + report["floats"])
    assert report["bytes_after"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert (out / "extra/notes.txt").read_text() == "kept"
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "layer.weight_scale" in index
    assert main(["quantize", str(folder), str(out), "--to", "float16", "--force"]) == 0
    assert load_file(out / index["layer.weight"])["layer.weight"].dtype == torch.float16


def test_affine(file: Path) -> None:
    out = file.with_name("out.safetensors")
    assert main(["quantize", str(file), str(out), "--to", "int8", "--affine"]) == 0
    assert load_file(out)["layer.weight_zero_point"].dtype == torch.int8


def test_weights_that_are_not_finite(
    file: Path, weights: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    weights["layer.weight"][3, 5] = torch.inf
    save_file(weights, file)
    out = file.with_name("out.safetensors")
    assert main(["quantize", str(file), str(out), "--to", "int8"]) == 2
    assert "layer.weight must be finite" in (said := capsys.readouterr().err)
    assert "row 3" in said
    assert not out.exists()
    assert main(["quantize", str(file), str(out), "--to", "int8", "--on-nonfinite", "propagate", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["layers"]
    assert next(layer for layer in layers if layer["name"] == "layer.weight")["snr_db"] is None


BAD = [
    (["{file}", "{out}"], "--to"),
    (["{file}", "{out}", "--to", "int9"], "--to must be"),
    (["{file}", "{out}", "--to", "int8", "--per", "column"], "--per must be tensor, row, group:N or tile:N"),
    (["{file}", "{out}", "--to", "int8", "--per", "group:0"], "got 'group:0'"),
    (["{file}", "{out}", "--to", "float16", "--affine"], "got 'float16:affine'"),
    (["{file}", "{out}", "--to", "int8", "--on-nonfinite", "ignore"], "--on-nonfinite must be one of"),
    (["{file}", "{out}", "--to", "int8", "--exclude", "*"], "must hold weights"),
    (["{file}", "{file}", "--to", "int8"], "OUT must not be there yet, or --force be given"),
    (["{file}", "{file}", "--to", "int8", "--force"], "must lie outside"),
    (["{file}", "{tmp}/no/out.safetensors", "--to", "int8"], "must be a folder"),
    (["{file}", "{tmp}/out.bin", "--to", "int8"], "must be a .safetensors file"),
    (["{tmp}/none.safetensors", "{out}", "--to", "int8"], "IN must be a safetensors file or a model folder"),
    (["{tmp}/junk.safetensors", "{out}", "--to", "int8"], "must be a whole safetensors file"),
    (["{tmp}/cut.safetensors", "{out}", "--to", "int8"], "must be a whole safetensors file"),
    (["{tmp}/empty", "{out}", "--to", "int8"], "must hold safetensors files"),
    (["{file}"], "OUT"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_arguments(
    file: Path, tmp_path: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"not a model")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    names = {"file": file, "out": tmp_path / "out.safetensors", "tmp": tmp_path}
    assert main(["quantize", *(word.format(**names) for word in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
    assert err.startswith("quantlib quantize: ")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_full_disk(file: Path) -> None:
    out = file.with_name("out.safetensors")
    command = [sys.executable, "-m", "quantlib", "quantize", str(file), str(out), "--to", "int8"]
    limit = 1000  # bytes a file may have
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"QUANTLIB_BUILD": "0"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("quantlib quantize: File too large")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_report_that_cannot_be_written_is_one_line(file: Path) -> None:
    argv = [sys.executable, "-m", "quantlib", "quantize", str(file), str(file.with_name("out.safetensors"))]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*argv, "--to", "int8", "--json"], text=True, stdout=full, stderr=subprocess.PIPE, check=False, env=env
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "quantlib quantize: No space left on device"


def test_closed_streams(file: Path) -> None:
    """A conversion needs nowhere to write its report: a program without a terminal starts it with closed streams."""
    out = file.with_name("out.safetensors")
    argv = [sys.executable, "-m", "quantlib", "quantize", str(file), str(out), "--to", "int8"]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *argv], check=False).returncode == 0
    assert load_file(out)["layer.weight"].dtype == torch.int8
