"""Prove the numeric contract with an SMT solver: ``python -m quantlib.proof``, ``make prove``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from quantlib import formats
from quantlib.proof import prove, solver
from quantlib.proof.report import report, write


def main() -> int:
    """Parse the command line and prove."""
    parser = argparse.ArgumentParser(prog="quantlib.proof", description=__doc__)
    parser.add_argument("--all", action="store_true", help="the long theorems too")
    parser.add_argument("--theorem", metavar="WORDS", help="only theorems whose name has these words")
    parser.add_argument(
        "--format", action="append", default=[], choices=sorted(formats.FORMATS), help="only cases of this format"
    )
    parser.add_argument("--no-faults", action="store_true", help="leave the planted faults out")
    parser.add_argument("--solver", choices=sorted(solver.ASK), default="bitwuzla", help="who is asked (bitwuzla)")
    parser.add_argument("--jobs", type=int, metavar="N", help="cases at a time (one a core)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for one case; 60, with --all 1800")
    parser.add_argument("--verbose", action="store_true", help="a line a case and fault, with the counter-examples")
    parser.add_argument("--json", metavar="OUT", help="write the results to this file as JSON; - is stdout")
    parser.add_argument(
        "--write",
        nargs="?",
        const="build/proof",
        metavar="FOLDER",
        help="prove nothing, write every question as SMT-LIB into this folder (build/proof)",
    )
    parser.add_argument("--table", type=Path, metavar="PAGE", help="write the results into this page's table")
    args = parser.parse_args()
    if args.write is not None:
        asked = prove.questions(args.format, args.all, args.theorem, not args.no_faults)
        write(Path(args.write), asked)
        print(f"{len(asked)} questions written to {args.write}, what a solver should answer to expected.txt")
        return 0
    try:
        return report(
            formats=args.format,
            theorem=args.theorem,
            long=args.all,
            faults=not args.no_faults,
            solved_by=args.solver,
            jobs=args.jobs,
            limit=args.limit,
            verbose=args.verbose,
            out=args.json,
            table=args.table,
        )
    except (ImportError, ValueError) as error:
        print(f"quantlib.proof: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
