"""Four gloo processes that start once, and run cases as meshes of 2 and of 4 ranks.

A case is a function (mesh) -> value. Each rank computes what one process makes of the same, and returns how far what it
has is from that: `far`. As two meshes of 2 ranks, both pairs do the same.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

WORLDS, SECONDS = (2, 4), 900
SOON = 420  # seconds in which no machine has been seen that had not finished: several times what a busy one takes
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
    faulthandler.dump_traceback_later(SOON - 60)  # where each waits for another
    FOLDERS.append(folder)
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
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
        faulthandler.cancel_dump_traceback_later()


def start(process: Callable[..., None], world: int, *args: Any, join: bool = True) -> Any:
    """Start ``process(rank, *args)`` for each rank: forks of a process that has imported what they need."""
    mp.get_context("forkserver").set_forkserver_preload(PRELOAD)  # imports once, for all of this test process
    return mp.start_processes(process, args, nprocs=world, join=join, start_method="forkserver")


def saved(process: Callable[..., None], folder: Path, world: int, *more: Any) -> list[Any]:
    """Start ``process(rank, folder, *more)`` for each rank, and return what each saved as ``folder/rank``.

    Processes that do not end are started once more, with a warning that says so: once in some forty runs all four were
    seen to wait for ever, on a machine that was busy, and why is not known. They print where they wait.
    """
    if not finished(process, folder, world, SOON, *more):
        warnings.warn(f"gloo: {world} processes waited for each other for {SOON} s and were started anew", stacklevel=1)
        folder = folder / "anew"
        folder.mkdir()
        assert finished(process, folder, world, SECONDS, *more), f"the processes still run after {SECONDS} s"
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(world)]


def finished(process: Callable[..., None], folder: Path, world: int, seconds: float, *more: Any) -> bool:
    """True if the processes have ended within so many seconds; they are gone in any case."""
    context = start(process, world, str(folder), *more, join=False)
    end = time.monotonic() + seconds
    try:
        while not context.join(timeout=5):
            if time.monotonic() > end:
                return False
        return True
    finally:
        for worker in context.processes:
            if worker.is_alive():
                worker.kill()


def run(cases: Sequence[tuple[str, str]], folder: Path) -> Results:
    """Return what every process returned of every case (module, function)."""
    ranks = saved(process, folder, max(WORLDS), cases)
    return {key: [found[key] for found in ranks] for key in ranks[0]}
