"""One case: bytes first, then everybody in turns (A B C A B C ...), so that what disturbs one disturbs all."""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import check, peers
from .case import (
    LIMIT,
    OURS,
    PEER,
    PLAIN_COPY,
    PLAIN_READ,
    READ_WRITE,
    Call,
    Case,
    Contender,
    Limits,
    Row,
    Tensors,
    described,
)

STEADY = 0.02  # a contender whose spread is no larger has been timed often enough
FEWEST, MOST = 7, 50  # timed runs from which a spread tells something; timed runs of a contender that wavers
PLAUSIBLE = 1.07  # on a GPU, more than this of a plain copy's bytes a second came out of a cache

NO_LIMITS = Limits()
ROLES = (LIMIT, PEER)

Clock = Callable[[], float]  # runs a call and says what it took, in seconds a call


@dataclass
class Entry:
    """A contender on its way through a case."""

    contender: Contender
    clock: Clock | None = None
    times: list[float] = field(default_factory=list)  # seconds a call
    moved: int = 0  # bytes
    differing: int | None = None
    compared: int | None = None
    error: str = ""

    @property
    def least(self) -> float:
        return min(self.times)


def measure(
    case: Case,
    rows: list[Row],
    seconds: float,
    without: Sequence[str] = (),
    tick: Callable[[str], None] = lambda _: None,
    limits: Limits = NO_LIMITS,
) -> None:
    """Check and time the contenders of ``case``; append a row each, and of an interrupted case those that have times.

    Parameters
    ----------
    seconds : float
        The time that a contender whose spread stays large may take for its timed runs; a slow one still gets
        ``case.least`` of them.
    without : sequence of str
        Peers whose names begin so are left out.
    tick : str -> None
        Told what is going on.
    limits : Limits
        The limits of which shares are taken.
    """
    peers.forget_compiled()
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
        take_turns(case, [entry for entry in entries if entry.clock], seconds)
    finally:
        rows += as_rows(case, [e for e in entries if e.times or e.error], limits)


def prepare(case: Case, contender: Contender, inputs: Tensors, outs: Tensors, expected: list[check.Part]) -> Entry:
    """Run once: quantlib must be right, of a peer it is counted how often it is not. Whatever fails becomes a row."""
    of = contender.case
    entry = Entry(contender, moved=(contender.role == LIMIT and contender.moved) or case.moved(inputs, outs))
    try:
        if of is not None:
            others = of.inputs()
            expected, entry.moved = check.parts(of, others), of.moved(others, of.outs(*others))
        if contender.role == OURS:
            check.right_in_table(case, contender)
        call, results = check.first_run(contender, inputs, outs)
        if results:
            counts = [check.differing(results, part) for part in expected]
            entry.differing, entry.compared = (sum(column) for column in zip(*counts, strict=True))
        if contender.role == OURS:
            for part in expected:
                check.right(results, part)
        entry.clock = clock(case, contender, inputs, outs, call)
    except Exception as error:
        entry.error = described(error)
    return entry


def clock(case: Case, contender: Contender, inputs: Tensors, outs: Tensors, call: Call) -> Clock:
    """The clock that suits the device; on a GPU it binds the contender anew, to inputs that no cache holds."""
    if case.device == "cpu":
        return lambda: timed(call, case.calls)
    from . import graphs

    return graphs.clock(case, contender, case.timed_inputs(inputs), outs)


