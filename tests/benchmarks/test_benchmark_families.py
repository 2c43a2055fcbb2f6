"""Every case of every family runs at a tiny size, and what is wrong by one code has no time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantlib
from benchmarks import command, graphs, matmul, measure, modules, peer_models, peers, targets, transformer
from benchmarks.case import OURS, PEER, Case, Contender, Row
from quantlib.nn import QuantLinear, QuantModule

SHAPE = (16, 256)
OWN_ONLY = ("",)  # no peer: the names of all begin so


def measured(one: Case, without: tuple[str, ...] = OWN_ONLY) -> dict[str, Row]:
    rows: list[Row] = []
    measure.measure(one, rows, seconds=0.0, without=without)
    return {row.backend: row for row in rows}


def own(rows: dict[str, Row]) -> Row:
    return next(row for row in rows.values() if row.role == OURS)


@pytest.mark.parametrize("name", [name for name in command.FAMILIES if name != "startup"])
def test_every_case_is_right_and_gets_a_time(name: str) -> None:
    seen = set()
    for one in command.FAMILIES[name].cases(False, shape=SHAPE):
        row = own(measured(one))
        assert not row.error, one.name
        assert row.min is not None
        assert row.differing == 0, one.name
        assert row.compared, one.name
        assert (row.flops or 0) == one.flops
        assert row.family == name
        seen.add(row.case)
    assert len(seen) == len(command.FAMILIES[name].cases(False, shape=SHAPE)), "two cases of one name"


@pytest.fixture
def fresh_models() -> Any:
    """None that an earlier test made, and none left for a later one."""
    peer_models.copies.cache_clear()
    yield
    peer_models.copies.cache_clear()


def smallest(module: Any, kind: type[Case]) -> Case:
    return next(one for one in module.cases(True, shape=SHAPE) if isinstance(one, kind))


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (modules, modules.Linear),
        (modules, modules.Embedding),
        (modules, modules.Conv2d),
        (transformer, transformer.Transformer),
    ],
    ids=lambda value: value.__name__,
)
def test_one_wrong_code_has_no_time(
    module: Any, kind: type[Case], monkeypatch: pytest.MonkeyPatch, fresh_models: None
) -> None:
    right = quantlib.quantize_

    def wrong(model: nn.Module, *args: Any, **options: Any) -> None:
        right(model, *args, **options)
        last = [m for m in model.modules() if isinstance(m, QuantModule)][-1]
        last.weight_codes[1, 0] *= -1

    monkeypatch.setattr(quantlib, "quantize_", wrong)
    row = own(measured(smallest(module, kind)))
    assert "differ, first at" in row.error
    assert row.min is None


def test_a_block_that_is_wrong_as_a_whole_has_no_time(monkeypatch: pytest.MonkeyPatch, fresh_models: None) -> None:
    right = QuantLinear.forward

    def wrong(self: QuantLinear, x: Tensor) -> Tensor:
        return right(self, x) * (1 if x.dtype == torch.float64 else 1.1)

    monkeypatch.setattr(QuantLinear, "forward", wrong)
    row = own(measured(smallest(transformer, transformer.Transformer)))
    assert "away from float64" in row.error
    assert row.min is None


@pytest.mark.parametrize(("spec", "names"), [(s, [q.name for q in of]) for s, of in peer_models.PEERS.items()], ids=str)
def test_missing_peers_are_rows_that_say_so(
    spec: Any, names: list[str], monkeypatch: pytest.MonkeyPatch, fresh_models: None
) -> None:
    def missing(name: str) -> Any:
        raise peers.MissingError(f"not installed: no {name}")

    monkeypatch.setattr(peer_models, "package", missing)
    one = modules.Linear((1, *SHAPE), "bfloat16", spec=spec)
    rows = measured(one, without=())
    for name in names:
        row = rows[name]
        assert row.role == PEER
        assert (row.min is None) == ("not installed" in row.error) == (name != "torch quantize_dynamic"), row


@pytest.mark.parametrize("spec", [matmul.W8A16, matmul.W8A8, matmul.W4A16], ids=str)
def test_whoever_quantizes_the_values_finds_the_codes(spec: Any) -> None:
    """Otherwise a module would be compared with codes that are not its own."""
    codes, scale = matmul.exact_weight((24, 256), spec.weight_only)
    block = spec.block((24, 256))
    values = quantlib.dequantize(codes, scale, spec.format, block=block, size=256)
    for dtype in (torch.float32, torch.bfloat16):
        again, again_scale = quantlib.quantize_dynamic(values.to(dtype), spec.format, block=block)
        assert torch.equal(again, codes)
        assert torch.equal(again_scale, scale)


def test_weights_take_turns() -> None:
    calls: list[int] = []
    turns = matmul.turns([lambda i=i: calls.append(i) for i in range(3)])  # type: ignore[misc]
    for _ in range(5):
        turns()
    assert calls == [0, 1, 2, 0, 1]
    assert len(turns) == 3


@pytest.mark.parametrize(
    ("nbytes", "cache", "count"),
    [(1 << 20, 60 << 20, 181), (60 << 20, 60 << 20, 4), (1 << 30, 60 << 20, 2), (0, 10, 31)],
)
def test_rotation_exceeds_three_caches(nbytes: int, cache: int, count: int) -> None:
    found = graphs.rotation(nbytes, cache)
    assert found == count
    assert found * max(nbytes, 1) > 3 * cache
    assert found == 2 or (found - 1) * max(nbytes, 1) <= 3 * cache


def test_slope_and_intercept() -> None:
    """The fit finds slope and intercept of exact times, and of times of which one is 4 % too long."""
    sizes = [2.0**i for i in range(16, 32, 3)]
    exact = [3e-6 + size / 4.3e12 for size in sizes]
    assert graphs.fit(sizes, exact) == pytest.approx((4300, 3.0))
    exact[2] *= 1.04
    assert graphs.fit(sizes, exact) == pytest.approx((4300, 3.0), rel=0.02)

    def row(size: float, backend: str) -> Row:
        return Row("cast", "cast", "a", "", (1,), backend, OURS, min=2e-6 + size / 1e12, bytes=int(size))

    rows = [row(size, "quantlib cuda") for size in sizes] + [row(size, "a peer") for size in sizes[:2]]
    (line,) = graphs.lines(rows)
    assert line.case == "cast a"
    assert line[1:] == pytest.approx(("quantlib cuda", 1000, 2.0))


def test_on_a_gpu_no_two_calls_in_turn_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes turns by itself is captured as it is; another is bound to more copies than a cache holds."""
    bound: list[torch.Tensor] = []  # held: the memory of a tensor that is gone may be another one's

    def bind(inputs: Any, outs: Any) -> Callable[[], None]:
        bound.append(inputs[0])
        return lambda: None

    device = type("Device", (), {"L2_cache_size": 1000})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    x = torch.zeros(250)
    assert len(graphs.in_turn(Contender("somebody", bind), (x,), ())) == 4
    assert len({x.data_ptr() for x in bound}) == 4
    bound.clear()
    turns = Contender("in turn", lambda inputs, outs: matmul.turns([bind(inputs, outs)] * 5))
    assert len(graphs.in_turn(turns, (x,), ())) == 5
    assert len(bound) == 1


