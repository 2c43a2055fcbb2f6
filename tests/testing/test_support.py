"""The backends of each op are a checked-in table, so that a kernel which stops being reached fails here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ALL, SERVED

from quantlib.testing import support

TABLE = Path(__file__).parents[1] / "support.txt"


@pytest.mark.parametrize("backend", support.COLUMNS)
def test_column_is_what_this_machine_finds(backend: str) -> None:
    if why := support.refusal(backend):
        pytest.skip(f"{backend}: {why}")
    found = {str(row).strip(): entry for row, entry in zip(support.rows(), support.column(backend), strict=True)}
    recorded = support.recorded(TABLE.read_text(), backend)
    assert found == recorded, "python -m quantlib.testing.support tests/support.txt writes it anew"


def test_what_is_not_run_here() -> None:
    """The tests that take a backend and a device in turn leave these out: this one says so for all of them."""
    left = {str(s): s.refusal() for s in ALL if s not in SERVED}
    if left:
        pytest.skip("; ".join(f"{name}: {why}" for name, why in left.items()))


def test_table_is_complete() -> None:
    text = TABLE.read_text()
    assert text.startswith(support.HEAD)
    assert support.recorded(text, "composite") == {str(row).strip(): "composite" for row in support.rows()}
    assert "?" not in text


def test_the_cuda_column_is_what_the_library_registers() -> None:
    """The table agrees with the sources about the CUDA kernels, where no GPU can say it."""
    csrc = TABLE.parent.parent / "csrc"
    if not csrc.is_dir():
        pytest.skip("not a checkout")
    glue = [path for path in csrc.glob("ops/*.cpp") if (csrc / f"cuda/{path.stem}.cu").exists()]
    overloads = {
        name
        for path in glue
        for name in re.findall(r'^.*(?:QL_REGISTER|register_glue).*?"([\w.]+)"', path.read_text(), re.M)
    }
    registered = overloads | {name + ("_out" if "." in name else ".out") for name in overloads}
    recorded = support.recorded(TABLE.read_text(), "cuda")
    for row, entry in recorded.items():
        assert (entry == "cuda") == (row.split()[0] in registered), row
