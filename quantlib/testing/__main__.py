"""``python -m quantlib.testing [BACKEND] [--op OP] [--format FORMAT] [--device DEVICE]``: the case tables on a backend.

Exit status 0 where every byte is right, 1 where one is wrong, 2 where the backend does not serve the device, 130 after
Ctrl-C, which ends it with what it has found.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from quantlib import backends, formats
from quantlib.testing import every, names

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    given = parser().parse_args(argv)
    if given.backend != "auto" and (why := backends.refuses(given.backend, given.device)):
        print(f"{given.backend} does not serve {given.device} tensors: {why}")
        return 2
    if given.jobs > 1:
        return in_processes(given.jobs, list(sys.argv[1:] if argv is None else argv))
    if given.launches:
        table = every.launches(given.op, given.format)
    else:
        table = every.every(given.op, given.format, large=given.device != "cpu")
    part, parts = given.part
    table = table[part::parts]
    served = [case for case in table if every.refuses(case, given.backend, given.device) is None]
    said, wrong, ran = misnamed(given.format) if part == 0 else [], [], 0
    interrupted = False
    try:
        with backends.use_backend(given.backend):
            for case in served:
                ran += 1
                try:
                    every.check(case, given.device)
                except AssertionError as error:
                    wrong.append(str(error))
                except Exception as error:  # a kernel that does not compile, say; a lost device has nothing more
                    wrong.append(f"{case}: {type(error).__name__}: {error}")
                    if "CUDA error" in str(error):
                        break
    except KeyboardInterrupt:
        interrupted, ran = True, ran - 1
    refused = f", {len(table) - len(served)} that it refuses" if len(served) < len(table) else ""
    left = f", {len(served) - ran} that did not run" if ran < len(served) else ""
    print(*said, *wrong[:20], f"{given.backend}: {ran - len(wrong)} of {len(served)} cases{refused}{left}", sep="\n")
    return INTERRUPTED if interrupted else 1 if said or wrong else 0


def misnamed(format: str | None) -> list[str]:
    """List the differences between the formats of the table and their names."""
    wrong = []
    for f in formats.FORMATS.values() if format is None else [formats.get(format)]:
        try:
            names.check(f)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


def in_processes(jobs: int, argv: list[str]) -> int:
    """The tables dealt out to ``jobs`` processes: most of a case is its reference, and the compiler of its kernel."""
    command = [sys.executable, "-m", "quantlib.testing", *argv, "--jobs", "1"]
    running = [
        subprocess.Popen([*command, "--part", f"{n}/{jobs}"], stdout=subprocess.PIPE, text=True, start_new_session=True)
        for n in range(jobs)
    ]
    said: dict[Any, str] = {}
    interrupted = False
    while len(said) < jobs:
        try:
            for process in running:
                if process not in said:
                    said[process] = process.communicate()[0]
        except KeyboardInterrupt:  # each then says what it has found
            interrupted = True
            for process in running:
                process.send_signal(signal.SIGINT)
    texts = [said[process] for process in running]
    found = [counts_of(text) for text in texts]
    print(*(line for text in texts for line in text.splitlines()[:-1]), sep="\n")
    right, of, refused, left = (sum(row[k] for row in found) for k in range(4))
    ended = [process.returncode for process in running]
    broken = sum(code not in (0, 1, INTERRUPTED) for code in ended)
    more = f", {left} that did not run" * (left > 0) + f", {broken} of {jobs} processes broke" * (broken > 0)
    print(f"{argv[0] if argv else 'auto'}: {right} of {of} cases, {refused} that it refuses{more}")
    return INTERRUPTED if interrupted else 1 if any(ended) else 0


def counts_of(text: str) -> tuple[int, int, int, int]:
    """Right cases, all, those that are refused and those that did not run, of what a process has said last."""
    last = text.splitlines()[-1] if text else ""
    words = (r"(\d+) of", r"of (\d+) cases", r"(\d+) that it refuses", r"(\d+) that did not run")
    first, second, third, fourth = (int(match[1]) if (match := re.search(word, last)) else 0 for word in words)
    return first, second, third, fourth


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m quantlib.testing", description="The case tables on one backend.")
    top.add_argument("backend", nargs="?", default="auto", choices=("auto", *backends.BACKENDS))
    top.add_argument("--op", choices=every.OPS)
    top.add_argument("--format", choices=tuple(formats.FORMATS))
    top.add_argument("--device", default="cpu", choices=tuple(backends.DEVICES))
    top.add_argument("--launches", action="store_true", help="only cases that start each kernel in each way there is")
    top.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (1)")
    top.add_argument("--part", type=fraction, default=(0, 1), metavar="I/N", help="every Nth case from the Ith on")
    return top


def fraction(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


if __name__ == "__main__":
    sys.exit(main())
