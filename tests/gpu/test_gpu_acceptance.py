"""`make gpu` on a machine that is made up: what it runs and keeps, and what it says of failures, crashes and time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
if not SCRIPTS.is_dir():
    pytest.skip("not a checkout", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import gpu_acceptance  # noqa: E402
import gpu_page  # noqa: E402
import gpu_pieces  # noqa: E402
from gpu_pieces import RESULTS, Piece  # noqa: E402

HERE = {"gpu": "A GPU, sm_90", "python": "3.12.0", "torch": "2.11.0", "triton": "3.6.0", "missing": ["a peer"]}
Accept = Callable[..., int]


def piece(name: str, code: str, seconds: int = 1, **more: Any) -> Piece:
    return Piece(name, (sys.executable, "-S", "-c", code), seconds, sources=("no folder",), **more)


@pytest.fixture
def accept(tmp_path: Path) -> Accept:
    """`make gpu` with these pieces; what it keeps is the file ``out``."""

    def run(*pieces: Piece, here: dict[str, Any] = HERE, options: tuple[str, ...] = ()) -> int:
        argv = ["--out", str(tmp_path / "gpu.json"), "--jobs", "2", *options]
        return gpu_acceptance.main(argv, missing=list, machine=lambda: dict(here), wanted=lambda: pieces)

    return run


def kept(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())["pieces"]
    return found


def test_what_passed_is_not_run_again_and_what_failed_is(accept: Accept, tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write"
    good = piece("good", f"{count}('g'); print('12 of 12 cases')")
    bad = piece("bad", f"{count}('b'); print('FAILED tests/x.py - wrong byte'); print('1 failed'); raise SystemExit(1)")
    assert accept(good, bad) == 1
    found = kept(tmp_path)
    assert (found["good"]["status"], found["good"]["last"]) == ("passed", "12 of 12 cases")
    assert (found["bad"]["status"], found["bad"]["last"]) == ("failed", "1 failed")
    assert found["bad"]["broken"] == ["FAILED tests/x.py - wrong byte"]
    assert accept(good, bad) == 1
    assert sorted((tmp_path / "runs").read_text()) == ["b", "b", "g"]
    assert accept(good, piece("bad", "pass")) == 0
    assert accept(good, here=HERE | {"torch": "2.12.0"}) == 0  # another machine: from the start
    assert (tmp_path / "runs").read_text().count("g") == 2
    assert "bad" not in kept(tmp_path)


def test_changed_sources_are_run_again(tmp_path: Path, accept: Accept, monkeypatch: pytest.MonkeyPatch) -> None:
    once = piece("once", f"open({str(tmp_path / 'runs')!r}, 'a').write('x')")
    accept(once)
    monkeypatch.setattr(gpu_pieces, "digest", lambda folders: "of another day")
    accept(once)
    assert (tmp_path / "runs").read_text() == "xx"


def test_a_crash_stays_in_its_piece(accept: Accept, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crash = piece("crash", "import os, sys; print('about to', flush=True); os.abort()")
    nothing = Piece("nothing", ("/no/such/program",), 1, sources=("no folder",))
    assert accept(crash, nothing, piece("after", "pass")) == 1
    found = kept(tmp_path)
    assert [found[name]["status"] for name in ("crash", "nothing", "after")] == ["failed", "failed", "passed"]
    assert "about to" in capsys.readouterr().out
    assert "does not start" in found["nothing"]["last"]


def test_out_of_time(accept: Accept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is interrupted first and can leave what it has; its children go with it. Its time is up once it is at work."""
    ready = tmp_path / "ready"
    late = 2.0 * gpu_pieces.PIECE_SECONDS
    monkeypatch.setattr(gpu_pieces.Running, "age", property(lambda _: late if ready.exists() else 0.0))
    monkeypatch.setattr(gpu_pieces, "GRACE_SECONDS", 60)
    code = f"""
import json, sys, time
try:
    open({str(ready)!r}, "w").close()
    time.sleep(600)
except KeyboardInterrupt:
    json.dump({{"rows": 3}}, open(sys.argv[1], "w"))
"""
    slow = Piece("slow", (sys.executable, "-S", "-c", code, RESULTS), 1, sources=("no folder",))
    assert accept(slow) == 1
    assert kept(tmp_path)["slow"]["status"] == "out of time"
    assert kept(tmp_path)["slow"]["results"] == {"rows": 3}


