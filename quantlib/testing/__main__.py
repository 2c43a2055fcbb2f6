"""``python -m quantlib.testing [BACKEND] [--op OP] [--format FORMAT] [--device DEVICE]``: the case table on a backend.

Exit status 0 where every byte is right, 1 where one is wrong, 2 where the backend does not serve the device.
"""

from __future__ import annotations

import argparse
import sys

from quantlib import backends, formats
from quantlib.testing.compare import check
from quantlib.testing.table import OPS, cases


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m quantlib.testing", description="The case table on one backend.")
    parser.add_argument("backend", nargs="?", default="auto", choices=("auto", *backends.BACKENDS))
    parser.add_argument("--op", choices=OPS)
    parser.add_argument("--format", choices=tuple(formats.FORMATS))
    parser.add_argument("--device", default="cpu", choices=tuple(backends.DEVICES))
    given = parser.parse_args()
    if given.backend != "auto" and (why := backends.refuses(given.backend, given.device)):
        print(f"{given.backend} does not serve {given.device} tensors: {why}")
        return 2
    wrong = []
    table = cases(given.op, given.format)
    with backends.use_backend(given.backend):
        for case in table:
            try:
                check(case, given.device)
            except AssertionError as error:
                wrong.append(str(error))
    print(*wrong[:20], f"{given.backend}: {len(table) - len(wrong)} of {len(table)} cases", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
