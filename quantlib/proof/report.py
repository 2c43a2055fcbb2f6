"""Print the results of proofs: a line a theorem, its domain, the solver and the time, and the planted faults."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from quantlib.proof import catalogue, prove, solver
from quantlib.proof.prove import Question, Result
from quantlib.proof.theorem import Theorem

LIMIT, LONG_LIMIT = 60.0, 1800.0  # seconds for one case


def report(
    *,
    formats: Collection[str] = (),
    theorem: str | None = None,
    long: bool = False,
    faults: bool = True,
    solved_by: str = "bitwuzla",
    jobs: int | None = None,
    limit: float | None = None,
    root: Path | None = None,
    verbose: bool = False,
    out: str | None = None,
    table: Path | None = None,
) -> int:
    """Prove the chosen theorems and say so.

    Returns
    -------
    int
        0 where every case is proven and every planted fault refuted by a counter-example that the code confirms;
        1 where a case is refuted, undecided or cannot be read, or a fault is not found.
    """
    why = solver.missing(solved_by)
    if why is not None:
        raise ImportError(f"a proof needs an SMT solver: {why}")
    asked = prove.questions(formats, long, theorem, faults)
    if not asked:
        raise ValueError(f"there must be a theorem to prove, got none for {theorem or ', '.join(formats)}")
    say = Printer(out)
    say(f"{solver.version(solved_by)}; {len(asked)} questions, {len({q.theorem for q in asked})} theorems")
    started = time.perf_counter()
    limit = limit or (LONG_LIMIT if long else LIMIT)
    jobs = jobs or min(os.cpu_count() or 1, 8)
    results: list[Result] = []
    for result in prove.answers(asked, limit, jobs, solved_by, root):
        results.append(result)
        last = len(results) == len(asked) or asked[len(results)].theorem != result.question.theorem
        if last:
            own = [r for r in results if r.question.theorem == result.question.theorem]
            say.theorem(catalogue.theorem(result.question.theorem), own, verbose)
    seconds = time.perf_counter() - started
    status = say.end(results, seconds, solver.version(solved_by), long)
    if table is not None:
        write_table(table, say.lines, solver.version(solved_by))
    return status


class Printer:
    """The lines, and the same as JSON."""

    def __init__(self, out: str | None) -> None:
        self.out = out
        self.lines: list[dict[str, Any]] = []

    def __call__(self, line: str) -> None:
        print(line, file=sys.stderr if self.out == "-" else sys.stdout, flush=True)

    def theorem(self, theorem: Theorem, results: list[Result], verbose: bool) -> None:
        cases = [r for r in results if not r.question.fault]
        faults = [r for r in results if r.question.fault]
        verdicts = Counter(r.verdict for r in cases)
        told = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items() if verdict != solver.PROVEN)
        verdict = f"proven, {len(cases)} cases" if not told else f"{told} of {len(cases)} cases"
        caught = sum(not r.wrong for r in faults)
        seconds = sum(r.seconds for r in results)
        self(f"{theorem.name} ({theorem.clause}): {verdict}, for {theorem.domain}; {seconds:.1f} s")
        if faults:
            self(f"  {caught} of {len(faults)} planted faults refuted, by counter-examples that the code confirms")
        for r in results:
            name = theorem.faults[r.question.index].name if r.question.fault else ""
            what = f"fault: {name}, {r.question.case.label}" if r.question.fault else r.question.case.label
            if r.wrong:
                self(f"  {what}: {r.verdict}, {r.wrong}")
            elif verbose:
                self(f"  {what}: {r.verdict}, {r.seconds:.2f} s{': ' + r.found if r.found else ''}")
        self.lines.append(
            {
                "theorem": theorem.name,
                "clause": theorem.clause,
                "says": theorem.says,
                "domain": theorem.domain,
                "cases": [_case(r) for r in cases],
                "faults": [{"fault": theorem.faults[r.question.index].name, **_case(r)} for r in faults],
                "seconds": round(seconds, 2),
            }
        )

    def end(self, results: list[Result], seconds: float, version: str, long: bool) -> int:
        cases = [r for r in results if not r.question.fault]
        proven = sum(r.verdict == solver.PROVEN for r in cases)
        wrong = [r for r in results if r.wrong]
        undecided = sum(r.verdict == solver.UNDECIDED for r in cases)
        left = sum(case.long for t in catalogue.theorems() for case in t.cases) if not long else 0
        self(
            f"{proven} of {len(cases)} cases proven, {undecided} undecided; "
            f"{sum(not r.wrong for r in results if r.question.fault)} of {len(results) - len(cases)} faults refuted; "
            f"{version}; {seconds:.0f} s" + (f"; {left} long cases left out (--all)" if left else "")
        )
        if self.out is not None:
            whole = {"solver": version, "seconds": round(seconds, 1), "theorems": self.lines}
            text = json.dumps(whole, indent=2) + "\n"
            sys.stdout.write(text) if self.out == "-" else Path(self.out).write_text(text)
        return 1 if wrong else 0


def _case(result: Result) -> dict[str, Any]:
    found = {"found": result.found} if result.found else {}
    wrong = {"wrong": result.wrong} if result.wrong else {}
    label = result.question.case.label
    long = result.question.case.long
    seconds = round(result.seconds, 2)
    return {"case": label, "verdict": result.verdict, "seconds": seconds, "long": long, **found, **wrong}


BEGIN, END = "<!-- table: make prove ARGS='--table docs/proof.md' -->", "<!-- end of table -->"


def write_table(page: Path, lines: list[dict[str, Any]], version: str) -> None:
    """The results as a table, between two marks of a page of Markdown."""
    rows = [
        f"Answered by {version}, seconds of one core.",
        "",
        "| theorem | clause | domain | cases | seconds | planted faults |",
        "|---|---|---|--:|--:|---|",
    ]
    for line in lines:
        cases, faults = line["cases"], line["faults"]
        proven = sum(case["verdict"] == solver.PROVEN for case in cases)
        left = sum(case.long for case in catalogue.theorem(line["theorem"]).cases) - sum(case["long"] for case in cases)
        count = str(proven) if proven == len(cases) else f"{proven} of {len(cases)}"
        count += f", {left} long" if left else ""
        found = ", ".join(dict.fromkeys(fault["fault"] for fault in faults if "wrong" not in fault))
        seconds = sum(case["seconds"] for case in cases)
        text = f"**{line['theorem']}** {line['says']}"
        cells = (text, line["clause"], line["domain"], count, f"{seconds:.1f}", found)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"--table must name a page with the marks of a table, got {page}")
    page.write_text("\n".join([before + BEGIN, "", *rows, "", END]) + after)


def write(folder: Path, asked: list[Question]) -> None:
    """Every question as a file of SMT-LIB, and what a solver should say of it."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = []
    for question in asked:
        run, claim = prove.claimed(question)
        (folder / f"{question.name}.smt2").write_text(prove.script(question, run, claim))
        expected.append(f"{'sat' if question.fault else 'unsat'}\t{question.name}.smt2\n")
    (folder / "expected.txt").write_text("".join(expected))
