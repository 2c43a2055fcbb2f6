"""The numeric contract proven: every theorem, and every planted fault refuted by a counter-example that is replayed."""

from __future__ import annotations

import pytest

from quantlib.proof import catalogue, prove, solver

if (why := solver.missing()) is not None:
    pytest.skip(why, allow_module_level=True)

LIMIT = 300.0  # seconds for one case, however busy the machine is


@pytest.mark.parametrize("theorem", [t.name for t in catalogue.theorems()])
def test_every_fault_is_found_and_replayed(theorem: str) -> None:
    faults = [q for q in prove.questions(theorem=theorem) if q.fault and q.theorem == theorem]
    assert len(faults) >= 2
    for question in faults:
        result = prove.answer(question, LIMIT)
        assert (result.verdict, result.wrong) == (solver.REFUTED, ""), question
