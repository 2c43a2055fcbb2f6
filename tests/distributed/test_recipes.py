"""docs/distributed.md on 2 and on 4 ranks, and its script under torchrun, which starts it again after a kill."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gloo
import pytest
import torch
import torch.distributed as dist
from test_readme import blocks

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs/distributed.md"
BLOCKS = [block for block in blocks(PAGE) if block.language == "python"]
RECIPES, TRAIN = BLOCKS[:-1], BLOCKS[-1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def as_torchrun(rank: int, world: int, port: int, folder: str, texts: list[tuple[int, str]]) -> None:
    """Run a script as torchrun would."""
    warnings.simplefilter("ignore")
    os.chdir(folder)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    namespace: dict[str, Any] = {"__name__": "page"}
    try:
        for line, text in texts:
            exec(compile("\n" * (line - 1) + text, str(PAGE), "exec"), namespace)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(world: int, folder: Path, texts: list[tuple[int, str]]) -> None:
    gloo.start(as_torchrun, world, world, free_port(), str(folder), texts)


@pytest.mark.parametrize("world", gloo.WORLDS)
def test_recipes_run(world: int, tmp_path: Path) -> None:
    run(world, tmp_path, [(block.line, block.text) for block in RECIPES])


def saved(folder: Path) -> dict[str, Any]:
    """The last checkpoint, in one process."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(folder / "checkpoints/6", folder / "whole.pt")
    state = torch.load(folder / "whole.pt", weights_only=False)
    tensors = {f"model.{name}": t for name, t in state["model"].items()}
    for name, values in state["optimizer"]["state"].items():
        tensors |= {f"{name}.{key}": t for key, t in values.items()}
    return tensors


def test_a_killed_rank_changes_nothing(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    run(2, whole, [(TRAIN.line, TRAIN.text)])
    before = "    optimizer.zero_grad()\n"
    assert TRAIN.text.count(before) == 1
    kill = (
        "    if step == 3 and dist.get_rank() == 1 and __import__('os').environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        __import__('os').kill(__import__('os').getpid(), 9)\n"
    )
    late = (  # so that rank 0 looks for its peers before rank 1 has said where it is
        "import os, time\n"
        "time.sleep(3 * (os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] != '0'))\n"
    )
    tell = "if dist.get_rank() == 0:\n    print('starts at', start, flush=True)\n"
    text = TRAIN.text.replace(before, kill + before).replace("for step in range", f"{tell}for step in range")
    (killed / "train.py").write_text(late + text)
    setting, _, line = TRAIN.text.partition("\n")[0].removeprefix("# ").partition(" torchrun ")
    command = [sys.executable, "-m", "torch.distributed.run", *line.split()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    environment |= dict([setting.split("=")])
    done = subprocess.run(
        command, cwd=killed, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split("\n")[:2] == ["starts at 0", "starts at 3"], done.stdout
    assert gloo.far(saved(whole), saved(killed)) == 0
