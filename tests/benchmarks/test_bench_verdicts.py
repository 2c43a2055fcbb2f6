"""Verdicts of given times, without a clock: when there is one, its words, and how often a contender is timed."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch

from benchmarks import case, cast, dequant_matmul, machine, matmul, measure, page, report, scaled_matmul, targets
from benchmarks.case import LIMIT, OURS, PEER, READ_WRITE, Contender, Limits, Row
from benchmarks.targets import AMBIGUOUS, MET, MISSED, Target

ROW = Row("cast", "cast", "float32 -> float8_e5m2", "", (8192, 4096), "quantlib cpp", OURS, runs=9, min=1.0, median=1.0,
          spread=0.02, of_copy=0.9, of_read_write=0.96)  # fmt: skip
MACHINE = {"device": "a machine", "instructions": "none", "cores": 2, "threads": 2, "load": 0.0, "copy_gb_per_s": 40.0}
MACHINE |= {"versions": {}, "date": "today", "python": "3"}


def peer(seconds: float, spread: float = 0.03, **changes: Any) -> Row:
    return dataclasses.replace(ROW, backend="torch.compile", role=PEER, min=seconds, spread=spread, **changes)


@pytest.mark.parametrize(
    ("measure", "bound", "seconds", "outcome"),
    [
        ("speedup", 1.3, 1.40, MET),
        ("speedup", 1.3, 1.364, AMBIGUOUS),  # the spreads are 2 % and 3 %: it may be as little as 1.364 / 1.05
        ("speedup", 1.3, 1.369, MET),
        ("speedup", 1.3, 1.24, AMBIGUOUS),
        ("speedup", 1.3, 1.23, MISSED),
        ("time", 0.8, 1 / 0.75, MET),
        ("time", 0.8, 1 / 0.79, AMBIGUOUS),
        ("time", 0.8, 1 / 0.85, MISSED),
        ("above", 0.3, 0.80, MET),
        ("above", 0.3, 0.72, AMBIGUOUS),  # 0.28 above, of which 0.02 + 0.72 * 0.03 = 0.042 are in doubt
        ("above", 0.3, 0.60, MISSED),
    ],
)
def test_a_spread_that_covers_the_difference_is_no_verdict(
    measure: str, bound: float, seconds: float, outcome: str
) -> None:
    target = Target(ROW.case, measure, bound, ("torch.compile",))
    found = targets.verdict(target, [ROW, peer(seconds)])
    assert found.outcome == outcome
    assert found.met == {MET: True, MISSED: False}.get(outcome)
    steady = [dataclasses.replace(row, spread=0.0) for row in (ROW, peer(seconds))]
    assert targets.verdict(target, steady).outcome in (MET, MISSED), "without a spread nothing is in doubt"


@pytest.mark.parametrize(("share", "outcome"), [(0.99, MET), (0.96, AMBIGUOUS), (0.93, AMBIGUOUS), (0.90, MISSED)])
def test_a_share_is_in_doubt_by_its_limit_too(share: float, outcome: str) -> None:
    rows = [dataclasses.replace(ROW, of_read_write=share, spread=0.01),
            dataclasses.replace(ROW, backend=READ_WRITE, role=LIMIT, spread=0.02)]  # fmt: skip
    assert targets.verdict(Target(ROW.case, "of_read_write", 0.95), rows).outcome == outcome


def test_a_noisy_machine_is_not_judged_on() -> None:
    target = next(t for t in targets.TARGETS if t.case == ROW.case and t.measure == "speedup")
    rows = [ROW, peer(2.0)]
    for noise, outcome in ((None, MET), (0.0, MET), (targets.NOISY, MET), (0.3, "not judged: noise 30%")):
        found = {v.target: v for v in targets.verdicts(rows, {**MACHINE, "noise": noise})}
        assert found[target].outcome == outcome
        assert found[target].measured == 2.0
    loud = {**MACHINE, "noise": 0.3}
    assert "noise 30%" in report.headline(loud)
    assert "not judged: noise 30%" in report.target_table(targets.verdicts(rows, loud))
    assert "not judged: noise 30%" in report.as_markdown(loud, rows)
    assert "not judged: noise 30%" in page.as_html(loud, rows, True)
    assert {t["met"] for t in json.loads(report.as_json(loud, rows, True))["targets"]} == {None}


def test_x_in_another_dtype_is_judged_by_its_own_row() -> None:
    name = dequant_matmul.DequantMatmul((1, 4096, 4096), "bfloat16", spec=matmul.W8A16).name
    own = dataclasses.replace(ROW, family="dequant_matmul", op="4096x4096 M=1", conversion="bfloat16 x int8", per="row",
                              dtype="bfloat16", spread=0.0)  # fmt: skip
    assert own.case == name
    wide = dataclasses.replace(own, backend="quantlib cpp float32", dtype="float32", min=1.2)
    target = Target(name, "time", 1.15, ("quantlib cpp",), dtype="float32")
    assert target in targets.TARGETS
    assert targets.verdict(target, [own, wide]).measured == pytest.approx(1.2)
    assert targets.verdict(target, [own, wide]).outcome == MISSED
    assert targets.verdict(target, [own]).outcome == targets.UNKNOWN
    assert str(target) == "x in float32: at most 1.15 x the time of quantlib cpp"


def test_noise_is_how_long_the_slow_runs_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.waver([1.0] * 20) == 0
    assert machine.waver([1.0] * 80 + [9.0] * 20) == 0, "one disturbed run in five"
    assert machine.waver([1.0] * 70 + [1.5] * 30) == pytest.approx(0.5)
    times = itertools.cycle([2.0, 2.0, 2.2, 2.2])
    monkeypatch.setattr(machine, "timed", lambda call, calls: next(times))
    assert machine.noise("cpu") == pytest.approx(0.1)


ONE = cast.Cast((64, 256))


@pytest.mark.parametrize(
    ("times", "seconds", "more"),
    [
        ([1.0] * 2, 0.0, True),  # `least`, whatever it takes
        ([1.0] * 3, 0.0, False),
        ([1.0] * 6, 9.0, True),  # too few for a spread
        ([1.0] * 7, 9.0, False),
        ([1.0, 1.1] * 4, 9.0, True),
        ([1.0, 1.1] * 5, 9.0, False),  # and given up: 9 s are over
        ([0.01, 0.011] * 25, 9.0, False),  # or fifty runs are
        ([1.0] * 6 + [5.0], 99.0, False),  # one of seven does not matter
        ([1.0, 1.01] * 4, 99.0, True) if measure.STEADY < 0.01 else ([1.0, 1.01] * 4, 99.0, False),
    ],
)
def test_timing_stops_by_the_spread(times: list[float], seconds: float, more: bool) -> None:
    assert measure.wants_more(times, ONE, seconds) is more


def test_a_steady_contender_leaves_the_others_to_go_on() -> None:
    def clock(times: Any) -> Any:
        return lambda: next(times)

    steady, wavering = (Contender(name, lambda inputs, outs: lambda: None) for name in ("steady", "wavering"))
    entries = [
        measure.Entry(steady, clock(itertools.repeat(1.0))),
        measure.Entry(wavering, clock(itertools.cycle([1.0, 2.0]))),
    ]
    measure.take_turns(ONE, list(entries), seconds=30.0)
    assert [len(e.times) for e in entries] == [measure.FEWEST, 20]


def test_a_read_and_a_write_are_the_limit_of_the_same_rounds() -> None:
    names = {name: role for role, name in ((OURS, "quantlib cpp"), (LIMIT, READ_WRITE), (LIMIT, case.PLAIN_COPY))}
    contenders = [Contender(name, lambda *_: lambda: None, role, moved=400 if "copy" in name else 0)
                  for name, role in names.items()]  # fmt: skip
    seconds = {"quantlib cpp": 2.0, READ_WRITE: 1.9, case.PLAIN_COPY: 4.0}
    entries = [measure.Entry(c, times=[seconds[c.name]] * 3, moved=c.moved or 250) for c in contenders]
    rows = {row.backend: row for row in measure.as_rows(ONE, entries, Limits(copy=1.0, read=1.0))}
    own = rows["quantlib cpp"]
    assert own.of_read_write == pytest.approx(0.95)
    assert own.of_copy == pytest.approx((250 / 2.0) / (400 / 4.0))
    assert (own.of_read, own.above) == (None, None)
    assert rows[READ_WRITE].of_read_write == 1
    assert rows[case.PLAIN_COPY].of_copy == 1


@pytest.mark.parametrize(("read", "written"), [(4096, 1024), (1024, 4096), (4096, 4096), (1000, 12), (260, 0), (0, 64)])
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_read_and_written(read: int, written: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    case.memory.cache_clear()
    call = case.reads_and_writes(read, written)
    target = case.memory(written, 2)
    target.zero_()
    call()
    both = min(read, written) // 64 * 16
    assert (target[:both] == 1).all()
    assert (target[both:] == (3 if written > read else 0)).all()


@pytest.mark.parametrize("family", [dequant_matmul, scaled_matmul])
def test_a_product_has_x_in_every_dtype(family: Any) -> None:
    for one in family.cases(False, shape=(16, 256)):
        if one.spec.weight_only == one.spec or one.conversion.startswith("float32"):
            rows: list[Row] = []
            measure.measure(one, rows, seconds=0.0, without=[""])
            ours = {row.dtype: row for row in rows if row.role == OURS}
            assert set(ours) == set(matmul.DTYPES)
            assert all(row.differing == 0 and row.compared and row.min for row in ours.values()), one.name
            read = next(row for row in rows if row.backend == case.PLAIN_READ)
            assert read.of_read == 1
            assert read.bytes == one.spec.codes_shape((16, 256))[1] * 16
            assert all(row.of_read and row.above is None for row in ours.values())
            wide, narrow = ours["float32"].bytes, ours["bfloat16"].bytes
            assert wide is not None
            assert narrow is not None
            assert wide - narrow == 2 * one.shape[0] * (16 + 256)


def test_a_wrong_byte_of_x_in_another_dtype_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = dequant_matmul.cases(True, shape=(16, 256))[0]
    right = dequant_matmul.DequantMatmul.our_op

    def wrong(self: Any, inputs: Any, outs: Any) -> Any:
        call = right(self, inputs, outs)
        if self.dtype != "float16":
            return call

        def changed() -> None:
            call()
            outs[0].view(torch.int16)[0, 3] ^= 1

        return matmul.turns([changed])

    monkeypatch.setattr(dequant_matmul.DequantMatmul, "our_op", wrong)
    rows: list[Row] = []
    measure.measure(one, rows, seconds=0.0, without=[""])
    errors = {row.dtype: row.error for row in rows if row.role == OURS}
    assert "1 of 16 differ, first at [0, 3]" in errors["float16"]
    assert errors["float32"] == errors["bfloat16"] == ""
