"""Quantized models on disk: the same bytes by every way there, and no file at all when something is wrong."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from quantlib import QuantSpec, prepare_qat_, quantize_
from quantlib.checkpoint import dequantize_file, load_quantized, quantize_file, save_quantized
from quantlib.checkpoint.files import DTYPES
from quantlib.nn import QuantLinear

SPECS = ("float16", "bfloat16:row", "float8_e4m3fn", "int8", "uint8", "int4:group:8", "int4:row:affine", "W8A8")
SCALED = tuple(words for words in SPECS if words != "float16")


class Encoder(nn.Module):
    """A table, a tied head, an odd width, a norm, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(10, 21)
        self.first = nn.Linear(21, 16)
        self.norm = nn.LayerNorm(16)
        self.second = nn.Linear(16, 21, bias=False)
        self.head = nn.Linear(21, 10)
        self.head.weight = self.embeddings.weight
        self.register_buffer("shift", torch.randn(10))
        self.register_buffer("ids", torch.arange(10), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.norm(self.first(self.embeddings(ids))))) + self.shift
        return y


IDS = torch.arange(10)
# What stays a float of it, and why.
KEPT = {"embeddings.weight": "a table that is looked up"}


BESIDE = ("README.md", "checksums.sha256")  # what every folder has


def float_file(path: Path) -> Path:
    state = {name: t for name, t in Encoder().state_dict().items() if name != "head.weight"}
    safetensors.torch.save_file(state, path, metadata={"format": "pt", "author": "someone"})
    return path


