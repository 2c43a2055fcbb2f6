"""The example of quantization-aware training: that it runs, and that it says so when something is not as it should."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quantlib import convert_
from quantlib.examples import qat, tasks, training
from quantlib.examples.tasks import Score
from quantlib.examples.training import Run, Schedule

WITH_DIGITS = importlib.util.find_spec("sklearn") is not None


def runs(**shares: float) -> list[Run]:
    """Runs of int4:row that lose 0.1 nats, and regain these shares of them."""
    fp32, quantized = Score(1.0, 0.9), Score(1.1, 0.8)
    return [
        Run(task, "int4:row", 0, fp32, quantized, Score(1.1 - 0.1 * share, 0.8 + 0.1 * share), {})
        for task, share in shares.items()
    ]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qat, "QUICK", Schedule(6, 5, 1))


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert qat.main(["--quick", "--save", str(tmp_path / "out" / "qat.png")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "every deployed code is the one that was trained" in printed.out
    assert WITH_DIGITS or "digits: left out" in printed.out
    with (tmp_path / "out" / "qat.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = ["digits", "characters"] if WITH_DIGITS else ["characters"]
    assert [(row["task"], row["spec"]) for row in rows] == [(task, spec) for task in chosen for spec in qat.SPECS]
    assert all(0 < float(row["qat_loss"]) < 10 for row in rows)
    assert (tmp_path / "out" / "qat.png").exists() == (importlib.util.find_spec("matplotlib") is not None)


@pytest.mark.parametrize(("share", "status"), [(0.5001, 0), (0.4999, 1), (float("nan"), 1)])
def test_half_of_the_loss_has_to_be_regained(
    share: float, status: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def experiment(task: tasks.Task, *_: Any) -> Iterator[Run]:
        yield from runs(**{task.name: share})

    monkeypatch.setattr(qat, "experiment", experiment)
    assert qat.main(["--tasks", "characters"]) == status
    assert ("characters, int4:row:" in capsys.readouterr().out) == bool(status)


def test_a_deployed_code_that_was_not_trained_is_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def faulty(model: nn.Module) -> None:
        convert_(model)
        model.get_parameter("head.weight_codes").data[0, 0] ^= 1

    monkeypatch.setattr(training, "convert_", faulty)
    monkeypatch.setattr(training, "SPECS", ("int8:row",))
    assert qat.main(["--quick", "--tasks", "characters"]) == 1
    assert "head has codes of other weights than those trained" in capsys.readouterr().out


def test_a_share_is_that_of_the_means() -> None:
    group = [*runs(a=1.0), *runs(a=0.5)]
    assert qat.share_of(group) == pytest.approx(0.75)
    line = qat.table(group)[1].split()
    assert line == ["a", "int4:row", "1.0000", "1.1000", "1.0250", "75%", "90.00%", "80.00%", "87.50%"]


def test_the_same_seed_trains_the_same_scales() -> None:
    task = tasks.characters()
    torch.manual_seed(1)
    first, second = (list(training.experiment(task, 0, Schedule(2, 2, 1), lambda: None)) for _ in range(2))
    assert first == second
    assert all(len(steps) == 2 for run in first for steps in run.scales.values())


def test_a_wrong_word_is_a_usage_error() -> None:
    with pytest.raises(SystemExit) as stop:
        qat.main(["--tasks", "chess"])
    assert stop.value.code == 2
