"""QuantEmbedding, QuantConv1d, QuantConv2d: values, gradients, and what becomes of them as modules."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from quantlib import dequantize_, quantize_
from quantlib.checkpoint import dequantize_file, load_quantized, save_quantized
from quantlib.nn import QUANTIZED, QuantConv1d, QuantConv2d, QuantEmbedding, QuantModule, conv
from quantlib.nn.functional import quantize_weight
from quantlib.spec import QuantSpec
from quantlib.testing import assert_same_bytes

pytestmark = pytest.mark.usefixtures("device")

SPECS = ("float16", "float8_e4m3fn", "float16:row", "int8", "int8:tensor", "int8:tile:8", "int4:group:8:affine")
ROWS, FEATURES = 21, 35


def table(words: str, **options: Any) -> QuantEmbedding:
    torch.manual_seed(0)
    return QuantEmbedding.from_float(nn.Embedding(ROWS, FEATURES, **options), words)


def convolution(cls: Any, words: str, **options: Any) -> Any:
    torch.manual_seed(0)
    float_type = nn.Conv1d if cls is QuantConv1d else nn.Conv2d
    return cls.from_float(float_type(12, 24, **{"kernel_size": 3, **options}), words)


def picture(cls: type, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn((2, 12, 11) if cls is QuantConv1d else (2, 12, 9, 10), dtype=dtype)


MODULES = {
    "embedding": table,
    "conv1d": lambda words: convolution(QuantConv1d, words),
    "conv2d": lambda words: convolution(QuantConv2d, words),
}
INPUTS = {
    "embedding": lambda: torch.tensor([[3, 0], [20, 3]]),
    "conv1d": lambda: picture(QuantConv1d),
    "conv2d": lambda: picture(QuantConv2d),
}


@pytest.mark.parametrize("words", SPECS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4), (0,), (2, 0)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_lookup_gives_rows_of_the_values(words: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q = table(words)
    ids = torch.randint(0, ROWS, shape, dtype=dtype)
    y = q(ids)
    assert y.shape == (*shape, FEATURES)
    assert torch.equal(y, q.values()[ids.long()])
    assert torch.equal(y, q.dequantize()(ids))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_lookup_follows_the_dtype_of_the_module(dtype: torch.dtype) -> None:
    q = table("int8").to(dtype)
    y = q(torch.arange(ROWS))
    assert y.dtype == dtype
    assert torch.equal(y, q.values(dtype))


@pytest.mark.parametrize("words", ["int8", "int8:tile:8", "int4:group:8:affine"])
def test_only_the_rows_that_are_asked_for_are_read(words: str) -> None:
    """A scale elsewhere that is NaN reaches no other row."""
    q = table(words)
    q.weight_scale.data[-1] = torch.nan
    ids = torch.tensor([[1, 2], [2, 0]])
    assert torch.isfinite(q(ids)).all()
    assert q(ids + ROWS - 3)[0, 1].isnan().all()


def test_indices_that_no_row_has_are_refused() -> None:
    for bad in (ROWS, -1):
        with pytest.raises(RuntimeError, match=rf"indices must be in 0..{ROWS - 1}, got {bad}"):
            table("int8:tile:8")(torch.tensor([0, bad]))
    with pytest.raises(RuntimeError, match="indices must be int64 or int32, got float32"):
        table("int8")(torch.tensor([0.5]))


def test_a_padding_row_stays_zero() -> None:
    q = table("uint8", padding_idx=4)
    assert q.padding_idx == 4
    assert not q(torch.tensor(4)).any()
    assert q.dequantize().padding_idx == 4
    assert repr(q) == f"QuantEmbedding({ROWS}, {FEATURES}, padding_idx=4, spec=uint8:row:affine)"


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_tables_that_codes_cannot_be_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=rf"layer must be an nn.Embedding that QuantEmbedding can serve.*{name}="):
        table("int8", **option)


def test_an_activation_is_of_linear_layers_only() -> None:
    assert str(table("W8A8").spec) == "int8:row"
    assert str(convolution(QuantConv1d, "W8A8").spec) == "int8:row"


@pytest.mark.parametrize("slab", [1 << 20, 200])
@pytest.mark.parametrize("padding", [0, 2, "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("cls", [QuantConv1d, QuantConv2d])
def test_a_convolution_is_that_of_the_values(
    cls: Any, mode: str, padding: Any, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "SLAB", slab)
    for groups in (1, 3, 12):
        for options in ({"kernel_size": 3}, {"kernel_size": 4, "dilation": 2}):
            q = convolution(cls, "int4:group:8", groups=groups, padding=padding, padding_mode=mode, **options)
            x = picture(cls).requires_grad_()
            y, expected = q(x), q.dequantize()(x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            dy = torch.randn_like(y)
            gradients = (torch.autograd.grad(out, (x, q.bias), dy) for out in (y, expected))
            for got, want in zip(*gradients, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("words", SPECS)
@pytest.mark.parametrize("cls", [QuantConv1d, QuantConv2d])
def test_the_codes_of_a_convolution(cls: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "SLAB", 100)
    torch.manual_seed(0)
    source = (nn.Conv1d if cls is QuantConv1d else nn.Conv2d)(12, 24, 3, stride=2)
    q = cls.from_float(source, words)
    for got, want in zip(q.plain, quantize_weight(source.weight.flatten(1), q.spec), strict=True):
        assert (got is None) == (want is None)
        assert got is None or torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    x = picture(cls)
    torch.testing.assert_close(q(x), q.dequantize()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q(x[0]), q(x)[0])
    assert q(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(q(x.double()), q.dequantize().double()(x.double()), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(q(x), q(x.bfloat16()))


def test_slabs_cover_every_channel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (1, 50, 1000, 1 << 20):
        monkeypatch.setattr(conv, "SLAB", size)
        for groups in (1, 2, 5, 10):
            how = conv.Convolution((20, 30 // groups, 3), (1,), (0,), (1,), groups)
            slabs = list(how.slabs())
            assert [n for out, _, _ in slabs for n in range(20)[out]] == list(range(20))
            for out, seen, g in slabs:
                channels, weights = len(range(20)[out]), len(range(20)[out]) * 3 * (30 // groups)
                assert weights <= max(size, 3 * (30 // groups))
                assert len(range(30)[seen]) == g * (30 // groups)
                assert g == 1 or channels == g * (20 // groups)
                assert {n // (20 // groups) for n in range(20)[out]} == {k // (30 // groups) for k in range(30)[seen]}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("words", SPECS)
def test_copies_states_and_casts(name: str, words: str) -> None:
    q, x = MODULES[name](words), INPUTS[name]()
    y = q(x)
    state = q.state_dict()
    assert {n: t.shape for n, t in state.items()} == {n: p.shape for n, p in q.named_parameters()}
    copies = [copy.deepcopy(q), copy.deepcopy(q).half().float()]
    copies += [pickle.loads(pickle.dumps(q))]
    fresh = MODULES[name](words)
    fresh.reset_parameters()
    fresh.load_state_dict(state)
    with torch.device("meta"):
        skeleton = copy.deepcopy(q).to("meta")
    skeleton.load_state_dict(state, assign=True)
    for other in (*copies, fresh, skeleton):
        assert other.spec == q.spec
        assert torch.equal(other.plain.codes.view(torch.uint8), q.plain.codes.view(torch.uint8))
        torch.testing.assert_close(other(x), y, rtol=1e-3, atol=1e-3)  # a bias may have been half
    assert not any(p.requires_grad for n, p in q.named_parameters() if n != "bias")
    assert f"spec={q.spec}" in repr(q)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.Embedding(6, 4), nn.Conv1d(6, 4, 1), nn.Conv2d(6, 4, 1), nn.Conv1d(6, 4, 3, groups=2)], ids=repr
)
def test_a_float_module_cannot_load_codes(layer: nn.Module, strict: bool) -> None:
    state = QUANTIZED[type(layer)].from_float(layer, "int8").state_dict()
    with pytest.raises(RuntimeError, match="weight must be a float weight, got codes"):
        copy.deepcopy(layer).load_state_dict(state, strict=strict)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("words", ["int8", "int4:group:8:affine", "float16"])
def test_compile_and_export(name: str, words: str) -> None:
    torch._dynamo.reset()
    q, x = MODULES[name](words).eval(), INPUTS[name]()
    assert torch.equal(torch.compile(q, fullgraph=True, backend="aot_eager")(x), q(x))
    for strict in (True, False):
        assert torch.equal(torch.export.export(q, (x,), strict=strict).module()(x), q(x))


@pytest.mark.parametrize("words", ["int8", "int4:group:8", "float16"])
def test_a_checkpoint_and_its_float_form(words: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(nn.Conv2d(12, 24, 1), nn.Conv2d(24, 12, 3, groups=3), nn.Flatten(2), nn.Conv1d(12, 5, 1))
    model, x = copy.deepcopy(source), picture(QuantConv2d)
    quantize_(model, words, types=[nn.Conv1d, nn.Conv2d])
    save_quantized(model, tmp_path / "q.safetensors")
    assert torch.equal(load_quantized(copy.deepcopy(source), tmp_path / "q.safetensors")(x), model(x))
    dequantize_file(tmp_path / "q.safetensors", tmp_path / "f.safetensors")
    expected = copy.deepcopy(model)
    dequantize_(expected)
    found = safetensors.torch.load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(found[name].to(tensor.device), tensor) for name, tensor in expected.state_dict().items())
    source.load_state_dict(found)


@pytest.mark.parametrize("layer", [nn.Linear(3, 3), table("int8"), None], ids=lambda layer: type(layer).__name__)
def test_from_float_refuses(layer: Any) -> None:
    for cls, name in ((QuantEmbedding, "Embedding"), (QuantConv1d, "Conv1d"), (QuantConv2d, "Conv2d")):
        with pytest.raises(
            TypeError, match=rf"layer must be an nn.{name} with float weights, got {type(layer).__name__}"
        ):
            cls.from_float(layer, "int8")


def test_all_of_them_are_modules_of_codes() -> None:
    assert all(isinstance(make("int8"), QuantModule) for make in MODULES.values())
    assert all(str(make("W4A16").spec) == str(QuantSpec.parse("W4A16")) for make in MODULES.values())


@pytest.mark.parametrize(
    "spec", ["int8", "int4:group:4", "int8:tensor", "uint8:row:affine", "float8_e4m3fn:row", "int8:tile:3"]
)
@pytest.mark.parametrize(
    ("layer", "quantized", "x"),
    [
        (nn.Embedding(7, 10), QuantEmbedding, torch.tensor([[1, 1, 2], [0, 3, 6]])),
        (nn.Conv1d(4, 6, 3, groups=2), QuantConv1d, torch.randn(2, 4, 9)),
        (nn.Conv2d(4, 6, 3, padding=1), QuantConv2d, torch.randn(2, 4, 5, 5)),
    ],
    ids=["embedding", "conv1d", "conv2d"],
)
def test_the_gradient_of_a_scale(layer: nn.Module, quantized: Any, x: torch.Tensor, spec: str) -> None:
    """The gradient of a scale is that of its block of the weight, times the codes; the values stay."""
    module = quantized.from_float(layer, spec)
    y = module(x)
    module.requires_grad_(True)
    again = module(x)
    assert_same_bytes(again, y)
    again.square().sum().backward()

    plain = module.dequantize()
    plain(x).square().sum().backward()
    rows = plain.weight.grad.flatten(1)
    terms = rows * plain.weight.detach().flatten(1)  # dw * code * scale
    (br, bk), scale = module.block, module.weight_scale
    at = [torch.arange(n) // b for n, b in zip(rows.shape, (br, bk), strict=True)]
    index = at[0][:, None] * scale.shape[1] + at[1]
    sums = torch.zeros(scale.numel()).index_add_(0, index.flatten(), terms.flatten()).view_as(scale)
    torch.testing.assert_close(scale.grad, sums / scale.detach(), rtol=1e-4, atol=1e-4)


def test_an_input_of_a_convolution_with_other_axes() -> None:
    m = QuantConv2d.from_float(nn.Conv2d(4, 8, 3), "int8")
    with pytest.raises(RuntimeError, match=r"input must have 3 or 4 axes, got \[9\]"):
        m(torch.randn(9))
