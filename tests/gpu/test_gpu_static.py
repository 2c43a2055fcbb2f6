"""The GPU kernels without a GPU: compiled for each architecture and held to their contracts; planted faults are seen.

`make gpu-static` does so for every configuration in use and prints what each needs; here are the most important ones.
"""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
from gpu_static import calls, contract, known, model, plants, reductions, run, sass, table, targets, warpgroups
from gpu_static.budgets import Budgets
from gpu_static.measured import Measured

from quantlib import _build
from quantlib.backends import triton as backend


@functools.cache
def measured(language: str, arch: int, scope: str = "first") -> list[Measured]:
    """A worker reports its findings; of two that are asked the same, one waits for the other's results."""
    if why := run.missing(language):
        pytest.skip(why)
    return run.measure(language, arch, scope)


def kernels_of_sources() -> set[tuple[str, str]]:
    """List the functions that the sources of either language call a kernel."""
    found = set()
    for path in Path(backend.__file__).parent.glob("*.py"):
        found |= {("triton", name) for name in re.findall(r"def (\w+_kernel)\(", path.read_text())}
    for path in _build.CSRC.glob("cuda/*.cu*"):
        found |= {("cuda", name) for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", path.read_text())}
    return found


@pytest.mark.parametrize("arch", [80, 90])  # `make gpu-static ARGS=--fast` compiles for the four others too, and more
@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_every_kernel_keeps_its_contract(language: str, arch: int) -> None:
    rows = run.judged(measured(language, arch), Budgets.read())
    wrong = [row for row in rows if row.faults]
    assert not wrong, "\n" + table.table(wrong)


@pytest.mark.parametrize("language", ["triton", "cuda"])
def test_no_kernel_is_forgotten(language: str) -> None:
    """All kernels of the sources are compiled for sm_90, and contracts and budgets are of no others."""
    compiled = {(m.language, m.kernel) for m in measured(language, 90)}
    assert compiled == {kernel for kernel in kernels_of_sources() if kernel[0] == language}
    assert compiled == {kernel for kernel in contract.CONTRACTS if kernel[0] == language}
    assert compiled == {tuple(name.split()[:2]) for name, _ in Budgets.read().of if name.startswith(language)}


def test_every_op_is_called() -> None:
    composed = {"dynamic_matmul"}  # it calls others
    assert {call.op for call in calls.FAST} | composed == set(backend.KERNELS)
    assert set(calls.FAST) <= set(calls.calls())


@pytest.mark.parametrize(
    ("language", "plant", "says"),
    [("triton", name, plant[-1]) for name, plant in plants.TRITON.items()]
    + [("cuda", name, plant[-1]) for name, plant in plants.CUDA.items()],
)
def test_a_planted_fault_is_caught(language: str, plant: str, says: str) -> None:
    planted = [m for m in measured(language, plants.ARCH, "plants") if m.plant == plant]
    faults = [fault for m in planted for fault in contract.faults(m, None)]
    assert any(re.search(says, fault) for fault in faults), faults
    assert not any(known.reason(m, fault) for m in planted for fault in faults if re.search(says, fault))


SOUND = Measured(
    language="triton",
    kernel="cast_kernel",
    op="cast",
    config="bfloat16 float8_e4m3fn 4096x4096",
    arch=90,
    compiler="0.0",
    warps=8,
    registers=32,
    spilled=0,
    shared=0,
    instructions=20.0,
    read=2.0,
    written=1.0,
    units=16.0,
    main={"LDG.E.128": 2, "STG.E.128": 1, "FMUL": 317},
    names={"LDG.E.128": 2, "LDG.E.U16": 16, "STG.E.128": 1, "FMUL": 400},
    inexact=[],
    scattered=[],
    facts={"bits": {"X": 16, "Y": 8}, "ragged": False},
)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"instructions": 23.0}, "23.00 instructions > 20.00 recorded"),
        ({"instructions": 24.0}, "above the ceiling of 23.4 instructions"),
        ({"registers": 41}, "41 registers > 32 recorded"),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"names": SOUND.names | {"STL.64": 1}}, "spills 0 bytes"),
        ({"shared": 232449}, "232449 bytes of shared memory > 232448"),
        ({"arch": 89, "shared": 101377}, "101377 bytes of shared memory > 101376"),
        ({"read": 2.25}, "reads 2.25 bytes, want 2.00"),  # nothing of four bytes is loaded, which a scale would be
        ({"written": 0.5}, "writes 0.50 bytes, want 1.00"),
        ({"main": {"LDG.E.64": 4, "STG.E.128": 1}}, "reads 8 bytes at once, want 16"),
        ({"main": SOUND.main | {"CALL.REL.NOINC": 1}}, "CALL.REL.NOINC on its main path"),
        ({"names": SOUND.names | {"REDG.E.ADD.F32.FTZ.RN": 1}}, "adds floats with REDG.E.ADD.F32.FTZ.RN"),
        ({"names": SOUND.names | {"ATOMG.E.ADD": 1}}, "1 atomics > 0"),
        ({"names": SOUND.names | {"DADD": 1}}, "has DADD"),
        ({"scattered": ["axis 1"]}, "Triton adds up the wrong lanes: axis 1"),
        ({"overwritten": ["HFMA2 at 0x20"]}, "an operand is overwritten: HFMA2 at 0x20"),
        ({"kernel": "new_kernel"}, "has no contract"),
    ],
)
def test_every_clause_of_a_contract_bites(changed: dict[str, object], says: str) -> None:
    assert contract.faults(SOUND, (20.0, 32)) == []
    assert contract.faults(SOUND, None) == [contract.NEW]
    assert says in contract.faults(replace(SOUND, **changed), (20.0, 32))


