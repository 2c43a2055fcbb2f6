"""Registers that a matrix instruction of a warpgroup still reads when they are written again.

``wgmma`` runs beside the instructions after it until a wait for its group, and an operand in registers must stay as it
is until then (PTX ISA, wgmma.wait_group). Triton 3.6 and 3.7 leave the wait to the next trip of a loop, whose operands
ptxas may put into the same registers before it: Triton's issue 9433, mended for 3.9.
"""

from __future__ import annotations

import re

from gpu_static.sass import Graph, Instruction

ASYNCHRONOUS = re.compile(r"[HIQ]GMMA\b")
FROM_REGISTERS = re.compile(r"\bR\d+, R(\d+)(?:\.reuse)?, gdesc")
OPERAND = 4  # registers of a thread: 64 rows of 32 bytes, over 128 threads
WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
WRITES_NONE = re.compile(r"ST|RED|BAR|BRA|EXIT|LDGSTS|U[A-Z]|R2UR|WARPGROUP|DEPBAR|[IFDH]SETP|PLOP3|CCTL|MEMBAR")
FIRST = re.compile(r"\s*(?:!?P\w+,\s*)?R(\d+)")
SEVERAL = {4: re.compile(r".*\.128\b|HMMA|IMMA|LDSM.*\.4\b"), 2: re.compile(r".*\.(WIDE|64|F64)\b|CS2R$")}
Group = frozenset[int]  # registers that it reads
State = tuple[Group, ...]  # groups that may run, in their order; the last is not closed yet


def overwritten(graph: Graph) -> list[str]:
    """List the instructions that write an operand of a matrix instruction which may not have read it."""
    if not any(ASYNCHRONOUS.match(i.name) for block in graph.blocks for i in block):
        return []
    before: dict[int, State] = {0: (frozenset(),)}
    todo, found = [0], {}
    while todo:
        n = todo.pop()
        state = before[n]
        for i in graph.blocks[n]:
            if lost := set().union(*state) & written(i):
                found[i.at] = f"{i.name} at {i.at:#x} writes R{min(lost)}, which a matrix instruction reads"
            state = after(state, i)
        for m in graph.after[n]:
            joined = join(before.get(m, ()), state)
            if joined != before.get(m):
                before[m] = joined
                todo.append(m)
    return [found[at] for at in sorted(found)]


def after(state: State, i: Instruction) -> State:
    if ASYNCHRONOUS.match(i.name):
        operand = FROM_REGISTERS.search(i.operands)
        *closed, last = state
        last |= frozenset(range(int(operand[1]), int(operand[1]) + OPERAND) if operand else ())
        return (*closed, last, frozenset()) if "gsb0" in i.operands else (*closed, last)
    if i.name.startswith("WARPGROUP.DEPBAR"):
        wait = WAIT.search(i.operands)
        assert wait, i
        return state[-1 - int(wait[1], 16) :]
    return state


def join(one: State, other: State) -> State:
    """The groups that may run if those of either may, counted from the last."""
    size = max(len(one), len(other))
    padded = [(frozenset[int](),) * (size - len(state)) + state for state in (one, other)]
    return tuple(a | b for a, b in zip(*padded, strict=True))


def written(i: Instruction) -> set[int]:
    """The registers that an instruction writes, but for the sums of a warpgroup's matrix instruction."""
    first = FIRST.match(i.operands)
    if not first or WRITES_NONE.match(i.name) or ASYNCHRONOUS.match(i.name):
        return set()
    size = next((size for size, names in SEVERAL.items() if names.match(i.name)), 1)
    return set(range(int(first[1]), int(first[1]) + size))
