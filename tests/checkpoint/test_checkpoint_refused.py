"""`quantize_file`: refusals before any work, the files that it takes for the model, and files that it leaves."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch
from safetensors.torch import load_file
from torch import Tensor, nn

from quantlib import quantize_
from quantlib.checkpoint import dequantize_file, load_quantized, publish, quantize_file, save_quantized
from quantlib.cli import main
from quantlib.nn import QuantLinear

W8 = torch.arange(64.0).reshape(8, 8) / 64 - 0.5
INDEX = "model.safetensors.index.json"


def save_file(state: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Tensors may share memory here."""
    safetensors_torch.save_file({name: t.clone() for name, t in state.items()}, path, metadata)


def folder(path: Path, **files: dict[str, Tensor]) -> Path:
    """A model folder of safetensors files."""
    path.mkdir()
    for name, state in files.items():
        save_file(state, path / f"{name}.safetensors")
    return path


def refused(src: Path, words: str, capsys: pytest.CaptureFixture[str], **options: Any) -> None:
    """Refused by the function and by the command line, in one line, before any work and with nothing left."""
    dst = src.with_name(f"out{src.suffix}")
    before = sorted(path.name for path in src.parent.iterdir())
    with pytest.raises(ValueError, match=words):
        quantize_file(src, dst, "int8", progress=lambda *step: pytest.fail("work has begun"), **options)
    capsys.readouterr()
    assert main(["quantize", str(src), str(dst), "--to", "int8"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) < 1000
    assert sorted(path.name for path in src.parent.iterdir()) == before


# which tensors are the model


def test_only_what_the_index_names_is_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    src = folder(
        tmp_path / "in",
        a={"0.weight": W8, "1.weight": W8 * 5},
        b={"1.weight": W8, "1.bias": W8[0]},
        zz_old={"0.weight": W8 * 100, "1.weight": W8 * 100},
        other={"apart": W8[0]},
    )
    weight_map = {"0.weight": "a.safetensors", "1.weight": "b.safetensors", "1.bias": "b.safetensors"}
    (src / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    report = quantize_file(src, tmp_path / "out", "int8")
    assert [layer.name for layer in report.layers] == ["0.weight", "1.weight"]
    assert "left out" in caplog.text
    assert "zz_old.safetensors" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "a.safetensors", "b.safetensors", "checksums.sha256", INDEX, "other.safetensors")
    ]
    assert sorted(load_file(tmp_path / "out" / "a.safetensors")) == ["0.weight", "0.weight_scale"]
    dequantize_file(tmp_path / "out", tmp_path / "float")
    (tmp_path / "out" / "zz_old.safetensors").write_bytes((src / "zz_old.safetensors").read_bytes())
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8))
    load_quantized(model, tmp_path / "out")
    for layer in model:
        assert isinstance(layer, QuantLinear)
        assert (layer.values() - W8).abs().max() < 0.01
    assert (load_file(tmp_path / "float" / "b.safetensors")["1.weight"] - W8).abs().max() < 0.01


