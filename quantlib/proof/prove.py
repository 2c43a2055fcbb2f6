"""Ask the solver about every case of every theorem and every planted fault, several at a time."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from quantlib.proof import catalogue, replay, solver, terms
from quantlib.proof.sources import Sources, unedited
from quantlib.proof.theorem import Case, Claim, Run


@dataclass(frozen=True)
class Question:
    """A case of a theorem, or the ``fault``-th fault of it."""

    theorem: str
    index: int
    fault: bool

    @property
    def case(self) -> Case:
        theorem = catalogue.theorem(self.theorem)
        return theorem.faults[self.index].case if self.fault else theorem.cases[self.index]

    @property
    def name(self) -> str:
        """The name of the question as a file name."""
        kind = "fault" if self.fault else "case"
        words = "".join(c if c.isalnum() else "_" for c in f"{self.theorem}__{kind}_{self.index}__{self.case.label}")
        return "_".join(filter(None, words.split("_")))


@dataclass(frozen=True)
class Result:
    """The answer to a question; ``found`` is the counter-example in words, ``wrong`` says what is not as expected."""

    question: Question
    verdict: str
    seconds: float
    found: str = ""
    wrong: str = ""


def questions(
    formats: Collection[str] = (), long: bool = False, theorem: str | None = None, faults: bool = True
) -> list[Question]:
    """The cases of ``formats``, or all, in the order of the catalogue, and the faults of each theorem after them."""
    asked = []
    for t in catalogue.theorems():
        if theorem is not None and theorem not in t.name:
            continue
        cases = [
            Question(t.name, i, fault=False)
            for i, case in enumerate(t.cases)
            if (long or not case.long) and (not formats or case.format in formats)
        ]
        asked += cases
        if faults and cases:
            asked += [Question(t.name, i, fault=True) for i in range(len(t.faults))]
    return asked


def claimed(question: Question, root: Path | None = None) -> tuple[Run, Claim]:
    """The claim of a question, of the files under ``root``."""
    edits = catalogue.theorem(question.theorem).faults[question.index].edits if question.fault else ()
    run = Run(Sources(edits, root) if edits else unedited(root))
    return run, question.case.build(run)


def script(question: Question, run: Run, claim: Claim) -> str:
    """The question as SMT-LIB: unsat where the claim holds, and sat where a fault is planted."""
    theorem = catalogue.theorem(question.theorem)
    fault = (
        f"\nWith a fault planted, so that it is sat: {theorem.faults[question.index].name}" if question.fault else ""
    )
    comment = f"{theorem.name} ({theorem.clause}): {question.case.label}\n{theorem.says}\nFor {theorem.domain}.{fault}"
    # A counter-example is one that ops take, and of the products themselves.
    asserted = claim.negated(run.calls if question.fault else ())
    return terms.smt_lib(asserted, comment, claim.open_products and not question.fault)


def answer(question: Question, limit: float, solved_by: str = "bitwuzla", root: Path | None = None) -> Result:
    """Ask, and replay what a fault is refuted with."""
    started = time.perf_counter()
    try:
        run, claim = claimed(question, root)
    except (SyntaxError, TypeError, AttributeError, ValueError) as error:
        return Result(question, "unread", time.perf_counter() - started, wrong=f"the sources cannot be read: {error}")
    said = solver.ask(script(question, run, claim), limit, solved_by)
    if not question.fault:
        if said.verdict == solver.PROVEN:
            return Result(question, said.verdict, said.seconds)
        if said.verdict == solver.UNDECIDED:
            return Result(question, said.verdict, said.seconds, wrong=said.why)
        if claim.open_products:  # the counter-example may be one of the open products alone
            said = solver.ask(terms.smt_lib(claim.negated()), limit, solved_by)
        found = ", ".join(f"{name} = {text}" for name, text in sorted(replay.shown(run, said.model).items()))
        return Result(question, said.verdict, said.seconds, wrong=f"false for {found}" if said.model else "false")
    if said.verdict != solver.REFUTED:
        return Result(question, said.verdict, said.seconds, wrong="the fault is not found")
    fault = catalogue.theorem(question.theorem).faults[question.index]
    if not said.model:  # a solver that gives no values
        return Result(question, said.verdict, said.seconds)
    try:
        found = replay.replay(fault, said.model, run, claim)
    except replay.UnfaithfulError as error:
        return Result(question, said.verdict, said.seconds, wrong=f"the counter-example is not confirmed: {error}")
    return Result(question, said.verdict, said.seconds, found)


def answers(
    asked: list[Question],
    limit: float,
    jobs: int,
    solved_by: str = "bitwuzla",
    root: Path | None = None,
) -> Iterator[Result]:
    """The results in the order of the questions, ``jobs`` of them at work at a time."""
    if jobs == 1:
        yield from (answer(question, limit, solved_by, root) for question in asked)
        return
    # A process has a solver of its own; forking one that has threads of torch's is not safe.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = [pool.submit(answer, question, limit, solved_by, root) for question in asked]
        try:
            for future in futures:
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
