"""Four gloo processes that start once, and run cases as meshes of 2 and of 4 ranks.

A case is a function (mesh) -> value. Each rank computes what one process makes of the same, and returns how far what it
has is from that: `far`. As two meshes of 2 ranks, both pairs do the same.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

WORLDS, SECONDS = (2, 4), 900
LOOK, IDLE = 5.0, 60.0  # seconds between two looks at the processes, and in which none of those that wait computes
PRELOAD = ["quantlib", "quantlib.distributed", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
Case = Callable[[DeviceMesh], Any]
MESHES: dict[int, DeviceMesh] = {}  # of this process, by their ranks
FOLDERS: list[str] = []  # the one that all processes share
Results = dict[tuple[str, int], list[Any]]  # (name of a case, ranks) -> what each process returned


def whole(t: Any) -> Tensor:
    """The values of ``t``, of all ranks if it is sharded."""
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach()


def far(a: Any, b: Any) -> float:
    """The largest difference of two tensors, or of two mappings of tensors; 0 means equal bytes."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{sorted(a.keys() ^ b.keys())}"
        return max(far(a[name], b[name]) for name in sorted(a))
    a, b = whole(a), whole(b)
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a.double() - b.double()).abs().max()) if a.numel() and not torch.equal(a, b) else 0.0


def message(call: Callable[[], object]) -> str:
    """The first line of the error that ``call`` raises."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error).partition("\n")[0]
    return "no error"


def process(rank: int, folder: str, cases: Sequence[tuple[str, str]]) -> None:
    """One of the four."""
    warnings.simplefilter("ignore")
    FOLDERS.append(folder)
    world = max(WORLDS)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=SECONDS))
    try:
        pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pair", "rank"))
        MESHES.update({2: pairs["rank"], 4: init_device_mesh("cpu", (4,))})
        found: dict[tuple[str, int], Any] = {}
        for module, name in cases:
            case: Case = getattr(importlib.import_module(module), name)
            for n, mesh in MESHES.items():
                try:
                    found[name, n] = case(mesh)
                except Exception:
                    found[name, n] = AssertionError(f"{name} on {n} ranks:\n{traceback.format_exc()}")
        torch.save(found, f"{folder}/{rank}")
        dist.barrier()
    finally:
        dist.destroy_process_group()


class StalledError(AssertionError):
    """Processes that all wait for each other."""


def entered(rank: int, stacks: str, process: Callable[..., None], *args: Any) -> None:
    """Run ``process`` in one thread, over the loopback whatever the name of this machine stands for."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with Path(stacks, str(rank)).open("w") as said:
        faulthandler.register(signal.SIGUSR1, said)
        process(rank, *args)
        faulthandler.unregister(signal.SIGUSR1)


def start(process: Callable[..., None], world: int, *args: Any) -> None:
    """Run ``process(rank, *args)`` for each rank to its end: forks of a process that has imported what they need.

    Processes that wait for each other for `IDLE` seconds say where and are ended: gloo itself would wait for its
    timeout. Time in which this process is stopped does not count, nor time in which one of the others is.
    """
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)  # imports once, for all of this test process
    with tempfile.TemporaryDirectory() as stacks:
        given = (stacks, process, *args)
        context = mp.start_processes(entered, given, nprocs=world, join=False, start_method="forkserver")
        try:
            join(context, Path(stacks))
        finally:
            for worker in context.processes:
                if worker.is_alive():
                    worker.kill()


def join(context: Any, stacks: Path) -> None:
    """Wait for the end of the processes, or for the time in which none of them has done anything."""
    world, idle, before = len(context.processes), 0.0, 0.0
    for _ in range(int(SECONDS / LOOK)):
        if context.join(timeout=LOOK):
            return
        computed = seconds_of(context.processes)
        idle = idle + LOOK if computed is not None and computed - before < LOOK / 20 else 0.0
        before = before if computed is None else computed
        if idle >= IDLE:
            for worker in context.processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGUSR1)
            time.sleep(1)
            where = "\n".join(f"{path.name}: {path.read_text()}" for path in sorted(stacks.iterdir()))
            raise StalledError(f"{world} processes waited for each other for {IDLE:.0f} s\n{where}")
    raise AssertionError(f"{world} processes still run after {SECONDS} s")


def seconds_of(processes: Sequence[Any]) -> float | None:
    """The CPU time of those that have not ended; None if one of them runs, or is stopped."""
    total = 0.0
    for worker in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            seen = psutil.Process(worker.pid)
            if seen.status() in (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP, psutil.STATUS_STOPPED):
                return None
            total += sum(seen.cpu_times()[:4])
    return total


def saved(process: Callable[..., None], folder: Path, world: int, *more: Any) -> list[Any]:
    """Start ``process(rank, folder, *more)`` for each rank, and return what each saved as ``folder/rank``.

    Processes that wait for each other are started once more, with a warning that says so: once in some forty runs all
    four were seen to wait for ever, on a machine that was busy, and why is not known.
    """
    try:
        start(process, world, str(folder), *more)
    except StalledError as error:
        warnings.warn(f"gloo: started anew, {error}", stacklevel=1)
        folder = folder / "anew"
        folder.mkdir()
        start(process, world, str(folder), *more)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(world)]


def run(cases: Sequence[tuple[str, str]], folder: Path) -> Results:
    """Return what every process returned of every case (module, function)."""
    ranks = saved(process, folder, max(WORLDS), cases)
    return {key: [found[key] for found in ranks] for key in ranks[0]}
