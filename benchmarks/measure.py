"""One case: bytes first, then everybody in turns (A B C A B C ...), so that what disturbs one disturbs all."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import check
from .case import LIMIT, OURS, PEER, Call, Case, Contender, Row, Tensors

MOST = 50  # timed runs of a contender


@dataclass
class Entry:
    """A contender on its way through a case."""

    contender: Contender
    call: Call | None = None
    times: list[float] = field(default_factory=list)  # seconds a call
    differing: int | None = None
    compared: int | None = None
    error: str = ""


def measure(
    case: Case,
    rows: list[Row],
    seconds: float,
    without: Sequence[str] = (),
    tick: Callable[[str], None] = lambda _: None,
) -> None:
    """Check and time the contenders of ``case``; append a row each, and of an interrupted case those that have times.

    Parameters
    ----------
    seconds : float
        What a contender may take for its timed runs; a slow one still gets ``case.least`` of them.
    without : sequence of str
        Peers whose names begin so are left out.
    tick : str -> None
        Told what is going on.
    """
    inputs = case.inputs()
    outs = case.outs(*inputs)
    expected = check.parts(case, inputs)
    entries = []
    for contender in case.contenders():
        if contender.role == PEER and contender.name.startswith(tuple(without)):
            continue
        tick(f"{case.name}: {contender.name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of peers, about their own future
            entries.append(prepare(case, contender, inputs, outs, expected))
    tick(f"{case.name}: timing")
    try:
        take_turns(case, [entry for entry in entries if entry.call], seconds)
    finally:
        moved = sum(t.nbytes for t in (*inputs, *outs))
        rows += as_rows(case, [entry for entry in entries if entry.times or entry.error], moved)


def prepare(case: Case, contender: Contender, inputs: Tensors, outs: Tensors, expected: list[check.Part]) -> Entry:
    """Run once: quantlib must be right, of a peer it is counted how often it is not. Whatever fails becomes a row."""
    entry = Entry(contender)
    try:
        if contender.role == OURS:
            check.right_in_table(case, contender)
        call, results = check.first_run(contender, inputs, outs)
        if results:
            counts = [check.differing(results, part) for part in expected]
            entry.differing, entry.compared = (sum(column) for column in zip(*counts, strict=True))
        if contender.role == OURS:
            for part in expected:
                check.right(results, part)
        entry.call = call
    except Exception as error:
        entry.error = described(error)
    return entry


def described(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def take_turns(case: Case, waiting: list[Entry], seconds: float) -> None:
    """Fill in the times, round by round."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        while waiting:
            for entry in waiting:
                try:
                    with entry.contender.within():
                        entry.times.append(timed(entry.call, case.calls))
                except Exception as error:
                    entry.times, entry.error = [], described(error)
            waiting = [e for e in waiting if not e.error and wants_more(e.times, case, seconds)]
    finally:
        if collecting:
            gc.enable()


def wants_more(times: list[float], case: Case, seconds: float) -> bool:
    return len(times) < case.least or (len(times) < MOST and sum(times) * case.calls < seconds)


def timed(call: Call | None, calls: int) -> float:
    """Seconds a call."""
    assert call is not None
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def as_rows(case: Case, entries: list[Entry], moved: int) -> list[Row]:
    """Times, beside those of the limit and of the best peer."""
    least = {
        role: min((min(e.times) for e in entries if e.times and e.contender.role == role), default=None)
        for role in (LIMIT, PEER)
    }
    copied = case.copied / least[LIMIT] if least[LIMIT] and case.copied else None  # bytes a second
    rows = []
    for e in entries:
        row = Row(
            family=case.family,
            op=case.op,
            conversion=case.conversion,
            per=case.per,
            shape=case.shape,
            backend=e.contender.name,
            role=e.contender.role,
            differing=e.differing,
            compared=e.compared,
            note=e.contender.note,
            error=e.error,
        )
        rows.append(
            with_times(row, e.times, case.copied if row.role == LIMIT else moved, copied, least) if e.times else row
        )
    return rows


def with_times(row: Row, times: list[float], moved: int, copied: float | None, least: dict[str, float | None]) -> Row:
    """``moved`` bytes a run, ``copied`` bytes a second, ``least`` seconds of a role"""
    best, median = min(times), statistics.median(times)
    first, _, third = statistics.quantiles(times, n=4) if len(times) > 1 else (median,) * 3
    rate = moved / best if copied else None
    peer, limit = least[PEER], least[LIMIT]
    return dataclasses.replace(
        row,
        runs=len(times),
        min=best,
        median=median,
        spread=(third - first) / median,
        bytes=moved if copied else None,
        gb_per_s=rate / 1e9 if rate else None,
        of_copy=rate / copied if rate and copied else None,
        speedup=peer / best if peer and row.role != LIMIT else None,
        above=best - limit if limit and not copied and row.role != LIMIT else None,
    )