def model_folder(path: Path) -> Path:
    """Two shards, their index, and the files that come with a model."""
    path.mkdir()
    state = safetensors.torch.load_file(float_file(path / "all.safetensors"))
    (path / "all.safetensors").unlink()
    weight_map = {}
    for number, names in enumerate((list(state)[:3], list(state)[3:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({name: state[name] for name in names}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 0, "note": "kept"}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text("{}")
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text("[]")
    (path / "pytorch_model.bin").write_bytes(b"float weights")
    return path


def tensors(path: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        found.update(safetensors.torch.load_file(file))
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("words", SPECS)
def test_every_way_gives_the_same_bytes(words: str, tmp_path: Path) -> None:
    model = Encoder()
    quantize_(model, words)
    save_quantized(model, tmp_path / "saved.safetensors")
    quantize_file(float_file(tmp_path / "float.safetensors"), tmp_path / "converted.safetensors", words)
    assert same(tensors(tmp_path / "saved.safetensors"), tensors(tmp_path / "converted.safetensors"))
    stored = json.loads(metadata(tmp_path / "saved.safetensors")["quantlib"])
    assert stored["version"] == (1 if QuantSpec.parse(words).symmetric else 3)  # which keeps zero points as codes
    assert stored["tied"] == {"head.weight": "embeddings.weight"}
    assert metadata(tmp_path / "converted.safetensors")["author"] == "someone"

    loaded = load_quantized(Encoder(), tmp_path / "saved.safetensors")
    assert same(loaded.state_dict(), model.state_dict())
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.first.spec == model.first.spec
    assert loaded.head.weight is loaded.embeddings.weight
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    other = load_quantized(Encoder(), tmp_path / "converted.safetensors")
    assert same(other.state_dict(), model.state_dict())


def test_the_layout_on_disk(tmp_path: Path) -> None:
    """A file that every later version has to read."""
    quantize_file(float_file(tmp_path / "float.safetensors"), tmp_path / "q.safetensors", "int4:group:8:affine")
    found = tensors(tmp_path / "q.safetensors")
    assert {name: (t.dtype, tuple(t.shape)) for name, t in found.items() if name.startswith(("first", "second"))} == {
        "first.weight": (torch.uint8, (16, 11, 1)),
        "first.weight_scale": (torch.float32, (16, 3)),
        "first.weight_zero_point": (torch.uint8, (16, 2)),
        "first.bias": (torch.float32, (16,)),
        "second.weight": (torch.uint8, (21, 8, 1)),
        "second.weight_scale": (torch.float32, (21, 2)),
        "second.weight_zero_point": (torch.uint8, (21, 1)),
    }
    spec = "int4:group:8:affine"
    assert json.loads(metadata(tmp_path / "q.safetensors")["quantlib"]) == {
        "version": 3,
        "weights": {
            "first.weight": {"spec": spec, "shape": [16, 21]},
            "second.weight": {"spec": spec, "shape": [21, 16]},
        },
        "tied": {},
    }


@pytest.mark.parametrize("skeleton", ["float", "quantized", "meta"])
def test_skeletons(skeleton: str, tmp_path: Path) -> None:
    model = Encoder()
    quantize_(model, "int8")
    save_quantized(model, tmp_path / "q.safetensors")
    if skeleton == "meta":
        with torch.device("meta"):
            into = Encoder()
        into.ids = torch.arange(10)
    else:
        into = Encoder()
    if skeleton == "quantized":
        quantize_(into, "int8")
    load_quantized(into, tmp_path / "q.safetensors")
    assert torch.equal(into(IDS), model(IDS))
    assert not any(p.is_meta for p in into.parameters())


@pytest.mark.parametrize("shard", [1, 700, 10**9])
def test_shards(shard: int, tmp_path: Path) -> None:
    model = Encoder()
    quantize_(model, "int4:group:8")
    save_quantized(model, tmp_path / "q", max_shard_bytes=shard)
    files = sorted(path.name for path in (tmp_path / "q").iterdir() if path.name not in BESIDE)
    assert files == ["model.safetensors"] if shard == 10**9 else len(files) > 2
    if len(files) > 1:
        index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == tensors(tmp_path / "q").keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "q").values())
    assert torch.equal(load_quantized(Encoder(), tmp_path / "q")(IDS), model(IDS))


def test_a_model_folder(tmp_path: Path) -> None:
    src, seen = model_folder(tmp_path / "model"), []
    report = quantize_file(src, tmp_path / "q", "int8", progress=lambda *step: seen.append(step))
    assert [layer.name for layer in report.layers] == ["first.weight", "second.weight"]
    assert report.skipped == KEPT
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == [
        *("1_Pooling", "README.md", "checksums.sha256"),
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert (tmp_path / "q" / "1_Pooling" / "config.json").read_text() == "[]"
    index = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "q").keys()
    assert index["weight_map"]["first.weight_scale"] == index["weight_map"]["first.weight"]
    assert index["metadata"] == {"note": "kept", "total_size": sum(t.nbytes for t in tensors(tmp_path / "q").values())}
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert seen[-1][1] == seen[-1][2] == sum(t.nbytes for t in tensors(src).values())
    quantized = Encoder()
    quantize_(quantized, "int8")
    assert torch.equal(load_quantized(Encoder(), tmp_path / "q")(IDS), quantized(IDS))


@pytest.mark.parametrize("dtype", ["float32", torch.bfloat16])
@pytest.mark.parametrize("words", SPECS)
def test_dequantize_file(words: str, dtype: object, tmp_path: Path) -> None:
    quantize_file(model_folder(tmp_path / "model"), tmp_path / "q", words)
    assert dequantize_file(tmp_path / "q", tmp_path / "float", dtype=dtype) == ["first.weight", "second.weight"]
    model = Encoder()
    quantize_(model, words)
    found = tensors(tmp_path / "float")
    expected = getattr(torch, str(dtype).removeprefix("torch."))
    assert torch.equal(found["first.weight"], model.first.values(expected))
    assert found.keys() == tensors(tmp_path / "model").keys()
    assert "quantlib" not in metadata(tmp_path / "float" / "model-00001-of-00002.safetensors")
    assert (tmp_path / "float" / "config.json").exists()


def test_exclude(tmp_path: Path) -> None:
    src = float_file(tmp_path / "float.safetensors")
    report = quantize_file(src, tmp_path / "q.safetensors", "int8", exclude=["sec*"])
    assert report.skipped == {**KEPT, "second.weight": "matches sec*"}
    assert tensors(tmp_path / "q.safetensors")["second.weight"].dtype == torch.float32
    report = quantize_file(src, tmp_path / "i.safetensors", "int8", exclude=["sec*"], include=["emb*", "second*"])
    assert [layer.name for layer in report.layers] == ["embeddings.weight", "first.weight"]
    with pytest.raises(TypeError, match=r"exclude must be a sequence of patterns, got the string 'sec\*'"):
        quantize_file(src, tmp_path / "r.safetensors", "int8", exclude="sec*")
    with pytest.raises(TypeError, match=r"include must be a sequence of patterns, got the string 'sec\*'"):
        quantize_file(src, tmp_path / "r.safetensors", "int8", include="sec*")


@pytest.mark.parametrize("words", SCALED)
def test_codes_are_not_taken_for_float_weights(words: str, tmp_path: Path) -> None:
    quantize_file(float_file(tmp_path / "float.safetensors"), tmp_path / "q.safetensors", words)
    state = {**tensors(tmp_path / "q.safetensors"), "head.weight": torch.zeros(10, 21)}
    with pytest.raises(RuntimeError, match=r"size mismatch for first\.weight"):
        Encoder().load_state_dict(state, strict=False)


def test_layers_that_cannot_hold_codes_get_values(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), "out": nn.Linear(16, 4)})
    safetensors.torch.save_file(model.state_dict(), tmp_path / "float.safetensors")
    quantize_file(tmp_path / "float.safetensors", tmp_path / "q.safetensors", "int8")
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "values.safetensors")
    with caplog.at_level(logging.WARNING, "quantlib"):
        load_quantized(model, tmp_path / "q.safetensors")
    assert "block.linear1.weight" in caplog.text
    assert isinstance(model["out"], QuantLinear)
    assert type(model["block"].linear1) is nn.Linear
    assert torch.equal(model["block"].linear1.weight, tensors(tmp_path / "values.safetensors")["block.linear1.weight"])


