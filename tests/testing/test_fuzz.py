"""A share of the random calls of `make fuzz`, the same ones on every machine; and planted faults of each class."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import fresh
import pytest
import torch

from quantlib import backends, ops
from quantlib.testing import fuzz

CALLS = 1000


@pytest.mark.skipif(sys.platform != "linux", reason="the calls run in forked processes")
def test_random_calls() -> None:
    """Run in another process: what is forked there has run nothing yet."""
    command = ["-m", "quantlib.testing.fuzz", "--calls", str(CALLS)]
    done = fresh.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert f"{CALLS} calls" in done.stdout


def test_a_seed_is_a_call() -> None:
    """The same call each time, with the same bytes expected, and smaller where less is done to it."""
    for seed in range(40):
        (one, after), (other, again) = fuzz.draw(seed), fuzz.draw(seed)
        texts = [re.sub(r"\bj\d+", "j", str(call)) for call in (one, other)]  # torch numbers the jagged axes it makes
        assert (texts[0], after) == (texts[1], again)
        call, after = fuzz.draw(seed, kept=())
        assert not call.faults
        assert after is fuzz.After.SERVED


def test_every_op_and_every_overload_is_drawn() -> None:
    names = {fuzz.draw(seed, kept=())[0].name for seed in range(1500)}
    drawn = {name.removeprefix("torch.ops.quantlib.").removesuffix(".default") for name in names if "torch.ops" in name}
    assert drawn == set(backends.SCHEMAS)
    public = {name.rpartition(".")[2] for name in names if "torch.ops" not in name}
    assert public == set(ops.__all__) - {"grad_factor"}  # of two numbers


def planted(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], seeds: Sequence[int] = range(20), limit: float = 60.0
) -> dict[str, fuzz.Finding]:
    """Return the findings of a hunt, by class, where ``quantlib.cast`` has ``fault``."""
    monkeypatch.setattr(ops, "cast", fault)
    found = fuzz.hunt(seeds, ["composite"], "cast", limit)
    return {finding.kind: finding for finding in found if finding.call.startswith("quantlib.cast(")}


@functools.cache
def casts() -> dict[int, fuzz.Call]:
    return {seed: fuzz.draw(seed, "cast")[0] for seed in range(3000)}


def seeds_with(fault: str) -> list[int]:
    """Calls of ``quantlib.cast`` with this done to them, and nothing else."""
    calls = casts()
    wanted = [
        seed for seed, call in calls.items() if not call.raw and len(call.faults) == 1 and fault in call.faults[0]
    ]
    assert wanted
    return wanted


def test_a_crash_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, lambda x, *_, **__: os.kill(os.getpid(), signal.SIGSEGV))
    assert "SIGSEGV" in found["crash"].said
    assert "fuzz.draw(" in str(found["crash"])


def test_a_hang_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = planted(monkeypatch, lambda *_, **__: time.sleep(600), range(4), limit=1.0)
    assert "no result" in found["hang"].said


def test_an_unclear_message_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("quantlib: a call of torch failed")

    found = planted(monkeypatch, fault)
    assert set(found) == {"unclear message"}
    assert found["unclear message"].kept == ()  # nothing has to be done to the call for it


def test_a_refused_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: Any, **__: Any) -> None:
        raise ValueError("cast: x must be something else")

    assert set(planted(monkeypatch, fault)) == {"refused"}


def test_a_wrong_byte_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.cast

    def fault(*args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(*args, **kwargs)
        if y.numel():
            y.view(torch.uint8).view(-1)[-1] ^= 1
        return y

    found = planted(monkeypatch, fault)
    assert "expected 0x" in found["wrong bytes"].said


def test_a_written_input_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.cast

    def fault(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = right(x, *args, **kwargs)
        if x.is_contiguous() and x.numel():
            x.detach().view(torch.uint8).view(-1)[-1] ^= 1
        return y

    assert "written input" in planted(monkeypatch, fault)


def test_a_lost_gradient_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, seeds = ops.cast, seeds_with("x: requires a gradient")
    found = planted(monkeypatch, lambda x, *args, **kwargs: right(x.detach(), *args, **kwargs), seeds)
    assert "lost gradient" in found


def test_a_result_that_overlaps_itself_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    right, seeds = ops.cast, seeds_with("result that overlaps itself")

    def fault(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        return right(*args, **kwargs) if out is None else out

    assert "accepted" in planted(monkeypatch, fault, seeds)
