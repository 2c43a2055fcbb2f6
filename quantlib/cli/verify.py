"""Compare every input of every op with the reference, byte for byte; or prove the contract's theorems."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlib import formats
from quantlib.cli.parser import checked, count, one_of
from quantlib.cli.text import style

if TYPE_CHECKING:
    from quantlib.testing.implementations import Backend
    from quantlib.testing.sweep import Case, Implementation, Suite

OPS = ("cast", "quantize", "dequantize", "activation")
ORACLES = ("reference", "cuda-headers", "ml_dtypes")  # beside every backend


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", type=one_of(OPS), metavar="OP", help="only this op; may be repeated")
    parser.add_argument(
        "--format",
        action="append",
        type=one_of(formats.FORMATS),
        metavar="FORMAT",
        help="only cases that read or write this format; may be repeated",
    )
    parser.add_argument("--backend", default="auto", help="the backend to check; by default the one of the device")
    parser.add_argument("--device", default="cpu", type=one_of(("cpu", "cuda")), help="where it runs (cpu)")
    parser.add_argument(
        "--against",
        default="reference",
        metavar="AUTHORITY",
        help=f"the authority to compare with: {', '.join(ORACLES)} or a backend (reference)",
    )
    parser.add_argument(
        "--share",
        default=Fraction(1),
        type=checked("a fraction in 0..1, such as 1/64", share),
        help="the part of the 2^32 inputs to check; every share, even 0, contains the deciding ones",
    )
    parser.add_argument(
        "--jobs", default=os.cpu_count() or 1, type=checked("a number >= 1", count), help="threads (one a core)"
    )
    parser.add_argument(
        "--prove",
        action="store_true",
        help="no sweep: the contract's theorems, proven by an SMT solver for every input, scale and zero point",
    )
    parser.add_argument("--all", action="store_true", help="with --prove, the theorems that take minutes too")
    parser.add_argument("--json", metavar="OUT", help="write the results to this file as JSON; - is stdout")


def share(text: str) -> Fraction:
    try:
        value = Fraction(text)
    except ZeroDivisionError:
        raise ValueError from None
    if not 0 <= value <= 1:
        raise ValueError
    return value


def run(args: argparse.Namespace) -> int:
    if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json must be a file in a folder that exists, got {args.json!r}")
    if args.prove:
        return theorems(args)
    if args.all:
        raise ValueError("--all must come with --prove")
    candidate, authority = backend(args.backend, args.device), implementation(args.against, args.device)
    chosen = [suite for suite in selected(args, authority) if suite.cases]
    if not chosen:
        asked = ", ".join([*(args.op or ()), *(args.format or ())])
        raise ValueError(f"--op and --format must leave a case that {authority.name} can run, got {asked}")
    report = Report(candidate.name, authority.name, args.share, args.json)
    # The switch between backends is one of the process: two of them take turns, each on all threads.
    jobs = 1 if isinstance(authority, type(candidate)) else args.jobs
    with report, torch_threads(args.jobs // jobs), candidate.forced():
        for suite in chosen:
            report.add(prove(suite, candidate, authority, args.share, jobs))
    return report.status


def theorems(args: argparse.Namespace) -> int:
    """Prove the theorems of `quantlib.proof`; the files it reads are the same for every backend."""
    from quantlib.proof.report import report

    others = {"--op": args.op, "--backend": args.backend != "auto", "--device": args.device != "cpu"}
    others |= {"--against": args.against != "reference", "--share": args.share != 1}
    given = [name for name, value in others.items() if value]
    if given:
        raise ValueError(f"--prove must come without options of a sweep, got {', '.join(given)}")
    return report(formats=args.format or (), long=args.all, jobs=args.jobs, out=args.json)


def selected(args: argparse.Namespace, authority: Implementation) -> Iterator[Suite]:
    """The suites, with the cases that the options and the authority leave."""
    from quantlib.testing.sweep import Suite, suites

    for suite in suites():
        cases = (case for case in suite.cases if not args.op or case.op in args.op)
        cases = (case for case in cases if not args.format or {case.source, case.format} & set(args.format))
        yield Suite(suite.name, tuple(case for case in cases if authority.refuses(case) is None))


def backend(name: str, device: str, option: str = "--backend") -> Backend:
    """The candidate, or the authority; "auto" is what serves ``device``."""
    import torch

    from quantlib import backends, ops  # noqa: F401  importing ops registers them
    from quantlib.testing.implementations import Backend

    if name not in ("auto", *backends.BACKENDS):
        raise ValueError(f"--backend must be auto, {', '.join(backends.BACKENDS)}, got {name!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be one that is here, got 'cuda'")
    name = backends.serving(device) if name == "auto" else name
    why = backends.refuses(name, device)
    if why is not None:
        raise ValueError(f"{option} must serve {device} tensors, got {name!r}: {why}")
    return Backend(name, device)


def implementation(name: str, device: str) -> Implementation:
    """The authority, pure torch on the device itself; an oracle that is not here is a wrong argument."""
    from quantlib import backends
    from quantlib.testing import implementations as known

    if (found := backends.BACKENDS.get(name)) is not None:
        return backend(name, device if device in found.devices else found.devices[0], "--against")
    if name not in ORACLES:
        names = ", ".join((*ORACLES, *backends.BACKENDS))
        raise ValueError(f"--against must be {names}, got {name!r}")
    oracles: dict[str, Callable[[], Implementation]] = {
        "reference": known.Reference,
        "ml_dtypes": known.MlDtypes,
        "cuda-headers": known.CudaHeaders,
    }
    oracle = oracles[name]()
    if oracle.missing is not None:
        raise ValueError(f"--against must be something that is here, got {name!r}: {oracle.missing}")
    return oracle


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def prove(
    suite: Suite, candidate: Implementation, authority: Implementation, share: Fraction, jobs: int
) -> dict[str, Any]:
    """The results of a suite, added up, as a line of the report."""
    from tqdm import tqdm

    from quantlib.testing.implementations import Backend
    from quantlib.testing.on_device import sweep_on_device
    from quantlib.testing.sweep import Inputs, Result, sweep

    def swept(case: Case) -> Result:
        sides = candidate, authority
        if share == 1 and all(isinstance(side, Backend) and side.device == "cuda" for side in sides):
            return sweep_on_device(case, *sides, progress.update)  # type: ignore[arg-type]
        return sweep(case, *sides, share, jobs, progress.update)

    total = sum(Inputs(case, share).size for case in suite.cases)
    bar = {"unit": " inputs", "unit_scale": True, "leave": False, "disable": None}  # None: only on a terminal
    with tqdm(total=total, desc=suite.name, **bar) as progress:
        results = [swept(case) for case in suite.cases]
    first = next((result.first for result in results if result.first is not None), None)
    return {
        "suite": suite.name,
        "cases": len(results),
        "inputs": sum(result.inputs for result in results),
        "mismatches": sum(result.mismatches for result in results),
        "seconds": round(sum(result.seconds for result in results), 2),
        "first": None if first is None else str(first),
    }


class Report:
    """The printed results: a line for each suite as it ends, a last line, and the JSON, also after an interrupt."""

    def __init__(self, candidate: str, authority: str, share: Fraction, out: str | None) -> None:
        self.candidate, self.authority, self.share, self.out = candidate, authority, share, out
        self.lines: list[dict[str, Any]] = []
        self.started = time.perf_counter()

    @property
    def status(self) -> int:
        return 1 if any(line["mismatches"] for line in self.lines) else 0

    def __enter__(self) -> Report:
        return self

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        cases = f"{line['cases']} cases, " if line["cases"] > 1 else ""
        verdict = f"{line['mismatches']:,} mismatches"
        verdict = style(verdict, "red") if line["mismatches"] else verdict
        self.say(f"{line['suite']}: {cases}{line['inputs']:,} inputs, {verdict}, {line['seconds']:.1f} s")
        if line["first"] is not None:
            self.say(f"  first: {line['first']}")

    def __exit__(self, kind: object, *_: object) -> None:
        seconds = time.perf_counter() - self.started
        inputs, wrong = (sum(line[what] for line in self.lines) for what in ("inputs", "mismatches"))
        verdict = "differs from" if wrong else "equals" if kind is None else "was not finished against"
        some = ", those that decide" if self.share == 0 else f", {self.share} of all and those that decide"
        part = "" if self.share == 1 else some
        found = f"{inputs:,} inputs{part}, {wrong:,} mismatches, {seconds:.0f} s"
        self.say(f"{self.candidate} {verdict} {self.authority}: {found}")
        if self.out is not None:
            text = json.dumps(self.as_json(complete=kind is None, seconds=seconds), indent=2) + "\n"
            sys.stdout.write(text) if self.out == "-" else Path(self.out).write_text(text)

    def as_json(self, complete: bool, seconds: float) -> dict[str, Any]:
        sides = {"candidate": self.candidate, "authority": self.authority, "share": str(self.share)}
        return {**sides, "complete": complete, "seconds": round(seconds, 1), "results": self.lines}

    def say(self, line: str) -> None:
        print(line, file=sys.stderr if self.out == "-" else sys.stdout, flush=True)