def test_files_are_those_of_safetensors_itself(tmp_path: Path) -> None:
    model = Encoder()
    quantize_(model, "int8")
    save_quantized(model, tmp_path / "ours.safetensors")
    state = tensors(tmp_path / "ours.safetensors")
    safetensors.torch.save_file(
        state, tmp_path / "theirs.safetensors", metadata=metadata(tmp_path / "ours.safetensors")
    )
    ours, theirs = ((tmp_path / f"{name}.safetensors").read_bytes() for name in ("ours", "theirs"))
    data = 8 + int.from_bytes(ours[:8], "little")
    assert json.loads(ours[8:data]) == json.loads(theirs[8:data])
    assert ours[data:] == theirs[data:]


def test_every_dtype_is_copied(tmp_path: Path) -> None:
    state = {name: torch.randint(0, 2, (15,)).to(dtype) for name, dtype in DTYPES.items() if name != "F8_E8M0"}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "a.weight": torch.randn(2, 3)}
    safetensors.torch.save_file(state, tmp_path / "float.safetensors")
    quantize_file(tmp_path / "float.safetensors", tmp_path / "q.safetensors", "int8")
    found = tensors(tmp_path / "q.safetensors")
    assert same(
        {name: found[name] for name in state if name != "a.weight"}, {n: t for n, t in state.items() if n != "a.weight"}
    )


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def untouched(folder: Path, before: set[str]) -> bool:
    return {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize("folder", [True, False])
def test_what_is_left_of_a_failure(folder: bool, tmp_path: Path) -> None:
    src = model_folder(tmp_path / "model") if folder else float_file(tmp_path / "float.safetensors")
    dst = tmp_path / ("q" if folder else "q.safetensors")
    before, kept_work = {src.name}, {src.name, f".{dst.name}.quantlib"}

    def interrupt(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    def refuse(name: str, done: int, total: int) -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):  # what cannot succeed later leaves nothing
        quantize_file(src, dst, "int8", progress=refuse)
    assert untouched(tmp_path, before)
    with pytest.raises(KeyboardInterrupt):
        quantize_file(src, dst, "int8", progress=interrupt)
    assert untouched(tmp_path, kept_work)
    writing = "while writing .*safetensors$"
    with small_disk(900), pytest.raises(OSError, match=writing):
        quantize_file(src, dst, "int8", resume=False)
    model = Encoder()
    quantize_(model, "bfloat16")
    with small_disk(900), pytest.raises(OSError, match=writing):
        save_quantized(model, dst)
    assert untouched(tmp_path, before)
    quantize_file(src, dst, "int8")
    kept = tensors(dst)
    with pytest.raises(FileExistsError, match="must not exist yet, or overwrite must be asked for"):
        quantize_file(src, dst, "int4")
    with pytest.raises(KeyboardInterrupt):
        quantize_file(src, dst, "int4", overwrite=True, progress=interrupt)
    assert same(tensors(dst), kept)
    quantize_file(src, dst, "int4", overwrite=True)
    assert tensors(dst)["first.weight"].dtype == torch.uint8
    assert untouched(tmp_path, before | {dst.name})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(bad: float, tmp_path: Path) -> None:
    state = tensors(float_file(tmp_path / "float.safetensors"))
    state["second.weight"][4, 2] = bad
    safetensors.torch.save_file(state, tmp_path / "float.safetensors")
    with pytest.raises(ValueError, match=rf"float\.safetensors: second\.weight must be finite.*got {bad} in row 4"):
        quantize_file(tmp_path / "float.safetensors", tmp_path / "q.safetensors", "int8")
    assert untouched(tmp_path, {"float.safetensors"})
    quantize_file(tmp_path / "float.safetensors", tmp_path / "q.safetensors", "int8", on_nonfinite="propagate")
    assert (
        not tensors(tmp_path / "q.safetensors")["second.weight_scale"][4].isnan().logical_xor(torch.tensor(bad).isnan())
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a whole safetensors file, got 0 bytes"),
        (
            b"PK\x03\x04 a zip archive, or a pickle of torch",
            "must be a whole safetensors file, got one of torch.save: ",
        ),
        (b"\x80\x02\x8a\nl\xfc\x9cF an older pickle", "must be a whole safetensors file, got one of torch.save: "),
        (b"GGUF\3\0\0\0" * 9, "must be a whole safetensors file, got one of GGUF, which is not read"),
        (b"\xff" * 64, "must be a whole safetensors file"),
        (b"\x08" + b"\0" * 7 + b'{"a": 1}', "must be a whole safetensors file"),
        (None, "must be a whole safetensors file"),
    ],
)
def test_truncated_and_foreign_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    src = float_file(tmp_path / "float.safetensors")
    src.write_bytes(src.read_bytes()[:-1] if content is None else content)
    for verb in (lambda dst: quantize_file(src, dst, "int8"), lambda dst: dequantize_file(src, dst)):
        with pytest.raises(ValueError, match=message) as error:
            verb(tmp_path / "q.safetensors")
        assert str(src) in str(error.value)
    with pytest.raises(ValueError, match=message):
        load_quantized(Encoder(), src)
    assert untouched(tmp_path, {"float.safetensors"})