def test_without_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8}, model_fp16={"0.weight": W8.half()})
    quantize_file(src, tmp_path / "out", "int8")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "checksums.sha256", "model.safetensors"]
    src = folder(tmp_path / "apart", a={"0.weight": W8}, b={"1.weight": W8})
    assert len(quantize_file(src, tmp_path / "both", "int8").layers) == 2
    src = folder(tmp_path / "twice", a={"0.weight": W8}, b={"0.weight": W8, "1.weight": W8})
    refused(src, r"must hold each tensor once, got 0\.weight in a\.safetensors and b\.safetensors", capsys)
    with pytest.raises(ValueError, match="must hold each tensor once"):
        load_quantized(nn.Sequential(nn.Linear(8, 8)), src)


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_files_without_an_index_are_all_there(first: int, tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00003" for number in range(first, first + 3)]
    for absent in (*names, None):
        files = {name: {f"{name[-10]}.weight": W8} for name in names if name != absent}
        src = folder(tmp_path / f"in{absent}", **files)
        if absent is None or (absent == names[0] and first == 0):  # files 1 and 2 may be the first two of 1, 2, 3
            continue
        with pytest.raises(FileNotFoundError, match=f"must hold {absent}.safetensors, as .* says, got no such file"):
            quantize_file(src, tmp_path / "out", "int8")
    assert len(quantize_file(src, tmp_path / "out", "int8").layers) == 3


NAMED = {"weight_map": {"0.weight": "model.safetensors"}}
INDICES = [
    json.dumps(NAMED, indent=1).replace("\n", "\r\n").encode(),
    b"\xef\xbb\xbf" + json.dumps(NAMED).encode(),
    *(json.dumps({"metadata": value, **NAMED}).encode() for value in (None, [], "text", 3, {"note": "kept"})),
    b'{"metadata": {"total_size": Infinity}, "weight_map": {"0.weight": "model.safetensors"}}',
]


@pytest.mark.parametrize("text", INDICES)
def test_indices_in_use(text: bytes, tmp_path: Path) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / INDEX).write_bytes(text)
    quantize_file(src, tmp_path / "out", "int8")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert sorted(index["weight_map"]) == ["0.weight", "0.weight_scale"]
    assert index["metadata"]["total_size"] == 64 + 8 * 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "must be JSON with a weight_map"),
        ('{"weight_map": {}}', "must be JSON with a weight_map"),
        ('{"weight_map": {"0.weight": 3}}', "must be JSON with a weight_map"),
        ("[" * 100_000, "must be JSON with a weight_map"),
        ('{"weight_map": {"0.weight": "../model.safetensors"}}', "must name files of its folder"),
        ('{"weight_map": {"0.weight": "/etc/passwd"}}', "must name files of its folder, got '/etc/passwd'"),
        ('{"weight_map": {"1.weight": "model.safetensors"}}', r"must hold what .* says, got no 1\.weight"),
    ],
)
def test_indices_that_do_not_fit(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / INDEX).write_text(text)
    refused(src, words, capsys)


# what a file may say