def test_the_limit(accept: Accept, tmp_path: Path) -> None:
    """Pieces that fit are run, others are not begun, and the rest is for the next call."""
    long, short = piece("long", "pass", 100), piece("short", "pass", 1)
    assert accept(long, short, options=("--limit", "30")) == 3
    assert list(kept(tmp_path)) == ["short"]
    assert accept(long, short) == 0


def test_without_a_build_nothing_else_is_tried(accept: Accept, tmp_path: Path) -> None:
    assert accept(piece("build", "raise SystemExit(1)", alone=True), piece("rest", "pass")) == 1
    assert list(kept(tmp_path)) == ["build"]


def test_what_cannot_run_is_left_out(accept: Accept, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = piece("refused", "print('Error: Device not supported'); raise SystemExit(1)")
    assert (
        accept(
            piece("absent", "", lacks="there is no tool"), refused, piece("other", "raise SystemExit(5)", fine=(0, 5))
        )
        == 0
    )
    assert {name: result["status"] for name, result in kept(tmp_path).items()} == {
        "absent": "left out",
        "refused": "left out",
        "other": "passed",
    }
    said = capsys.readouterr().out
    assert "left out, not installed: a peer" in said
    assert "absent: there is no tool" in said
    assert "A GPU, sm_90: 2 left out, 1 passed" in said


def test_one_that_is_alone_runs_alone(accept: Accept, tmp_path: Path) -> None:
    code = f"""
import os, time
path = {str(tmp_path / "here")!r}
if NAME == "b": assert not os.path.exists(path)
open(path, "w"); time.sleep(0.3); os.unlink(path)
"""
    a, b = (piece(name, code.replace("NAME", repr(name)), alone=name == "b") for name in "ab")
    assert accept(a, b) == 0


def test_what_is_light_runs_beside_what_is_alone(accept: Accept, tmp_path: Path) -> None:
    """Each waits for the other to have begun."""
    code = f"""
import os, time
open({str(tmp_path)!r} + "/" + NAME, "w")
for _ in range(600):
    if os.path.exists({str(tmp_path)!r} + "/" + OTHER): break
    time.sleep(0.1)
else: raise SystemExit("nothing beside it")
"""
    light, alone = (
        piece(name, f"NAME, OTHER = {name!r}, {other!r}\n{code}", light=name == "a", alone=name == "b")
        for name, other in ("ab", "ba")
    )
    assert accept(light, alone) == 0


def test_what_a_lent_machine_gives_back(accept: Accept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The summary and its output are in OUT after every piece; a fresh machine goes on from them."""
    out = tmp_path / "given back"
    monkeypatch.setenv("OUT", str(out))
    see = f"import os; assert sorted(os.listdir({str(out)!r})) == ['first.log', 'gpu.json']"
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write"
    assert accept(piece("first", f"{count}('1')"), piece("second", f"{count}('2'); {see}", alone=True)) == 0
    assert {path.name for path in out.iterdir()} == {"gpu.json", "first.log", "second.log"}
    (tmp_path / "gpu.json").unlink()
    again = piece("first", f"{count}('1')"), piece("third", f"{count}('3')")
    assert accept(*again, options=("--resume", str(out / "gpu.json"))) == 0
    assert (tmp_path / "runs").read_text() == "123"


def test_a_piece_finds_what_was_carried_to_the_machine(tmp_path: Path) -> None:
    """A package on PYTHONPATH is there for the pieces as it is for `has`, and the checkout comes first."""
    (tmp_path / "carried_peer.py").write_text("")
    first = f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import gpu_pieces; "
    inside = f"{first}import carried_peer, quantlib; print(gpu_pieces.has('carried_peer'), quantlib.__file__)"
    call = f"subprocess.run([sys.executable, '-c', {inside!r}], env=gpu_pieces.ENVIRONMENT, check=True)"
    ask = f"{first}import subprocess; {call}"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "QUANTLIB_BUILD": "0"}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", str(SCRIPTS.parent / "quantlib/__init__.py")], done.stderr


def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_acceptance.main([], missing=lambda: ["torch sees no CUDA device"], wanted=tuple) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces come in the order of their worth; without pytest-xdist tests are a piece a file, without pytest none."""
    monkeypatch.setattr(gpu_pieces, "families_of_benchmarks", lambda: ["cast", "matmul", "dequant_matmul", "startup"])
    assert gpu_acceptance.main(["--list"], wanted=lambda: gpu_pieces.pieces(cores=16)) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.partition("s  ")[2].partition(" (")[0] for line in lines]
    assert names[:2] == ["smoke", "build"]
    for name in ("cases cuda", "tests other", "sanitizer racecheck", "every input triton"):
        assert name in names
    order = ["launches triton", "tests graphs", "bench products", "bench projections", "cases triton", "tests device"]
    assert [name for name in names if name in order] == order
    seconds = [int(line.split()[0]) for line in lines]
    assert sum(seconds[1 : names.index("bench products")]) <= 360, "the first figures come in the first minutes"
    assert all(1 <= p.seconds < gpu_pieces.PIECE_SECONDS for p in gpu_pieces.pieces(cores=16))

    monkeypatch.setattr(gpu_pieces, "has", lambda package: package == "pytest")
    assert any(p.name == "tests device test_bits" for p in gpu_pieces.pieces(cores=16))
    monkeypatch.setattr(gpu_pieces, "has", lambda package: False)
    tests = [p for p in gpu_pieces.pieces(cores=1) if p.name.startswith("tests")]
    assert {p.lacks for p in tests} == {"pytest is not installed"}


def test_the_first_minute_on_no_gpu() -> None:
    """The steps of the smoke piece run on the CPU, in pure torch, but for the package, which is a compiler's minute."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        SCRIPTS / "gpu_smoke.py",
        "--device",
        "cpu",
        "slabs",
        "descriptors",
        "graph",
    ]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), "QUANTLIB_BUILD": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "3 of 3 passed", done.stderr


def test_the_package_of_the_first_minute_is_compiled_without_what_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's headers compiled ahead are four fifths of what a package of one product takes."""
    import gpu_smoke
    import torch

    given: dict[str, Any] = {}
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda *args, **how: given.update(how))
    with pytest.raises((RuntimeError, OSError)):  # there is no package to load
        gpu_smoke.package("cpu")
    assert given["inductor_configs"]["aot_inductor.precompile_headers"] is False
    known = torch._inductor.config.get_config_copy()
    assert all(name in known for name in given["inductor_configs"])