def test_a_header_as_long_as_a_pickle_begins(tmp_path: Path) -> None:
    src = tmp_path / "float.safetensors"
    header = json.dumps({"linear.weight": {"dtype": "F32", "shape": [16, 32], "data_offsets": [0, 2048]}}).ljust(0x0280)
    src.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(2048))
    assert src.read_bytes().startswith(b"\x80\x02")
    quantize_file(src, tmp_path / "q.safetensors", "int8")
    assert tensors(tmp_path / "q.safetensors").keys() == {"linear.weight", "linear.weight_scale"}


def test_refused_paths(tmp_path: Path) -> None:
    src, model = float_file(tmp_path / "float.safetensors"), model_folder(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "absent", tmp_path / "q", FileNotFoundError, "got nothing there"),
        (tmp_path / "empty", tmp_path / "q", ValueError, "must hold safetensors files, got none"),
        (tmp_path / "other", tmp_path / "q", ValueError, r"must hold safetensors files, got thesis\.tex"),
        (src, tmp_path / "q", ValueError, r"dst must be a \.safetensors file, as src is, got"),
        (
            model,
            tmp_path / "q.safetensors",
            ValueError,
            "dst must be a folder, as src is, got .*, which",
        ),
        (src, src, ValueError, "dst must lie outside src"),
        (model, model, ValueError, "dst must lie outside src"),
        (model, model / "q", ValueError, "dst must lie outside src"),
        (model, tmp_path, ValueError, "dst must lie outside src"),
        (src, tmp_path / "nowhere" / "q.safetensors", FileNotFoundError, "must be a folder to write"),
        (model, tmp_path / "other", FileExistsError, "must be a model to be overwritten"),
    ]
    before = {path.name for path in tmp_path.iterdir()}
    for source, target, error, message in cases:
        with pytest.raises(error, match=message):
            quantize_file(source, target, "int8", overwrite=True)
    assert untouched(tmp_path, before)
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"
    (model / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model-00002-of-00002\.safetensors"):
        quantize_file(model, tmp_path / "q", "int8")
    (model / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="must be JSON with a weight_map"):
        quantize_file(model, tmp_path / "q", "int8")


def test_refused_words(tmp_path: Path) -> None:
    src, dst = float_file(tmp_path / "float.safetensors"), tmp_path / "q.safetensors"
    with pytest.raises(ValueError, match="spec must be"):
        quantize_file(src, dst, "int7")
    with pytest.raises(ValueError, match="on_nonfinite must be raise or propagate"):
        quantize_file(src, dst, "int8", on_nonfinite="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be float32, float16 or bfloat16, got 'int8'"):
        dequantize_file(src, dst, dtype="int8")
    with pytest.raises(ValueError, match="must hold weights to convert, got none among 8 tensors"):
        dequantize_file(src, dst)
    with pytest.raises(ValueError, match="must hold weights to convert"):
        quantize_file(src, dst, "int8", exclude=["*"])
    with pytest.raises(ValueError, match="must hold weights that quantlib quantized, got none among 8 tensors"):
        load_quantized(Encoder(), src)
    quantize_file(src, dst, "int8")
    with pytest.raises(ValueError, match="must hold float weights, got weights that are quantized already"):
        quantize_file(dst, tmp_path / "r.safetensors", "int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 4}, r"must be of version 3 or older, got 4: update quantlib"),
        ({"version": None}, "metadata quantlib must describe its weights"),
        ({"weights": []}, "metadata quantlib must describe its weights"),
        ({"weights": {"first.weight": {"spec": "int8:row"}}}, "metadata quantlib must describe its weights"),
        (
            {"weights": {"first.weight": {"spec": "int8:group:4", "shape": [16, 21]}}},
            r"first\.weight_scale must be F32 \[16, 6\], got F32 \[16, 1\]",
        ),
        (
            {"weights": {"other.weight": {"spec": "int8:row", "shape": [2, 2]}}},
            r"other\.weight must be I8.*got nothing",
        ),
    ],
)
def test_metadata_that_lies(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    quantize_file(float_file(tmp_path / "float.safetensors"), path, "int8")
    entry = {**json.loads(metadata(path)["quantlib"]), **change}
    safetensors.torch.save_file(tensors(path), path, metadata={"quantlib": json.dumps(entry)})
    before = Encoder()
    into = Encoder()
    with pytest.raises(ValueError, match=message):
        load_quantized(into, path)
    assert same(into.state_dict(), before.state_dict())


def test_a_file_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    quantize_file(float_file(tmp_path / "float.safetensors"), tmp_path / "q.safetensors", "int8")

    def with_first(layer: nn.Module) -> Encoder:
        model = Encoder()
        model.first = layer  # type: ignore[assignment]
        return model

    del (without := Encoder()).second
    extra = Encoder()
    extra.more = nn.Linear(2, 2)  # type: ignore[assignment]
    with torch.device("meta"):
        meta = Encoder()
    cases = [
        (with_first(nn.Linear(21, 17)), r"first\.weight"),
        (with_first(nn.Linear(21, 16, bias=False)), r"first\.bias, which the model does not have"),
        (with_first(QuantLinear(21, 16, spec="int8:group:8")), "first: codes of int8:row for int8:group:8"),
        (without, r"second\.weight"),
        (extra, r"no more\.weight, no more\.bias"),
        (meta, "ids on meta, which no file fills"),
    ]
    for model, message in cases:
        types = [type(module) for module in model.modules()]
        with pytest.raises(ValueError, match=f"must fit the model, got.*{message}"):
            load_quantized(model, tmp_path / "q.safetensors")
        assert [type(module) for module in model.modules()] == types


def test_ties_between_quantized_layers(tmp_path: Path) -> None:
    def build(tied: bool) -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        if tied:
            model[1].weight = model[0].weight
        return model

    model = build(tied=True)
    quantize_(model, "int8")
    save_quantized(model, tmp_path / "q.safetensors")
    assert sorted(tensors(tmp_path / "q.safetensors")) == ["0.bias", "0.weight", "0.weight_scale", "1.bias"]
    for tied in (True, False):
        loaded = load_quantized(build(tied), tmp_path / "q.safetensors")
        assert loaded[1].weight_codes is loaded[0].weight_codes
        assert loaded[1].weight_scale is loaded[0].weight_scale
        assert torch.equal(loaded(torch.ones(8)), model(torch.ones(8)))


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """snapshots/<revision>/<name> -> ../../blobs/<hash>"""
    cache = tmp_path / "models--someone--encoder"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    model_folder(tmp_path / "model")
    for number, path in enumerate(path for path in sorted((tmp_path / "model").rglob("*")) if path.is_file()):
        link = snapshot / path.relative_to(tmp_path / "model")
        link.parent.mkdir(parents=True, exist_ok=True)
        path.rename(blobs / f"{number:08x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:08x}", link.parent))
    quantize_file(snapshot, tmp_path / "q", "int8")
    assert (tmp_path / "q" / "1_Pooling" / "config.json").read_text() == "[]"
    shutil.rmtree(cache)
    assert load_quantized(Encoder(), tmp_path / "q")(IDS).shape == (10, 10)
    assert not any(path.is_symlink() for path in (tmp_path / "q").iterdir())


