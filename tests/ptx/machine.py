"""Threads that step through a kernel together: registers, branches, and what threads do with each other and memory.

A register is an array of one value a thread, or of one value for all; a mask says which threads run, None for all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ptx import banks, instructions, products
from ptx.arithmetic import Array
from ptx.instructions import DTYPES, Meaning
from ptx.memory import FaultError, Global, Shared
from ptx.order import order
from ptx.parse import BRANCHES, Address, Ignored, Immediate, Instruction, Kernel, Name, Operand, Register

TABLE = instructions.table()
MOST = 1 << 15  # threads that step together
Mask = Array | None
Step = Callable[["Machine", Mask], None]
Read = Callable[["Machine"], Array]
Write = Callable[["Machine", Array, Mask], None]
BITS = {1: np.dtype(np.bool_), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
UNWRITTEN = 0xA5A5A5A5A5A5A5A5


class Program:
    """A kernel that is ready to run: its blocks in the order in which threads take them."""

    def __init__(self, kernel: Kernel, shared: int) -> None:
        self.kernel, self.shared = kernel, shared
        end = len(kernel.blocks)
        edges = {block: following(kernel, block) for block in range(end)} | {end: []}
        ordered = [block for block in order(0, edges) if block != end]
        place = {block: n for n, block in enumerate([*ordered, end])}
        self.blocks = [[(i, step(i)) for i in kernel.blocks[block] if i.opcode not in BRANCHES] for block in ordered]
        self.ends = [kernel.blocks[block][-1] for block in ordered]
        self.next = [[place[to] for to in edges[block]] for block in ordered]

    def run(self, grid: int, arguments: Mapping[str, int], memory: Global) -> None:
        """Run the programs 0 .. grid - 1; ``arguments``: the bits of each parameter."""
        together = max(MOST // self.kernel.threads, 1)
        with np.errstate(all="ignore"):
            for first in range(0, grid, together):
                Machine(self, first, min(together, grid - first), grid, arguments, memory).run()


def following(kernel: Kernel, block: int) -> list[int]:
    """Return the block that a branch at the end leads to, and the one that follows otherwise, if it may."""
    end, last = kernel.blocks[block][-1], len(kernel.blocks)
    if end.opcode not in BRANCHES:
        return [block + 1]
    if end.opcode == "ret":
        return [last, block + 1] if end.guard else [last]
    (to,) = end.operands
    if not isinstance(to, Name) or to.name not in kernel.labels:
        raise end.error("no label")
    return [kernel.labels[to.name], block + 1] if end.guard else [kernel.labels[to.name]]


class Machine:
    """Some programs of a grid while they run."""

    def __init__(
        self, program: Program, first: int, programs: int, grid: int, arguments: Mapping[str, int], memory: Global
    ) -> None:
        self.program, self.memory, self.arguments = program, memory, arguments
        self.threads = program.kernel.threads
        self.n = programs * self.threads
        self.every = np.arange(self.n)
        self.lane = self.every % 32
        self.registers: list[Any] = [None] * len(program.kernel.bits)
        self.shared = Shared(programs, program.shared, self.threads)
        self.copies = products.Queue(self.n)
        self.products = products.Queue(self.n // products.WARPGROUP)
        self.special = {
            "%tid.x": (self.every % self.threads).astype(np.uint32),
            "%ctaid.x": (self.every // self.threads + first).astype(np.uint32),
            "%laneid": self.lane.astype(np.uint32),
            "%ntid.x": np.array([self.threads], np.uint32),
            "%nctaid.x": np.array([grid], np.uint32),
            "global_smem": np.array([Shared.FIRST], np.uint32),
            **{name: np.zeros(1, np.uint32) for name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z")},
        }

    def run(self) -> None:
        """Run the threads of the first block until none is left: those that have branched apart meet further down."""
        done = len(self.program.blocks)
        at = np.zeros(self.n, np.int32)
        while (block := int(at.min())) < done:
            active = at == block
            mask = None if active.all() else active
            for instruction, run in self.program.blocks[block]:
                try:
                    run(self, mask)
                except FaultError as fault:
                    raise instruction.error(str(fault)) from None
            to, *otherwise = self.program.next[block]
            if otherwise:
                guard = self.program.ends[block].guard
                assert guard
                taken = active & (self.registers[guard[0].slot] == guard[1])
                at[active] = otherwise[0]
                at[taken] = to
            else:
                at[active] = to

    def full(self, x: Array) -> Array:
        return np.broadcast_to(x, self.n)

    def active(self, mask: Mask) -> Array:
        return self.every if mask is None else np.flatnonzero(mask)


def step(i: Instruction) -> Step:
    """The effect of an instruction."""
    for pattern, make in OTHERS.items():
        if match := re.fullmatch(pattern, i.opcode):
            run = make(i, *match.groups())
            break
    else:
        if i.opcode == "mov.b32" or i.opcode == "mov.b64":
            run = move(i)
        elif match := re.fullmatch(r"(setp\.\w+\.b?f16)x2", i.opcode):
            run = compare_pairs(i, TABLE[match[1]])
        elif i.opcode in TABLE:
            run = compute(i, TABLE[i.opcode])
        else:
            raise i.error("this instruction is not known")
    return guarded(i, run) if i.guard else run


def guarded(i: Instruction, run: Step) -> Step:
    assert i.guard
    register, wanted = i.guard
    written = [o for o in flat(i.operands[0]) if isinstance(o, Register)] if not i.opcode.startswith("st") else []

    def guard(m: Machine, mask: Mask) -> None:
        if m.registers[register.slot] is None:
            raise FaultError("the predicate has not been written")
        taken = m.full(m.registers[register.slot] == wanted)
        if mask is not None:
            taken = taken & mask
        if taken.all():
            run(m, None)
        elif taken.any():
            run(m, taken)
        else:
            for r in written:
                if m.registers[r.slot] is None:
                    m.registers[r.slot] = unwritten(r.bits)

    return guard


def flat(operand: Operand) -> tuple[Any, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def unwritten(bits: int) -> Array:
    return np.array([UNWRITTEN & ((1 << bits) - 1)], np.uint64).astype(BITS[bits])


# ---- operands --------------------------------------------------------------------------------------------------------


def reader(i: Instruction, operand: Operand, type: str, *, narrow: bool = False) -> Read:
    """The operand as ``type``; ``narrow``: the low bits of a wider register will do."""
    dtype = DTYPES[type]
    bits = 1 if type == "pred" else dtype.itemsize * 8
    if isinstance(operand, Immediate):
        constant = np.array([operand.value & ((1 << bits) - 1)], BITS[bits]).view(dtype)
        return lambda m: constant
    if isinstance(operand, Name):
        return named(i, operand.name, dtype)
    if not isinstance(operand, Register):
        raise i.error(f"no value: {operand}")
    slot, cut = operand.slot, operand.bits > bits and narrow and bits > 1
    if operand.bits != bits and not cut:
        raise i.error(f"a register of {operand.bits} bits for {type}")

    def read(m: Machine) -> Array:
        value = m.registers[slot]
        if value is None:  # as what pads the last four of a conversion
            value = unwritten(bits)
        return (value.astype(BITS[bits]) if cut else value).view(dtype)

    return read


def named(i: Instruction, name: str, dtype: np.dtype[Any]) -> Read:
    def read(m: Machine) -> Array:
        if name not in m.special:
            raise FaultError(f"{name} is not known")
        return m.special[name].astype(f"u{dtype.itemsize}").view(dtype)

    return read


def writer(i: Instruction, operand: Operand, type: str) -> Write:
    """The operand takes a ``type``; a wider register takes it with its sign, if it has one."""
    if isinstance(operand, Ignored):
        return lambda m, value, mask: None
    if not isinstance(operand, Register):
        raise i.error(f"no register: {operand}")
    slot, bits = operand.slot, BITS[operand.bits]
    dtype = DTYPES[type]
    if dtype.itemsize > bits.itemsize or (dtype.kind == "b") != (bits.kind == "b"):
        raise i.error(f"a register of {operand.bits} bits for {type}")
    widened = np.dtype(f"{dtype.kind}{bits.itemsize}") if dtype.itemsize < bits.itemsize else dtype

    def write(m: Machine, value: Array, mask: Mask) -> None:
        assert value.dtype == dtype, (i.text, value.dtype)
        if widened is not dtype:
            value = value.astype(widened)
        value = value.view(bits)
        if mask is not None:
            before = m.registers[slot]
            value = np.where(mask, value, unwritten(operand.bits) if before is None else before)
        m.registers[slot] = value

    return write


def expect(i: Instruction, count: int) -> None:
    if len(i.operands) != count:
        raise i.error(f"{len(i.operands)} operands, expected {count}")


# ---- of a thread alone -----------------------------------------------------------------------------------------------


def compute(i: Instruction, meaning: Meaning) -> Step:
    expect(i, 1 + len(meaning.operands))
    narrow = i.opcode.startswith("cvt")
    reads = [reader(i, o, t, narrow=narrow) for o, t in zip(i.operands[1:], meaning.operands, strict=True)]
    write = writer(i, i.operands[0], meaning.result)
    if not narrow and isinstance(i.operands[0], Register) and i.operands[0].bits != bits_of(meaning.result):
        raise i.error(f"a register of {i.operands[0].bits} bits for {meaning.result}")
    function = meaning.function

    def run(m: Machine, mask: Mask) -> None:
        values = [read(m) for read in reads]
        if meaning.nonzero and not (m.full(values[-1]) != 0)[m.active(mask)].all():
            raise FaultError("a division by zero")
        write(m, function(*values), mask)

    return run


def compare_pairs(i: Instruction, meaning: Meaning) -> Step:
    """Setp of two halves: p|q takes that of the low and of the high ones."""
    expect(i, 3)
    writes, reads = [writer(i, o, "pred") for o in flat(i.operands[0])], [reader(i, o, "b32") for o in i.operands[1:]]
    if len(writes) != 2:
        raise i.error("the number of predicates")

    def run(m: Machine, mask: Mask) -> None:
        words = [read(m) for read in reads]
        found = [meaning.function(*((w >> np.uint32(at)).astype(np.uint16) for w in words)) for at in (0, 16)]
        for write, value in zip(writes, found, strict=True):
            write(m, value, mask)

    return run


def bits_of(type: str) -> int:
    return 1 if type == "pred" else DTYPES[type].itemsize * 8


def move(i: Instruction) -> Step:
    """Mov.b32 and mov.b64, which also take a word apart and put it together."""
    expect(i, 2)
    type, (to, of) = i.opcode[4:], i.operands
    size = int(type[1:])
    if isinstance(to, tuple):
        part, read = size // len(to), reader(i, of, type)
        writes = [writer(i, o, f"b{part}") for o in to]
        dtype = DTYPES[type].type

        def apart(m: Machine, mask: Mask) -> None:
            word = read(m)
            for n, write in enumerate(writes):
                write(m, (word >> dtype(n * part)).astype(BITS[part]), mask)

        return apart
    if isinstance(of, tuple):
        part = size // len(of)
        reads = [reader(i, o, f"b{part}") for o in of]
        write_word = writer(i, to, type)
        dtype = DTYPES[type].type

        def together(m: Machine, mask: Mask) -> None:
            word = np.zeros(1, dtype)
            for n, read in enumerate(reads):
                word = word | (read(m).astype(dtype) << dtype(n * part))
            write_word(m, word, mask)

        return together
    return compute(i, TABLE[i.opcode])


def parameter(i: Instruction, type: str) -> Step:
    expect(i, 2)
    write, address = writer(i, i.operands[0], type), i.operands[1]
    if not isinstance(address, Address) or not isinstance(address.base, Name) or address.offset:
        raise i.error("no parameter")
    name, bits = address.base.name, bits_of(type)

    def run(m: Machine, mask: Mask) -> None:
        if name not in m.arguments:
            raise FaultError(f"{name} is not known")
        value = np.array([m.arguments[name] & ((1 << bits) - 1)], BITS[bits])
        write(m, value.view(DTYPES[type]), mask)

    return run


# ---- memory ----------------------------------------------------------------------------------------------------------


def addresses(i: Instruction, operand: Operand, type: str) -> Read:
    if not isinstance(operand, Address):
        raise i.error("no address")
    read, offset = reader(i, operand.base, type), DTYPES[type].type(operand.offset % (1 << bits_of(type)))
    return lambda m: m.full(read(m) + offset)


def load_global(i: Instruction, vector: str | None, type: str) -> Step:
    expect(i, 2)
    dtype = DTYPES[type]
    to = flat(i.operands[0])
    if len(to) != int((vector or ".v1")[2:]):
        raise i.error("the number of registers")
    at, writes = addresses(i, i.operands[1], "u64"), [writer(i, o, type) for o in to]

    def run(m: Machine, mask: Mask) -> None:
        address = at(m)
        found = m.memory.load(address if mask is None else address[mask], dtype.itemsize, len(to))
        for write, value in zip(writes, found, strict=True):
            write(m, spread(m, value.view(dtype), mask), mask)

    return run


def spread(m: Machine, value: Array, mask: Mask) -> Array:
    """The values of the threads that run, at their places."""
    if mask is None:
        return value
    placed = np.zeros(m.n, value.dtype)
    placed[mask] = value
    return placed


def store_global(i: Instruction, vector: str | None, width: str) -> Step:
    expect(i, 2)
    of = flat(i.operands[1])
    if len(of) != int((vector or ".v1")[2:]):
        raise i.error("the number of registers")
    at, reads = addresses(i, i.operands[0], "u64"), [reader(i, o, f"b{width}", narrow=True) for o in of]

    def run(m: Machine, mask: Mask) -> None:
        where = m.active(mask)
        m.memory.store(at(m)[where], [m.full(read(m))[where] for read in reads], int(width) // 8)

    return run


def load_shared(i: Instruction, vector: str | None, type: str) -> Step:
    expect(i, 2)
    dtype = DTYPES[type]
    to = flat(i.operands[0])
    if len(to) != int((vector or ".v1")[2:]):
        raise i.error("the number of registers")
    at, writes = addresses(i, i.operands[1], "u32"), [writer(i, o, type) for o in to]

    def run(m: Machine, mask: Mask) -> None:
        where = m.active(mask)
        address = at(m)[where]
        banks.note(i, where, address, dtype.itemsize * len(to))
        found = m.shared.load(where, address, dtype.itemsize, len(to))
        for write, value in zip(writes, found, strict=True):
            write(m, spread(m, value.view(dtype), mask), mask)

    return run


def store_shared(i: Instruction, vector: str | None, width: str) -> Step:
    expect(i, 2)
    of = flat(i.operands[1])
    if len(of) != int((vector or ".v1")[2:]):
        raise i.error("the number of registers")
    at, reads = addresses(i, i.operands[0], "u32"), [reader(i, o, f"b{width}", narrow=True) for o in of]

    def run(m: Machine, mask: Mask) -> None:
        where = m.active(mask)
        address = at(m)[where]
        banks.note(i, where, address, int(width) // 8 * len(of))
        m.shared.store(where, address, [m.full(read(m))[where] for read in reads], int(width) // 8)

    return run


def matrix_rows(thread: Array, address: Array, matrix: int, row: Array) -> Array:
    """The address of a row of an 8 x 8 matrix of 16 bits, which the lane 8 * matrix + ``row`` of the warp gives."""
    rows = address[thread // 32 * 32 + 8 * matrix + row]
    if (rows % 16).any():
        raise FaultError("a row of a matrix is no multiple of 16 bytes")
    return rows


def load_matrix(i: Instruction, count: str, transposed: str | None) -> Step:
    """Ldmatrix: each lane has two neighbours of a row, or of a column if transposed."""
    expect(i, 2)
    to = flat(i.operands[0])
    if len(to) != int(count):
        raise i.error("the number of registers")
    at, writes = addresses(i, i.operands[1], "u32"), [writer(i, o, "b32") for o in to]

    def run(m: Machine, mask: Mask) -> None:
        whole_warps(m, mask, None)
        address, where = at(m), m.active(mask)
        lane = where % 32
        banks.note(i, where[lane < 8 * len(to)], address[where][lane < 8 * len(to)], 16)
        for matrix, write in enumerate(writes):
            if transposed:
                halves = []
                for k in (0, 1):
                    row = matrix_rows(where, address, matrix, lane % 4 * 2 + k)
                    halves += m.shared.load(where, row + lane // 4 * 2, 2, 1)
                value = halves[0] | (halves[1].astype(np.uint32) << np.uint32(16))
            else:
                row = matrix_rows(where, address, matrix, lane // 4)
                (value,) = m.shared.load(where, row + lane % 4 * 4, 4, 1)
            write(m, spread(m, value, mask), mask)

    return run


def store_matrix(i: Instruction, count: str, transposed: str | None) -> Step:
    expect(i, 2)
    of = flat(i.operands[1])
    if len(of) != int(count):
        raise i.error("the number of registers")
    at, reads = addresses(i, i.operands[0], "u32"), [reader(i, o, "b32") for o in of]

    def run(m: Machine, mask: Mask) -> None:
        whole_warps(m, mask, None)
        address, where = at(m), m.active(mask)
        lane = where % 32
        banks.note(i, where[lane < 8 * len(of)], address[where][lane < 8 * len(of)], 16)
        for matrix, read in enumerate(reads):
            value = m.full(read(m))[where]
            if transposed:
                for k in (0, 1):
                    row = matrix_rows(where, address, matrix, lane % 4 * 2 + k)
                    half = (value >> np.uint32(16 * k)).astype(np.uint16)
                    m.shared.store(where, row + lane // 4 * 2, [half], 2)
            else:
                row = matrix_rows(where, address, matrix, lane // 4)
                m.shared.store(where, row + lane % 4 * 4, [value], 4)

    return run


# ---- threads with each other -----------------------------------------------------------------------------------------


def whole_warps(m: Machine, mask: Mask, members: Array | None) -> None:
    """Every warp that runs does so with all its lanes, or just with ``members``."""
    if mask is None and (members is None or (members == 0xFFFFFFFF).all()):
        return
    running = (np.ones(m.n, bool) if mask is None else mask).reshape(-1, 32)
    lanes = (running * (1 << np.arange(32, dtype=np.uint64))).sum(1)
    wanted = m.full(np.array([0xFFFFFFFF]) if members is None else members).reshape(-1, 32)
    if (running & (wanted != lanes[:, None])).any():
        raise FaultError("other lanes of the warp run than those that it names")


def barrier(i: Instruction) -> Step:
    expect(i, 1)
    if i.operands[0] != Immediate(0):
        raise i.error("a barrier of some threads")

    def run(m: Machine, mask: Mask) -> None:
        here = (np.ones(m.n, bool) if mask is None else mask).reshape(-1, m.threads)
        if (here.any(1) != here.all(1)).any():
            raise FaultError("not all threads of a program reach this barrier")
        m.shared.barriers[here.all(1)] += 1

    return run


def warp_barrier(i: Instruction) -> Step:
    expect(i, 1)
    members = reader(i, i.operands[0], "u32")

    def run(m: Machine, mask: Mask) -> None:
        whole_warps(m, mask, members(m))
        if (members(m) != 0xFFFFFFFF).any():
            raise FaultError("a barrier of some lanes")
        m.shared.meetings[np.unique(m.active(mask) // 32)] += 1

    return run


def shuffle(i: Instruction, kind: str) -> Step:
    expect(i, 5)
    reads = [reader(i, o, "u32") for o in i.operands[1:]]
    write = writer(i, i.operands[0], "b32")

    def run(m: Machine, mask: Mask) -> None:
        value, by, limits, members = (read(m) for read in reads)
        whole_warps(m, mask, members)
        lane, by, limits = m.lane, by.astype(np.int64) & 31, limits.astype(np.int64)
        segment, clamp = (limits >> 8) & 31, limits & 31
        first = lane & segment
        last = first | (clamp & ~segment)
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": first | (by & ~segment)}[kind]
        there = source >= last if kind == "up" else source <= last
        source = m.every - lane + np.where(there, source, lane)
        if mask is not None and not mask[source[mask]].all():
            raise FaultError("a lane is read that does not run")
        write(m, m.full(value)[source], mask)

    return run


def reduce(i: Instruction, op: str, type: str) -> Step:
    expect(i, 3)
    read, members = reader(i, i.operands[1], type), reader(i, i.operands[2], "u32")
    write, function = writer(i, i.operands[0], type), {"max": np.maximum, "min": np.minimum, "add": np.add}[op]
    limits = np.iinfo(DTYPES[type])
    nothing = DTYPES[type].type({"max": limits.min, "min": limits.max, "add": 0}[op])

    def run(m: Machine, mask: Mask) -> None:
        whole_warps(m, mask, members(m))
        value = m.full(read(m)) if mask is None else np.where(mask, read(m), nothing)
        write(m, np.repeat(function.reduce(value.reshape(-1, 32), 1, dtype=value.dtype), 32), mask)

    return run


# ---- products, and what runs beside the threads ----------------------------------------------------------------------


def multiply(i: Instruction, size: str, clamped: str | None, types: str) -> Step:
    """Mma: a warp multiplies operands that its lanes have in registers."""
    expect(i, 4)
    rows, columns, steps, total, a_type, b_type = products.shape(f"{size}.{types}")
    if (rows, columns) != (16, 8) or steps != (16 if a_type in products.TO_FLOAT else 32):
        raise i.error("this shape is not known")
    a, b, c = ([reader(i, o, "b32") for o in flat(operand)] for operand in i.operands[1:])
    writes = [writer(i, o, "b32") for o in flat(i.operands[0])]
    if (len(a), len(b), len(c), len(writes)) != (4, 2, 4, 4):
        raise i.error("the number of registers")

    def run(m: Machine, mask: Mask) -> None:
        whole_warps(m, mask, None)
        words = [products.words_of(m, reads).reshape(m.n // 32, 32, -1) for reads in (a, b, c)]
        operands = products.left(words[0], a_type), products.right(words[1], b_type), products.sums(words[2], total)
        dealt = products.dealt(products.multiplied(*operands, clamped is not None)).reshape(m.n, 4)
        for n, write in enumerate(writes):
            write(m, np.ascontiguousarray(dealt[:, n]), mask)

    return run


def multiply_beside(i: Instruction, form: str) -> Step:
    """Wgmma: a warpgroup multiplies a, of registers or shared memory, with b of shared memory, until it is waited for.

    Who overwrites an operand before finds it in the product.
    """
    rows, columns, steps, total, a_type, b_type = products.shape(form)
    to, a, b, keeps, *rest = i.operands
    if rows != 64 or any(not isinstance(o, Immediate) for o in rest):
        raise i.error("this shape is not known")
    signs, turned = [o.value for o in rest[:2]], [bool(o.value) for o in rest[2:]]
    if signs != [1, 1] * (total == "f32"):
        raise i.error("this sign is not known")
    from_registers = isinstance(a, tuple)
    turned = [False] * (2 - len(turned)) + turned
    writes, before = ([make(i, o, "b32") for o in flat(to)] for make in (writer, reader))
    if len(writes) != columns // 2 or (from_registers and len(flat(a)) != 4):
        raise i.error("the number of registers")
    a_reads = [reader(i, o, "b32" if from_registers else "u64") for o in flat(a)]
    b_read, keep = reader(i, b, "u64"), reader(i, keeps, "pred")

    def run(m: Machine, mask: Mask) -> None:
        by = warpgroups(m, mask)
        descriptors = [of_warpgroups(m, read, by) for read in ([b_read] if from_registers else [b_read, *a_reads])]
        added = m.full(keep(m)).reshape(-1, products.WARPGROUP)[:, :1, None, None].astype(np.int32)

        def operands(by: Array) -> tuple[Array, Array]:
            right = products.loaded(m, descriptors[0], by, columns, steps, b_type, turned[1])
            if from_registers:
                words = products.words_of(m, a_reads).reshape(-1, 4, 32, 4)[by]
                return products.left(words, a_type), right[:, None]
            left = products.loaded(m, descriptors[1], by, rows, steps, a_type, turned[0])
            return left.reshape(len(left), 4, 16, steps), right[:, None]

        def finish(m: Machine, by: Array) -> None:
            words = products.words_of(m, before).reshape(-1, 4, 32, len(before))[by]
            c = products.sums(words, total)
            c = np.where(added[by] != 0, c, np.zeros(1, c.dtype))
            dealt = products.dealt(products.multiplied(*operands(by), c))
            placed = np.zeros((len(by), 4, 32, len(writes)), np.uint32)
            placed[by] = dealt
            placed = placed.reshape(m.n, -1)
            threads = None if by.all() else np.repeat(by, products.WARPGROUP)
            for n, write in enumerate(writes):
                write(m, np.ascontiguousarray(placed[:, n]), threads)

        operands(by)  # a race is one now, too
        m.products.add(finish, by)

    return run


def warpgroups(m: Machine, mask: Mask) -> Array:
    """The warpgroups that run, each with all its threads."""
    running = (np.ones(m.n, bool) if mask is None else mask).reshape(-1, products.WARPGROUP)
    if (running.any(1) != running.all(1)).any():
        raise FaultError("not all threads of a warpgroup run")
    return running.all(1)


def of_warpgroups(m: Machine, read: Read, by: Array) -> Array:
    """The one value that the threads of each warpgroup have."""
    values = m.full(read(m)).reshape(-1, products.WARPGROUP)
    if (values[by] != values[by][:, :1]).any():
        raise FaultError("threads of a warpgroup have different descriptors")
    return np.ascontiguousarray(values[:, 0])


def commit_products(i: Instruction) -> Step:
    return lambda m, mask: m.products.commit(warpgroups(m, mask))


def wait_products(i: Instruction) -> Step:
    pending = number(i)
    return lambda m, mask: m.products.wait(m, pending, warpgroups(m, mask))


def number(i: Instruction) -> int:
    expect(i, 1)
    if not isinstance(i.operands[0], Immediate):
        raise i.error("no number")
    return i.operands[0].value


def copy_beside(i: Instruction) -> Step:
    """Cp.async: so many bytes, or zeros where it is told to read none, by the time that it is waited for."""
    size = i.operands[2].value if len(i.operands) in (3, 4) and isinstance(i.operands[2], Immediate) else 0
    if size not in (4, 8, 16):
        raise i.error("the number of bytes")
    to, of = addresses(i, i.operands[0], "u32"), addresses(i, i.operands[1], "u64")
    bytes_read = reader(i, i.operands[3] if len(i.operands) == 4 else i.operands[2], "u32")
    words = size // 4

    def run(m: Machine, mask: Mask) -> None:
        there, source, count = to(m).copy(), of(m).copy(), m.full(bytes_read(m)).copy()
        by = np.ones(m.n, bool) if mask is None else mask.copy()
        if not np.isin(count[by], (0, size)).all():
            raise FaultError("a copy of some of the bytes")
        where = np.flatnonzero(by)
        banks.note(i, where, there[where], size)
        m.shared.store(where, there[where], [np.full(len(where), products.POISON, np.uint32)] * words, 4)

        def finish(m: Machine, by: Array) -> None:
            where = np.flatnonzero(by)
            full = np.flatnonzero(count[where])
            values = [np.zeros(len(where), np.uint32) for _ in range(words)]
            if len(full):
                for value, found in zip(values, m.memory.load(source[where][full], 4, words), strict=True):
                    value[full] = found
            m.shared.store(where, there[where], values, 4)

        m.copies.add(finish, by)

    return run


def running(m: Machine, mask: Mask) -> Array:
    return np.ones(m.n, bool) if mask is None else mask


def commit_copies(i: Instruction) -> Step:
    return lambda m, mask: m.copies.commit(running(m, mask))


def wait_copies(i: Instruction) -> Step:
    pending = number(i)
    return lambda m, mask: m.copies.wait(m, pending, running(m, mask))


def take_ticket(i: Instruction) -> Step:
    """Atom.add of integers: threads take turns."""
    expect(i, 3)
    write, at, read = (
        writer(i, i.operands[0], "b32"),
        addresses(i, i.operands[1], "u64"),
        reader(i, i.operands[2], "u32"),
    )

    def run(m: Machine, mask: Mask) -> None:
        where = m.active(mask)
        address, add, found = at(m), m.full(read(m)), np.zeros(m.n, np.uint32)
        for thread in where:
            (found[thread : thread + 1],) = m.memory.load(address[thread : thread + 1], 4, 1)
            m.memory.store(address[thread : thread + 1], [found[thread : thread + 1] + add[thread]], 4)
        write(m, found, mask)

    return run


def nothing(i: Instruction) -> Step:
    return lambda m, mask: None


VECTOR, WIDTH = r"(\.v[24])?", r"\.b(8|16|32|64)"
LOADED = r"\.([bsu](?:8|16|32|64))"
OTHERS: dict[str, Callable[..., Step]] = {
    r"ld\.param\.([bsu](?:32|64))": parameter,
    rf"ld\.global(?:\.cg)?{VECTOR}{LOADED}": load_global,
    rf"st\.global{VECTOR}{WIDTH}": store_global,
    rf"ld\.shared{VECTOR}{LOADED}": load_shared,
    rf"st\.shared{VECTOR}{WIDTH}": store_shared,
    r"ldmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16": load_matrix,
    r"stmatrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared\.b16": store_matrix,
    r"bar\.sync": barrier,
    r"bar\.warp\.sync": warp_barrier,
    r"shfl\.sync\.(up|down|bfly|idx)\.b32": shuffle,
    r"mma\.sync\.aligned\.(m16n8k\d+)\.row\.col(\.satfinite)?\.([fs]32\.\w+\.\w+)\.[fs]32": multiply,
    r"wgmma\.mma_async\.sync\.aligned\.(m64.*)": multiply_beside,
    r"wgmma\.fence\.sync\.aligned|fence\.proxy\.async\.shared::cta": nothing,
    r"wgmma\.commit_group\.sync\.aligned": commit_products,
    r"wgmma\.wait_group\.sync\.aligned": wait_products,
    r"cp\.async\.c[ag]\.shared\.global": copy_beside,
    r"cp\.async\.commit_group": commit_copies,
    r"cp\.async\.wait_group": wait_copies,
    r"atom\.global\.gpu\.acq_rel\.add\.u32": take_ticket,
    r"redux\.sync\.(max|min|add)\.([su]32)": reduce,
}
