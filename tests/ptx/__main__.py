"""The case tables of the ops on their PTX: exit status 1 where a byte is wrong."""

from __future__ import annotations

import argparse
import collections
import sys
import time
import traceback

import torch


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m ptx", description=__doc__)
    parser.add_argument("--op", action="append", help="an op; all of them otherwise")
    parser.add_argument("--part", default="0/1", help="k/n: the k-th of n parts, to be run beside each other")
    parser.add_argument("--every", type=int, default=1, help="every n-th case of an op")
    parser.add_argument("--arch", type=int, default=90, help="compile for sm_80, 90, ...")
    parser.add_argument("--few", action="store_true", help="the cases of `make test`")
    parser.add_argument("--only", default="", help="cases whose text has this in it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after this time")
    parser.add_argument("--trace", action="store_true", help="print where an error comes from")
    given = parser.parse_args(argv)
    torch.set_num_threads(1)

    from ptx import launches
    from ptx.cases import chosen, few
    from quantlib.testing import every

    arch = given.arch
    part, parts = map(int, given.part.split("/"))
    cases = [
        case for case in (few(arch) if given.few else chosen(given.op, given.every, arch)) if given.only in str(case)
    ]
    cases = cases[part::parts]
    began, wrong, done = time.monotonic(), collections.defaultdict(list), 0
    with launches.served(arch):
        for case in cases:
            if time.monotonic() - began > given.seconds:
                print(f"{len(cases) - done} cases have not begun")
                break
            start = time.monotonic()
            try:
                every.check(case, "cpu")
            except Exception as error:  # every case is tried
                wrong[case.op].append(case)
                print(f"WRONG {case}\n  {type(error).__name__}: {error}", flush=True)
                if given.trace:
                    traceback.print_exc()
            done += 1
            if (took := time.monotonic() - start) > 20:
                print(f"{took:.0f} s: {case}", flush=True)
    print("launches:", ", ".join(f"{count} of {kernel}" for kernel, count in sorted(launches.ran.items())))
    found = ", ".join(f"{len(c)} of {op}" for op, c in wrong.items()) or "none"
    print(f"{done} cases in {time.monotonic() - began:.0f} s; wrong: {found}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
