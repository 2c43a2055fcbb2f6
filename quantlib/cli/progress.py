"""Progress of the work, in bytes a second with the time left: a bar on a terminal, a line a minute elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

MINUTE = 60.0


class Progress:
    """Call it with (name, bytes done, bytes in all). What an earlier run did has no name, and is in no rate."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.begun = self.told = time.monotonic()
        self.before = 0  # bytes that an earlier run did

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(unit="B", unit_scale=True)
        return self

    def __call__(self, name: str, done: int, total: int) -> None:
        if not name:
            self.before = done
        if self.bar is not None:
            self.bar.total, self.bar.initial = total, self.before
            self.bar.set_postfix_str(name[-40:], refresh=False)
            self.bar.update(done - self.bar.n)
        elif (now := time.monotonic()) - self.told >= MINUTE:
            self.told = now
            rate = max(done - self.before, 1) / (now - self.begun)
            left = (total - done) / rate
            print(
                f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e6:.0f} MB/s, {left:.0f} s left", file=sys.stderr
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
