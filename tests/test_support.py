"""Who serves what is a checked-in table, so that a kernel which stops being reached fails here and not in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from quantlib.testing import support

TABLE = Path(__file__).with_name("support.txt")


@pytest.mark.parametrize("backend", support.COLUMNS)
def test_column_is_what_this_machine_finds(backend: str) -> None:
    if why := support.refusal(backend):
        pytest.skip(f"{backend}: {why}")
    found = {str(row).strip(): entry for row, entry in zip(support.rows(), support.column(backend), strict=True)}
    recorded = support.recorded(TABLE.read_text(), backend)
    assert found == recorded, "python -m quantlib.testing.support tests/support.txt writes it anew"


def test_table_is_complete() -> None:
    text = TABLE.read_text()
    assert text.startswith(support.HEAD)
    assert support.recorded(text, "composite") == {str(row).strip(): "composite" for row in support.rows()}
    for backend in ("cpp", "triton"):  # which the machine that writes the table has; what a GPU runs, a GPU says
        assert "?" not in support.recorded(text, backend).values()