def test_every_command_is_one_that_is_there() -> None:
    for one in gpu_pieces.pieces(cores=16):
        words = [word for word in one.command if word.endswith(".py") or word.startswith("tests")]
        assert all((SCRIPTS.parent / word).exists() for word in words), one


def test_the_page_shows_what_is_checked_in() -> None:
    page = gpu_page.PAGE.read_text()
    assert page == gpu_page.with_results(page, gpu_page.rendered())


def test_the_page_of_a_run(accept: Accept, tmp_path: Path) -> None:
    accept(piece("good", "print('12 of 12 cases')"), piece("bad", "raise SystemExit('a | b')"))
    summary = json.loads((tmp_path / "gpu.json").read_text())
    row = {"role": "ours", "op": "cast", "conversion": "float32 -> int8", "per": "", "shape": [8, 4], "error": ""}
    row |= {"backend": "quantlib triton", "min": 2e-6, "gb_per_s": 4000.0, "of_copy": 0.97, "speedup": None}
    failed = row | {"min": None, "error": "a wrong byte", "backend": "quantlib cuda"}
    summary["pieces"]["good"]["results"] = {"rows": [row, failed, row | {"role": "peer"}]}
    (tmp_path / "gpu-a.json").write_text(json.dumps(summary))
    (tmp_path / "gpu-other.json").write_text('{"rows": []}')  # of the benchmarks alone
    text = gpu_page.rendered(tmp_path)
    assert "### A GPU, sm_90\n" in text
    assert "| good | passed | 0 | 12 of 12 cases |\n" in text
    assert "| bad | failed | 0 | a \\| b |\n" in text
    assert "| cast float32 -> int8 | 8x4 | quantlib triton | 2.00 | 4e+03 | 0.97 | - | - | - |\n" in text
    assert "| quantlib cuda | a wrong byte | 4e+03 |" in text
    assert "peer |\n| :--" in text
    assert "Not installed there: a peer." in text
    assert gpu_page.rendered(tmp_path / "nothing") == gpu_page.NOTHING
