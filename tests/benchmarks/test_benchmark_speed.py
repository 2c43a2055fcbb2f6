"""``pytest --benchmark-only``: the quick set for pytest-benchmark to compare with saved runs; a tiny one otherwise."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks import command, measure
from benchmarks.case import OURS, Case, Row

pytest.importorskip("pytest_benchmark")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("benchmark_only"):
        cases = command.chosen(quick=True)
    else:
        cases = command.chosen(quick=True, families=["cast", "modules"], shape=(16, 256))[::4]
    metafunc.parametrize("one", cases, ids=lambda one: f"{one.name} {'x'.join(map(str, one.shape))}")


def test_speed(one: Case, benchmark: Any) -> None:
    """quantlib's call, timed by the plugin; as extra_info its row of `measure`, and those of its peers."""
    quick = benchmark.enabled
    rows: list[Row] = []
    measure.measure(one, rows, seconds=0.1 if quick else 0.0, without=() if quick else [""])
    own = next(row for row in rows if row.role == OURS)
    assert not own.error
    contender = next(c for c in one.contenders() if c.role == OURS)
    inputs = one.inputs()
    benchmark.group = one.family
    benchmark.extra_info.update(dataclasses.asdict(own), rows=[dataclasses.asdict(row) for row in rows])
    benchmark(contender.bind(inputs, one.outs(*inputs)))
