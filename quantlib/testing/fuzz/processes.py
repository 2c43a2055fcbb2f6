"""The calls in child processes, so that one which dies or never returns is a finding like any other."""

from __future__ import annotations

import faulthandler
import multiprocessing
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from quantlib.testing.fuzz.verdicts import Finding, judge, smallest

BATCH = 250  # calls of a process: what one leaves behind is soon forgotten
MEMORY = 8 << 30  # bytes of address space beyond what the process began with
LIMIT = 60.0  # seconds of a call that takes a millisecond


def hunt(
    seeds: Sequence[int],
    backends: Sequence[str],
    op: str | None = None,
    limit: float = LIMIT,
    seconds: float = float("inf"),
    progress: Callable[[int], object] = lambda calls: None,
) -> Iterator[Finding]:
    """Run the calls of ``seeds``, each on one of ``backends`` in turn.

    Parameters
    ----------
    seeds : sequence of int
        Each is one call.
    backends : sequence of str
    op : str, optional
        Only calls of this one.
    limit : float
        Seconds after which a call hangs.
    seconds : float
        After these no batch is begun.
    progress : callable, optional
        Called with the number of calls that are done.

    Yields
    ------
    Finding
        The first of its kind and words.
    """
    seen: set[Any] = set()
    started, at = time.monotonic(), 0
    while at < len(seeds) and time.monotonic() - started < seconds:
        done, findings = _batch(seeds[at : at + BATCH], at, backends, op, limit)
        for finding in findings:
            if finding.key not in seen:
                seen.add(finding.key)
                yield finding
        at += done
        progress(at)


def _batch(
    seeds: Sequence[int], first: int, backends: Sequence[str], op: str | None, limit: float
) -> tuple[int, list[Finding]]:
    """Run calls in a child; return the number that it finished, and its findings."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)
    with tempfile.TemporaryFile("w+") as stack:
        child = context.Process(target=_run, args=(sending, stack, seeds, first, backends, op), daemon=True)
        child.start()
        sending.close()
        findings: list[Finding] = []
        done, why, call, ended = 0, "", "a call that is not made yet", False
        while True:
            if not receiving.poll(limit):
                child.kill()
                why = f"no result after {limit:g} s"
                break
            try:
                message = receiving.recv()
            except EOFError:
                break
            if isinstance(message, Finding):
                findings.append(message)
            elif isinstance(message, str):
                call = message
            elif message is None:
                ended = True
            else:
                done = message
        child.join()
        receiving.close()
        if not ended:
            name = backends[(first + done) % len(backends)]
            if not why:
                stack.seek(0)
                code = child.exitcode or 0
                died = signal.Signals(-code).name if code < 0 else f"exit status {code}"
                why = f"the process died of {died}\n{stack.read()[:1500]}"
            kind = "hang" if why.startswith("no result") else "crash"
            findings.append(Finding(kind, seeds[done], None, name, op, call, why))
            done += 1
    return done, findings


def _run(
    sending: Any, stack: IO[str], seeds: Sequence[int], first: int, backends: Sequence[str], op: str | None
) -> None:
    """A child: says of each call that it is done."""
    faulthandler.enable(stack)
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size < 1 << 40:  # a sanitizer reserves terabytes
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    state = _dispatcher()
    for number, seed in enumerate(seeds):
        finding = judge(seed, backends[(first + number) % len(backends)], op, announce=sending.send)
        if finding is not None:
            sending.send(smallest(finding))
        sending.send(number + 1)
        if (
            _dispatcher() != state
        ):  # torch's own errors inside of a transform leave it so: the next call gets a new process
            break
    sending.send(None)
    sending.close()


def _dispatcher() -> tuple[int, int]:
    """Return the dispatch keys that this thread excludes and includes."""
    excluded, included = torch._C._dispatch_tls_local_exclude_set(), torch._C._dispatch_tls_local_include_set()
    return excluded.raw_repr(), included.raw_repr()
