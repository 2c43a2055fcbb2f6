"""``quantlib verify``: what a sweep covers, that it names a planted fault, that an interrupt keeps what was done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantlib import backends, formats, ops, reference
from quantlib.cli import main
from quantlib.testing import implementations
from quantlib.testing.implementations import Backend, Reference
from quantlib.testing.sweep import BATCH, Array, Case, Inputs, suites, sweep

CASTS = ("--op", "cast", "--format", "float8_e5m2")
CAST = Case("cast", "float32", "float16", saturate=False)


def inputs(case: Case, share: Fraction) -> Array:
    return np.concatenate([batch() for batch in Inputs(case, share)])


# ---- what is looked at ----------------------------------------------------------------------------------------------


def test_all_inputs_are_all_inputs() -> None:
    batches = [batch.args for batch in Inputs(CAST)]
    assert batches == [(start, start + BATCH) for start in range(0, 1 << 32, BATCH)]
    last = list(Inputs(CAST))[-1]()
    assert (last[0], last[-1]) == (2**32 - BATCH, 2**32 - 1)
    for source in ("float16", "float8_e4m3fn"):
        case = Case("cast", source, "float32", saturate=False)
        assert np.array_equal(inputs(case, Fraction(0)), np.arange(1 << formats.get(source).bits))


def test_every_share_holds_what_decides() -> None:
    for case in (suite.cases[0] for suite in suites() if suite.cases[0].source == "float32"):
        codes = inputs(case, Fraction(0))
        assert codes.dtype == np.uint32
        assert Inputs(case, Fraction(0)).size == codes.size
        assert np.unique(codes >> 23).size == 512  # every exponent of both signs
        for fraction in (0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFE, 0x7FFFFF):
            exponents = codes[codes & 0x7FFFFF == fraction] >> 23
            assert np.unique(exponents).size == 512, f"{fraction:#x} of {case}"
        f = case.projection
        if case.op == "activation":
            continue  # which has no codes to lie between
        if isinstance(f, formats.FloatFormat):
            values = reference.decode_float(np.arange(f.max_code + 1), f).astype(np.float64)
            halves = ((values[1:] + values[:-1]) / 2).astype(np.float32).view(np.uint32)
        else:
            halves = np.arange(-f.max, f.max, dtype=np.float32) + np.float32(0.5)
            halves = halves.view(np.uint32)
        around = (halves + np.uint32(1), halves - np.uint32(1), halves)
        assert np.isin(np.concatenate(around), codes).all(), case


def test_a_share_meets_every_low_bit() -> None:
    decisive, share = inputs(CAST, Fraction(0)), Inputs(CAST, Fraction(1, 4096))
    codes = inputs(CAST, share.share)
    assert codes.size == share.size == decisive.size + (1 << 20)
    assert np.array_equal(codes[: decisive.size], decisive)
    strided = codes[decisive.size :]
    assert np.unique(strided % 4096).size == 4096
    assert np.array_equal(strided // 4096, np.arange(1 << 20))


def test_the_suites_cover_the_contract() -> None:
    cases = [case for suite in suites() for case in suite.cases]
    assert len(set(cases)) == len(cases)
    for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        assert {Case("cast", "float32", name, s) for s in (False, True)} <= set(cases)
    scales = {float(np.float32(s)) for s in (1, 0.1, 2**-7, np.pi / 127, 2.0**-100, 2.0**120)}
    int8 = {(c.scale, c.zero_point) for c in cases if (c.op, c.source, c.format) == ("quantize", "float32", "int8")}
    assert int8 == {(s, z) for s in scales for z in (None, 0, 5, -128, 127)}
    assert {c.source for c in cases if c.op == "dequantize"} == {f.name for f in formats.TABLE}


def test_a_sweep_equals_the_reference_called_once() -> None:
    x = np.concatenate([np.linspace(-300, 300, 20001, dtype=np.float32), [np.nan, np.inf, -np.inf]]).astype(np.float32)
    x = x[: x.size // 2 * 2]
    for case in (case for suite in suites() for case in suite.cases if case.source == "float32"):
        got = Reference()(case, x.view(np.uint32))
        if case.op == "cast":
            want = reference.cast(x, case.format, saturate=case.saturate)
        elif case.op == "activation":
            want = reference.activate(x, case.activation)
        else:
            scale, zero_point = case.scale_and_zero_point()
            want = reference.quantize(x, scale, case.format, block=(1, x.size), zero_point=zero_point)
        assert np.array_equal(got, want.view(got.dtype)), str(case)


# ---- the verb -------------------------------------------------------------------------------------------------------


def test_a_share_of_everything(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "verify.json"
    assert main(["verify", "--share", "1/16384", "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = [suite.name for suite in suites()]
    assert [line.partition(":")[0] for line in printed] == [
        *names,
        f"{backends.serving('cpu')} on cpu equals reference",
    ]
    assert all(", 0 mismatches, " in line for line in printed)
    report = json.loads(out.read_text())
    assert report["complete"] is True
    assert [line["suite"] for line in report["results"]] == names
    assert sum(line["mismatches"] for line in report["results"]) == 0


@pytest.mark.parametrize("authority", ["composite", "cuda-headers", "ml_dtypes"])
def test_against_something_else(capsys: pytest.CaptureFixture[str], authority: str) -> None:
    status = main(["verify", "--share", "0", *CASTS, "--against", authority, "--json", "-"])
    out, err = capsys.readouterr()
    if status == 2 and "must be something that is here" in err:
        pytest.skip(err)
    assert status == 0
    assert json.loads(out)["authority"].startswith(authority)
    assert "0 mismatches" in err


def off_by_one(result: torch.Tensor, x: torch.Tensor, bits: int) -> torch.Tensor:
    """``result`` with the last bit of the code of one input turned over."""
    codes = result.clone().view(torch.int16)
    codes[x.view(torch.int32) == bits] ^= 1
    return codes.view(result.dtype)


def test_one_wrong_code_in_all_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cast = ops.cast

    def faulty(x: torch.Tensor, format: str, *, saturate: bool) -> torch.Tensor:
        y = cast(x, format, saturate=saturate)
        return off_by_one(y, x, 0x477FF000) if x.dtype == torch.float32 and format == "float16" else y

    monkeypatch.setattr(implementations.ops, "cast", faulty)
    assert main(["verify", "--share", "0", "--op", "cast", "--format", "float16", "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    first = "cast float32 to float16, saturate=False: x = 0x477ff000 (65520), expected 0x7c00 (inf), got 0x7c01 (nan)"
    assert f"first: {first}" in printed
    assert "differs from reference" in printed


def units(x: torch.Tensor, s: float) -> torch.Tensor:
    return x * (1 / torch.tensor(s))


Rule = Callable[[torch.Tensor, float, int], torch.Tensor]  # x, s, z -> the code less z, before it is clamped
RULES: dict[str, Rule] = {
    "the contract": lambda x, s, z: torch.round(units(x, s)),
    "a division": lambda x, s, z: torch.round(x / s),
    "ties away from zero": lambda x, s, z: torch.trunc(units(x, s) + torch.copysign(torch.tensor(0.5), x)),
    "zero point before rounding": lambda x, s, z: torch.round(units(x, s) + z) - z,
}


@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_rule_is_caught(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def projected(x: torch.Tensor, scale: torch.Tensor, format: str, **options: Any) -> torch.Tensor:
        affine = options["zero_point"] is not None
        z = int(options["zero_point"]) if affine else 0
        qmin, qmax = formats.get(format).range(affine)  # type: ignore[union-attr]
        k = RULES[rule](x, float(scale), z)
        return (torch.where(k.isnan(), 0.0, k).clamp(qmin - z, qmax - z) + z).to(torch.int8)

    cases = [case for suite in suites() for case in suite.cases if suite.name == "quantize int8"]
    cases = [case for case in cases if case.scale in (1.0, float(np.float32(np.pi / 127)))]
    monkeypatch.setattr(implementations.ops, "quantize", projected)
    results = [sweep(case, Backend("composite"), Reference(), Fraction(0)) for case in cases]
    caught = sum(result.mismatches for result in results)
    assert caught == 0 if rule == "the contract" else caught > 0


def test_a_packed_mismatch_names_its_element() -> None:
    case = Case("quantize", "float32", "int4", scale=1.0)

    class Faulty(Reference):
        def __call__(self, case: Case, codes: Array) -> Array:
            packed = super().__call__(case, codes).copy()
            where = np.flatnonzero(codes == 0x40400000)  # 3.0
            for i in where:
                packed[i // 2] ^= 1 << (4 * (i % 2))
            return packed

    first = sweep(case, Faulty(), Reference(), Fraction(0)).first
    assert first is not None
    assert str(first) == "quantize float32 to int4, scale=1.0: x = 0x40400000 (3), expected 0x03, got 0x02"


def test_a_result_of_another_shape_is_an_error() -> None:
    class Short(Reference):
        def __call__(self, case: Case, codes: Array) -> Array:
            return super().__call__(case, codes)[1:]

    with pytest.raises(RuntimeError, match=r"result must be uint16 \[\d+\], got uint16 \[\d+\]"):
        sweep(CAST, Short(), Reference(), Fraction(0))


def test_an_interrupt_keeps_what_was_proved(tmp_path: Path) -> None:
    out = tmp_path / "verify.json"
    command = [sys.executable, "-m", "quantlib", "verify", "--op", "cast", "--share", "1/64", "--json", str(out)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    first = child.stdout.readline()
    child.send_signal(signal.SIGINT)
    rest, err = child.communicate(timeout=600)
    assert "0 mismatches" in first
    assert child.returncode == 130
    assert err.strip().endswith("quantlib verify: interrupted")
    report = json.loads(out.read_text())
    assert report["complete"] is False
    assert f"{report['results'][0]['inputs']:,} inputs" in first
    assert "was not finished against reference" in rest


BAD = [
    (["--share", "2"], "--share must be a fraction in 0..1, such as 1/64, got '2'"),
    (["--share", "1/0"], "--share must be"),
    (["--share", "x"], "--share must be"),
    (["--jobs", "0"], "--jobs must be a number >= 1, got '0'"),
    (["--op", "round"], "--op must be cast, quantize, dequantize or activation, got 'round'"),
    (["--format", "int9"], "--format must be float32"),
    (["--backend", "cublas"], "--backend must be auto, triton, cuda, cpp, composite, got 'cublas'"),
    (["--backend", "cuda"], "--backend must serve cpu tensors, got 'cuda'"),
    (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    (["--against", "itself"], "--against must be reference"),
    (["--op", "cast", "--format", "int8"], "--op and --format must leave a case that reference can run"),
    (["--json", "/nowhere/at/all"], "--json must be a file in a folder that exists"),
    (["extra"], "extra"),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_arguments(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("quantlib verify: ")
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cuda"]) == 2
    assert capsys.readouterr().err == "quantlib verify: --device must be one that is here, got 'cuda'\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["verify", "--share", "0", "--op", "cast", "--format", "float8_e5m2", "--json", "/dev/full"]
    assert main(argv) == 1
    assert capsys.readouterr().err == "quantlib verify: No space left on device\n"
