"""``quantlib bench compare A B``: what counts as a change, what is said, and the exit status."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, report
from benchmarks.case import OURS, PEER, Row
from quantlib import cli

ROW = Row("cast", "cast", "float32 -> float16", "", (8192, 4096), "quantlib cpp", OURS, runs=9, min=1.0, median=1.1,
          spread=0.03)  # fmt: skip
ELSE = dataclasses.replace(ROW, backend="torch copy_", role=PEER)
MACHINE = {"device": "a machine", "threads": 2, "cores": 2, "versions": {"torch": "2"}}


def saved(path: Path, *rows: Row, **machine: Any) -> Path:
    path.write_text(report.as_json({**MACHINE, **machine}, rows, complete=True))
    return path


def slowed(row: Row, by: float, **changes: Any) -> Row:
    assert row.min is not None
    assert row.median is not None
    return dataclasses.replace(row, min=row.min * by, median=row.median * by, **changes)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (ROW, compare.SAME),
        (slowed(ROW, 1.055), compare.SAME),  # 3 % and 3 % of spread
        (slowed(ROW, 1.065), compare.SLOWER),
        (slowed(ROW, 1.065, spread=0.04), compare.SAME),
        (slowed(ROW, 1 / 1.055), compare.SAME),
        (slowed(ROW, 1 / 1.065), compare.FASTER),
        (dataclasses.replace(ROW, min=1.5), compare.SAME),  # of fifty runs none was lucky this time
        (dataclasses.replace(ROW, median=1.5), compare.SAME),  # a machine that was busy half of the time
        (dataclasses.replace(ROW, min=None, median=None, error="wrong"), compare.LOST),
        (None, compare.ONLY_BEFORE),
    ],
)
def test_a_change_is_beyond_both_spreads(after: Row | None, verdict: str) -> None:
    assert compare.verdict(ROW, after, tolerance=0.02) == verdict


def test_the_tolerance_is_the_least_that_counts() -> None:
    steady = dataclasses.replace(ROW, spread=0.0)
    assert compare.verdict(steady, slowed(steady, 1.019), 0.02) == compare.SAME
    assert compare.verdict(steady, slowed(steady, 1.021), 0.02) == compare.SLOWER
    assert compare.verdict(steady, slowed(steady, 1.021), 0.05) == compare.SAME


@pytest.mark.parametrize(
    ("before", "after", "options", "status"),
    [
        ([ROW, ELSE], [ROW, ELSE], [], 0),
        ([ROW], [slowed(ROW, 0.5)], [], 0),
        ([ROW], [slowed(ROW, 1.5)], [], 1),
        ([ROW], [slowed(ROW, 1.5)], ["--tolerance", "0.6"], 0),
        ([ROW, ELSE], [ROW, slowed(ELSE, 1.5)], [], 1),
        ([ROW, ELSE], [ROW, slowed(ELSE, 1.5)], ["--ours"], 0),
        ([ROW], [dataclasses.replace(ROW, min=None, error="1 of 4 differ")], [], 1),
        ([ROW], [ELSE], [], 0),
        ([], [], [], 0),
    ],
)
def test_the_exit_status_gates(
    before: list[Row], after: list[Row], options: list[str], status: int, tmp_path: Path
) -> None:
    a, b = saved(tmp_path / "a.json", *before), saved(tmp_path / "b.json", *after)
    assert cli.main(["bench", "compare", str(a), str(b), *options]) == status


def test_what_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = dataclasses.replace(ROW, conversion="float32 -> bfloat16")
    a = saved(tmp_path / "a.json", ROW, ELSE, dataclasses.replace(ELSE, backend="gone"))
    b = saved(tmp_path / "b.json", slowed(ROW, 1.5), ELSE, new)
    assert cli.main(["bench", "compare", str(a), str(b)]) == 1
    table, summary = capsys.readouterr().out.split("\n\n")
    header, *lines = table.splitlines()
    assert [line[header.index("backend") :].split("  ")[0].strip() for line in lines] == [
        "quantlib cpp", "torch copy_", "gone", "quantlib cpp",
    ]  # fmt: skip
    assert lines[0].split()[-4:] == ["1.50", "3%", "3%", "SLOWER"]
    assert lines[2].endswith("only in A")
    assert lines[3].endswith("only in B")
    assert "1 SLOWER" in summary
    assert "the slowest: cast float32 -> float16, quantlib cpp, 1.50 of its time" in summary


def test_another_machine_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a.json", ROW)
    b = saved(tmp_path / "b.json", ROW, threads=4, versions={"torch": "3"})
    assert cli.main(["bench", "compare", str(a), str(b)]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("NOT THE SAME MACHINE OR SETTINGS")
    assert rest[:2] == ["  threads: 2 in A, 4 in B", "  torch: 2 in A, 3 in B"]


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    full = dataclasses.replace(ROW, flops=10, bytes=20, of_peak=0.5, tflop_per_s=1.0, device="cuda", dtype="float32")
    assert report.read_json(saved(tmp_path / "a.json", full)) == (MACHINE, [full])


def test_the_first_version_is_still_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", ROW)
    content = json.loads(path.read_text())
    content["version"] = 1
    for name in ("dtype", "device", "flops", "tflop_per_s", "of_peak", "of_read", "of_read_write"):
        del content["rows"][0][name]
    path.write_text(json.dumps(content))
    assert report.read_json(path) == (MACHINE, [ROW])


ROWLESS = '{"version": 2, "machine": {}, "rows": [{"speed": 3}]}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file or directory"),
        (b"min,median\n", "must be the JSON of a run, got JSONDecodeError: Expecting value"),
        (b"\xff\xfe\x00", "must be the JSON of a run, got UnicodeDecodeError"),
        (b"[1]", "must be the JSON of a run, got other JSON"),
        (b'{"benchmarks": []}', "must be the JSON of a run, got other JSON"),
        (b'{"version": 4, "machine": {}, "rows": []}', "must be of version 1 or 2 or 3, got 4"),
        (ROWLESS.replace("3}", '3, "shape": []}').encode(), "must hold rows as `quantlib bench --json` writes them"),
        (ROWLESS.encode(), "must hold rows as `quantlib bench --json` writes them"),
        (b'{"version": 2, "machine": [], "rows": {}}', "must be the JSON of a run, got other JSON"),
    ],
)
def test_what_is_no_run_is_one_line(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = saved(tmp_path / "good.json", ROW), tmp_path / "bad.json"
    if content is not None:
        bad.write_bytes(content)
    for order in ([good, bad], [bad, good]):
        assert cli.main(["bench", "compare", *map(str, order)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith(f"quantlib bench: {bad}")
        assert said in err


def test_a_folder_and_a_missing_argument(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = saved(tmp_path / "good.json", ROW)
    assert cli.main(["bench", "compare", str(good), str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"quantlib bench: {tmp_path}: Is a directory\n"
    assert cli.main(["bench", "compare", str(good)]) == 2
    assert "B.json" in capsys.readouterr().err
    assert cli.main(["bench", "compare", str(good), str(good), "--tolerance", "-1"]) == 2
    assert "--tolerance must be a number >= 0, got '-1'" in capsys.readouterr().err


def test_the_rule_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "compare", "--help"]) == 0
    assert "spreads of the two runs" in " ".join(capsys.readouterr().out.split())