def test_verdicts_are_of_one_shape_each() -> None:
    base: dict[str, Any] = {"family": "cast", "op": "cast", "conversion": "float32 -> float16", "per": ""}
    rows = [
        Row(**base, shape=(rows, 8192), backend=name, role=role, min=time)
        for rows in (4096, 8192)
        for name, role, time in (("quantlib cpp", OURS, rows / 4096), ("torch copy_", PEER, 3.0))
    ]
    assert [v.measured for v in targets.verdicts(rows, {})] == [3.0, 1.5]


def test_every_gpu_target_has_its_case_and_peers() -> None:
    families = (module for name, module in command.FAMILIES.items() if name not in ("call", "startup"))
    every = [one for module in families for one in module.cases(False, shape=command.FULL, device="cuda")]
    names = {one.name: {c.name for c in one.contenders()} for one in every}
    for target in targets.GPU_TARGETS:
        assert set(target.against) <= names[target.case], target


def test_a_gpu_has_sizes_enough_for_a_line() -> None:
    for name in ("cast", "quantize", "quantize_dynamic", "dequantize", "compute_scale", "fake_quantize"):
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for one in command.FAMILIES[name].cases(True, shape=command.FULL, device="cuda"):
            shapes.setdefault(one.name, set()).add(one.shape)
        assert all(len(of) == len(graphs.SHAPES) + 1 for of in shapes.values()), name
        assert len(command.FAMILIES[name].cases(False, shape=command.FULL, device="cuda")) < 40
        assert {one.shape for one in command.FAMILIES[name].cases(True, shape=SHAPE, device="cuda")} == {SHAPE}
