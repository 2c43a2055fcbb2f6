"""Processes that wait for each other are ended soon; those that compute, or are stopped, are left alone."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import gloo
import pytest
import torch
import torch.distributed as dist

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "LOOK", 0.25)
    monkeypatch.setattr(gloo, "IDLE", 2.0)


def joined(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)


def one_is_missing(rank: int, folder: str) -> None:
    joined(rank, folder)
    if rank == 0:
        dist.barrier()
    time.sleep(600)


def second_try(rank: int, folder: str) -> None:
    if "anew" not in folder:
        one_is_missing(rank, folder)
    torch.save(rank, f"{folder}/{rank}")


def computes(rank: int, folder: str) -> None:
    joined(rank, folder)
    end = time.process_time() + 3
    while rank == 1 and time.process_time() < end:
        pass
    dist.barrier()
    dist.destroy_process_group()


def is_stopped(rank: int, folder: str) -> None:
    joined(rank, folder)
    if rank == 1:
        Path(folder, "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()
    dist.destroy_process_group()


def test_they_say_where_and_are_ended(tmp_path: Path) -> None:
    with pytest.raises(gloo.StalledError, match="2 processes waited for each other for 2 s") as error:
        gloo.start(one_is_missing, 2, str(tmp_path))
    first, second = str(error.value).split("\n1: ")
    assert "in barrier" in first
    assert "in one_is_missing" in second
    assert "in barrier" not in second


def test_they_are_started_once_more(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="started anew, 2 processes waited for each other for 2 s"):
        assert gloo.saved(second_try, tmp_path, 2) == [0, 1]


def test_a_wait_for_one_that_computes_is_none(tmp_path: Path) -> None:
    gloo.start(computes, 2, str(tmp_path))


def test_a_wait_for_one_that_is_stopped_is_none(tmp_path: Path) -> None:
    def go_on() -> None:
        while not (tmp_path / "pid").exists():
            time.sleep(0.05)
        time.sleep(3)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)

    helper = threading.Thread(target=go_on)
    helper.start()
    gloo.start(is_stopped, 2, str(tmp_path))
    helper.join()
