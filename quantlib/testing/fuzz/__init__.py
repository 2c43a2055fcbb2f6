"""Random calls of every op and every public function, right and wrong, judged by the numeric contract.

``python -m quantlib.testing.fuzz [BACKEND] [--calls N] [--op OP]`` runs them in child processes, and says of each call
that crashes, hangs, gives wrong bytes, or fails with a message that does not help.
"""

from __future__ import annotations

from quantlib.testing.fuzz.draw import Call
from quantlib.testing.fuzz.faults import After
from quantlib.testing.fuzz.processes import hunt
from quantlib.testing.fuzz.verdicts import CLASSES, Finding, judge, make

__all__ = ["CLASSES", "After", "Call", "Finding", "draw", "hunt", "judge"]


def draw(seed: int, op: str | None = None, kept: tuple[int, ...] | None = None) -> tuple[Call, After]:
    """The call that a finding names, and what may come of it."""
    call, after, _ = make(seed, op, kept)
    return call, after