def take_turns(case: Case, waiting: list[Entry], seconds: float) -> None:
    """Fill in the times, round by round."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        while waiting:
            for entry in waiting:
                assert entry.clock is not None
                try:
                    with entry.contender.within():
                        entry.times.append(entry.clock())
                except Exception as error:
                    entry.times, entry.error = [], described(error)
            waiting = [e for e in waiting if not e.error and wants_more(e.times, case, seconds)]
    finally:
        if collecting:
            gc.enable()


def wants_more(times: list[float], case: Case, seconds: float) -> bool:
    """True until the spread is small, or until so many runs or ``seconds`` if it stays large."""
    if len(times) < case.least or (len(times) < MOST and sum(times) * case.calls < seconds):
        return len(times) < max(case.least, FEWEST) or spread(times) > STEADY
    return False


def spread(times: list[float]) -> float:
    """The distance between the quartiles as a share of the median."""
    first, median, third = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    return (third - first) / median


def timed(call: Call, calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def as_rows(case: Case, entries: list[Entry], limits: Limits) -> list[Row]:
    """Times, beside those of the limit and of the best peer, and shares of what this machine can do."""
    timed = [e for e in entries if e.times]
    least = {role: min((e.least for e in timed if e.contender.role == role), default=None) for role in ROLES}
    beside = {e.contender.name: e for e in timed if e.contender.role == LIMIT}
    rates = {name: e.moved / e.least for name, e in beside.items()}
    limits = Limits(rates.get(PLAIN_COPY, limits.copy), rates.get(PLAIN_READ, limits.read), limits.products)
    limited = not {PLAIN_COPY, PLAIN_READ}.isdisjoint(beside)
    rivals = {e.contender.name: (e.least, e.contender.moved) for e in timed if e.contender.moved}
    rows = []
    for e in entries:
        of = e.contender.case or case
        row = Row(
            family=case.family,
            op=case.op,
            conversion=case.conversion,
            per=case.per,
            shape=case.shape,
            backend=e.contender.name,
            role=e.contender.role,
            dtype=of.dtype,
            device=case.device,
            differing=e.differing,
            compared=e.compared,
            note=e.contender.note,
            error=e.error,
        )
        if e.times:
            row = with_times(row, e.times, least, limited)
            row = with_rates(row, e.moved, of, limits)
            if READ_WRITE in beside:
                row = dataclasses.replace(row, of_read_write=beside[READ_WRITE].least / e.least)
            row = dataclasses.replace(row, note="; ".join(filter(None, (row.note, artefact(row, rivals)))))
        rows.append(row)
    return rows


def with_times(row: Row, times: list[float], least: dict[str, float | None], limited: bool) -> Row:
    """``least`` seconds of a role; ``limited`` by the memory, so that the distance to the limit is a ratio"""
    best, median = min(times), statistics.median(times)
    peer, limit = least[PEER], least[LIMIT]
    return dataclasses.replace(
        row,
        runs=len(times),
        min=best,
        median=median,
        spread=spread(times),
        speedup=peer / best if peer and row.role != LIMIT else None,
        above=best - limit if limit and not limited and row.role != LIMIT else None,
    )


def with_rates(row: Row, moved: int, case: Case, limits: Limits) -> Row:
    """Add the rates: ``moved`` bytes and the FLOPs of the case a second, and their shares of this machine's limits."""
    assert row.min is not None
    flops = 0 if row.role == LIMIT else case.flops
    peak = limits.products.get(case.multiplies)
    return dataclasses.replace(
        row,
        bytes=moved or None,
        gb_per_s=moved / row.min / 1e9 if moved else None,
        of_copy=moved / row.min / limits.copy if moved and limits.copy else None,
        of_read=moved / row.min / limits.read if moved and case.flops and limits.read else None,
        flops=flops or None,
        tflop_per_s=flops / row.min / 1e12 if flops else None,
        of_peak=flops / row.min / peak if flops and peak else None,
    )


def artefact(row: Row, rivals: dict[str, tuple[float, int]]) -> str:
    """Return why a time on a GPU needs an explanation first; ``rivals``: seconds and bytes of peers.

    Nothing moves bytes much faster than a plain copy, and what is bound by them gains no more than it has fewer.
    """
    if row.device == "cpu" or row.min is None:
        return ""
    if (row.of_copy or 0) > PLAUSIBLE:
        return f"artefact? {row.of_copy:.2f} of a plain copy"
    for name, (seconds, moved) in rivals.items():
        if row.bytes and row.role == OURS and seconds / row.min > moved / row.bytes:
            return f"artefact? {seconds / row.min:.2f}x {name}, which moves {moved / row.bytes:.2f}x the bytes"
    return ""
