"""CUDA kernels that run on this CPU show the errors that a GPU may hide: one of each kind, in a kernel of its own."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from cuda_on_cpu.emulator import COMPILER, HERE, Emulator, link

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")

OUTSIDE, MISALIGNED, UNWRITTEN = "outside of every buffer", "misaligned: 16 bytes", "which nobody wrote"
READ, WRITE, OVERWRITE = (
    f"race: it {what}" for what in ("reads what is wr", "writes what is wr", "writes what is read")
)
IN_FLIGHT = "an asynchronous copy (that nobody has waited for|is on its way)"
FAULTS = {
    "read_past_the_end": f"reads 4 bytes {OUTSIDE}",
    "read_before_the_start": f"reads 4 bytes {OUTSIDE}",
    "write_past_the_end": f"writes 4 bytes {OUTSIDE}",
    "read_a_row_too_far": f"reads 4 bytes {OUTSIDE}",
    "shared_past_the_end": f"reads 4 bytes {OUTSIDE}",
    "index_of_a_shared_array": "index 64 out of bounds",
    "index_of_registers": "index 4 out of bounds",
    "misaligned": MISALIGNED,
    "misaligned_store": MISALIGNED,
    "misaligned_shared": MISALIGNED,
    "shift_by_the_width": "shift exponent 32 is too large",
    "missing_barrier": f"{UNWRITTEN}|{READ}",
    "overwritten_while_read": f"{READ}|{OVERWRITE}",
    "never_written": UNWRITTEN,
    "two_writers": WRITE,
    "neighbouring_bytes": WRITE,
    "warp_for_block": f"{UNWRITTEN}|{READ}",
    "half_a_warp": f"{UNWRITTEN}|{READ}",
    "shuffle_for_barrier": READ,
    "divergent_barrier": "deadlock: .* threads at the barrier of line .* threads at the barrier of line",
    "barrier_in_a_branch": "deadlock: .*barrier of line .*shuffle of line",
    "a_lane_that_left": "a shuffle names a lane that has left",
    "lane_outside_of_the_mask": "a shuffle reads a lane that is not in its mask",
    "blocks_write_the_same": f"{WRITE}.*; another block did",
    "block_reads_another": f"{UNWRITTEN}|({READ}|{WRITE}|{OVERWRITE}).*; another block did",
    "sum_without_an_atomic": READ,
    "reads_an_output": UNWRITTEN,
    "ticket_without_a_fence": f"{READ}.*; another block did",
    "copy_not_waited": IN_FLIGHT,
    "copy_not_met": f"{UNWRITTEN}|{READ}|{IN_FLIGHT}",
    "copy_one_group_left": IN_FLIGHT,
    "copy_overwritten": f"{OVERWRITE}|{IN_FLIGHT}",
    "copy_written": f"writes where {IN_FLIGHT}",
    "copy_left": "it left without waiting for its asynchronous copies",
}


@pytest.fixture(scope="session")
def emulator(request: pytest.FixtureRequest) -> Emulator:
    return Emulator(link(request.config.cache.mkdir("cuda_on_cpu"), [HERE / "faults.cu"]))


def run(emulator: Emulator, kernel: str, fault: bool, seed: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(emulator.path), kernel, str(int(fault)), str(seed)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("kernel", [*FAULTS, "votes_and_shuffles"])
def test_a_fault_is_caught_and_its_line_is_told(emulator: Emulator, kernel: str) -> None:
    right = [run(emulator, kernel, False, seed) for seed in range(4)]
    assert [r.stderr for r in right] == [""] * 4
    assert {r.stdout for r in right} == {right[0].stdout}, "the order of threads changes what comes out"
    if kernel not in FAULTS:
        assert right[0].stdout.split() == [str(k * 7) for k in range(192)]
        return
    lines = (HERE / "faults.cu").read_text().split("\n")
    for seed in range(4):
        wrong = run(emulator, kernel, True, seed)
        text = emulator.with_lines(wrong.stderr)
        assert wrong.returncode
        assert re.search(FAULTS[kernel], text), text
        told = [int(line) for line in re.findall(r"(?:faults\.cu:|, line |of line )(\d+)", text)]
        assert all("// fault" in lines[line - 1] for line in told), text
        assert told or kernel == "copy_left", text
