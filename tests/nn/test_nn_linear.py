"""QuantLinear's choice of product, tiles, batch invariance, and adapters around frozen codes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import quantlib.nn.linear
from quantlib import backends, ops
from quantlib.nn import QuantEmbedding, QuantLinear, functional
from quantlib.nn.linear import kernel_of
from quantlib.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("device")

N, K = 19, 70
TILED = ("int8", "uint8:group:16", "int4:group:8:affine", "float8_e4m3fn", "float4_e2m1fn:group:16", "int8:tile:8")


def quantized(words: str, dtype: torch.dtype = torch.float32, **options: bool) -> QuantLinear:
    torch.manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(K, N, dtype=dtype), words)
    for name, value in options.items():
        setattr(layer, name, value)
    return layer


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("bf16", "linear"),
        ("float16@int8", "linear"),
        ("W8A16", "dequant_matmul"),
        ("W4A16", "dequant_matmul"),
        ("fp8@int8", "dequant_matmul"),
        ("int8@float8_e4m3fn", "dequant_matmul"),
        ("int8@int8:group:32", "dequant_matmul"),
        ("W8A8", "dynamic_matmul"),
        ("W4A8", "dynamic_matmul"),
        ("uint8@int8:row", "dynamic_matmul"),
        ("int8@int8:tensor", "scaled_matmul"),
        ("int8@int8:row:affine", "scaled_matmul"),
        ("int4@uint8", "scaled_matmul"),
    ],
)
def test_the_kernel_of_a_spec(words: str, kernel: str) -> None:
    layer = QuantLinear(K, N, spec=words)
    assert layer.kernel == kernel_of(QuantSpec.parse(words), K) == kernel
    older = {"linear": "whole", "dequant_matmul": "floats", "dynamic_matmul": "rows", "scaled_matmul": "integers"}
    assert layer.product == older[kernel]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_layer_gives_the_bytes_of_its_op(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, K, dtype=dtype)
    for words in ("W8A16", "int4:group:8:affine", "float8_e5m2"):
        q = quantized(words, dtype)
        options = {"block": q.block, "zero_point": q.weight_zero_point, "bias": q.bias}
        assert same(q(x), ops.dequant_matmul(x, q.codes, q.weight_scale, q.spec.format, **options)), words
    for words in ("W8A8", "int4:group:8@int8"):
        q = quantized(words, dtype)
        options = {"block": q.block, "bias": q.bias}
        assert same(q(x), ops.dynamic_matmul(x, q.codes, q.weight_scale, q.spec.format, **options)), words
    for words in ("int8@int8:tensor", "int8@uint8", "uint8@int8:row:affine"):
        q = quantized(words, dtype)
        codes, scale, zero_point = functional.quantized(x, q.spec.activation)
        with torch.no_grad():
            expected = ops.scaled_matmul(
                codes,
                scale,
                q.codes,
                q.weight_scale,
                q.spec.format,
                block=q.block,
                x_zero_point=zero_point,
                zero_point=q.weight_zero_point,
                bias=q.bias,
                dtype=dtype,
            )
        assert same(q(x), expected), words


@pytest.mark.parametrize("words", ["W8A16", "int4:group:128", "W8A8", "int8@uint8:tensor", "int8@int8:row:affine"])
def test_gradients_of_input_bias_and_scale(words: str) -> None:
    q = quantized(words)
    assert q.weight_scale is not None
    q.weight_scale.requires_grad_()
    x, dy = torch.randn(2, 3, K, requires_grad=True), torch.randn(2, 3, N)
    dx, dscale, dbias = torch.autograd.grad(q(x), (x, q.weight_scale, q.bias), dy)
    activation = q.spec.activation
    values = x.detach() if activation is None else functional.project(x.detach(), activation)
    with torch.no_grad():
        br, bk = q.block
        spread = q.weight_scale.repeat_interleave(br, 0)[:N].repeat_interleave(bk, 1)[:, :K]
        weight = q.values()
        units = weight / spread  # the codes less their zero points
        of_weight = torch.einsum("bmn,bmk->nk", dy, values)
        expected = nn.functional.pad(of_weight * units, (0, -K % bk)).unflatten(1, (-1, bk)).sum(-1)
    torch.testing.assert_close(dx, dy @ weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dbias, dy.sum((0, 1)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dscale, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("words", ["W8A16", "W8A8", "W4A16"])
def test_an_adapter_around_frozen_codes_trains(words: str) -> None:
    class Adapted(nn.Module):
        """LoRA: y = q(x) + up(down(x))"""

        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Linear(K, K)
            self.frozen = quantized(words).requires_grad_(False)
            self.down, self.up = nn.Linear(K, 4, bias=False), nn.Linear(4, N, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.before(x)
            y: Tensor = self.frozen(h) + self.up(self.down(h))
            return y

    model, x, target = Adapted(), torch.randn(16, K), torch.randn(16, N)
    codes = model.frozen.weight_codes.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(8):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(model.frozen.weight_codes, codes)
    assert {n for n, p in model.named_parameters() if p.grad is None} == {
        f"frozen.{name}" for name in ("weight_codes", "weight_scale", "bias")
    }
    h = torch.randn(5, K, requires_grad=True)
    (dh,) = torch.autograd.grad(model.frozen(h).sum(), h)
    torch.testing.assert_close(dh, model.frozen.values().sum(0).expand(5, K))


@pytest.mark.parametrize("words", TILED)
def test_tiles_are_the_same_layer(words: str) -> None:
    q = quantized(words)
    tiled = copy.deepcopy(q).tile_()
    assert tiled.tiled
    assert tiled.weight_codes.dtype == torch.uint8
    assert tiled.weight_codes.shape[0] == 2
    assert not tiled.weight_codes.requires_grad
    assert repr(tiled) == repr(q)[:-1] + ", tiled=True)"
    x = torch.randn(3, K, requires_grad=True)
    y = tiled(x)
    torch.testing.assert_close(y, q(x), rtol=1e-5, atol=1e-5)  # each kernel has its own order of the sum
    assert torch.equal(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (q, tiled)))
    assert torch.equal(tiled.values(), q.values())
    assert torch.equal(tiled.dequantize().weight, q.values())

    state = tiled.state_dict()
    assert all(same(state[name], tensor) for name, tensor in q.state_dict().items())
    for copied in (copy.deepcopy(tiled), copy.copy(tiled), pickle.loads(pickle.dumps(tiled))):
        assert not copied.tiled
        assert same(copied.weight_codes, q.weight_codes)
    assert tiled.bfloat16().float().tiled
    fresh = QuantLinear(K, N, spec=words).tile_()
    fresh.load_state_dict(state)
    assert not fresh.tiled
    assert torch.equal(fresh(x), q(x))
    assert tiled.tile_() is tiled
    assert same(tiled.untile_().weight_codes, q.weight_codes)
    assert tiled.untile_() is tiled


def test_tiles_take_only_codes_of_their_shape() -> None:
    fresh = QuantLinear(K, N, spec="int8").tile_()
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_codes: .*torch.Size\(\[18, 70\]\)"):
        fresh.load_state_dict(QuantLinear(K, N - 1, bias=False, spec="int8").state_dict(), strict=False)
    with torch.device("meta"):
        skeleton = QuantLinear(K, N, spec="int8").tile_()
    skeleton.load_state_dict(quantized("int8").state_dict(), assign=True)
    x = torch.randn(2, K)
    torch.testing.assert_close(skeleton(x), quantized("int8")(x), rtol=1e-5, atol=1e-5)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take their device for one that multiplies tiles faster."""
    monkeypatch.setattr(quantlib.nn.linear, "on_gpu", lambda x: True)
    monkeypatch.setattr(backends, "serving", lambda device: "triton")


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("words", TILED)
def test_a_layer_packs_itself_the_first_time_it_multiplies(words: str, device: str, tmp_path: Path) -> None:
    q, x = quantized(words, torch.bfloat16).eval(), torch.randn(3, K).bfloat16()
    want, plain = q(x), copy.deepcopy(q)  # with gradients: nothing moves
    q.requires_grad_(False)
    assert not q.tiled
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(q(x), want, rtol=0.02, atol=0.02)
        assert q.tiled
        assert not q.weight_codes.is_inference()
        assert not q.weight_codes.asked
        q.train()
        assert not q.tiled
        q.eval()
    with torch.no_grad():
        q(x)
    assert all(same(q.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    safetensors.torch.save_model(q, str(tmp_path / "q.safetensors"))
    fresh = QuantLinear(K, N, spec=words, dtype=torch.bfloat16)
    safetensors.torch.load_model(fresh, str(tmp_path / "q.safetensors"))
    for other in (fresh, copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert not other.tiled
        assert same(other.weight_codes, plain.weight_codes)
    assert q.tiled
    assert q.to(torch.float16).tiled
    assert copy.deepcopy(q).to("meta").weight_codes.shape == plain.weight_codes.shape
    assert q.to("meta").weight_codes.shape == plain.weight_codes.shape


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_does_not_pack_itself_where_something_depends_on_its_codes() -> None:
    x = torch.randn(3, K).bfloat16()

    def packs(
        words: str = "int8", change: Callable[[QuantLinear], Any] = lambda q: q, call: Any = QuantLinear.__call__
    ) -> bool:
        q = quantized(words, torch.bfloat16).eval()
        with torch.no_grad():
            change(q)
            call(q, x)
        return q.tiled

    embedding = QuantEmbedding.from_float(nn.Embedding(N, K), "int8")
    assert packs()
    assert not packs("W8A8")
    assert not packs("bfloat16:row")
    assert not packs(change=QuantLinear.train)
    assert not packs(change=lambda q: q.share(embedding))
    assert not packs(change=embedding.share)
    assert not packs(change=lambda q: vars(q).update(_hf_hook=None))
    assert not packs(change=lambda q: q._parameters.update(weight_codes=nn.Parameter(q.weight_codes.data, False)))
    assert not packs(call=lambda q, x: q(x.float()))
    assert not packs(call=lambda q, x: torch.func.vmap(q)(x))
    assert not packs(call=lambda q, x: torch.jit.trace(q, x, check_trace=False))
    assert not packs(call=lambda q, x: torch.export.export(q, (x,)))
    assert not packs(call=lambda q, x: torch.compile(q, backend="eager", fullgraph=True)(x))
    with torch.enable_grad():
        q = quantized("int8", torch.bfloat16).eval()
        q(x)
    assert not q.tiled


@pytest.mark.usefixtures("as_on_a_gpu")
def test_codes_that_a_graph_has_recorded_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = quantized("int8", torch.bfloat16).eval(), torch.randn(3, K).bfloat16()
    with torch.no_grad():
        with monkeypatch.context() as patch:
            patch.setattr(quantlib.nn.linear, "is_recorded", lambda x: True)
            q(x)
        q(x)
        assert not q.tiled
        copied = copy.deepcopy(q)
        copied(x)
        assert copied.tiled
        with monkeypatch.context() as patch:
            patch.setattr(quantlib.nn.linear, "is_recorded", lambda x: True)
            copied(x)
        assert copied.train().tiled


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_layer_without_memory_for_two_copies_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    q, x = quantized("int8", torch.bfloat16).eval(), torch.randn(3, K).bfloat16()
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(ops, "tile", full)
    with torch.no_grad():
        assert torch.equal(q(x), q(x))
    assert len(calls) == 1
    assert not q.tiled


def test_weights_that_are_shared_are_a_matrix() -> None:
    q, embedding = quantized("int8").tile_(), QuantEmbedding.from_float(nn.Embedding(N, K), "int8")
    embedding.share(q)
    assert embedding.weight_codes is q.weight_codes
    assert torch.equal(embedding(torch.arange(N)), q.values())


def test_a_layer_pickled_by_an_earlier_version() -> None:
    q = quantized("W8A8")
    state = {k: v for k, v in q.__getstate__().items() if k not in ("kernel", "_fixed")} | {"product": "rows"}
    old = QuantLinear.__new__(QuantLinear)
    old.__setstate__(state)
    assert (old.kernel, old.product) == ("dynamic_matmul", "rows")
    x = torch.randn(2, K)
    assert torch.equal(old(x), q(x))


@pytest.mark.parametrize("words", ["bf16", "W8A8", "int8@uint8"])
def test_what_is_not_multiplied_as_tiles_is_refused(words: str) -> None:
    with pytest.raises(ValueError, match=r"spec must be of codes that are multiplied by as floats to be tiled, got"):
        quantized(words).tile_()
    with pytest.raises(RuntimeError, match=r"format must be float8_e4m3fn, .* or int4, got float16"):
        quantized("float16:row").tile_()


@pytest.mark.parametrize("words", ["W8A16", "W4A16", "W8A8", "int8@int8:row:affine"])
def test_a_batch_invariant_row_is_the_same_alone(words: str) -> None:
    q, x = quantized(words, batch_invariant=True), torch.randn(33, K)
    assert "batch_invariant=True" in repr(q)
    rows = q(x)
    for m in (0, 7, 32):
        assert same(q(x[m]), rows[m])
        assert same(q(x[m : m + 1]), rows[m : m + 1])


def test_the_op_is_told_of_batch_invariance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that always is so would hide it."""
    told: list[bool] = []
    matmul = ops.dequant_matmul
    monkeypatch.setattr(
        ops, "dequant_matmul", lambda *a, batch_invariant, **k: (told.append(batch_invariant), matmul(*a, **k))[1]
    )
    q = quantized("int8")
    q(torch.randn(2, K))
    q.batch_invariant = True
    q(torch.randn(2, K))
    copy.deepcopy(q)(torch.randn(2, K))
    assert told == [False, True, True]


def test_batch_invariance_that_cannot_be_is_refused() -> None:
    x = torch.randn(2, K)
    with pytest.raises(RuntimeError, match=r"batch_invariant must be False .* got codes of bfloat16, which have no"):
        quantized("bf16", batch_invariant=True)(x)
    with pytest.raises(RuntimeError, match=r"batch_invariant must be False .* got an input of torch.float64"):
        quantized("int8", batch_invariant=True)(x.double())
    with pytest.raises(
        RuntimeError, match=r"batch_invariant must be False where rows share a scale, got .*int8:tensor"
    ):
        quantized("int8@int8:tensor", batch_invariant=True)(x)


def test_sums_that_no_int32_holds_are_refused() -> None:
    q = QuantLinear(140_000, 1, spec="W8A8", device="meta")
    with pytest.raises(RuntimeError, match=r"dynamic_matmul: K must be at most \d+, so that an int32 holds the sum"):
        q(torch.empty(1, 140_000, device="meta"))


def test_float64_is_not_rounded_to_float32() -> None:
    q = quantized("int8").double()
    x = torch.randn(4, K, dtype=torch.float64)
    torch.testing.assert_close(q(x), x @ q.values().double().T + q.bias, rtol=1e-12, atol=1e-12)
    assert q(x.float()).dtype == torch.float32  # a float64 bias is rounded for it


@pytest.mark.parametrize("words", ["W8A16", "W8A8", "int8@uint8", "int8@float8_e4m3fn", "bf16"])
def test_autocast_multiplies_in_its_dtype(words: str) -> None:
    q, x = quantized(words), torch.randn(4, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
        assert q(x.double()).dtype == torch.float64
    assert same(y.detach(), q(x.detach().bfloat16()).detach())
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
