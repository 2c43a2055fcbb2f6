"""Models that others quantized, written as their formats are published: every value is what their libraries decode."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from defaults import default_dtype
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantlib import formats
from quantlib.checkpoint import convert_file, dequantize_file, inspect_checkpoint, quantize_file
from quantlib.cli import main

N, K = 32, 64
State = dict[str, Tensor]


def pack_columns(codes: Tensor, bits: int) -> Tensor:
    """[R, C] -> [R, C * bits / 32] int32, from the lowest bits."""
    grouped = codes.long().reshape(len(codes), -1, 32 // bits)
    return (
        (grouped << torch.arange(0, 32, bits)).sum(-1).to(torch.int64).bitwise_and(0xFFFFFFFF).view(torch.int32)[:, ::2]
    )


def random(bits: int, group: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [N, K], zero points and scales [N, G], all unsigned; the values in float16."""
    torch.manual_seed(bits)
    q = torch.randint(0, 2**bits, (N, K))
    z = torch.randint(1, 2**bits, (N, K // group))
    s = torch.rand(N, K // group).add(0.1).half()
    wide = [t.repeat_interleave(group, 1) for t in (z, s)]
    return q, z, s, (q - wide[0]).half() * wide[1]


def gptq(bits: int, version: int = 1, group: int = 16) -> tuple[State, dict[str, Any], Tensor]:
    q, z, s, y = random(bits, group)
    state = {
        "qweight": pack_columns(q, bits).T,
        "qzeros": pack_columns((z - int(version == 1)).T, bits),
        "scales": s.T,
        "g_idx": (torch.arange(K) // group).int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return state, config, y


def gptq_act_order() -> tuple[State, dict[str, Any], Tensor]:
    q, z, s, _ = random(4, 16)
    state, config, _ = gptq(4)
    g_idx = torch.randperm(K) // 16
    return {**state, "g_idx": g_idx.int()}, config, (q - z[:, g_idx]).half() * s[:, g_idx]


def gptq_symmetric() -> tuple[State, dict[str, Any], Tensor]:
    q, z, s, _ = random(4, 16)
    state, config, _ = gptq(4)
    state["qzeros"] = pack_columns(torch.full_like(z, 7).T, 4)
    return state, config, (q - 8).half() * s.repeat_interleave(16, 1)


def awq() -> tuple[State, dict[str, Any], Tensor]:
    q, z, s, y = random(4, 16)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def packed(t: Tensor) -> Tensor:
        return pack_columns(t.T.reshape(t.shape[1], -1, 8)[..., order].flatten(1), 4)

    return {"qweight": packed(q), "qzeros": packed(z), "scales": s.T}, {"quant_method": "awq"}, y


def fp8_blocks() -> tuple[State, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    codes = torch.randn(N, K).mul(50).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 4) + 0.1
    y = codes.float() * scale.repeat_interleave(16, 0)[:N].repeat_interleave(16, 1)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    return {"weight": codes, "weight_scale_inv": scale}, config, y.bfloat16()


def bnb_int8() -> tuple[State, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    q, scb = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N) + 0.1
    state = {"weight": q, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return state, {"quant_method": "bitsandbytes"}, (q * (scb / 127)[:, None]).half()


def bnb_4bit(kind: str, nested: bool, columns: int = K) -> tuple[State, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    size, block = N * columns, 64
    q, table = torch.randint(0, 16, (size,)), torch.tensor(formats.NF4) if kind == "nf4" else torch.linspace(-1, 1, 16)
    blocks = math.ceil(size / block)
    absmax = torch.rand(blocks) + 0.5
    told: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [N, columns]}
    state = {"weight": (q[::2] << 4 | q[1::2]).to(torch.uint8)[:, None], "weight.quant_map": table}
    if nested:
        told |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": 0.25}
        codes, outer, levels = (
            torch.randint(0, 256, (blocks,)),
            torch.rand(math.ceil(blocks / 8)),
            torch.linspace(0, 1, 256),
        )
        absmax = levels[codes] * outer[torch.arange(blocks) // 8] + 0.25
        state |= {
            "weight.absmax": codes.to(torch.uint8),
            "weight.nested_absmax": outer,
            "weight.nested_quant_map": levels,
        }
    else:
        state["weight.absmax"] = absmax
    state[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
    y = table[q] * absmax[torch.arange(size) // block]
    return state, {"quant_method": "bitsandbytes"}, y.view(N, columns).bfloat16()


def hqq() -> tuple[State, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    q, z, s = torch.randint(0, 16, (N * K // 16, 16)), torch.rand(N * K // 16, 1) * 15, torch.rand(N * K // 16, 1)
    z, s, half = z.bfloat16(), s.bfloat16(), len(q) // 2
    word = torch.tensor(list(b"4bit_u8"), dtype=torch.uint8)
    state = {"W_q": (q[:half] << 4 | q[half:]).to(torch.uint8), "zero": z, "scale": s, "packing": word}
    state |= {"nbits": torch.tensor(4), "axis": torch.tensor(1), "shape": torch.tensor([N, K])}
    return state, {"quant_method": "hqq"}, ((q.bfloat16() - z) * s).view(N, K)


def packed(symmetric: bool = True) -> tuple[State, dict[str, Any], Tensor]:
    """compressed-tensors, pack-quantized."""
    q, z, s, y = random(4, 16)
    state = {"weight_packed": pack_columns(q, 4), "weight_scale": s, "weight_shape": torch.tensor([N, K])}
    if symmetric:
        y = (q - 8).half() * s.repeat_interleave(16, 1)
    else:
        state["weight_zero_point"] = pack_columns(z.T, 4).T
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": symmetric}
    return state, ct_config("pack-quantized", weights), y


def ct_config(format: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def int_quantized() -> tuple[State, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    q, s = torch.randint(-128, 128, (N, K), dtype=torch.int8), torch.rand(N, 1).bfloat16()
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    config = ct_config("int-quantized", {"num_bits": 8, "strategy": "channel"}, activations)
    return {"weight": q, "weight_scale": s}, config, q.bfloat16() * s


def float_quantized() -> tuple[State, dict[str, Any], Tensor]:
    torch.manual_seed(0)
    codes, s = torch.randn(N, K).mul(50).to(torch.float8_e4m3fn), torch.tensor([0.5])
    state = {"weight": codes, "weight_scale": s.bfloat16(), "input_scale": torch.tensor([0.1])}
    activations = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    config = ct_config("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, activations)
    return state, config, codes.bfloat16() * 0.5


CASES: dict[str, tuple[Callable[[], tuple[State, dict[str, Any], Tensor]], str | None]] = {
    "gptq 4 bits": (lambda: gptq(4), "int4:group:16:affine:float16"),
    "gptq 4 bits, version 2": (lambda: gptq(4, 2), "int4:group:16:affine:float16"),
    "gptq 8 bits": (lambda: gptq(8), "int8:group:16:affine:float16"),
    "gptq 2 bits": (lambda: gptq(2, 2), "int4:group:16:affine:float16"),
    "gptq symmetric": (gptq_symmetric, "int4:group:16:float16"),
    "gptq act-order": (gptq_act_order, None),
    "awq": (awq, "int4:group:16:affine:float16"),
    "fp8 blocks": (fp8_blocks, "float8_e4m3fn:tile:16"),
    "bitsandbytes int8": (bnb_int8, "int8:row"),
    "bitsandbytes nf4": (lambda: bnb_4bit("nf4", False), "nf4:group:64"),
    "bitsandbytes nf4, nested": (lambda: bnb_4bit("nf4", True), "nf4:group:64"),
    "bitsandbytes nf4, flat": (lambda: bnb_4bit("nf4", False, 40), None),
    "bitsandbytes fp4": (lambda: bnb_4bit("fp4", False), None),
    "bitsandbytes fp4, nested": (lambda: bnb_4bit("fp4", True), None),
    "hqq": (hqq, None),
    "pack-quantized": (packed, "int4:group:16:float16"),
    "pack-quantized, affine": (lambda: packed(False), "int4:group:16:affine:float16"),
    "int-quantized": (int_quantized, "int8:row:bfloat16@int8:row"),
    "float-quantized": (float_quantized, "float8_e4m3fn:tensor:bfloat16"),
}


def put(path: Path, state: State, config: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    """A model folder in which ``state`` is a layer beside a float one."""
    path.mkdir()
    state = {f"model.layer.{name}": tensor.contiguous() for name, tensor in state.items()}
    save_file({**state, "lm_head.weight": torch.ones(4, K)}, path / "model.safetensors", metadata)
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return path


def weight_of(path: Path) -> Tensor:
    return load_file(path / "model.safetensors")["model.layer.weight"]


@pytest.mark.parametrize("case", CASES)
def test_values_are_those_of_the_library(case: str, tmp_path: Path) -> None:
    make, spec = CASES[case]
    state, config, expected = make()
    src = put(tmp_path / "in", state, config)
    dtype = str(expected.dtype).removeprefix("torch.")
    convert_file(src, tmp_path / "float", dtype)
    assert torch.equal(weight_of(tmp_path / "float"), expected)
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    report = convert_file(src, tmp_path / "out", "quantlib")
    assert [layer.spec for layer in report.layers] == ([spec] if spec else [])
    if spec is None:
        assert torch.equal(weight_of(tmp_path / "out"), expected)
        assert report.skipped["model.layer.weight"] in report.notes[0]
    else:
        assert report.layers[0].snr_db == math.inf
        dequantize_file(tmp_path / "out", tmp_path / "again", dtype=dtype)
        assert torch.equal(weight_of(tmp_path / "again"), expected)
    anew = convert_file(src, tmp_path / "anew", "int8:row")
    assert anew.layers[0].spec == "int8:row"
    assert 20 < anew.layers[0].snr_db < 80


@pytest.mark.parametrize("case", ["pack-quantized, affine", "int-quantized", "fp8 blocks"])
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """compressed-tensors of ours is read as the same codes; the scales are float32 then."""
    state, config, _ = CASES[case][0]()
    src = put(tmp_path / "in", state, config)
    convert_file(src, tmp_path / "ours", "quantlib")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "compressed-tensors"]) == 0
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "again")]) == 0
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name].float(), again[name].float()) for name in first)
    assert main(["check", str(tmp_path / "theirs")]) == 0


def broken(state: State, **changes: Tensor | None) -> State:
    return {name: tensor for name, tensor in {**state, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("gptq 4 bits", {"scales": torch.zeros(4, 8)}, "layer.qzeros must be|layer.qweight must be"),
        ("gptq 4 bits", {"g_idx": torch.full((K,), 99, dtype=torch.int32)}, "g_idx must be of 0..3, got 99"),
        ("gptq 4 bits", {"qzeros": None}, "layer.qzeros must be I32"),
        ("awq", {"qzeros": torch.zeros(3, 3, dtype=torch.int32)}, r"layer.qzeros must be I32 \[4, 4\]"),
        ("fp8 blocks", {"weight_scale_inv": torch.zeros(3, 3)}, r"weight_scale_inv must be .*\[2, 4\]"),
        ("bitsandbytes int8", {"SCB": torch.zeros(3)}, r"SCB must be F32 \[32\]"),
        ("bitsandbytes fp4", {"weight.quant_state.bitsandbytes__fp4": torch.zeros(9).byte()}, "must be JSON with"),
        ("bitsandbytes fp4", {"weight.absmax": torch.zeros(5)}, r"absmax must be F32 \[32\]"),
        ("hqq", {"axis": torch.tensor(0)}, "must be of 8, 4 or 2 bits along axis 1, got 4 bits, axis 0"),
        ("hqq", {"nbits": None}, "must have nbits beside it"),
        ("pack-quantized", {"weight_shape": torch.tensor([32, 640])}, "weight_packed must be"),
        ("int-quantized", {"weight_scale": torch.zeros(5, 5)}, "weight_scale must have a scale for"),
        ("int-quantized", {"extra.qweight": torch.zeros(3, 3).int()}, "extra.scales must be"),
        (
            "fp8 blocks",
            {"other.weight": torch.zeros(3, 3).char()},
            "must hold codes that quantlib reads, got codes of I8",
        ),
    ],
)
def test_tensors_that_do_not_fit(case: str, changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    state, config, _ = CASES[case][0]()
    src = put(tmp_path / "in", broken(state, **changes), config)
    with pytest.raises(ValueError, match=words):
        convert_file(src, tmp_path / "out", "quantlib")
    assert main(["convert", str(src), str(tmp_path / "out")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_what_is_refused(tmp_path: Path) -> None:
    src = put(tmp_path / "in", {"weight": torch.randn(N, K)}, {})
    with pytest.raises(ValueError, match="must hold weights that are quantized, got none"):
        convert_file(src, tmp_path / "out", "quantlib")
    (src / "config.json").write_text("{}")
    quantize_file(src, tmp_path / "ours", "int8:tile:8")
    with pytest.raises(ValueError, match="got quantlib's own"):
        convert_file(tmp_path / "ours", tmp_path / "out", "quantlib")
    with pytest.raises(ValueError, match="to must be quantlib, compressed-tensors, float32"):
        convert_file(tmp_path / "ours", tmp_path / "out", "int99")
    report = convert_file(tmp_path / "ours", tmp_path / "out", "compressed-tensors")
    assert report.skipped["model.layer.weight"] == "compressed-tensors has blocks of FP8 only"


@pytest.mark.parametrize(
    "case", ["pack-quantized, affine", "int-quantized", "float-quantized", "bitsandbytes nf4", "awq"]
)
def test_scales_of_zero(case: str, tmp_path: Path) -> None:
    """A scale of 0 becomes 2^-100, by quantlib's rules; the values stay 0 all the same. A negative one is taken."""
    state, config, _ = CASES[case][0]()
    name = next(name for name in state if name.endswith(("scale", "absmax", "scales")))
    state[name] = state[name].contiguous().clone(memory_format=torch.contiguous_format)
    state[name].view(-1)[0] = 0
    convert_file(put(tmp_path / "in", state, config), tmp_path / "out", "quantlib")
    dequantize_file(tmp_path / "out", tmp_path / "float")
    first = weight_of(tmp_path / "float")[0, :16]
    assert not first.any()
    found = {}
    for value in (0.5, -0.5, -0.0):
        state[name].view(-1)[0] = value
        convert_file(put(tmp_path / f"in {value}", state, config), tmp_path / f"out {value}", "quantlib")
        dequantize_file(tmp_path / f"out {value}", tmp_path / f"float {value}")
        found[value] = weight_of(tmp_path / f"float {value}")[0, :16]
    assert found[0.5].any()
    assert torch.equal(found[-0.5], -found[0.5])
    state[name].view(-1)[0] = -math.inf
    with pytest.raises(ValueError, match=r"layer.weight must have scales that are finite, got inf"):
        convert_file(put(tmp_path / "infinite", state, config), tmp_path / "refused", "quantlib")


def test_torchao(tmp_path: Path) -> None:
    """Its parts are known from the metadata of the file."""
    torch.manual_seed(0)
    q, s, z = torch.randint(-8, 8, (N, K), dtype=torch.int8), torch.rand(N, 4).bfloat16(), torch.randint(-8, 8, (N, 4))
    state = {"_weight_qdata": q, "_weight_scale": s, "_weight_zero_point": z.char()}
    told = {"_type": "IntxUnpackedToInt8Tensor", "_tensor_data_names": ["qdata", "scale", "zero_point"]}
    data = {"block_size": [1, 16], "target_dtype": {"_type": "torch.dtype", "_data": "int4"}}
    metadata = {"model.layer.weight": json.dumps({**told, "_data": data}), "tensor_names": "[]"}
    src = put(tmp_path / "in", state, {}, metadata)
    report = convert_file(src, tmp_path / "out", "quantlib")
    assert report.layers[0].spec == "int4:group:16:affine:bfloat16"
    dequantize_file(tmp_path / "out", tmp_path / "float", dtype="bfloat16")
    wide = [t.repeat_interleave(16, 1) for t in (z, s)]
    assert torch.equal(weight_of(tmp_path / "float"), (q - wide[0]).bfloat16() * wide[1])


def test_parts_in_several_files(tmp_path: Path) -> None:
    state, config, expected = packed()
    src = put(tmp_path / "in", state, config)
    whole = load_file(src / "model.safetensors")
    (src / "model.safetensors").unlink()
    weight_map = {}
    for k, (name, tensor) in enumerate(whole.items()):
        save_file({name: tensor}, src / f"{k}.safetensors")
        weight_map[name] = f"{k}.safetensors"
    (src / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert_file(src, tmp_path / "out", "float16")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert sorted(index) == ["lm_head.weight", "model.layer.weight"]
    assert torch.equal(load_file(tmp_path / "out" / index["model.layer.weight"])["model.layer.weight"], expected)


SPECS = (
    "int8:row",
    "int8:tensor",
    "int8:group:16:affine",
    "uint8:row:affine",
    "int4:group:16",
    "int4:row:affine",
    "W8A8",
)


@pytest.mark.parametrize("spec", [*SPECS, "float8_e4m3fn:row", "float8_e4m3fn:tensor", "float8_e4m3fn:tile:8"])
def test_compressed_tensors_decompresses_ours(spec: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    src = put(tmp_path / "in", {"weight": torch.randn(N, K)}, {})
    (src / "config.json").write_text("{}")
    quantize_file(src, tmp_path / "ours", spec)
    convert_file(tmp_path / "ours", tmp_path / "theirs", "compressed-tensors")
    dequantize_file(tmp_path / "ours", tmp_path / "float")
    entry = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert QuantizationConfig(**entry).ignore == ["lm_head"]
    group = entry["config_groups"]["group_0"]
    compressor = BaseCompressor.get_value_from_registry(group["format"])
    state = load_file(tmp_path / "theirs" / "model.safetensors")
    parts = {k.removeprefix("model.layer."): t for k, t in state.items() if k.startswith("model.layer.")}
    got = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
    assert torch.equal(got, weight_of(tmp_path / "float"))


@pytest.mark.parametrize("case", CASES)
def test_the_default_device_and_dtype_change_no_byte(case: str, tmp_path: Path) -> None:
    """A program that makes skeletons on ``meta`` reads and writes files there too."""
    state, config, _ = CASES[case][0]()
    src = put(tmp_path / "in", state, config)
    for to in ("quantlib", "compressed-tensors", "int8:row"):
        convert_file(src, tmp_path / to, to)
        with torch.device("meta"), default_dtype(torch.bfloat16):
            convert_file(src, tmp_path / f"{to}-again", to)
        names = sorted(path.name for path in (tmp_path / to).glob("*.safetensors"))
        assert all((tmp_path / to / n).read_bytes() == (tmp_path / f"{to}-again" / n).read_bytes() for n in names)
    with torch.device("meta"), default_dtype(torch.bfloat16):
        (found,) = (r for r in inspect_checkpoint(src) if r.name == "model.layer.weight")
    assert found.nonfinite == 0


@pytest.mark.parametrize(
    ("case", "told", "changes", "words"),
    [
        (
            "gptq act-order",
            {"desc_act": True},
            {"g_idx": None},
            "layer.g_idx must be there for desc_act",
        ),
        (
            "awq",
            {"group_size": 32},
            {},
            "qweight must be of groups of 32, as .*, got 64 columns in 4",
        ),
        (
            "pack-quantized, affine",
            {},
            {"weight_zero_point": None},
            "weight_zero_point must be there for weights",
        ),
    ],
)
def test_tensors_that_config_json_contradicts(
    case: str, told: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """They could be read, as another weight."""
    state, config, _ = CASES[case][0]()
    src = put(tmp_path / "in", broken(state, **changes), config | told)
    with pytest.raises(ValueError, match=words):
        convert_file(src, tmp_path / "out", "quantlib")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("case", "part"),
    [("gptq act-order", "scales"), ("bitsandbytes fp4", "weight.absmax"), ("hqq", "zero"), ("gptq 4 bits", "scales")],
)
def test_values_that_are_not_finite(case: str, part: str, tmp_path: Path) -> None:
    """Codes and floats alike: a scale of NaN is an error that names the weight."""
    state, config, _ = CASES[case][0]()
    src = put(tmp_path / "in", state | {part: torch.full_like(state[part], math.nan)}, config)
    for to in ("quantlib", "float32"):
        with pytest.raises(ValueError, match=r"layer\.weight must have (values|scales) that are finite, got nan"):
            convert_file(src, tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