REDUCTION = """
#linear = #ttg.linear<{register = [[0, 128]], lane = LANE, warp = [[0, 16], [0, 32], [0, 64]], block = []}>
    %55 = "tt.reduce"(%54) <{axis = AXIS : i32}> ({
    ^bb0(%a: f32, %b: f32):
      tt.reduce.return %c : f32
    }) : (tensor<2x2048xf32, LAYOUT>) -> tensor<2xf32, #ttg.slice<{dim = 1, parent = LAYOUT}>>
"""


@pytest.mark.parametrize(
    ("lane", "axis", "layout", "right"),
    [
        ("[[0, 1], [0, 2], [1, 0], [0, 4], [0, 8]]", 1, "#linear", False),
        ("[[0, 1], [0, 2], [1, 0], [0, 4], [0, 8]]", 0, "#linear", True),
        ("[[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]]", 1, "#linear", True),
        ("[[1, 0], [0, 1], [0, 2], [0, 4], [0, 8]]", 1, "#linear", True),
        ("[[0, 1], [0, 2], [1, 0], [0, 4], [0, 8]]", 1, "#blocked", True),
        (
            "[[0, 1, 0], [0, 2, 0], [1, 0, 0], [0, 4, 0], [0, 0, 1]]",
            1,
            "#ttg.slice<{dim = 2, parent = #linear}>",
            False,
        ),
        ("[[0, 1, 0], [0, 0, 1], [0, 2, 0], [0, 4, 0], [1, 0, 0]]", 0, "#ttg.slice<{dim = 1, parent = #linear}>", True),
    ],
)
def test_lanes_that_lie_apart_are_found(lane: str, axis: int, layout: str, right: bool) -> None:
    text = REDUCTION.replace("LANE", lane).replace("AXIS", str(axis)).replace("LAYOUT", layout)
    assert (reductions.scattered(text) == []) is right


def test_the_least_time_of_a_kernel() -> None:
    """50 MB at 4.3 TB/s, instructions of 132 times 128 lanes, and products of 790 TFLOP/s."""
    assert str(model.bound(SOUND)) == "11.7 us, memory"
    assert str(model.bound(replace(SOUND, instructions=24.0))) == "12.0 us, issue"
    codes = replace(SOUND, main={"PRMT": 5, "FMUL": 3}, instructions=24.0)
    assert str(model.bound(codes)) == "15.0 us, integers"
    assert str(model.bound(replace(codes, arch=120))) == "30.1 us, memory"
    facts = {"M": 256, "bits": {"X": 16, "F": 4}, "tile_m": 128, "tile_n": 256}
    matmul = replace(SOUND, kernel="dequant_matmul_kernel", facts=facts, instructions=8.88)
    assert str(model.bound(matmul)) == "10.9 us, products"
    assert str(model.bound(replace(matmul, instructions=15.75))) == "15.8 us, issue"  # twice, by two rows of tiles
    narrow = replace(matmul, facts=facts | {"tile_n": 64})
    assert str(model.bound(narrow)) == "24.4 us, cache"  # 64 times 2 MB
    few = replace(matmul, facts=facts | {"M": 1, "tile_m": 8}, instructions=2.4)
    assert str(model.bound(few)) == "2.0 us, memory"
    assert model.bound(replace(SOUND, config="bfloat16 float8_e4m3fn")) is None
    assert set(model.GPUS) == set(contract.SHARED)
    for arch, gpu in model.GPUS.items():  # the ceilings are of the same devices
        assert contract.PER_BYTE[arch] == pytest.approx(model.LANES * gpu.processors * gpu.ghz / gpu.tb / 1e3, rel=0.01)


