"""``quantlib inspect`` and ``quantlib compare``."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from defaults import default_dtype
from safetensors.torch import load_file, save_file

from quantlib.checkpoint import compare_checkpoints, inspect_checkpoint, quantize_file
from quantlib.checkpoint.look import steps_between
from quantlib.cli import main

N, K = 16, 48


@pytest.fixture
def src(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    w = torch.randn(N, K)
    w[0, :8] = 0
    state = {"a.weight": w, "b.weight": torch.randn(K, N), "a.bias": torch.tensor([1.0, math.nan, math.inf, 0.0])}
    save_file({**state, "step": torch.tensor(3)}, tmp_path / "in.safetensors")
    return tmp_path / "in.safetensors"


@pytest.mark.parametrize(
    "spec", ["int8:row", "int4:group:16", "int8:row:affine", "uint8:row", "fp8", "float4_e2m1fn:row"]
)
def test_inspect(spec: str, src: Path) -> None:
    out = src.with_name("out.safetensors")
    quantize_file(src, out, spec)
    a, b, bias = (
        next(r for r in inspect_checkpoint(out) if r.name == name) for name in ("a.weight", "b.weight", "a.bias")
    )
    assert a.format.startswith(spec.replace("fp8", "float8_e4m3fn:row"))
    assert (a.shape, sum(a.histogram), a.nonfinite) == ((N, K), N * K, 0)
    assert a.codes == len(a.histogram)
    assert a.codes_used == sum(count > 0 for count in a.histogram)
    assert a.zeroed >= 8 / (N * K)
    assert a.clipped is not None
    blocks = N * (3 if "group" in spec else 1)
    assert a.clipped >= blocks / (N * K)  # each block has its extreme
    assert a.clipped < 0.5
    assert a.scale_min is not None
    assert a.scale_max is not None
    assert 0 < a.scale_min <= a.scale_max < 1
    assert (bias.format, bias.nonfinite, bias.zeroed, bias.most) == ("float32", 2, 0.75, 1.0)
    assert b.bytes == sum(t.nbytes for name, t in load_file(out).items() if name.startswith("b."))


def test_inspect_counts_each_code(tmp_path: Path) -> None:
    w = torch.tensor([[-7.0, -7.0, 7.0, 3.0, 0.0, 1.0]])
    save_file({"w.weight": w}, tmp_path / "in.safetensors")
    quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "int4:row")
    (found,) = inspect_checkpoint(tmp_path / "out.safetensors")
    assert found.histogram == [0, 2, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1]
    assert (found.codes_used, found.codes, found.clipped, found.zeroed) == (5, 16, 0.5, 1 / 6)
    assert (found.scale_min, found.scale_max, found.least, found.most) == (1.0, 1.0, -7.0, 7.0)
    (floats,) = inspect_checkpoint(tmp_path / "in.safetensors")
    assert {k: c for k, c in enumerate(floats.histogram) if c} == {0: 1, 127: 1, 128: 1, 129: 3}


def test_compare(src: Path) -> None:
    out, report = (
        src.with_name("out.safetensors"),
        quantize_file(src, src.with_name("out.safetensors"), "int4:group:16"),
    )
    x = torch.randn(5, K)
    save_file({"a": x}, src.with_name("inputs.safetensors"))
    found = compare_checkpoints(src, out, inputs=src.with_name("inputs.safetensors"))
    a = next(d for d in found.tensors if d.name == "a.weight")
    assert a.sqnr_db == pytest.approx(report.layers[0].snr_db, abs=1e-4)
    assert a.relative == pytest.approx(10 ** (-a.sqnr_db / 20))
    assert a.cosine == pytest.approx(math.sqrt(1 - a.relative**2), abs=0.01)
    assert a.formats == ("float32", "int4:group:16")
    assert a.output_db == pytest.approx(a.sqnr_db, abs=6)
    assert 0 < a.differ < N * K
    bias = next(d for d in found.tensors if d.name == "a.bias")
    assert (bias.differ, bias.ulp, bias.histogram[0]) == (0, 0, 4)
    same = compare_checkpoints(out, out)
    assert all((d.sqnr_db, d.differ, d.relative) == (math.inf, 0, 0.0) for d in same.tensors if d.name != "a.bias")
    save_file({"a": x[:, 1:].contiguous()}, src.with_name("inputs.safetensors"))
    with pytest.raises(ValueError, match=r"a must be inputs \[..., K\] floats of a layer"):
        compare_checkpoints(src, out, inputs=src.with_name("inputs.safetensors"))


def test_next_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "float")
    ids = torch.randint(0, 64, (2, 5))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    argv = ["compare", str(tmp_path / "float"), str(tmp_path / "codes"), "--inputs", str(tmp_path / "ids.safetensors")]
    found = {}
    for spec in ("int8", "int4:row"):
        quantize_file(tmp_path / "float", tmp_path / "codes", spec, overwrite=True)
        assert main([*argv, "--json"]) == 0
        found[spec] = json.loads(capsys.readouterr().out)["tokens"]
        assert found[spec]["tokens"] == 10
    assert 0 < found["int8"]["kl"] < found["int4:row"]["kl"] < 1
    assert found["int8"]["kl"] <= found["int8"]["kl_max"]
    assert main(argv) == 0
    assert "next tokens: KL" in capsys.readouterr().out


def test_a_pattern_that_matches_no_tensor_is_no_success(src: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = src.with_name("out.safetensors")
    quantize_file(src, out, "int4:row", include=["*"])
    assert [report.name for report in inspect_checkpoint(out, only=["a.*ght"])] == ["a.weight"]
    for verb in (["inspect", str(out)], ["compare", str(src), str(out), "--tolerance", "1e-9"]):
        assert main([*verb, "--only", "a.*", "--only", "c.*"]) == 2
        assert "only must be patterns of names of tensors, such as 'a." in capsys.readouterr().err


def test_steps_between() -> None:
    p = torch.tensor([1.0, -0.0, 1e-45, math.nan])
    assert steps_between(p, torch.tensor([1.0, 0.0, -1e-45, math.nan])) == 2
    assert steps_between(p.bfloat16(), torch.tensor([1.0078125, 0.0, 0.0, math.nan]).bfloat16()) == 1


def test_the_commands(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.safetensors"
    quantize_file(src, out, "int8")
    files = [f"--{kind}={tmp_path}/x.{kind}" for kind in ("csv", "html")]
    assert main(["inspect", str(out), *files]) == 0
    printed = capsys.readouterr().out
    assert "a.weight  16 x 48  int8:row" in printed
    with (tmp_path / "x.csv").open() as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["a.weight", "b.weight", "a.bias"]
    page = (tmp_path / "x.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page
    assert main(["inspect", str(out), "--json", "--only", "a.*"]) == 0
    assert [t["name"] for t in json.loads(capsys.readouterr().out)["tensors"]] == ["a.weight", "a.bias"]

    assert main(["compare", str(src), str(out), *files]) == 0
    assert "3 tensors in both, 1 of them equal" in capsys.readouterr().out
    assert main(["compare", str(src), str(out), "--only", "*weight", "--tolerance", "0.1"]) == 0
    assert main(["compare", str(src), str(out), "--only", "*weight", "--tolerance", "0.0001"]) == 1
    assert "beyond 0.0001: a.weight: 0.00" in capsys.readouterr().out
    save_file({"a.weight": torch.zeros(2, 2), "c": torch.ones(3)}, tmp_path / "other.safetensors")
    assert main(["compare", str(out), str(tmp_path / "other.safetensors"), "--json", "--tolerance", "1"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["only_a"], told["only_b"]) == (["b.weight", "a.bias"], ["c"])
    assert told["misfits"] == ["a.weight: [16, 48] in A, [2, 2] in B"]
    assert main(["compare", str(out), str(out), "--tolerance", "-1"]) == 2
    assert main(["compare", str(out), str(tmp_path / "nothing")]) == 2


def test_png(src: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert main(["inspect", str(src), "--png", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("spec", ["int8:row", "fp8", "float4_e2m1fn:group:32:e8m0"])
def test_the_default_dtype_changes_no_report(spec: str, src: Path) -> None:
    out = src.with_name("out.safetensors")
    quantize_file(src, out, spec)
    want = inspect_checkpoint(out)
    for dtype in (torch.float64, torch.bfloat16):
        with default_dtype(dtype):
            assert str(inspect_checkpoint(out)) == str(want)


@pytest.mark.parametrize("tolerance", [[], ["--tolerance", "1"]])
def test_compare_refuses_checkpoints_with_nothing_in_common(
    tolerance: list[str], src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file({"model.a.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"must have a tensor of .*, such as 'a.bias', got none.*'model.a.weight'"):
        compare_checkpoints(src, tmp_path / "other.safetensors")
    assert main(["compare", str(src), str(tmp_path / "other.safetensors"), *tolerance]) == 2
    assert "got none of them" in capsys.readouterr().err
