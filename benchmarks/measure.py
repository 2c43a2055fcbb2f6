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
from .case import LIMIT, OURS, PEER, Call, Case, Contender, Limits, Row, Tensors, described

MOST = 50  # timed runs of a contender
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
    differing: int | None = None
    compared: int | None = None
    error: str = ""


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
        What a contender may take for its timed runs; a slow one still gets ``case.least`` of them.
    without : sequence of str
        Peers whose names begin so are left out.
    tick : str -> None
        Told what is going on.
    limits : Limits
        What shares are of.
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
        rows += as_rows(case, [e for e in entries if e.times or e.error], case.moved(inputs, outs), limits)


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
    return len(times) < case.least or (len(times) < MOST and sum(times) * case.calls < seconds)


def timed(call: Call, calls: int) -> float:
    """Seconds a call."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def as_rows(case: Case, entries: list[Entry], moved: int, limits: Limits) -> list[Row]:
    """Times, beside those of the limit and of the best peer, and shares of what this machine can do."""
    timed = [e for e in entries if e.times]
    least = {role: min((min(e.times) for e in timed if e.contender.role == role), default=None) for role in ROLES}
    beside = case.copied / least[LIMIT] if least[LIMIT] and case.copied else None
    limits = Limits(beside or limits.copy, limits.products)
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
            dtype=case.dtype,
            device=case.device,
            differing=e.differing,
            compared=e.compared,
            note=e.contender.note,
            error=e.error,
        )
        if e.times:
            row = with_times(row, e.times, least, limited=bool(case.copied))
            row = with_rates(row, case.copied if row.role == LIMIT else moved, case, limits)
            rivals = {r.contender.name: (min(r.times), r.contender.moved) for r in timed if r.contender.moved}
            row = dataclasses.replace(row, note="; ".join(filter(None, (row.note, artefact(row, rivals)))))
        rows.append(row)
    return rows


def with_times(row: Row, times: list[float], least: dict[str, float | None], limited: bool) -> Row:
    """``least`` seconds of a role; ``limited`` by the memory, so that the distance to the limit is a ratio"""
    best, median = min(times), statistics.median(times)
    first, _, third = statistics.quantiles(times, n=4) if len(times) > 1 else (median,) * 3
    peer, limit = least[PEER], least[LIMIT]
    return dataclasses.replace(
        row,
        runs=len(times),
        min=best,
        median=median,
        spread=(third - first) / median,
        speedup=peer / best if peer and row.role != LIMIT else None,
        above=best - limit if limit and not limited and row.role != LIMIT else None,
    )


def with_rates(row: Row, moved: int, case: Case, limits: Limits) -> Row:
    """What ``moved`` bytes and the FLOPs of the case are a second, and of this machine's most."""
    assert row.min is not None
    flops = 0 if row.role == LIMIT else case.flops
    peak = limits.products.get(case.multiplies)
    return dataclasses.replace(
        row,
        bytes=moved or None,
        gb_per_s=moved / row.min / 1e9 if moved else None,
        of_copy=moved / row.min / limits.copy if moved and limits.copy else None,
        flops=flops or None,
        tflop_per_s=flops / row.min / 1e12 if flops else None,
        of_peak=flops / row.min / peak if flops and peak else None,
    )


def artefact(row: Row, rivals: dict[str, tuple[float, int]]) -> str:
    """Why the time on a GPU is not to be believed until it is explained; ``rivals``: seconds and bytes of peers.

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