def test_the_summary_is_of_the_architectures_that_were_asked_for() -> None:
    rows = [run.Row(replace(SOUND, arch=arch), None, [], []) for arch in (90, 80)]
    head, _, line = table.summary(rows).splitlines()
    assert head.startswith("| kernel, for sm_80 / sm_90 | configurations |")
    assert line == "| triton `cast_kernel` | 1 | 32 | 0 | 20.0, 20.0 | 0 |"


def test_a_product_of_1024_rows_takes_the_kernel_of_4096() -> None:
    facts = {"M": 4096, "bits": {"X": 8, "Y": 16, "F": 8}, "tile_m": 128, "tile_n": 256}
    config = "bfloat16 int8 M=4096 4096x4096 row"
    kernel = replace(SOUND, kernel="described_matmul_kernel", op="scaled_matmul", config=config, facts=facts)
    lines = targets.table([replace(kernel, instructions=0.5)]).splitlines()
    assert lines[2] == "| W8A8 | 4096 x 4096 | 1024 | 1.6 | - | 1.68 | 1.76 |"  # 43.5 us over 21.7 and 2.9
    assert len(lines) == 4  # of two shapes of a weight; no other number of rows takes it


def test_tables_of_a_device_are_those_of_its_architecture() -> None:
    from gpu_static import launches

    from quantlib.backends.triton import tables

    assert set(launches.ARCHS) == set(tables.shipped())
    assert launches.devices(90) == ("NVIDIA H200",)
    assert launches.devices(80) == ()


def test_a_product_in_float32_has_a_contract_of_its_own() -> None:
    """A code book whose values bfloat16 does not hold is multiplied without tensor cores."""
    facts = {"bits": {"X": 16, "F": 4}, "tile_m": 8, "tiled": True, "scales": "step", "splits": 1, "ragged": False}
    product = replace(SOUND, kernel="dequant_matmul_kernel", facts=facts | {"exact": True})
    assert r"no HMMA\.16816 on its main path" in contract.faults(product, (20.0, 32))
    assert contract.faults(replace(product, facts=facts | {"exact": False}), (20.0, 32)) == []


def test_a_budget_is_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "budgets.txt"
    Budgets({}, {}).record([SOUND, replace(SOUND, arch=80, instructions=1.5)], path)
    read = Budgets.read(path)
    assert (read.get(SOUND), read.get(replace(SOUND, arch=80))) == ((20.0, 32), (1.5, 32))
    assert read.get(replace(SOUND, arch=89)) is None
    assert not read.is_stale(SOUND)
    assert read.is_stale(replace(SOUND, compiler="0.1"))


def test_what_excuses_nothing_is_named() -> None:
    assert known.unused([]) == [k for k in known.KNOWN if not k.compiler]


def test_a_fault_of_one_compiler_is_known_of_it_alone() -> None:
    fault = known.Known("cast_kernel", "spills", "why", compiler="3.9")
    assert fault.excuses(replace(SOUND, compiler="3.9.0"), "spills 8 bytes")
    assert not fault.excuses(replace(SOUND, compiler="3.6.0"), "spills 8 bytes")