def test_state_that_cannot_be_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Encoder()
    with pytest.raises(ValueError, match=r"state shift must be a tensor with values.*got torch\.float32 on meta"):
        save_quantized(model, tmp_path / "q")
    assert untouched(tmp_path, set())


def test_what_cannot_be_saved_or_loaded(tmp_path: Path) -> None:
    """A model without codes gives a file that nothing loads: it is not written."""
    prepared = nn.Sequential(nn.Linear(8, 8))
    prepare_qat_(prepared, "int8")
    for model, words in ((Encoder(), "quantize_ it first"), (prepared, "convert_ it first")):
        with pytest.raises(ValueError, match=f"model must have a module of codes to save, got none: {words}"):
            save_quantized(model, tmp_path / "out")
    for other in (prepared.state_dict(), None):
        words = f"model must be an nn.Module, got {type(other).__name__}"
        with pytest.raises(TypeError, match=words):
            save_quantized(other, tmp_path / "out")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=words):
            load_quantized(other, tmp_path / "out")  # type: ignore[arg-type]
    for size in (0, -1, 1.5, "5GB", True):
        with pytest.raises(ValueError, match="max_shard_bytes must be an integer of at least 1, got "):
            save_quantized(Encoder(), tmp_path / "out", max_shard_bytes=size)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_loaded_in_inference_mode_trains_outside_of_it(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    quantize_(model, "int8")
    save_quantized(model, tmp_path / "q.safetensors")
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(8, 8))
    with torch.inference_mode():
        loaded = load_quantized(skeleton, tmp_path / "q.safetensors")
    x = torch.randn(2, 8, requires_grad=True)
    loaded(x).sum().backward()
    assert x.grad is not None
    assert loaded[0].bias.grad is not None  # type: ignore[index]
