"""``quantlib bits`` and ``quantlib formats``: the seed examples exactly, and every way to write a value."""

from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quantlib import formats, reference
from quantlib.cli import main
from quantlib.cli.parser import number

SEEDS = [
    ("3.141592", "float32", "0 10000000 10010010000111111011000", "0x40490FD8", "3.14159202575683593750", "4"),
    ("pi", "float32", "0 10000000 10010010000111111011011", "0x40490FDB", "3.14159274101257324219", "4"),
    ("pi", "float16", "0 10000 1001001000", "0x4248", "3.140625", "2"),
    ("3.141592", "float16", "0 10000 1001001000", "0x4248", "3.140625", "2"),
    ("3.141592", "bfloat16", "0 10000000 1001001", "0x4049", "3.140625", "2"),
    ("3.141592", "int8 (s=1)", "0 0000011", "0x03", "3", "1"),
    ("3.141592", "float8_e4m3fn", "0 1000 101", "0x45", "3.25", "1"),
    ("3.141592", "float8_e5m2", "0 10000 10", "0x42", "3.0", "1"),
    ("3.141592", "float4_e2m1fn", "0 10 1", "0x5", "3.0", "0.5"),
]


def lines(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, list[str]]:
    """Format -> its cells."""
    assert main(["bits", *argv]) == 0
    rows = [re.split(r" {2,}", line) for line in capsys.readouterr().out.splitlines()]
    return {row[0]: row for row in rows}


