"""``quantlib quantize`` stopped at every step that it takes in the file system: nothing of the user's is ever lost.

A child process counts its calls of the file system and is stopped in one of them: by a signal that arrives, or by an
error that the call gives. What it leaves behind is then looked at, and after SIGKILL another run tidies up. Every step
is killed where an output is replaced; other faults take turns over the steps. ``make test-interrupted`` has every fault
at every step.
"""

from __future__ import annotations

import errno
import functools
import gc
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quantlib import cli
from quantlib.checkpoint import publish
from quantlib.cli import main

CALLS = (
    "mkdir",
    "open",
    "pwrite",
    "write",
    "fsync",
    "ftruncate",
    "chmod",
    "rename",
    "replace",
    "link",
    "unlink",
    "rmdir",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
OTHERS = (signal.SIGINT, errno.ENOSPC, signal.SIGTERM, errno.EIO)
EVERY = "QUANTLIB_EVERY_FAULT" in os.environ
Files = dict[str, bytes]


def build(box: Path, folder: bool) -> None:
    """A model to convert: a file, or one with an index and a configuration."""
    torch.manual_seed(0)
    state = {"0.weight": torch.randn(4, 6), "0.bias": torch.randn(4)}
    if not folder:
        save_file(state, box / "in.safetensors")
        return
    (box / "in").mkdir()
    name = "model-00001-of-00001.safetensors"
    save_file(state, box / "in" / name)
    index = {"metadata": None, "weight_map": dict.fromkeys(state, name)}
    (box / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    (box / "in" / "config.json").write_text('{"dtype": "float32"}')


def build_old(box: Path, folder: bool) -> None:
    """The files that an earlier run and the user have put at the place of the output."""
    if not folder:
        (box / "out.safetensors").write_bytes(b"an earlier model")
        return
    (box / "out" / "mine").mkdir(parents=True)
    (box / "out" / "model.safetensors").write_bytes(b"an earlier model")
    (box / "out" / "NOTES.txt").write_text("mine")
    (box / "out" / "mine" / "data.txt").write_text("mine, too")


def contents(path: Path) -> Files | None:
    """Every file at ``path`` with its bytes; None where there is nothing."""
    if not os.path.lexists(path):
        return None
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def convert(box: Path, folder: bool, force: bool, at: int, fault: int, exchange: bool) -> tuple[int, int]:
    """Convert in a child that is stopped by ``fault`` in its call ``at``: its status, and how many calls it made."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            calls = len(pipe.read())
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status), calls
    try:
        signal.alarm(60)
        gc.disable()  # it would touch, and so copy, the memory of all that the tests have imported
        sys.stdout = sys.stderr = io.StringIO()
        inject(at, fault, write)
        if not exchange:
            publish.renameat2 = lambda source, target, flag: False  # type: ignore[assignment]
        suffix = "" if folder else ".safetensors"
        argv = ["quantize", f"{box}/in{suffix}", f"{box}/out{suffix}", "--to", "int8"]
        os._exit(main([*argv, "--force"] if force else argv))
    finally:
        os._exit(99)


def inject(at: int, fault: int, pipe: int) -> None:
    """Have this process stopped in call ``at`` of `CALLS`; every call is a byte in ``pipe``."""
    count, pid, report = iter(range(10**6)), os.getpid(), os.write

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **options: Any) -> Any:
            report(pipe, b".")
            if next(count) == at:
                if fault not in SIGNALS:
                    raise OSError(fault, os.strerror(fault))
                os.kill(pid, fault)
            return call(*args, **options)

        return wrapper

    os.fsync = lambda descriptor: None  # what is tested is the order of the calls, not the disk
    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name)))
    publish.renameat2 = wrapped(publish.renameat2)


def boxes(tmp_path: Path, folder: bool, force: bool) -> Iterator[Path]:
    """Fresh places with the same things in them."""
    template = tmp_path / "template"
    template.mkdir()
    build(template, folder)
    if force:
        build_old(template, folder)
    for number in range(10**6):
        shutil.copytree(template, tmp_path / str(number))
        yield tmp_path / str(number)
        shutil.rmtree(tmp_path / str(number))


def faults_at(at: int, killed: bool) -> tuple[int, ...]:
    """The faults of a step: all of them, or SIGKILL (for ``killed`` at each, else at every second) and one in turn."""
    if EVERY:
        return (signal.SIGKILL, *OTHERS)
    if killed:
        return (signal.SIGKILL, OTHERS[at % len(OTHERS)])
    return (signal.SIGKILL,) if at % 2 else (OTHERS[at // 2 % len(OTHERS)],)


@pytest.mark.parametrize(
    ("folder", "force", "exchange"),
    [(True, True, True), (True, True, False), (True, False, False), (False, True, True), (False, False, False)],
)
def test_whatever_stops_it(
    folder: bool, force: bool, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "parser", functools.cache(cli.parser))  # a third of a child's time, and no step of it
    places = boxes(tmp_path, folder, force)
    suffix = "" if folder else ".safetensors"
    source, target = f"in{suffix}", f"out{suffix}"
    box = next(places)
    before, old = contents(box / source), contents(box / target)
    shutil.copytree(box, tmp_path / "warm")
    argv = ["quantize", f"{tmp_path}/warm/{source}", f"{tmp_path}/warm/{target}", "--to", "int8"]
    assert main([*argv, "--force"] if force else argv) == 0  # what is imported and compiled here, no child has to
    status, calls = convert(box, folder, force, -1, 0, exchange)
    new = contents(box / target)
    assert (status, contents(box / source)) == (0, before)
    assert new is not None
    assert new != old
    if folder and force:
        assert (new["NOTES.txt"], new["mine/data.txt"]) == (b"mine", b"mine, too")
        assert "model.safetensors" not in new
    assert calls > 10
    for at in range(calls):
        for fault in faults_at(at, killed=force and folder):
            box = next(places)
            where = f"call {at} of {calls}, {errno.errorcode[fault] if fault in (errno.EIO, errno.ENOSPC) else fault}"
            status, _ = convert(box, folder, force, at, fault, exchange)
            assert contents(box / source) == before, where
            if fault is signal.SIGKILL:
                assert status in (-signal.SIGKILL, 0), where
            else:
                expected = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(fault, 1)  # type: ignore[call-overload]
                assert status in (expected, 0), where
                assert contents(box / target) in (old, new), where
                assert status or contents(box / target) == new, where
                left = {path.name for path in box.iterdir()} - {source, target}
                assert left <= {f".{target}.quantlib"}, where
            if fault is signal.SIGKILL or left:  # the next run goes on, and tidies up
                again, _ = convert(box, folder, True, -1, 0, exchange)
                assert (again, contents(box / target)) == (0, new), where
            assert {path.name for path in box.iterdir()} <= {source, target}, where