def raw(path: Path, header: str, data: bytes = b"") -> Path:
    text = header.encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(shape: str, offsets: str = "[0,0]", dtype: str = "F32") -> str:
    return f'{{"w.weight":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (entry("[0,9223372036854775808]"), r"w\.weight must have a shape of sizes"),
        (entry("[4294967296,4294967296,0]"), r"w\.weight must have a shape of sizes"),
        (entry("[Infinity]"), r"w\.weight must have a shape of sizes .* got \[inf\]"),
        (entry("[1e999]"), r"w\.weight must have a shape of sizes"),
        (entry("[-1]"), r"w\.weight must have a shape of sizes"),
        (entry("[true]"), r"w\.weight must have a shape of sizes"),
        (entry("null"), r"w\.weight must have a shape of sizes .* got None"),
        (entry("[2]", "[0,4]"), r"w\.weight must have 8 bytes"),
        (entry("[1]", "[0,1e999]"), r"w\.weight must have 4 bytes"),
        (entry("[1]", "[4,8]"), r"w\.weight begins at 4 of its data"),
        (entry("[1]", "[0,4]", "F4"), r"w\.weight must be of F64.*got 'F4'"),
        ('{"a":' * 5000 + "1" + "}" * 5000, "with a header that cannot be read"),
        ('{"w":1,"w":1}', "a name that stands twice"),
        ('{"__metadata__":{"a":1}}', "metadata that are not text"),
    ],
)
def test_headers(header: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(raw(tmp_path / "in.safetensors", header, b"\0" * 4), words, capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"version":1e999,"weights":{},"tied":{}}', "must describe its weights"),
        ('{"version":1,"weights":{"0.weight":{"spec":"int8:row","shape":[Infinity,1]}},"tied":{}}', r"0\.weight must"),
        ('{"version":1,"weights":{"0.weight":{"spec":"int8:row","shape":[1e400]}},"tied":{}}', r"0\.weight must have"),
        ('{"version":1,"weights":{"0.weight":{"spec":"int8:row","shape":[]}},"tied":{}}', "must describe its weights"),
        (
            '{"version":1,"weights":{"0.weight":{"spec":"int8:row","shape":[4294967296,4294967296]}},"tied":{}}',
            r"0\.weight must have a shape",
        ),
        ('{"version":1,"weights":{"0.weight":{"spec":3,"shape":[8,8]}},"tied":{}}', r"by spec and shape.*0\.weight"),
        ('{"version":1,"weights":{"0.weight":{"spec":"int3","shape":[8,8]}},"tied":{}}', r"by spec and shape.*0\.w"),
        ('{"version":1,"weights":{},"tied":{"a":1}}', "must describe its weights"),
        ("[" * 100_000, "must describe its weights"),
    ],
)
def test_metadata(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.safetensors"
    save_file({"0.weight": W8}, path, metadata={"quantlib": text})
    refused(path, words, capsys)
    for verb in (
        lambda: dequantize_file(path, tmp_path / "out.safetensors"),
        lambda: load_quantized(nn.Module(), path),
    ):
        with pytest.raises(ValueError, match=words) as error:
            verb()
        assert str(path) in str(error.value)


def test_a_file_that_is_cut_off_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.safetensors"
    save_file({"a.weight": W8, "b.weight": torch.ones(512, 2048)}, path)
    # the last look at the place of the output comes between the headers and the values
    monkeypatch.setattr(publish, "check", lambda *arguments, **options: os.truncate(path, 4096))
    with pytest.raises(ValueError, match=r"in\.safetensors must be a whole safetensors file, got cut off"):
        quantize_file(path, tmp_path / "out.safetensors", "int8")
    assert [p.name for p in tmp_path.iterdir()] == ["in.safetensors"]


# what a folder may hold


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("name", ["a.safetensors", INDEX, "notes.txt", "config.json", "sub/x.safetensors"])
@pytest.mark.parametrize(("make", "kind"), [(pipe, "a pipe"), (unix_socket, "a socket")])
def test_pipes_and_sockets(
    name: str, make: Callable[[Path], None], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / name).parent.mkdir(exist_ok=True)
    make(src / name)
    words = "must be JSON with a weight_map" if name == INDEX else f"must be a file, got {kind}"
    refused(src, f"{name}.* {words}", capsys)


@pytest.mark.parametrize(
    ("link", "to", "words"),
    [
        ("tokenizer.json", "/etc/passwd", "must stay in the folder of the model, got a link to /etc/passwd"),
        ("tokenizer.json", "../secret", "must stay in the folder of the model"),
        ("sub", "../outside", "must stay in the folder of the model"),
        ("x.safetensors", "../other.safetensors", "must stay in the folder of the model"),
        ("sub", ".", "must be a folder of its own"),
        ("tokenizer.json", "nowhere", "must lead to a file, got a link to nowhere"),
        ("sub", "sub", "must lead to a file, got a link to sub"),
    ],
)
def test_links(link: str, to: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "outside").mkdir()
    save_file({"1.weight": W8}, tmp_path / "other.safetensors")
    (src / link).symlink_to(to)
    refused(src, f"in/{link} {words}", capsys)


def test_links_that_stay_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / "a").mkdir()
    (src / "a" / "x.txt").write_text("x")
    (src / "b").symlink_to("a")
    (src / "y.txt").symlink_to("a/x.txt")
    quantize_file(src, tmp_path / "out", "int8")
    assert (tmp_path / "out" / "b" / "x.txt").read_text() == "x"
    assert not (tmp_path / "out" / "y.txt").is_symlink()
    (src / "a" / "c").symlink_to("../b")  # a/c is a again
    refused(src, "must be a folder of its own", capsys)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_kept(tmp_path: Path) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / "config.json").write_text('{"dtype": "float32"}')
    (src / INDEX).write_text(json.dumps(NAMED))
    (src / "sub").mkdir()
    (src / "sub" / "x.txt").write_text("x")
    for path in [src, *src.rglob("*")]:
        path.chmod(0o750 if path.is_dir() else 0o640)
    src.chmod(0o700)
    (src / "model.safetensors").chmod(0o600)
    for number, spec in enumerate(("int8", "bfloat16")):
        out = tmp_path / str(number)
        quantize_file(src, out, spec)
        for path in [src, *src.rglob("*")]:
            assert mode(out / path.relative_to(src)) == mode(path), path
    quantize_file(src / "model.safetensors", tmp_path / "out.safetensors", "int8")
    assert mode(tmp_path / "out.safetensors") == 0o600


