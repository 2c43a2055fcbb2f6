"""The Triton kernels executed as compiled for sm_90, and faults put into them: tests/ptx.

`make gpu-ptx` does so for every case; here is one of each kind.
"""

from __future__ import annotations

import functools
import json
import os
import re
from importlib import metadata, util
from pathlib import Path

import fresh
import pytest

from quantlib.backends import triton as backend

ROOT = Path(__file__).resolve().parents[2]
NOT_EXECUTED = ("descriptors",)  # files whose kernels load through tensor descriptors

if not util.find_spec("triton") or not metadata.version("triton").startswith("3.6."):
    pytest.skip("the instructions that are known are those of Triton 3.6", allow_module_level=True)


def run(*words: str) -> fresh.Done:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return fresh.run(["-m", *words], env=environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})


def test_every_kernel_gives_the_bytes_of_the_reference() -> None:
    done = run("ptx", "--few")
    assert done.returncode == 0, done.stdout + done.stderr
    launched = set(re.findall(r"\d+ of (\w+_kernel)", done.stdout))
    files = [f for f in Path(backend.__file__).parent.glob("*.py") if f.stem not in NOT_EXECUTED]
    assert launched == {name for f in files for name in re.findall(r"def (\w+_kernel)\(", f.read_text())}


@functools.cache
def plants() -> dict[str, str | None]:
    done = run("ptx.plants")
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def test_products_ask_few_banks_twice() -> None:
    """A program of each tile gives the bytes of the reference; its loop meets no more bank conflicts than it must."""
    done = run("ptx.conflicts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "int8 128x256x64 16 warps" in done.stdout


SAYS = {
    "a barrier is missing": "no barrier: thread",
    "a lane beside it": "dscale: off by",
    "a mask is missing": "outside of every tensor",
    "not rounded to nearest": "this instruction is not known",
    "a product that is not waited for": "y: ",
    "a copy that is not waited for": "y: ",
    "lanes that lie apart, fake_quantize_backward": "threads write different values",
    "lanes that lie apart, compute_scale": "threads write different values",
    "lanes that lie apart, quantize_dynamic": "threads write different values",
    "lanes that lie apart, the bytes of fake_quantize_backward": "dscale: off by",
    "lanes that lie apart, the bytes of compute_scale": "scale: 4 of 5 differ",
    "lanes that lie apart, the bytes of quantize_dynamic": "codes: 968 of 1295 differ",
}


@pytest.mark.parametrize("plant", SAYS)
def test_a_planted_fault_is_found(plant: str) -> None:
    assert SAYS[plant] in (plants()[plant] or "nothing")


def test_nothing_is_found_without_a_plant() -> None:
    sound = {name: found for name, found in plants().items() if name not in SAYS}
    assert len(sound) == 6
    assert not any(sound.values()), sound
