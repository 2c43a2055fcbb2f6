"""``quantlib`` itself: help, version, ``info``, exit statuses, and a reader that leaves early."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import quantlib
from quantlib import backends, cli
from quantlib.cli import VERBS, main
from quantlib.cli.info import VARIABLES

OPS = ["cast", "compute_scale", "quantize", "dequantize", "quantize_dynamic"]


def run(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "quantlib", *argv], text=True, stderr=subprocess.PIPE, check=False, **options
    )


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: quantlib {verb}")
    assert main(["--help"]) == 0
    assert f"    {verb}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"quantlib {quantlib.__version__}\n"


def test_without_docstrings() -> None:
    """``python -OO`` leaves none, and neither help nor a verb may need them."""
    given = [["--help"], ["bits", "--help"], ["formats"]]
    code = f"from quantlib.cli import main; print(*(main(argv) for argv in {given}))"
    done = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n0 0 0\n")
    assert done.stdout.count("usage: quantlib") == 2


def test_a_locale_without_a_character_of_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(cli.formats, "run", lambda args: print("bar \u2588"))
    assert not main(["formats"])
    assert written.getvalue() == b"bar ?\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "verb"),
        (
            ["projekt"],
            f"verb must be one of {', '.join(VERBS)}, got 'projekt'",
        ),
        (["formats", "--yaml"], "--yaml"),
        (["info", "extra"], "extra"),
    ],
)
def test_bad_arguments(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith("quantlib")
    assert err.count("\n") == 1


def test_info(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLIB_CACHE", "/some/where")
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(OPS) <= set(facts["ops"])
    assert facts["ops"]["cast"]["cpu"] == backends.serving("cpu")
    assert facts["refusals"]["cpu"]["cuda"]["device"] == "serves cuda tensors only"
    assert facts["refusals"]["cpu"]["composite"] == {"device": None, "ops": {}}
    assert (facts["devices"]["cuda"] is None) == ("cuda" in facts["refusals"])
    assert {"quantlib", "python", "torch", "triton", "numpy", "c++", "instruction set"} <= set(facts["versions"])
    cpp = backends.refuses("cpp", "cpu") is None
    assert facts["versions"]["c++ library"] == (str(backends.library_path()) if cpp else "-")
    assert facts["environment"]["QUANTLIB_CACHE"] == "/some/where"
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in (*OPS, *VARIABLES, *backends.BACKENDS, "/some/where", "serves cuda tensors only"):
        assert word in text


@pytest.mark.skipif(bool(backends.refuses("cpp", "cpu")), reason="there is no compiled library")
def test_info_of_a_product(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels' own choice: few rows by dots, many in blocks; a spec that no kernel multiplies is an error."""
    assert main(["info", "--matmul", "4096", "4096", "--to", "W4A16", "--to", "W8A8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [product["x"] for product in facts["products"]] == ["bfloat16", "int8"]
    for product in facts["products"]:
        assert product["rows"]["1"]["kernel"].startswith("dots")
        assert product["rows"]["1024"]["kernel"].startswith("blocks")
        assert all(choice["why"] for choice in product["rows"].values())
    assert main(["info", "--matmul", "64", "64", "--to", "int8:tile:8", "--dtype", "float32"]) == 0
    assert "weight and x in FP32" in capsys.readouterr().out
    for argv, word in (
        (["--matmul", "0", "4"], "'0'"),
        (["--matmul", "4", "4", "--to", "float16"], "'float16'"),
        (["--to", "W8A16"], "'W8A16'"),
    ):
        assert main(["info", *argv]) == 2
        assert word in capsys.readouterr().err


def test_info_of_a_forced_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with backends.use_backend("composite"):
        assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["forced"] == "composite"
    assert facts["ops"]["quantize"]["cpu"] == "composite"
    with backends.use_backend("cuda"):
        assert main(["info"]) == 0
    assert "none: cuda refuses" in capsys.readouterr().out


def test_a_variable_with_a_wrong_value() -> None:
    done = run("info", stdout=subprocess.DEVNULL, env=os.environ | {"QUANTLIB_BACKEND": "fastest"})
    assert done.returncode == 2
    assert "got 'fastest'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_leaves() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run("formats", stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = run("formats", stdout=full)
    assert done.returncode == 1
    assert done.stderr == "quantlib formats: No space left on device\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("x must be 1,\n  got 2"), 2, "x must be 1, got 2"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "a.txt: No such file or directory"),
        (PermissionError(13, "Permission denied", "a.txt"), 1, "a.txt: Permission denied"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_exit_statuses(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(args: object) -> int:
        raise error

    monkeypatch.setattr(cli.formats, "run", fails)
    assert main(["formats"]) == status
    assert capsys.readouterr().err == f"quantlib formats: {line}\n"


@pytest.mark.parametrize("command", [["-m", "quantlib"], ["quantlib"]])
@pytest.mark.parametrize("module", ["numpy", "torch"])
def test_an_interrupt_during_an_import_leaves_no_traceback(module: str, command: list[str], tmp_path: Path) -> None:
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise RuntimeError('was imported')\n"
    (tmp_path / f"{module}.py").write_text(interrupt)
    (tmp_path / "quantlib").write_text("import sys\nfrom quantlib.cli import main\nsys.exit(main())\n")
    words = [str(tmp_path / word) if word == command[0] == "quantlib" else word for word in command]
    paths = os.pathsep.join(map(str, (tmp_path, Path(quantlib.__file__).parents[1])))
    done = subprocess.run(
        [sys.executable, *words, "info"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("", "" if module == "numpy" else "quantlib: interrupted\n")