# what is no float model


FP8 = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
I8, I32 = torch.zeros(8, 8, dtype=torch.int8), torch.zeros(8, 8, dtype=torch.int32)
FOREIGN: dict[str, dict[str, Tensor]] = {
    "FP8 codes": {"w.weight": FP8, "w.weight_scale_inv": W8},
    "codes of F8_E4M3": {"w.weight": FP8},
    "GPTQ or AWQ": {"w.qweight": I32, "w.qzeros": I32, "w.scales": W8, "w.g_idx": I32[0]},
    "bitsandbytes": {
        "w.weight": I8.view(torch.uint8).reshape(64, 1),
        "w.weight.absmax": W8[0],
        "w.weight.quant_map": W8[0],
    },
    "bitsandbytes codes": {"w.weight": I8, "w.SCB": W8[0]},
    "compressed-tensors": {"w.weight_packed": I32, "w.weight_scale": W8},
    "codes of I8": {"w.weight": I8, "w.weight_scale": W8},
    "torch.ao": {"w._packed_params.dtype": W8[0], "w.scale": W8[0, 0]},
    "Marlin": {"w.B_24": I32, "w.B_meta": I8, "w.s": W8},
    "SpQR": {"w.dense_weights": I32[0], "w.row_offsets": I32[0]},
    "VPTQ": {"w.indices": I32, "w.centroids.weight": W8},
    "codes of I32": {"w.B": I32, "w.s": W8},
    "codes of U8": {"mlp.experts.down_proj": I8.view(torch.uint8)[None], "mlp.experts.down_proj_scale": W8[None]},
    "codes of I16": {"w.weight": I32.short().unsqueeze(-1)},
    "MX": {"experts.gate_up_proj_blocks": I8.view(torch.uint8), "experts.gate_up_proj_scales": I8.view(torch.uint8)},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_models_that_others_quantized(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "in.safetensors"
    save_file({**FOREIGN[kind], "lm.weight": W8}, path)
    refused(path, f"must hold float weights, got {kind}.*: convert_file", capsys)
    with pytest.raises(ValueError, match=f"must be a model that quantize_file or save_quantized wrote, got {kind}"):
        dequantize_file(path, tmp_path / "out.safetensors")


@pytest.mark.parametrize("text", ['{"model_type": "llama", ', "[]", "", "\xff", "[" * 100_000])
def test_a_config_that_cannot_be_read(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output would have a config.json without what stands in this one."""
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / "config.json").write_bytes(text.encode("latin-1"))
    refused(src, r"config\.json must be JSON with an object, got something else", capsys)
    (src / "config.json").unlink()
    (src / "config.json").mkdir()
    refused(src, r"config\.json must be a file, got a folder", capsys)


@pytest.mark.parametrize("key", ["quantization_config", "quantization"])
@pytest.mark.parametrize("inside", [(), ("text_config",), ("thinker_config", "text_config")])
def test_a_config_that_tells_of_codes(
    inside: tuple[str, ...], key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    config: dict[str, Any] = {key: {"quant_method": "gptq"}}
    for name in reversed(inside):
        config = {name: config}
    (src / "config.json").write_text(json.dumps(config))
    refused(src, rf"got a config\.json with {key} of gptq", capsys)


def test_a_name_that_a_scale_would_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"0.weight": W8, "0.weight_scale": W8[0]}, tmp_path / "in.safetensors")
    refused(tmp_path / "in.safetensors", r"must leave 0\.weight_scale free for the codes of 0\.weight", capsys)


def test_tensors_of_other_kinds_stay(tmp_path: Path) -> None:
    state = {"0.weight": W8, "z.weight": W8.to(torch.complex64), "mask.weight": W8 > 0}
    save_file(state, tmp_path / "in.safetensors")
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "int8")
    assert report.skipped == {"z.weight": "complex64: float32, float16 or bfloat16 is quantized"}
    assert load_file(tmp_path / "out.safetensors")["z.weight"].dtype == torch.complex64


# which weights stay floats

STAY = {
    "a router": [
        "mlp.gate",
        "block_sparse_moe.gate",
        "ffn.router.layer",
        "mlp.shared_expert_gate",
        "router",
        "mlp.gate.wg",
        "mlp.gate_network.0",
        "moe.routing",
    ],
    "a head": [
        *("lm_head", "lm_heads.0", "embed_out", "output", "score", "classifier.out_proj", "reward_head", "head"),
        *("lm_loss", "to_logits", "transformer.output_layer", "class_predictor", "bbox_embed.layers.0", "unembed"),
        "cls.seq_relationship",
    ],
    "an adapter": ["q_proj.lora_A.default", "q_proj.lora_B", "lora_down", "hada_w1_a", "to_q_lora.up", "q.lora.down"],
    "a table that is looked up": [
        *("model.embed_tokens", "wte", "transformer.wpe", "shared", "embeddings.word_embeddings", "embed_tokens.0"),
        *("embeddings", "y_embedder.embedding_table", "layer.0.relative_attention_bias", "pos_embed"),
        *("vq.codebook", "emb_g", "query_tokens"),
    ],
    "a norm": ["q_norm", "layernorm", "ln_f", "ln1", "LayerNorm", "bn1"],
}
GO = [
    *("mlp.gate_proj", "mlp.gate_up_proj", "experts.0.w1", "time_embedding.linear_1", "add_embedding.linear_1"),
    *("x_embedder", "context_embedder", "patch_embed", "time_embed.0", "label_emb.0.0", "norm1.linear", "0"),
    *(
        "attention.output.dense",
        "model.output_layer.output",
        "t_embedder.mlp.0",
        "patch_embedding",
        "q_proj.base_layer",
    ),
]
STACK = "a stack of experts: neither its sizes nor the class in config.json tell how it lies"


def test_names(tmp_path: Path) -> None:
    src = tmp_path / "in.safetensors"
    state = {f"{name}.weight": W8 for names in STAY.values() for name in names} | {f"{name}.weight": W8 for name in GO}
    state |= {"x.lora_embedding_A": W8, "positional_embedding": W8, "in_proj_weight": W8}
    state |= {"mlp.experts.gate_up_proj": torch.ones(2, 4, 4), "conv.weight": torch.ones(2, 2, 3, 3), "bias": W8[0]}
    state |= {"double.weight": W8.double(), "scalar": torch.tensor(1.0), "ids": torch.arange(3)}
    save_file(state, src)
    report = quantize_file(src, tmp_path / "out.safetensors", "int8")
    assert {layer.name for layer in report.layers} == {f"{name}.weight" for name in GO}
    expected = {f"{name}.weight": why for why, names in STAY.items() for name in names}
    expected |= {
        "x.lora_embedding_A": "an adapter",
        "positional_embedding": "a table that is looked up",
        "in_proj_weight": "not named *.weight",
        "mlp.experts.gate_up_proj": STACK,
        "conv.weight": "4 axes: a convolution, not one matrix",
        "double.weight": "float64: float32, float16 or bfloat16 is quantized",
    }
    assert report.skipped == expected
    assert report.sizes == {name: state[name].numel() for name in expected}
    assert report.quantized == 64 * len(GO)
    assert report.quantized + report.floats == sum(t.numel() for t in state.values() if t.is_floating_point())
    asked = quantize_file(src, tmp_path / "all.safetensors", "int8", include=["*"], exclude=["0.weight"])
    assert all("axes" in why or why.startswith(("float64", "matches", STACK)) for why in asked.skipped.values())
    assert len(asked.layers) == len(report.layers) - 1 + len(expected) - 3


def test_routers_and_heads_are_known_by_their_rows(tmp_path: Path) -> None:
    """A router or a table is known under any name: it has a row for each expert, or for each word of the vocabulary."""
    state = {f"layers.0.mlp.experts.{i}.w1.weight": torch.ones(6, 4) for i in range(3)}
    state |= {"layers.0.mlp.switch.weight": torch.ones(3, 4), "layers.0.mlp.switch2.linear.weight": torch.ones(3, 4)}
    state |= {"layers.0.q.weight": torch.ones(3, 4), "layers.1.mlp.experts.up": torch.ones(5, 6, 4)}
    state |= {"layers.1.mlp.switch.weight": torch.ones(5, 4), "layers.1.mlp.up.weight": torch.ones(3, 4)}
    state |= {
        "speech.weight": torch.ones(11, 4),
        "layers.1.v.weight": torch.ones(11, 4),
        "text.weight": torch.ones(9, 4),
    }
    state |= {"square.weight": torch.ones(9, 9)}
    src = folder(tmp_path / "in", model=state)
    config = {"vocab_size": 9, "audio": {"padded_vocab_size": 11, "vocab_size": None, "odd_vocab_size": [4]}}
    (src / "config.json").write_text(json.dumps(config))
    report = quantize_file(src, tmp_path / "out", "int8")
    assert report.skipped == {
        "layers.0.mlp.switch.weight": "a router: a row for each of 3 experts",
        "layers.0.mlp.switch2.linear.weight": "a router: a row for each of 3 experts",
        "layers.1.mlp.experts.up": STACK,
        "layers.1.mlp.switch.weight": "a router: a row for each of 5 experts",
        "speech.weight": "a head or a table: a row for each of 11 words",
        "text.weight": "a head or a table: a row for each of 9 words",
    }
    assert len(quantize_file(src, tmp_path / "all", "int8", include=["*"]).skipped) == 1


def test_patterns_that_match_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({"0.weight": W8, "1.weight": W8}, tmp_path / "in.safetensors")
    options = {"exclude": ["1.*", "layer.1.*"], "include": ["lm_head"]}
    quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "int8", **options)
    words = [record.getMessage() for record in caplog.records]
    assert [line.split(" matches no tensor of ")[0] for line in words] == ["exclude", "include"]
    assert words[0].endswith("in.safetensors: layer.1.*")


@pytest.mark.parametrize("told", ["config", "biases"])
def test_layers_that_lie_transposed(told: str, tmp_path: Path) -> None:
    """transformers' Conv1D, of GPT-2: [in, out]."""
    state = {"h.0.attn.c_attn.weight": torch.ones(4, 12), "h.0.attn.c_proj.weight": torch.ones(4, 4)}
    state |= {"h.0.mlp.c_fc.weight": torch.ones(4, 16), "h.0.mlp.c_proj.weight": torch.ones(16, 4), "x.weight": W8}
    if told == "biases":
        state |= {name.replace("weight", "bias"): torch.ones(t.shape[1]) for name, t in state.items()}
    src = folder(tmp_path / "in", model=state)
    (src / "config.json").write_text(json.dumps({"model_type": "gpt2" if told == "config" else "mine"}))
    report = quantize_file(src, tmp_path / "out", "int8")
    assert [layer.name for layer in report.layers] == ["x.weight"]
    of_gpt2 = " of gpt2" if told == "config" else ""
    lie = {
        name: f"transformers' Conv1D{of_gpt2}: it lies [in, out]" for name in state if "c_" in name and "weight" in name
    }
    assert report.skipped == lie
    with pytest.raises(ValueError, match=r"must hold weights to convert, got none among \d+ tensors: .*Conv1D"):
        quantize_file(src, tmp_path / "none", "int8", include=["*c_attn*"], exclude=["x*"])


def test_linear_layers_of_the_same_names_do_not(tmp_path: Path) -> None:
    """GPT-BigCode and nanoGPT name their linear layers so."""
    state = {"c_attn.weight": torch.ones(12, 4), "c_attn.bias": torch.ones(12), "c_proj.weight": torch.ones(4, 4)}
    save_file(state, tmp_path / "in.safetensors")
    assert len(quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "int8").layers) == 2


# what the files tell


def test_activations_are_written_down(tmp_path: Path) -> None:
    save_file({"0.weight": W8}, tmp_path / "in.safetensors")
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "W8A8")
    assert report.layers[0].spec == "int8:row@int8:row"
    model = load_quantized(nn.Sequential(nn.Linear(8, 8, bias=False)), tmp_path / "out.safetensors")
    assert str(model[0].spec) == "int8:row@int8:row"
    with pytest.raises(ValueError, match="spec must have activations whose scales follow the input"):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "x.safetensors", "int8@int8:tensor:static")


