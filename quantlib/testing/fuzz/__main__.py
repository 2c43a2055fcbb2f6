"""``python -m quantlib.testing.fuzz [BACKEND] [--calls N] [--seconds S] [--seed N] [--op OP]``

Exit status 0 where nothing was found, 1 where something was, 2 where the backend does not serve the
CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from quantlib import backends
from quantlib.testing.fuzz import hunt
from quantlib.testing.fuzz.draw import OPS, served


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    if given.backend != "auto" and (why := backends.refuses(given.backend, "cpu")):
        print(f"{given.backend} does not serve cpu tensors: {why}")
        return 2
    names = served() if given.backend == "auto" else (given.backend,)
    found, done = 0, 0

    def count(calls: int) -> None:
        nonlocal done
        done = calls
        if sys.stderr.isatty():
            print(f"\r{calls} of {given.calls} calls", end="", file=sys.stderr)

    seeds = range(given.seed, given.seed + given.calls)
    for finding in hunt(seeds, names, given.op, seconds=given.seconds, progress=count):
        found += 1
        print(finding, end="\n\n", flush=True)
    print(f"{done} calls on {', '.join(names)}: {found} findings")
    return 1 if found else 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m quantlib.testing.fuzz",
        description="Random calls of every op and public function on the CPU, right and wrong.",
    )
    top.add_argument("backend", nargs="?", default="auto", choices=("auto", *backends.BACKENDS))
    top.add_argument("--calls", type=int, default=100_000, metavar="N", help="how many (100000)")
    top.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="begin nothing after these")
    top.add_argument("--seed", type=int, default=0, metavar="N", help="of the first call (0)")
    top.add_argument("--op", choices=OPS, help="only calls of this one")
    return top


if __name__ == "__main__":
    sys.exit(main())
