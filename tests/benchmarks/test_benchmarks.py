"""The benchmarks run, say what they must and cannot be fooled; how fast anything is, no test asserts."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import case, cast, chart, check, command, machine, measure, peers, report, roofline, targets
from benchmarks.case import OURS, PEER, Case, Contender, Limits, Row
from quantlib import cli

TINY = ["--shape", "64", "256", "--seconds", "0.001", *(f"--without={p}" for p in ("torch.compile", "torchao"))]
SHAPE = (64, 256)
ROW = Row("cast", "cast", "float32 -> float16", "", (8192, 4096), "quantlib cpp", OURS, runs=3, min=1.0, of_copy=0.5)


LIMITS = Limits(copy=40e9, read=50e9, products={"float32": 1e11, "bfloat16": 2e11, "int8": 4e11})
MACHINE = {"device": "a machine", "instructions": "none", "cores": 2, "threads": 2, "load": 0.0, "copy_gb_per_s": 40.0}
MACHINE |= {"peak_tflop_per_s": {"float32": 0.1, "bfloat16": 0.2, "int8": 0.4}, "versions": {}, "date": "today"}


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the machine's limits, which take seconds to measure."""
    monkeypatch.setattr(machine, "limits", lambda shape, device, quick: LIMITS)
    monkeypatch.setattr(machine, "noise", lambda device: 0.01)


def bench(*arguments: object) -> int:
    return cli.main(["bench", *map(str, arguments)])


def every_case(quick: bool) -> list[Case]:
    families = (module for name, module in command.FAMILIES.items() if name != "startup")
    return [case for module in families for case in module.cases(quick, shape=SHAPE)]


def measured(one: Case, **options: Any) -> dict[str, Row]:
    rows: list[Row] = []
    measure.measure(one, rows, seconds=0.0, **options)
    return {row.backend: row for row in rows}


def test_a_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "csv", "html")}
    arguments = [word for kind, path in files.items() for word in (f"--{kind}", path)]
    assert bench(*TINY, "--quick", "--family", "quantize", "--family", "call", *arguments) == 0

    headline, header, *blocks = capsys.readouterr().out.split("\n\n")
    assert (
        "noise 1%, plain copy 40.0 GB/s, plain read 50.0 GB/s, products FP32 0.100, BF16 0.200, INT8 0.400 TFLOP/s"
        in headline
    )
    heading, *lines = blocks[0].splitlines()
    assert heading == "quantize float32 -> int8 tensor, 64x256, 0.1 MB"
    ends = [header.index(column) + len(column) for column in ("min", "median", "spread", "of copy")]
    assert all(line[end : end + 2].strip() == "" and line[end - 1] != " " for line in lines for end in ends)
    assert files["html"].read_text().startswith("<!doctype html>")

    about, rows = report.read_json(files["json"])
    assert {"device", "threads", "versions", "copy_gb_per_s", "peak_tflop_per_s"} <= about.keys()
    assert json.loads(files["json"].read_text())["complete"] is True
    assert [row["backend"] for row in csv.DictReader(files["csv"].open())] == [row.backend for row in rows]
    by_name = {row.backend: row for row in rows if row.family == "quantize"}
    own = next(row for row in by_name.values() if row.role == OURS)
    assert own.differing == 0
    assert own.compared == 64 * 256
    assert own.bytes == 64 * 256 * 5 + 4
    assert own.gb_per_s == pytest.approx(own.bytes / own.min / 1e9)
    assert by_name["plain copy"].of_copy == 1
    best = min(row.min for row in by_name.values() if row.role == PEER)
    assert own.speedup == pytest.approx(best / own.min)
    assert all(row.above is not None for row in rows if row.family == "call" and row.role == OURS)


def test_peers_compute_what_quantlib_computes() -> None:
    """The formulas that torch eager and torch.compile run give the reference's bytes, so the race is a fair one."""
    for one in every_case(quick=False):
        inputs = one.inputs()
        outs = one.outs(*inputs)
        for contender in one.contenders():
            if contender.name == "torch eager":
                _, results = check.first_run(contender, inputs, outs)
                for part in check.parts(one, inputs):
                    assert check.differing(results, part)[0] == 0, one.name


def test_no_time_for_a_wrong_byte() -> None:
    class Wrong(cast.Cast):
        def contenders(self) -> list[Contender]:
            def bind(inputs: Any, outs: Any) -> Any:
                def call() -> None:
                    outs[0].copy_(inputs[0])
                    outs[0].view(torch.int16)[5, 7] ^= 1

                return call

            return [self.copy(), *self.ours(bind)]

    rows = measured(Wrong(SHAPE))
    own = next(row for row in rows.values() if row.role == OURS)
    assert "1 of 16384 differ, first at [5, 7]" in own.error
    assert own.min is None
    assert own.gb_per_s is None
    assert rows["plain copy"].min is not None