def test_the_dtype_of_a_config_follows(tmp_path: Path) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    config = {"torch_dtype": "float32", "text_config": {"dtype": "torch.float32", "hidden": 8}, "name": "é"}
    (src / "config.json").write_text(json.dumps(config))
    quantize_file(src, tmp_path / "bf16", "bfloat16")
    told = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert told == {"torch_dtype": "bfloat16", "text_config": {"dtype": "torch.bfloat16", "hidden": 8}, "name": "é"}
    quantize_file(src, tmp_path / "int8", "int8")
    told = json.loads((tmp_path / "int8" / "config.json").read_text())
    entry = told.pop("quantization_config")
    assert told == config
    assert entry["weights"] == {"0.weight": {"spec": "int8:row", "shape": list(W8.shape)}}
    dequantize_file(tmp_path / "int8", tmp_path / "half", dtype=torch.float16)
    told = json.loads((tmp_path / "half" / "config.json").read_text())
    assert told["torch_dtype"] == "float16"
    assert "quantization_config" not in told


@pytest.mark.parametrize(
    "spec", ["int8:tensor", "int8:tensor:affine", "int8:tile:100", "int4:group:32", "W8A8", "float16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_larger_than_a_slab(spec: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1100, 900, bias=False, dtype=dtype))
    save_file(model.state_dict(), tmp_path / "in.safetensors")
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", spec)
    assert report.layers[0].snr_db == pytest.approx(quantize_(model, spec).layers[0].snr_db, abs=1e-3)
    save_quantized(model, tmp_path / "saved.safetensors")
    saved, found = (load_file(tmp_path / f"{name}.safetensors") for name in ("saved", "out"))
    assert saved.keys() == found.keys()
    for name, t in saved.items():
        assert torch.equal(found[name].view(torch.uint8), t.view(torch.uint8)), name
    dequantize_file(tmp_path / "out.safetensors", tmp_path / "float.safetensors", dtype=dtype)
    values = load_file(tmp_path / "float.safetensors")["0.weight"]
    assert torch.equal(values.float(), model[0].weight.float())


@pytest.mark.parametrize("spec", ["int8", "int8:tensor", "float16"])
def test_the_first_bad_row_is_named(spec: str, tmp_path: Path) -> None:
    weight = torch.ones(1000, 1024)
    weight[700, 3] = weight[900, 4] = torch.nan
    save_file({"a.weight": weight}, tmp_path / "in.safetensors")
    with pytest.raises(ValueError, match=r"a\.weight must be finite.*got nan in row 700 and in 1 more rows"):
        quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", spec)


def test_values_whose_squares_leave_float32(tmp_path: Path) -> None:
    weights = {f"{k}.weight": W8 * 2.0**power for k, power in enumerate((-100, 0, 80))}
    save_file(weights, tmp_path / "in.safetensors")
    report = quantize_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "float8_e4m3fn")
    assert len({round(layer.snr_db, 2) for layer in report.layers[1:]}) == 1


# where it goes


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("is_folder", [True, False])
def test_an_output_that_appears_meanwhile_stays(
    is_folder: bool, exchange: bool, overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "renameat2", lambda source, target, flag: False)
    src = folder(tmp_path / "in", model={"0.weight": W8})
    dst = tmp_path / ("out" if is_folder else "out.safetensors")
    thesis = dst / "thesis.txt" if is_folder else dst

    def appear(name: str, done: int, total: int) -> None:
        thesis.parent.mkdir(exist_ok=True)
        thesis.write_text("mine")

    if is_folder or not overwrite:
        with pytest.raises(
            FileExistsError, match=r"must not exist yet, but has appeared|must be a model to be overwritten"
        ):
            quantize_file(
                src if is_folder else src / "model.safetensors", dst, "int8", overwrite=overwrite, progress=appear
            )
        assert thesis.read_text() == "mine"
    else:
        quantize_file(src / "model.safetensors", dst, "int8", overwrite=overwrite, progress=appear)
        assert "0.weight_scale" in load_file(dst)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({"in", dst.name})


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_name_that_is_taken_at_the_last_moment(
    is_folder: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look at the place and the rename."""
    if not exchange:
        monkeypatch.setattr(publish, "renameat2", lambda source, target, flag: False)
    new, taken = tmp_path / "new", tmp_path / "out"
    for path, text in ((new, "new"), (taken, "mine")):
        if is_folder:
            path.mkdir()
        (path / "x" if is_folder else path).write_text(text)
    monkeypatch.setattr(os.path, "lexists", lambda path: False)
    with pytest.raises(OSError, match=r"must not exist yet, but has appeared|not empty"):
        publish.put(new, taken)
    assert (taken / "x" if is_folder else taken).read_text() == "mine"
    assert new.exists()


def test_what_may_be_replaced(tmp_path: Path) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    folder(tmp_path / "old", model={"0.weight": W8})
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe.safetensors")
    cases = [
        (src, "link", "must be a model to be overwritten, got a link to old"),
        (src, "file", "must be a model folder to be overwritten, got a file"),
        (src / "model.safetensors", "pipe.safetensors", "must be a safetensors file to be overwritten, got something"),
    ]
    for source, name, words in cases:
        with pytest.raises(FileExistsError, match=words):
            quantize_file(
                source, tmp_path / name, "int8", overwrite=True, progress=lambda *step: pytest.fail("work has begun")
            )
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("exchange", [True, False])
def test_other_files_of_an_output_stay(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(publish, "renameat2", lambda source, target, flag: False)
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (src / "config.json").write_text("{}")
    out = folder(tmp_path / "out", old={"1.weight": W8})
    (out / "my-data").mkdir()
    (out / "my-data" / "x.bin").write_bytes(b"mine")
    (out / "my-data" / "link").symlink_to("x.bin")
    (out / "NOTES.txt").write_text("mine")
    (out / "config.json").write_text("an older one")
    (out / INDEX).write_text(json.dumps({"weight_map": {"1.weight": "old.safetensors"}}))
    quantize_file(src, out, "int8", overwrite=True)
    found = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
    ours = ["README.md", "checksums.sha256", "config.json", "model.safetensors"]
    assert found == sorted(["NOTES.txt", *ours, "my-data", "my-data/link", "my-data/x.bin"])
    assert list(json.loads((out / "config.json").read_text())) == ["quantization_config"]
    assert (out / "my-data" / "link").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_folder_of_that_name_that_is_not_ours(tmp_path: Path) -> None:
    src = folder(tmp_path / "in", model={"0.weight": W8})
    (tmp_path / ".out.quantlib").mkdir()
    (tmp_path / ".out.quantlib" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="must be free for the work on out"):
        quantize_file(src, tmp_path / "out", "int8")
    assert (tmp_path / ".out.quantlib" / "thesis.txt").read_text() == "mine"


def test_what_was_on_its_way_out_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A system without an exchange, and a kill between its two renames."""
    src, left = folder(tmp_path / "in", model={"0.weight": W8}), tmp_path / ".out.quantlib"
    (left / "new").mkdir(parents=True)
    folder(left / "old", model={"0.weight": W8})
    with pytest.raises(FileExistsError, match="must not exist yet"):
        quantize_file(src, tmp_path / "out", "int8")
    assert "put" in caplog.text
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == ["0.weight"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    (left / "new").mkdir(parents=True)
    folder(left / "old", model={"1.weight": W8})
    with pytest.raises(FileExistsError, match="which is taken: move one of them"):
        quantize_file(src, tmp_path / "out", "int8", overwrite=True)
    assert sorted(load_file(left / "old" / "model.safetensors")) == ["1.weight"]
