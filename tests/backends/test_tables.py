"""The tables of matmuls and fake quantizations: what they cover, that they bite, and the command that runs them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from quantlib import backends, formats
from quantlib.testing import every, learned, product
from quantlib.testing.__main__ import in_processes, main
from quantlib.testing.learned import Learned
from quantlib.testing.product import Product
from quantlib.testing.rotated import Rotated
from quantlib.testing.steps import Step
from quantlib.testing.table import DTYPES

KINDS = [(f.name, symmetric) for f in formats.TABLE for symmetric in (True, False) if symmetric or not f.is_float]


def test_no_case_is_there_twice() -> None:
    for table in (every.every(large=True), every.launches()):
        assert len(set(map(str, table))) == len(table)


@pytest.mark.parametrize("op", [op for op in every.OPS if op not in ("cast", "adamw_step", "hadamard")])
def test_every_kernel_is_launched(op: str) -> None:
    """The table has every format, dtype and kind of zero point of the op, tiles and both masks too."""
    table = every.launches(op)
    found = {(case.format, case.symmetric, case.dtype) for case in table}
    integers = op in product.INTEGERS
    assert found == {(f, s, d) for f, s in KINDS for d in DTYPES if not (integers and formats.get(f).is_float)}
    if op == "dequant_matmul":
        tiled = {case.format for case in table if isinstance(case, Product) and case.tiled}
        assert tiled == {f.name for f in formats.TABLE if f.bits <= 8}
    if op == "fake_quantize_backward":
        masks = {(c.format, c.symmetric, c.dtype, c.lsq) for c in table if isinstance(c, Learned)}
        assert len(masks) == 2 * len(found)
    assert {case.layout for case in table} >= {"contiguous", "offset"}


def test_every_kernel_of_a_step_is_launched() -> None:
    """States in 8 bits and in 32 with every dtype, rounded at random where that is bfloat16, and at any address."""
    table = [case for case in every.launches("adamw_step") if isinstance(case, Step)]
    kinds = {(case.dtype, case.format, case.random) for case in table}
    assert kinds == {(d, f, r) for d in DTYPES for f in ("int8", "float32") for r in {False, d == "bfloat16"}}
    assert {case.layout for case in table} >= {"contiguous", "offset"}


def test_every_kernel_of_a_rotation_is_launched() -> None:
    """Every block with every dtype, with values that are not finite too."""
    table = [case for case in every.launches("hadamard") if isinstance(case, Rotated)]
    kinds = {(case.dtype, case.block, case.special) for case in table}
    assert kinds == {(d, 1 << k, s) for d in DTYPES for k in range(11) for s in (False, True)}
    assert {case.layout for case in table} == {"contiguous", "offset"}


def test_a_share_of_them_is_right_here() -> None:
    backend = "composite" if backends.refuses("cpp", "cpu") else "cpp"
    with backends.use_backend(backend):
        for case in every.launches()[5::17]:
            if isinstance(case, (Product, Learned)) and every.refuses(case, backend, "cpu") is None:
                every.check(case)


class Off:
    """A call whose result is wrong in one bit."""

    def __init__(self, call: Any) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        found = self.call(*args)
        last = found[-1] if isinstance(found, tuple) else found
        last.view(-1)[:1].view(torch.uint8)[-1:] ^= 64
        return found


@pytest.mark.parametrize(
    ("module", "op"), [(product, "scaled_matmul"), (learned, "fake_quantize"), (learned, "fake_quantize_backward")]
)
def test_a_wrong_bit_is_seen(module: Any, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in every.launches(op) if case.dtype == "float32")
    every.check(case)
    monkeypatch.setattr(module, "call", Off(module.call))
    with pytest.raises(AssertionError, match=r"differ, first at|off by"):
        every.check(case)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["composite", "--launches", "--op", "dynamic_matmul", "--format", "int4"]
    assert main(options) == 0
    whole = int(capsys.readouterr().out.split()[1])
    assert main([*options, "--part", "1/3"]) == 0
    assert int(capsys.readouterr().out.split()[1]) in range(whole // 3, whole // 3 + 2)


class Process:
    """One of several that run the tables; the last does not survive it."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.part = command[-1]
        self.returncode = {"0/3": 0, "1/3": 1, "2/3": -6}.get(self.part, 0)

    def communicate(self) -> tuple[str, None]:
        said = {"0/3": "cuda: 7 of 7 cases, 2 that it refuses\n", "1/3": "a byte\ncuda: 6 of 7 cases\n", "2/3": ""}
        return said[self.part], None


def test_processes_that_share_the_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("subprocess.Popen", Process)
    assert in_processes(3, ["cuda"]) == 1
    out = capsys.readouterr().out
    assert out == "a byte\ncuda: 13 of 14 cases, 2 that it refuses, 1 of 3 processes broke\n"


def test_a_wrong_byte_is_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(product, "call", Off(product.call))
    assert main(["composite", "--launches", "--op", "dynamic_matmul", "--format", "int4"]) == 1
    assert "differ, first at" in capsys.readouterr().out


def test_ctrl_c_ends_a_table_with_what_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Any] = []

    def check(case: Any, device: str) -> None:
        ran.append(case)
        if len(ran) == 2:
            raise AssertionError("a byte")
        if len(ran) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(every, "check", check)
    assert main(["composite", "--op", "cast"]) == 130
    assert re.fullmatch(r"a byte\ncomposite: 2 of \d+ cases, \d+ that did not run\n", capsys.readouterr().out)


def test_ctrl_c_is_told_to_every_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = []

    class Interrupted(Process):
        def send_signal(self, signal: int) -> None:
            told.append(self.part)
            self.returncode = 130

        def communicate(self) -> tuple[str, None]:
            if self.part not in told:
                raise KeyboardInterrupt
            return "cuda: 3 of 7 cases, 1 that it refuses, 4 that did not run\n", None

    monkeypatch.setattr("subprocess.Popen", Interrupted)
    assert in_processes(2, ["cuda"]) == 130
    assert told == ["0/2", "1/2"]
    assert capsys.readouterr().out == "\ncuda: 6 of 14 cases, 2 that it refuses, 8 that did not run\n"
