"""The CUDA kernel of adamw_step on this CPU: the case table, every instance of it, and planted faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.emulator import COMPILER, CSRC, STEP, Buffer, Call, Emulator, KernelError, build

from quantlib.testing import assert_same_bytes, bits
from quantlib.testing.steps import STATES, Step, expected, inputs, steps

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("cuda_on_cpu")


@pytest.fixture(scope="session")
def emulator(cache: Path) -> Emulator:
    return build(cache, STEP)


def call_of(case: Step, seed: int) -> Call:
    """``case`` as a call, whose buffers begin an element past an aligned address where its layout is an offset."""
    given, shift = inputs(case), case.layout == "offset"
    order = ("parameter", "gradient", *STATES, "constants", "key")
    read = [None if given[n] is None else Buffer(bits(given[n]), True, shift * given[n].itemsize) for n in order]
    written = [Buffer(np.empty_like(bits(a)), False, shift * a.itemsize) for a in expected(case)]
    grid = (*case.shape, *(case.origin or (0, 0)))
    return Call("adamw_step", case.dtype, "int8", False, seed, grid, (*read, *written), M=case.block)


def check(emulator: Emulator, cases: list[Step], launched: set[str] | None = None) -> None:
    calls = [call_of(case, seed) for seed, case in enumerate(cases)]
    for case, buffers in zip(cases, emulator.run(calls, launched), strict=True):
        want = expected(case)
        for k, (got, right) in enumerate(zip(buffers[-len(want) :], want, strict=True)):
            assert_same_bytes(got, bits(right), f"{case}: result {k}")


def test_the_case_table_starts_every_kernel(emulator: Emulator) -> None:
    launched: set[str] = set()
    check(emulator, list(steps()), launched)
    assert launched == set(emulator.kernels().values())


FAULTS = {  # what a person might write, and what it is caught by
    "a scale of one warp": ("  range = reduce(range, a.sharing.lanes);\n", "  range = reduce(range, 32);\n", "differ"),
    "ties go up": ("y > mul(above, above)", "y >= mul(above, above)", "differ"),
    "read past a row": ("const auto x_units = load<V>(a.parameter + at, first, last,",
                        "const auto x_units = load<V>(a.parameter + at, 0, V,", "outside of every buffer|differ"),
    "the row of the shard": ("uint32_t(a.row + i)", "uint32_t(i)", "differ"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(cache: Path, tmp_path: Path, name: str) -> None:
    right, wrong, caught = FAULTS[name]
    csrc = Path(shutil.copytree(CSRC, tmp_path / "csrc"))
    source = csrc / "cuda/adamw_step.cu"
    text = source.read_text()
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong))
    with pytest.raises((AssertionError, KernelError), match=caught):
        check(build(cache, STEP, csrc), [c for c in steps() if c.shape in ((2, 2049), (3, 100), (70, 36))])
