"""Work that was stopped goes on, with the same bytes; several processes share it; nobody else disturbs it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib.checkpoint import check_checkpoint, dequantize_file, publish, quantize_file
from quantlib.checkpoint.publish import Scratch, replacing
from quantlib.cli import main

INDEX = "model.safetensors.index.json"


def shards(path: Path, count: int = 3) -> Path:
    """A model folder of several files with two matrices each."""
    path.mkdir()
    weight_map = {}
    for k in range(count):
        torch.manual_seed(k)
        state = {f"{k}.a.weight": torch.randn(24, 40), f"{k}.b.weight": torch.randn(16, 24), f"{k}.norm": torch.ones(8)}
        name = f"model-{k + 1:05}-of-{count:05}.safetensors"
        save_file(state, path / name)
        weight_map |= dict.fromkeys(state, name)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text('{"dtype": "float32"}')
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


class StopAfter:
    """Interrupts when ``count`` tensors are made in this call; the names of those that were."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.names: list[str] = []

    def __call__(self, name: str, done: int, total: int) -> None:
        if name:
            self.names.append(name)
        if len(self.names) == self.count:
            raise KeyboardInterrupt


@pytest.mark.parametrize("convert", [quantize_file, dequantize_file])
def test_it_goes_on_from_any_tensor(convert: object, tmp_path: Path) -> None:
    src = shards(tmp_path / "in")
    if convert is dequantize_file:
        quantize_file(src, tmp_path / "codes", "int8")
        src = tmp_path / "codes"

    def call(out: str, stop: StopAfter) -> object:
        if convert is dequantize_file:
            return dequantize_file(src, tmp_path / out, progress=stop)
        return quantize_file(src, tmp_path / out, "int4:group:8", progress=stop)

    whole = StopAfter(100)
    expected = call("whole", whole)
    made: list[str] = []
    stop = StopAfter(1)
    while True:  # a tensor a run
        try:
            found = call("out", stop)
            break
        except KeyboardInterrupt:
            assert len(stop.names) == 1
            made += stop.names
            stop = StopAfter(1)
    assert made == whole.names
    assert found == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.quantlib").exists()


