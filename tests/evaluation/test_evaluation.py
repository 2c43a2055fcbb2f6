"""`quantlib.evaluate` by sums that NumPy makes, and what `quantlib eval` measures on."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantlib
from quantlib.evaluation import contenders, page, subjects
from quantlib.evaluation.scores import RUN, EncoderReference, Estimate, LanguageReference
from quantlib.spec import SCHEMES, QuantSpec

V, L = 32, 80


def language(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(V, 32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, V)).eval()


def tokens(n: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (n, L), generator=torch.Generator().manual_seed(seed))


def softmax(model: nn.Module, x: Tensor) -> np.ndarray:
    with torch.no_grad():
        logits = model(x[None])[0].double().numpy()
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_evaluate_is_its_formula() -> None:
    model, other, windows = language(0), language(1), tokens(3)
    found = quantlib.evaluate(other, model, windows)
    p = np.stack([softmax(model, w) for w in windows])
    q = np.stack([softmax(other, w) for w in windows])
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    nll = -np.log(np.take_along_axis(q[:, :-1], windows.numpy()[:, 1:, None], -1))[..., 0]
    assert found.tokens == 3 * L
    assert found.kl.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert found.perplexity.mean == pytest.approx(math.exp(nll.mean()), rel=1e-4)
    assert found.top1.mean == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())
    runs = [part.mean() for part in np.split(kl.ravel(), range(RUN, kl.size, RUN))]
    assert found.kl.error == pytest.approx(np.std(runs, ddof=1) / math.sqrt(len(runs)), rel=1e-3)


def test_a_model_beside_itself() -> None:
    model = language()
    alone = quantlib.evaluate(model, model, tokens(2))
    assert (alone.kl.mean, alone.kl.error, alone.top1.mean) == (0.0, 0.0, 1.0)
    assert alone.perplexity.mean == quantlib.evaluate(language(), model, tokens(2)).perplexity.mean


def test_fewer_bits_lose_more() -> None:
    model, losses = language(), []
    for spec in ("int8:row", "int4:group:32"):
        quantized = language()
        quantlib.quantize_(quantized, spec)
        losses.append(quantlib.evaluate(quantized, model, tokens(4)).kl.mean)
    assert 0 < losses[0] < losses[1] / 10


def test_texts_apart() -> None:
    model, other = language(0), language(1)
    known = LanguageReference(model, {"a": list(tokens(2, 0)), "b": list(tokens(2, 1)), "none": []})
    scores = known.score(other)
    assert list(scores.parts) == ["a", "b"]
    assert scores.kl.mean == pytest.approx((scores.parts["a"].kl.mean + scores.parts["b"].kl.mean) / 2)
    assert scores.parts["b"] == LanguageReference(model, {"b": list(tokens(2, 1))}).score(other)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([], "got none"),
        ([torch.zeros(1, dtype=torch.int64)], r"L >= 2, inputs has int64 \[1\]"),
        ([torch.zeros(4)], r"int64 tokens with L >= 2, inputs has float32 \[4\]"),
    ],
)
def test_inputs_that_cannot_be_measured_on(inputs: list[Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantlib.evaluate(language(), language(), inputs)


def test_a_model_without_logits_a_token() -> None:
    model = nn.Sequential(nn.Embedding(V, 32), nn.Flatten(1), nn.Linear(32 * L, V))
    with pytest.raises(ValueError, match=rf"model must give logits \[1, {L}, V\], got \[1, {V}\]"):
        quantlib.evaluate(model, model, tokens(1))


def test_estimates() -> None:
    few = Estimate.of(torch.tensor([1.0, 3.0]))
    assert (few.mean, few.error) == (2.0, 1.0)
    assert math.isnan(Estimate.of(torch.tensor([1.0])).error)


def test_an_encoder_by_cosines() -> None:
    model, x = nn.Linear(8, 4, bias=False), torch.randn(6, 8)
    known = EncoderReference(model, lambda m: m(x).detach())
    assert abs(known.score(model).mean) < 1e-12
    turned = nn.Linear(8, 4, bias=False)
    turned.weight = nn.Parameter(-model.weight.detach())
    assert known.score(turned).mean == pytest.approx(2)


def test_what_is_compared_by_itself_has_every_named_spec_and_four_bit_format() -> None:
    specs = [QuantSpec.parse(text) for text in contenders.plain_specs()]
    assert len(set(specs)) == len(specs)
    for text in SCHEMES.values():
        assert QuantSpec.parse(text) in specs or not QuantSpec.parse(text).scaled
    for spec in ("float4_e2m1fn:group:128", "int4:group:32:bfloat16", "int4:group:128:affine"):
        assert QuantSpec.parse(spec) in specs


@pytest.mark.parametrize("text", contenders.plain_specs())
def test_a_contender_is_quantize(text: str) -> None:
    model, expected = language(), language()
    subject = subjects.Subject("tiny", model, kept=frozenset({"3"}))
    made, bits = contenders.made(contenders.ours(text), subject)
    report = quantlib.quantize_(expected, text, lambda module, name: name != "3")
    assert bits == 8 * report.bytes_after / model[1].weight.numel()
    assert torch.equal(made[1].weight + 0, expected[1].weight + 0)
    assert made[3] is not model[3]
    assert torch.equal(made[3].weight, model[3].weight)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("text", ["int4:group:128+gptq", "9.5", "9.5+gptq"])
def test_a_contender_that_needs_inputs(text: str) -> None:
    subject = subjects.Subject("tiny", language(), kept=frozenset({"3"}), calibration=[w[None] for w in tokens(4)])
    contender = contenders.ours(text)
    made, bits = contenders.made(contender, subject)
    assert ("GPTQ" in contender.name) == text.endswith("+gptq")
    assert bits <= 9.5
    plain, _ = contenders.made(contenders.ours("int4:group:128"), subject)
    known = LanguageReference(subject.model, {"": list(tokens(8, 5))})
    assert known.score(made).kl.mean < known.score(plain).kl.mean
    assert torch.equal(made[3].weight, subject.model[3].weight)


def test_moving_off_the_grid_keeps_the_function() -> None:
    transformers = pytest.importorskip("transformers", reason="a Llama of transformers: not installed")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.2, 2)
    x = tokens(1)
    with torch.no_grad():
        before = model(x).logits
        weights = {name: p.clone() for name, p in model.named_parameters()}
        subjects.off_grid_(model)
        after = model(x).logits
    assert float((after - before).norm() / before.norm()) < 1e-5
    still = [name for name, p in model.named_parameters() if torch.equal(p, weights[name])]
    assert still == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    with pytest.raises(ValueError, match="must be built as a Llama"):
        subjects.off_grid_(language())


def test_the_texts_that_ship_are_long_enough_and_plain() -> None:
    for name in subjects.TEXTS:
        text = subjects.shipped(name)
        assert text.isascii()
        assert len(text.split()) > 1700
        assert len(subjects.sentences(text)) > 40


def test_the_table_in_a_page(tmp_path: Path) -> None:
    rows = [page.Row("a", False, 4.5, loss=Estimate(0.25, 0.01)), page.Row("b", True, 0.0, why="not installed")]
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN.format('tiny')}\nold\n{page.END.format('tiny')}\nafter\n")
    for _ in range(2):
        page.put(file, "tiny", page.markdown(rows))
    begin, *middle, end = file.read_text().strip().split("\n")[1:-1]
    assert (begin, end) == (page.BEGIN.format("tiny"), page.END.format("tiny"))
    table = ["|  | bits | 1 - cosine |", "| --- | --: | --: |", "| a | 4.50 | 0.2500 ± 0.0100 |"]
    assert middle == ["", *table, ""]
    assert page.table(rows)[-1] == "b: not installed"
    file.write_text("no marks")
    with pytest.raises(ValueError, match="--markdown must be a file with the lines"):
        page.put(file, "tiny", [])
