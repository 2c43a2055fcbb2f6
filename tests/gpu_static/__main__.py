"""``make gpu-static``: every kernel configuration in use, compiled without a GPU and held to its contract.

usage: python -m gpu_static [--fast | --all] [--arch 80 89 90] [--only triton|cuda] [--json] [--record] [--page]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict

from tqdm import tqdm

from gpu_static import known, run
from gpu_static.budgets import Budgets
from gpu_static.contract import NEW, SHARED
from gpu_static.table import products, summary, table, write_page


def main(arguments: list[str]) -> int:
    """The exit status: 1 where a contract is broken."""
    parser = argparse.ArgumentParser(prog="make gpu-static", description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--fast", action="store_const", const="fast", dest="scope", help="the calls that are used most")
    scope.add_argument(
        "--all", action="store_const", const="all", dest="scope", help="the product of all choices: hours"
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(SHARED), default=tuple(SHARED))
    parser.add_argument("--only", choices=("triton", "cuda"), help="one language")
    parser.add_argument("--json", action="store_true", help="everything measured, instead of the table")
    parser.add_argument("--record", action="store_true", help="make what is measured the budget, in gpu_budgets.txt")
    parser.add_argument("--page", action="store_true", help="write the summary into docs/gpu.md")
    given = parser.parse_args(arguments)
    languages = [name for name in ("triton", "cuda") if given.only in (None, name)]
    for name in languages:
        if why := run.missing(name):
            parser.exit(2, f"gpu-static: {why}\n")
    start = time.perf_counter()
    with tqdm(unit=" kernels", disable=None, total=0) as bar:

        def told(line: str) -> None:
            if line.isdigit():
                bar.total += int(line)
            elif not line.startswith("["):
                bar.update()
                bar.set_description(line, refresh=False)

        measured = run.everything(given.scope or "common", given.arch, languages, told)
    seconds = time.perf_counter() - start
    whole = given.scope != "fast" and set(given.arch) == set(SHARED) and given.only is None
    budgets = Budgets({}, {}) if given.record and whole else Budgets.read()
    if given.record:
        budgets.record(m for m in measured if not m.facts.get("ragged"))
    rows = run.judged(measured, budgets, new=True)
    idle = known.unused([(row.measured, fault) for row in rows for fault in row.known if fault != NEW]) if whole else []
    if given.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print(table(rows), summary(rows), products(rows), sep="\n\n")
        print(*(f"known, but no kernel breaks it: {k.name}: {k.fault}" for k in idle), sep="\n", end="\n" * bool(idle))
        print(f"{len(rows)} kernels in {seconds:.0f} s")
    if given.page:
        write_page(rows)
    return int(bool(idle) or any(row.faults for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