def test_a_missing_peer_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise peers.MissingError(f"not installed: no {name}")

    monkeypatch.setattr(peers, "package", missing)
    (one,) = command.FAMILIES["quantize_dynamic"].cases(True, shape=SHAPE)
    rows = measured(one, without=["torch.compile"])
    for name in ("torchao", "bitsandbytes row-wise"):
        assert rows[name].min is None
        assert "not installed" in rows[name].error
    assert "not installed" in report.table(list(rows.values()))


def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times, timed = iter(range(100)), measure.timed

    def interrupted(*args: Any) -> float:
        if next(times) == 6:  # in the second round of the first case
            raise KeyboardInterrupt
        return timed(*args)

    monkeypatch.setattr(measure, "timed", interrupted)
    path, table, page = (tmp_path / f"out.{kind}" for kind in ("json", "csv", "html"))
    outs = ("--json", path, "--csv", table, "--html", page)
    assert bench(*TINY, "--family", "cast", *outs) == command.INTERRUPTED
    assert json.loads(path.read_text())["complete"] is False
    rows = report.read_json(path)[1]
    assert [row.runs for row in rows] == [2, 1, 1, 1, 1]
    assert len(table.read_text().splitlines()) == 1 + 5
    assert "was interrupted" in page.read_text()
    assert "interrupted" in capsys.readouterr().err


def test_every_target_has_its_case_and_peers() -> None:
    families = (module for name, module in command.FAMILIES.items() if name != "startup")
    every = [case for module in families for case in module.cases(False, shape=command.FULL)]
    cases = {one.name: one for one in [*every, *command.FAMILIES["startup"].cases(True)]}
    for target in targets.TARGETS:
        assert set(target.against) <= {c.name for c in cases[target.case].contenders()}, target


@pytest.mark.parametrize(
    ("target", "peer", "expected", "met"),
    [
        (targets.Target(ROW.case, "speedup", 2, ("torch copy_",)), 1.9, 1.9, False),
        (targets.Target(ROW.case, "speedup", 2, ("torch copy_",)), 2.0, 2.0, True),
        (targets.Target(ROW.case, "above", 0.5, ("torch copy_",)), 0.4, 0.6, False),
        (targets.Target(ROW.case, "of_copy", 0.5), 1.0, 0.5, True),
        (targets.Target(ROW.case, "speedup", 2, ("somebody else",)), 2.0, None, None),
    ],
)
def test_verdicts(target: targets.Target, peer: float, expected: float | None, met: bool | None) -> None:
    rows = [ROW, dataclasses.replace(ROW, backend="torch copy_", role=PEER, min=peer)]
    found = targets.verdict(target, rows)
    assert (found.measured, found.met) == (expected if expected is None else pytest.approx(expected), met)


def test_the_chart(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [ROW, dataclasses.replace(ROW, backend="torch.compile", role=PEER), dataclasses.replace(ROW, of_copy=None)]
    chart.draw(MACHINE, rows, tmp_path / "chart.png")
    product = dataclasses.replace(ROW, flops=10**9, bytes=10**8, of_peak=0.1)
    chart.draw_roofline(MACHINE, [product, dataclasses.replace(product, role=PEER, min=0.5)], tmp_path / "roof.png")
    chart.draw_roofline({**MACHINE, "peak_tflop_per_s": {}}, [], tmp_path / "empty.png")
    for name in ("chart.png", "roof.png", "empty.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_targets_are_not_judged_on_tensors_that_fit_a_cache() -> None:
    small = dataclasses.replace(ROW, shape=SHAPE)
    assert targets.verdicts([ROW], MACHINE)
    assert not targets.verdicts([small], MACHINE)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.234, "1.23 s"), (0.0123, "12.3 ms"), (123.4e-6, "123 us"), (9.999e-7, "1.00 us"), (5e-9, "5 ns"), (None, "")],
)
def test_seconds(value: float | None, text: str) -> None:
    assert case.seconds(value) == text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--family", "matmuls"], "--family must be cast,"),
        (["--shape", "0", "4"], "--shape must be an integer >= 1, got '0'"),
        (["--threads", "x"], "--threads must be an integer >= 1, got 'x'"),
        (["--seconds", "-1"], "--seconds must be a number > 0, got '-1'"),
        (["--json", "/no/such/folder/out.json"], "--json must be a file in an existing folder, got '/no/such"),
        (["--backend", "cpu"], "--backend must be one of triton, cuda, cpp, composite, got 'cpu'"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--device", "cuda"], "--device must be a device of this machine, got 'cuda': "),
    ],
)
def test_a_wrong_argument_is_one_line(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"quantlib bench: {said}")