@pytest.mark.parametrize("change", ["spec", "source", "no resume", "header", "boot"])
def test_other_work_begins_anew(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = shards(tmp_path / "in", 1), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_file(src, out, "int8", progress=StopAfter(1))
    (journal,) = (tmp_path / ".out.quantlib" / "journal").iterdir()
    assert len(journal.read_text().splitlines()) == 2
    if change == "source":
        os.utime(src / "model-00001-of-00001.safetensors", ns=(1, 1))
    if change == "header":
        with (tmp_path / ".out.quantlib" / "new" / journal.name).open("r+b") as file:
            file.write(b"\0")
    if change == "boot":
        monkeypatch.setattr(publish, "boot", lambda: "another one")
    stop = StopAfter(100)
    quantize_file(src, out, "int4" if change == "spec" else "int8", resume=change != "no resume", progress=stop)
    assert len(stop.names) == 3
    quantize_file(src, tmp_path / "whole", "int4" if change == "spec" else "int8")
    assert contents(out) == contents(tmp_path / "whole")


def test_an_old_output_is_not_taken_for_new_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the exchange and the end leaves the old output, with the same headers, where work is kept."""
    src, out = shards(tmp_path / "in", 2), tmp_path / "out"
    quantize_file(src, out, "int8")
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({key: tensor * 3 for key, tensor in load_file(src / name).items()}, src / name)
    with monkeypatch.context() as patch:
        patch.setattr(Scratch, "leave", lambda self, keep: [os.close(d) for d in self.descriptors])
        quantize_file(src, out, "int8", overwrite=True)
    expected = contents(out)
    assert (tmp_path / ".out.quantlib" / "journal").exists()
    stop = StopAfter(100)
    quantize_file(src, out, "int8", overwrite=True, progress=stop)
    assert len(stop.names) == 6
    assert contents(out) == expected
    assert not (tmp_path / ".out.quantlib").exists()


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    with publish.Journal(tmp_path / "journal") as journal:
        journal.begin()
        journal.add({"a": 1})
    whole = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(whole + b'{"note": {"b"')
    with publish.Journal(tmp_path / "journal") as journal:
        assert journal.notes == [{"a": 1}]
        with pytest.raises(BlockingIOError):
            publish.Journal(tmp_path / "journal")
        journal.add(2)
    with publish.Journal(tmp_path / "journal") as journal:
        assert journal.notes == [{"a": 1}, 2]


@pytest.mark.parametrize("join", [True, False])
def test_two_processes_of_one_output(join: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them refuses: a lock of another open file is what a process of another kind would have."""
    src = shards(tmp_path / "in", 1)
    monkeypatch.setattr(Scratch, "PATIENCE", 0.0)
    with replacing(tmp_path / "out", False, True, "another job") as scratch:
        (scratch.new / "x").write_text("mine")
        with pytest.raises(FileExistsError, match="must be written by one process at a time, got another one at work"):
            quantize_file(src, tmp_path / "out", "int8", join=join)
    assert contents(tmp_path / "out") == {"x": b"mine"}
    assert main(["quantize", str(src), str(tmp_path / "out"), "--to", "int8"]) == 2


WORKER = """
import os, sys, time
from quantlib.checkpoint import quantize_file
def slow(name, done, total):
    time.sleep(0.05)
    print(name, flush=True)
print("begun", flush=True)
sys.stdin.readline()
quantize_file(sys.argv[1], sys.argv[2], "int8", join=True, progress=slow)
"""


def test_processes_share_the_files(tmp_path: Path) -> None:
    """Two processes; the third one is killed at work, and the others take over what it had."""
    src, out = shards(tmp_path / "in", 8), tmp_path / "out"
    quantize_file(src, tmp_path / "whole", "int8")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(src), str(out)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "begun\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    assert workers[2].stdout is not None
    workers[2].stdout.readline()
    workers[2].send_signal(signal.SIGKILL)
    made = [set(worker.communicate(timeout=60)[0].split()) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, -signal.SIGKILL]
    assert made[0]
    assert made[1]
    assert contents(out) == contents(tmp_path / "whole")
    for _ in range(100):  # the last one to leave removes it
        if not (tmp_path / ".out.quantlib").exists():
            break
        time.sleep(0.01)
    assert not (tmp_path / ".out.quantlib").exists()


def test_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = shards(tmp_path / "in"), tmp_path / "out"
    quantize_file(src, out, "int8")
    assert main(["check", str(out)]) == 0
    assert "whole; 5 files by their checksums, 15 tensors, 6 of them quantized" in capsys.readouterr().out
    done = subprocess.run(["sha256sum", "-c", "--quiet", "checksums.sha256"], cwd=out, check=False)
    assert done.returncode == 0
    assert main(["check", str(src), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["whole"], told["files"]) == (True, 0)
    assert "no checksums.sha256" in told["notes"][0]

    shard = out / "model-00002-of-00003.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert main(["check", str(out)]) == 1
    assert f"wrong: {shard.name} must have the SHA-256" in capsys.readouterr().out
    shard.write_bytes(data[:-1])
    assert any("must be a whole safetensors file" in line for line in check_checkpoint(out).problems)
    shard.unlink()
    problems = check_checkpoint(out).problems
    assert problems[0] == f"{shard.name} must be there, got no such file"
    shard.write_bytes(data)
    (out / "notes.txt").write_text("mine")
    found = check_checkpoint(out)
    assert (found.problems, found.notes) == ([], ["not listed in checksums.sha256: notes.txt"])
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["weights"]["0.a.weight"]["spec"] = "int4"
    (out / "config.json").write_text(json.dumps(config))
    assert any(
        "config.json must say of 0.a.weight what its file says" in line for line in check_checkpoint(out).problems
    )
    (out / "checksums.sha256").write_text(f"{'0' * 64}  ../in/config.json\n")
    assert any("a name of the folder a line" in line for line in check_checkpoint(out).problems)
    assert main(["check", str(tmp_path / "nothing")]) == 2


def test_a_read_that_fails_in_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src, out = shards(tmp_path / "in"), tmp_path / "out"
    quantize_file(src, tmp_path / "whole", "int8")
    before, read, count = contents(src), os.preadv, iter(range(10**6))

    def failing(*arguments: Any) -> int:
        if next(count) == 14:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", failing)
        assert main(["quantize", str(src), str(out), "--to", "int8"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("quantlib quantize: Input/output error while reading model-0000")
    assert not out.exists()
    assert contents(src) == before
    assert main(["quantize", str(src), str(out), "--to", "int8"]) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    """Ranks find each other, share the files, and none of them is too late."""
    src = shards(tmp_path / "in", 4)
    quantize_file(src, tmp_path / "whole", "int8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "quantlib", "quantize", str(src), str(tmp_path / "out"), "--to", "int8"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not (tmp_path / ".out.quantlib").exists()