def entries(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, dict[str, Any]]:
    """Format -> its entry in the JSON of one value."""
    assert main(["bits", "--json", *argv]) == 0
    (only,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return {entry["format"]: entry for entry in only["formats"]}


@pytest.mark.parametrize(("value", "format", "bits", "code", "stored", "size"), SEEDS)
def test_the_seed_examples(
    capsys: pytest.CaptureFixture[str], value: str, format: str, bits: str, code: str, stored: str, size: str
) -> None:
    row = lines(capsys, value)[format]
    assert row[1:4] == [bits, code, stored]
    assert row[-1] == size


def test_values_that_look_like_options(capsys: pytest.CaptureFixture[str]) -> None:
    values = ["nan", "inf", "-inf", "-0", "-3.5", "-.5", "-1e-40", "-pi", "-nan", "-0x1p-3", "65520", "0x40490FD8"]
    assert main(["bits", *values]) == 0
    codes = re.findall(r"^float32 .*(0x[0-9A-F]{8})", capsys.readouterr().out, re.MULTILINE)
    assert codes == [
        *("0x7FFFFFFF", "0x7F800000", "0xFF800000", "0x80000000", "0xC0600000", "0xBF000000"),
        *("0x800116C2", "0xC0490FDB", "0x7FFFFFFF", "0xBE000000", "0x477FF000", "0x40490FD8"),
    ]


def test_edges(capsys: pytest.CaptureFixture[str]) -> None:
    assert lines(capsys, "65520")["float16"][2:5] == ["0x7C00", "inf", "inf"]
    assert lines(capsys, "65519.99")["float16"][2:4] == ["0x7BFF", "65504.0"]
    assert lines(capsys, "nan")["int8 (s=1)"][2:] == ["0x00", "0", "-", "-", "1"]
    assert lines(capsys, "-0")["float16"][2:4] == ["0x8000", "-0.0"]
    assert lines(capsys, "1e-40")["float32"][2:4] == ["0x000116C2", "9.99994610111475958153e-41"]
    assert lines(capsys, "-3.5")["int8 (s=1)"][1:4] == ["1 1111100", "0xFC", "-4"]
    assert lines(capsys, "1000", "--no-saturate")["float8_e4m3fn"][2:4] == ["0x7F", "nan"]
    assert lines(capsys, "1e9", "--saturate")["float16"][2:4] == ["0x7BFF", "65504.0"]


def test_json_holds_the_exact_value(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys, "0.1")
    assert list(found) == list(formats.FORMATS)
    assert found["float32"]["value"] == "0.100000001490116119384765625"
    assert found["float16"]["code"] == "0x2E66"
    assert found["float16"]["error"] == pytest.approx(-2.44140625e-05)
    assert entries(capsys, "-inf")["float8_e5m2"]["error"] is None


def test_a_scale(capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(capsys, "3.141592", "--scale", "0.05")
    for f in formats.TABLE:
        scale = np.full((1, 1), 0.05, np.float32)
        codes = reference.quantize(np.float32([[3.141592]]), scale, f.name, block=(1, 1))
        stored = reference.dequantize(codes, scale, f.name, block=(1, 1), size=1).view(np.float32)
        code = int(codes.view(f"uint{8 * codes.itemsize}").item())
        assert (found[f.name]["code"], found[f.name]["value"]) == (
            f"0x{code:0{(f.bits + 3) // 4}X}",
            str(Decimal(float(stored.item()))),
        )
    assert found["bfloat16"]["scale"] == pytest.approx(0.05)
    assert entries(capsys, "3", "--scale", "1e30")["bfloat16"]["scale"] == 1  # the largest of bfloat16 (C4)


@pytest.mark.parametrize(
    "text", ["16777217.0000000000000000001", "1.00000017881393432617187499999999", "5e-46", "8e-46"]
)
def test_a_decimal_is_rounded_to_fp32_once(text: str) -> None:
    nearest = np.float32(number(text))
    exact = Fraction(Decimal(text))
    with np.errstate(all="ignore"):
        others = [np.nextafter(nearest, np.float32(end)) for end in (-np.inf, np.inf)]
    assert all(abs(Fraction(float(nearest)) - exact) < abs(Fraction(float(x)) - exact) for x in others)


def test_numbers() -> None:
    assert number("1e999999999999") == math.inf
    assert number("-1e-999999999999") == 0
    assert number("0x1p99999") == math.inf
    assert number("-tau") == -math.tau


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["x"], "VALUE must be a number, inf, nan, pi, tau, e or the 0x and 8 digits of an FP32 code, got 'x'"),
        (["0x4248"], "got '0x4248'"),
        (["-0x40490FD8"], "got '-0x40490FD8'"),
        ([], "VALUE"),
        (["1", "--scale", "-1"], "--scale must be a finite number > 0, got '-1'"),
        (["1", "--scale", "inf"], "--scale must be a finite number > 0, got 'inf'"),
        (["1", "--scale", "2", "--no-saturate"], "--no-saturate must be without --scale"),
        (["1", "--colour"], "--colour"),
    ],
)
def test_bad_values(capsys: pytest.CaptureFixture[str], argv: list[str], words: str) -> None:
    assert main(["bits", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("quantlib bits: ")
    assert words in err
    assert err.count("\n") == 1


def in_a_terminal(*argv: str, **environment: str) -> str:
    master, slave = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")} | {"TERM": "xterm"} | environment
    child = subprocess.Popen([sys.executable, "-m", "quantlib", *argv], stdout=slave, stderr=slave, env=env)
    os.close(slave)
    out = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # Linux's way to say that the other end is closed
            break
        if not chunk:
            break
        out += chunk
    os.close(master)
    assert child.wait() == 0
    return out.decode().replace("\r\n", "\n")


def test_colour_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bits", "3.141592"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    coloured = in_a_terminal("bits", "3.141592")
    assert "\x1b[31m0\x1b[0m \x1b[32m10000\x1b[0m \x1b[36m1001001000\x1b[0m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert in_a_terminal("bits", "3.141592", NO_COLOR="1") == plain
    assert in_a_terminal("bits", "3.141592", TERM="dumb") == plain


def test_bits_and_formats_wait_for_nothing_but_numpy() -> None:
    # The names of packages, not the seconds that they take: those differ by processor and by what else it does.
    bare = packages_loaded("pass")
    for argv in (["bits", "pi"], ["formats"], ["--version"]):
        run = f"sys.argv = ['quantlib']; from quantlib.cli import main; main({argv})"
        assert packages_loaded(run) - bare == {"numpy", "quantlib"}, argv


def packages_loaded(code: str) -> set[str]:
    """Return which installed packages, and quantlib, a new interpreter has loaded after `code`."""
    listing = "print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    run = [sys.executable, "-c", f"import sys; {code}; {listing}"]
    loaded = set(subprocess.run(run, capture_output=True, text=True, check=True).stderr.split())
    return loaded & {"quantlib", *packages_distributions()}


def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["formats"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert rows["float32"][1:6] == ["32", "1", "8", "23", "4"]
    assert rows["float16"][1:7] == ["16", "1", "5", "10", "2", "+-65504"]
    assert rows["bfloat16"][1:6] == ["16", "1", "8", "7", "2"]
    assert rows["int8"][1:7] == ["8", "1", "-", "7", "1", "-127..127"]
    assert main(["formats", "--json"]) == 0
    listed = {row["format"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(listed) == list(formats.FORMATS)
    for name, row in listed.items():
        fields = [row[field] for field in ("sign", "exponent", "fraction")]
        assert fields == [None] * 3 if "values" in row else sum(fields) == row["bits"], name
        assert row["bytes"] == row["bits"] / 8
    assert listed["int8"]["affine_range"] == [-128, 127]


def test_the_manual_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    manual = (Path(__file__).parents[2] / "docs/cli.md").read_text()
    assert main(["bits", "3.141592"]) == 0
    assert f"$ quantlib bits 3.141592\n{capsys.readouterr().out}```" in manual