def test_save_wants_a_checkout(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "PAGE", Path("/no/such/page.md"))
    assert bench(*TINY, "--save") == 2
    assert "--save must be in a checkout" in capsys.readouterr().err


def test_shares_of_what_the_machine_can_do() -> None:
    """A product of 2 GFLOP over 10 MB in 10 ms, beside 40 GB/s and 400 GFLOP/s."""

    class Product(cast.Cast):
        streams, multiplies, flops = False, "int8", 2 * 10**9

    row = measure.with_rates(dataclasses.replace(ROW, min=0.01), 10**7, Product(SHAPE), LIMITS)
    assert (row.gb_per_s, row.of_copy) == (pytest.approx(1), pytest.approx(1 / 40))
    assert (row.tflop_per_s, row.of_peak) == (pytest.approx(0.2), pytest.approx(0.5))
    assert row.of_read == pytest.approx(1 / 50)
    assert row.intensity == 200
    assert roofline.share(row) == row.of_peak
    unknown = measure.with_rates(dataclasses.replace(ROW, min=0.01), 0, Product(SHAPE), Limits())
    assert (unknown.of_copy, unknown.of_peak, unknown.gb_per_s) == (None, None, None)


@pytest.mark.parametrize(
    ("of_copy", "peer_seconds", "device", "found"),
    [
        (1.07, 1.9, "cuda", ""),
        (1.08, 1.9, "cuda", "artefact? 1.08 of a plain copy"),
        (1.00, 2.1, "cuda", "artefact? 2.10x F.linear bfloat16, which moves 2.00x the bytes"),
        (1.41, 2.1, "cpu", ""),  # a CPU reads what it writes, so that an op that writes less is above a copy
    ],
)
def test_what_no_memory_can_do_on_a_gpu_is_marked(of_copy: float, peer_seconds: float, device: str, found: str) -> None:
    row = dataclasses.replace(ROW, of_copy=of_copy, device=device, bytes=100)
    assert measure.artefact(row, {"F.linear bfloat16": (peer_seconds, 200)}) == found


def test_a_gpu_is_described_by_what_decides_its_figures() -> None:
    gpu = {"architecture": "sm_90", "sms": 132, "l2_bytes": 60 << 20, "clocks.sm": "1980 MHz", "power.draw": "120.00 W"}
    line = report.headline({**MACHINE, "instructions": "sm_90", "gpu": gpu})
    assert line.startswith(
        "a machine (sm_90), 132 SMs, 60 MiB of L2, 1980 MHz, 120.00 W, load 0.0, plain copy 40.0 GB/s"
    )
    assert "threads" not in line


def test_several_sizes_have_a_line() -> None:
    """1 us and then 100 GB/s."""
    sizes = (10**6, 10**7, 10**8)
    rows = [dataclasses.replace(ROW, shape=(n,), bytes=n, min=1e-6 + n / 1e11) for n in sizes]
    assert report.line_table(rows).splitlines()[1].split()[-2:] == ["100", "1.00"]
    assert report.line_table(rows[:2]) == ""
    assert len(json.loads(report.as_json(MACHINE, rows, True))["lines"]) == 1


def test_a_gpu_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"major": 9, "minor": 0, "multi_processor_count": 132, "total_memory": 1 << 37, "L2_cache_size": 60 << 20}
    properties = type("Properties", (), {**facts, "uuid": "1234"})
    said, asked = ["1980 MHz, 1980 MHz, 3201 MHz, 123.45 W, 700.00 W, 41\n", "No devices were found\n"], []

    def smi(command: list[str], **options: Any) -> Any:
        asked.append(command)
        return type("Done", (), {"stdout": said.pop(0)})

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(machine, "subprocess", type("Subprocess", (), {"run": smi, "SubprocessError": OSError}))
    monkeypatch.setattr(machine, "commit", lambda: "v1")
    about = machine.describe("cuda")
    assert (about["device"], about["instructions"], about["gpu"]["sms"]) == ("a GPU", "sm_90", 132)
    assert about["gpu"]["clocks.sm"] == "1980 MHz"
    assert about["gpu"]["temperature.gpu"] == "41"
    assert asked[0][:2] == ["nvidia-smi", "--id=GPU-1234"]
    assert machine.gpu_state() == {}


def test_the_page_shows_the_saved_run() -> None:
    saved = sorted(command.RESULTS.glob("cpu-*.json"))
    if not saved:
        pytest.skip("no run is saved")
    page = command.PAGE.read_text()
    assert any(page == command.with_figures(page, report.as_markdown(*report.read_json(path))) for path in saved)
