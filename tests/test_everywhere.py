"""`make test-everywhere`: what it changes reaches the tests, what fails is counted, what cannot be had is named."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
if not SCRIPTS.is_dir():
    pytest.skip("not a checkout", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import everywhere  # noqa: E402
from everywhere import Environment  # noqa: E402

TESTS = """
import os
import pytest
def test_home():
    assert "HOME" in os.environ
def test_umask():
    old = os.umask(0)
    os.umask(old)
    assert old != 0o077
@pytest.mark.skip(reason="always")
def test_never(): pass
@pytest.mark.parametrize("n", range(9))
def test_order(n):
    print("order", n)
"""


def test_a_run_of_two_environments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_few.py").write_text(TESTS)
    arguments = [str(tmp_path), "-c", os.devnull, "--rootdir", str(tmp_path), "-W", "ignore"]
    given = [
        Environment("as it is", {"HOME": "/somewhere"}, umask=0o022),
        Environment("no HOME", {"HOME": None}, umask=0o077, busy=1),
        Environment("a Martian", lacks="not installed"),
    ]
    assert everywhere.main(arguments, given) == 1
    out = capsys.readouterr().out
    table = [line.split() for line in out[out.index("environment ") :].splitlines()]
    assert table[0] == ["environment", "passed", "failed", "skipped", "seconds"]
    assert table[1][:6] == ["as", "it", "is", "11", "0", "1"]
    assert table[2][:5] == ["no", "HOME", "9", "2", "1"]
    assert table[3] == ["a", "Martian", "-", "-", "-", "-", "not", "installed"]
    assert "test_few.py::test_home" in out
    assert everywhere.main(["--only", "as it is", *arguments], given) == 0


def test_a_shuffled_order_is_another_and_the_same_again(tmp_path: Path) -> None:
    (tmp_path / "test_few.py").write_text(TESTS)
    orders = []
    for seed in ("1", "1", "2"):
        shuffled = Environment("", {"QUANTLIB_SHUFFLE": seed, "HOME": "/"}, ("-p", "shuffled"), umask=0o022)
        done = everywhere.run(shuffled, [str(tmp_path), "-c", os.devnull, "-s", "--rootdir", str(tmp_path)])
        orders.append([line.split()[1] for line in done.output.splitlines() if "order " in line])
    assert orders[0] == orders[1]
    assert len({tuple(order) for order in orders}) == 2
    assert all(sorted(order) == list("012345678") for order in orders)
    assert [str(n) for n in range(9)] not in orders


def test_what_this_machine_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert everywhere.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "as it is"
    names = [line.partition(": cannot be had, ")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert {"a CPU with AVX2 only", "no HOME", "a busy machine", "shuffled, order 1"} <= set(names)
    assert f"python3.{sys.version_info[1]}" not in names


def test_a_python_that_is_not_there_is_named() -> None:
    assert everywhere.lacks_torch("python3.no") == "not installed"
    assert everywhere.lacks("no-such-instruction") == "this CPU has no no-such-instruction" or sys.platform != "linux"