# A guard; vectors, or elements where there is no whole vector; a loop of two products a trip, which a call leaves.
LISTING = """
/*0000*/ @P0 EXIT ;
/*0010*/ @P1 BRA 0x0050 &req={2,1} ?trans6 ;
/*0020*/ LDG.E.128 R4, [R2] ;
/*0030*/ STG.E.128 [R2], R4 ;
/*0040*/ BRA 0x00c0 ;
/*0050*/ LDG.E.U8 R4, [R2] ;
/*0060*/ @P2 BRA 0x0050 ;
/*0070*/ CALL.REL.NOINC 0x0100 ;
/*0080*/ HMMA.16816.F32 R4, R8, R12, R4 ;
/*0090*/ HMMA.16816.F32 R4, R8, R12, R4 ;
/*00a0*/ @P3 CALL.REL.NOINC 0x00c0 ;
/*00b0*/ BRA 0x0080 ;
/*00c0*/ FMUL R1, R1, R1 ;
/*00d0*/ EXIT ;
/*00e0*/ BRA 0x00e0 ;
"""


def test_a_way_through_a_listing() -> None:
    graph = sass.Graph(sass.parsed(LISTING))
    assert [i.at for i in graph.route()] == [0x00, 0x10, 0x20, 0x30, 0x40, 0xC0, 0xD0]
    assert [sorted(i.at for i in graph.code(loop.blocks)) for loop in graph.loops] == [
        [0x50, 0x60],
        [0x80, 0x90, 0xA0, 0xB0],
    ]
    assert [i.at for i in graph.around_products()] == [0x80, 0x90, 0xA0, 0xB0]
    assert graph.streaming() == (graph.route(), False)


# A vector, and elements where it is none: both have a guard, and the jump between them has it too.
GUARDED = """
/*0000*/ ISETP.NE.AND P0, PT, R0, 0x4, PT ;
/*0010*/ @!P0 STG.E.128 [R14], R4 ;
/*0020*/ {between}
/*0030*/ @!P0 BRA 0x0060 ;
/*0040*/ @P5 STG.E [R14], R4 ;
/*0050*/ @P0 STG.E [R14+0x4], R5 ;
/*0060*/ EXIT ;
"""


def test_a_guard_of_an_access_and_of_a_jump_is_one() -> None:
    """Unless it is set again between them."""
    for between, stored in (("LEA R3, R10, UR9, R11, 0x2, P5 ;", 1), ("ISETP.NE.AND P0, PT, R1, 0x4, PT ;", 3)):
        graph = sass.Graph(sass.parsed(GUARDED.format(between=between)))
        assert len(sass.accesses(graph.route(), "STG")) == stored


# A loop of two matrix instructions, each a group; what the second reads is written in the next trip.
WARPGROUP = """
/*0000*/ MOV R8, 0x1 ;
/*0010*/ WARPGROUP.ARRIVE ;
/*0020*/ HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR16], R24, gsb0 ;
/*0030*/ WARPGROUP.DEPBAR.LE gsb0, {first} ;
/*0040*/ {between} ;
/*0050*/ HGMMA.64x128x16.F32.BF16 R24, R8, gdesc[UR16], R24, gsb0 ;
/*0060*/ WARPGROUP.DEPBAR.LE gsb0, {last} ;
/*0070*/ @P0 BRA 0x0000 ;
/*0080*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
/*0090*/ LDS.128 R4, [R2] ;
/*00a0*/ EXIT ;
"""


@pytest.mark.parametrize(
    ("first", "last", "between", "at"),
    [
        ("0x1", "0x0", "MOV R12, R8", []),
        ("0x1", "0x1", "MOV R12, R8", ["0x0"]),  # the second of the last trip runs
        ("0x0", "0x0", "MOV R7, 0x2", []),
        ("0x1", "0x0", "MOV R7, 0x2", ["0x40"]),
        ("0x1", "0x0", "LDS.64 R2, [R1]", []),
        ("0x1", "0x0", "LDS.128 R0, [R12]", []),
        ("0x1", "0x0", "@P1 IMAD.WIDE R6, R7, 0x2, R2", ["0x40"]),
        ("0x1", "0x0", "STS.128 [R6], R4", []),
        ("0x1", "0x0", "SHFL.BFLY PT, R5, R5, 0x1, 0x1f", ["0x40"]),
    ],
)
def test_operands_that_a_warpgroup_still_reads(first: str, last: str, between: str, at: list[str]) -> None:
    text = WARPGROUP.format(first=first, last=last, between=between)
    found = warpgroups.overwritten(sass.Graph(sass.parsed(text)))
    assert [re.findall(r"at (\w+) ", said)[0] for said in found] == at
