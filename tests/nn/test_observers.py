"""Observers: the range of what passed, the scale that follows, and values that are not finite."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from defaults import default_dtype
from torch import Tensor

from quantlib import nn, ops
from quantlib.nn.observers import OBSERVERS, HistogramObserver, Observer, by_block, initial_scale
from quantlib.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("device")

SHAPE = (6, 35)
SPECS = ("int8:tensor", "int8:row", "int4:group:8", "int8:tile:4", "uint8:tensor", "int4:group:16:affine", "fp8")
KINDS = sorted(OBSERVERS)


def seen(kind: str, spec: str, *tensors: Tensor, **options: float) -> Observer:
    observer = OBSERVERS[kind](tensors[0].shape, spec, **options)  # type: ignore[arg-type]
    for x in tensors:
        observer(x)
    return observer


def scale_of(x: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    result = ops.compute_scale(x, spec.format, spec.block(x.shape), symmetric=spec.symmetric is True)
    return result if isinstance(result, tuple) else (result,)


def same(got: tuple[Tensor | None, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip([t for t in got if t is not None], expected, strict=True))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["minmax", "moving_average"])
def test_of_one_tensor_the_scale_is_that_of_quantize(kind: str, spec: str) -> None:
    x = torch.randn(SHAPE) + 0.3
    observer = seen(kind, spec, x)
    assert same(observer.scale(), scale_of(x, observer.spec))


@pytest.mark.parametrize("spec", SPECS)
def test_min_max_is_that_of_all_tensors_at_once(spec: str) -> None:
    first, second = torch.randn(SHAPE), 2 * torch.randn(SHAPE)
    both = torch.where(first.abs() > second.abs(), first, second)
    observer = seen("minmax", spec, first, second)
    if observer.spec.symmetric:
        assert same(observer.scale(), scale_of(both, observer.spec))
    assert isinstance(observer, nn.MinMaxObserver)
    block = observer.spec.block(SHAPE)
    stacked = torch.cat([by_block(first, block), by_block(second, block)], 1)
    assert torch.equal(observer.lowest.flatten(), stacked.amin(1).clamp(max=0))
    assert torch.equal(observer.highest.flatten(), stacked.amax(1).clamp(min=0))


def test_a_moving_average_moves_by_its_rate() -> None:
    xs = [torch.tensor([[-1.0, 2.0]]) * k for k in (1, 3, 2)]
    observer = seen("moving_average", "uint8:tensor", *xs, rate=0.25)
    assert isinstance(observer, nn.MovingAverageObserver)
    expected = 1.0
    for k in (3, 2):
        expected += 0.25 * (k - expected)
    assert math.isclose(observer.highest.item(), 2 * expected, rel_tol=1e-6)
    assert math.isclose(observer.lowest.item(), -expected, rel_tol=1e-6)


def test_a_moving_average_starts_with_the_first_values_of_a_block() -> None:
    zeros = torch.zeros(2, 8)
    one_row = torch.tensor([[0.0], [3.0]]).expand(2, 8)
    both = torch.tensor([[2.0], [5.0]]).expand(2, 8)
    observer = seen("moving_average", "int8:row", zeros, one_row, both, rate=0.25)
    assert isinstance(observer, nn.MovingAverageObserver)
    assert torch.equal(observer.highest.flatten(), torch.tensor([2.0, 3.5]))


@pytest.mark.parametrize("spec", ["int8:tensor", "int8:row", "int8:group:8"])
def test_a_histogram_that_grew_counts_what_one_of_the_final_width_would(spec: str) -> None:
    small, large = torch.randn(SHAPE) * 1e-3, torch.randn(SHAPE) * 40
    grown, whole = (HistogramObserver(SHAPE, spec, bins=64) for _ in range(2))
    grown(small), grown(large)
    whole(large), whole(small)
    assert torch.equal(grown.top, whole.top)
    assert int(grown.counts.sum()) == 2 * small.numel()
    # what moves to wider bins does so as the middle of its own, which lies in the same wide bin
    assert torch.equal(grown.counts, whole.counts)
    values = torch.cat([by_block(t, grown.spec.block(SHAPE)) for t in (small, large)], 1)
    assert (grown.top > values.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("spec", ["int8:tensor", "uint8:tensor"])
def test_a_percentile_leaves_out_its_share(spec: str) -> None:
    x = torch.linspace(-1, 1, 20001).view(1, -1)
    outliers = torch.cat([x, torch.full((1, 10), 50.0)], 1)
    observer = seen("percentile", spec, outliers, percentile=90.0, bins=16384)
    scale, zero_point = observer.scale()
    steps = 127 if zero_point is None else 255 / 2
    assert math.isclose(scale.item() * steps, 0.9, rel_tol=2e-2)
    everything, _ = seen("percentile", spec, x, percentile=100.0).scale()
    assert same((everything,), scale_of(x, observer.spec)[:1])


@pytest.mark.parametrize(
    "spec", ["int4:tensor", "int4:tensor:affine", "float4_e2m1fn:tensor", "int4:row", "int4:group:64"]
)
def test_least_squares_beats_min_max(spec: str) -> None:
    x = torch.randn(4, 256) ** 3
    parsed = QuantSpec.parse(spec)

    def noise(scale: Tensor, zero_point: Tensor | None) -> float:
        y = ops.fake_quantize(x, scale, parsed.format, block=parsed.block(x.shape), zero_point=zero_point)
        return float((y - x).square().sum())

    widest = noise(*seen("minmax", spec, x).scale())
    exact, histogram = noise(*initial_scale(x, parsed, "mse")), noise(*seen("mse", spec, x).scale())
    assert exact < 0.95 * widest
    assert histogram < 1.02 * exact + 1e-6 * widest


def test_lsqs_initial_scale() -> None:
    x = torch.randn(3, 50)
    scale, zero_point = initial_scale(x, QuantSpec.parse("int4:row"), "lsq")
    torch.testing.assert_close(scale, 2 * x.abs().mean(1, keepdim=True) / math.sqrt(7))
    assert zero_point is None
    ragged, _ = initial_scale(x, QuantSpec.parse("int4:group:32"), "lsq")
    torch.testing.assert_close(ragged[:, 1], 2 * x[:, 32:].abs().mean(1) / math.sqrt(7))
    with pytest.raises(ValueError, match="initial must be minmax or mse for a spec with a zero point, got lsq"):
        initial_scale(x, QuantSpec.parse("uint8"), "lsq")
    with pytest.raises(ValueError, match="initial must be minmax, mse or lsq, got 'best'"):
        initial_scale(x, QuantSpec.parse("int8"), "best")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_left_out_and_reported_once(kind: str) -> None:
    x = torch.randn(SHAPE)
    dirty = x.clone()
    dirty[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    clean = torch.where(dirty.isfinite(), dirty, 0)
    observer = OBSERVERS[kind](SHAPE, "int8:tensor")
    observer(x)
    with pytest.warns(RuntimeWarning, match="left 3 values that are not finite out of its range"):
        observer(dirty), observer.report()  # nothing waits for a GPU to be asked; on the CPU it was said already
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observer(dirty)
        observer(torch.full(SHAPE, math.nan))  # nothing is learned of it, and the range stays
    assert int(observer.nonfinite) == 6 + dirty.numel()
    assert int(observer.batches) == 3
    assert same(observer.scale()[:1], seen(kind, "int8:tensor", x, clean, clean).scale()[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_observers_are_modules(kind: str) -> None:
    xs = torch.randn(3, *SHAPE)
    observer = seen(kind, "int8:tensor", xs[0], xs[1])
    copies = [copy.deepcopy(observer), pickle.loads(pickle.dumps(observer)), OBSERVERS[kind](SHAPE, "int8:tensor")]
    copies[2].load_state_dict(observer.state_dict())
    observer(xs[2])
    for other in copies:
        other.half()(xs[2])
        assert same(other.scale()[:1], observer.scale()[:1])  # type: ignore[arg-type]
    assert not list(observer.parameters())


def test_compiled_they_see_the_same() -> None:
    xs = torch.randn(2, *SHAPE)
    eager, compiled = (nn.PercentileObserver(SHAPE, "int8:tensor") for _ in range(2))
    program = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for x in xs:
        eager(x), program(x)
    torch.testing.assert_close(eager.scale(), compiled.scale())


def test_activations_of_any_batch_share_one_scale() -> None:
    observer = nn.MinMaxObserver((8,), "int8:tensor")
    for shape in ((2, 8), (3, 5, 8), (8,), (0, 8)):
        x = torch.randn(shape)
        assert observer(x) is x
    assert int(observer.batches) == 3


BAD = {
    "spec must have a scale to observe, got bfloat16": lambda: nn.MinMaxObserver((4, 4), "bfloat16"),
    r"x must have 4 x 1 scales, got \[3, 4\]": lambda: nn.MinMaxObserver((4, 4), "int8:row")(torch.ones(3, 4)),
    "rate must be above 0 and at most 1, got 2": lambda: nn.MovingAverageObserver((4,), "int8:tensor", rate=2),
    "percentile must be above 50 and at most 100": lambda: nn.PercentileObserver((4,), "int8:tensor", percentile=0.99),
    "bins must be even and at least 2, got 7": lambda: nn.MSEObserver((4,), "int8:tensor", bins=7),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BAD[message]()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_the_default_dtype_changes_no_scale(kind: str, dtype: torch.dtype) -> None:
    x = torch.randn(*SHAPE)
    want = seen(kind, "int8:tensor", x, 3 * x).scale()
    with default_dtype(dtype):
        got = seen(kind, "int8:tensor", x, 3 * x).scale()
    assert same(got, tuple(t for t in want if t is not None))
