"""Machine code as cuobjdump lists it, in numbers: registers, stack, instructions and bytes along a way through it.

Nothing is executed. Of all ways from the start of a kernel to its end, the one that counts moves the most bytes in the
widest accesses and the fewest instructions: that of a thread whose vectors are whole and whose divisions are ordinary.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import subprocess
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}  # bytes of an access; 4 where it names none
PRODUCTS = re.compile(r"(HMMA|IMMA|QMMA|HGMMA|IGMMA|QGMMA|UTC[A-Z]*MMA)\b")
SCHEDULE = re.compile(r"\s+[&?].*")  # what cuobjdump adds from sm_120 on: barriers and the cycles that follow
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?([A-Z][\w.]*)([^;]*);")


def width(name: str) -> int:
    """Bytes of a load or store."""
    return next((WIDTH[part] for part in name.split(".") if part in WIDTH), 4)


@dataclass(frozen=True)
class Instruction:
    at: int
    guard: str  # predicate, or ""
    name: str
    operands: str

    @property
    def width(self) -> int:
        return width(self.name)

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.name.split(".")[0] in ("BRA", "JMP") else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Say if the instruction after it can come next."""
        kind = self.name.split(".")[0]
        if kind in ("BRA", "JMP"):
            return bool(self.guard) or not re.fullmatch(r"\s*0x[0-9a-f]+\s*", self.operands)
        return bool(self.guard) or kind not in ("EXIT", "RET", "BRX", "JMX")


@dataclass(frozen=True)
class Listing:
    """One kernel."""

    name: str
    registers: int
    stack: int
    local: int
    shared: int
    code: tuple[Instruction, ...]

    @property
    def names(self) -> dict[str, int]:
        return count(self.code)

    @functools.cached_property
    def graph(self) -> Graph:
        return Graph(self.code)


def count(code: Iterable[Instruction]) -> dict[str, int]:
    return dict(collections.Counter(i.name for i in code))


def accesses(code: Iterable[Instruction], kind: str) -> list[int]:
    """Widths of the loads, "LDG", or the stores, "STG", of global memory."""
    return [i.width for i in code if i.name.split(".")[0] == kind]


def disassemble(cuobjdump: Path | str, binary: Path) -> list[Listing]:
    """Every kernel of a cubin."""
    command = [str(cuobjdump), "-res-usage", "-sass", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text))
    found = []
    for part in text.split("Function : ")[1:]:
        name = part.split(None, 1)[0]
        usage = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", used[name])}
        found.append(Listing(name, usage["REG"], usage["STACK"], usage["LOCAL"], usage["SHARED"], parsed(part)))
    return found


def parsed(text: str) -> tuple[Instruction, ...]:
    """Instructions; a call of what follows the jump behind it, which leaves a loop before sm_90, is a jump."""
    found = ((*parts, re.sub(SCHEDULE, "", rest)) for *parts, rest in INSTRUCTION.findall(text))
    code = [Instruction(int(at, 16), guard, op, rest) for at, guard, op, rest in found]
    for n, (call, jump, after) in enumerate(zip(code, code[1:], code[2:], strict=False)):
        if call.name.startswith("CALL") and jump.name == "BRA" and call.operands.split()[-1] == hex(after.at):
            code[n] = replace(call, name="BRA")
    return tuple(code)


Worth = Callable[[int], tuple[int, ...]]  # of a block


@dataclass(frozen=True)
class Loop:
    """The blocks between a jump back and where it leads."""

    head: int
    blocks: frozenset[int]
    latches: tuple[int, ...]


class Graph:
    """The basic blocks of a kernel, numbered in the order in which they lie."""

    def __init__(self, code: tuple[Instruction, ...]) -> None:
        leaders = {code[0].at} | {i.target for i in code if i.target is not None}
        leaders |= {b.at for a, b in itertools.pairwise(code) if a.target is not None or not a.falls_through}
        self.blocks: list[list[Instruction]] = []
        for i in code:
            if i.at in leaders:
                self.blocks.append([])
            self.blocks[-1].append(i)
        self._number = {block[0].at: n for n, block in enumerate(self.blocks)}
        self.after = [self._successors(n) for n in range(len(self.blocks))]
        for n in range(len(self.blocks)):
            self._part(n)
        entered = {n for after in self.after for n in after}
        for n, block in enumerate(self.blocks):  # a jump to a table of addresses: to whatever no other way leads to
            if block[-1].name.startswith(("BRX", "JMX")):
                self.after[n] = [m for m in range(n + 1, len(self.blocks)) if m not in entered]
        self.order, self.back = self._depth_first()

    def _successors(self, n: int) -> list[int]:
        last = self.blocks[n][-1]
        found = [self._number[last.target]] if last.target in self._number else []
        if last.falls_through and n + 1 < len(self.blocks):
            found.append(n + 1)
        return found

    def _part(self, n: int) -> None:
        """Give the accesses that a block makes only if its last jump is taken, or only if not, to a block on that way.

        The jump and these accesses have one guard, which nothing between them sets.
        """
        *code, jump = self.blocks[n]
        if not jump.guard or len(self.after[n]) < 2 or jump.operands.count(",") > 0:
            return
        taken, other, predicate = [], [], jump.guard.strip("!")
        for i in reversed(code):
            if i.guard.strip("!") == predicate and i.name.startswith(("LDG.", "STG.")):
                (taken if i.guard == jump.guard else other).insert(0, i)
            if re.search(rf"(?<!!)\b{predicate}\b", i.operands):  # it may set it
                break
        self.blocks[n] = [i for i in code if i not in taken and i not in other] + [jump]
        for way, part in enumerate((taken, other)):
            if part:
                self.blocks.append(part)
                self.after.append([self.after[n][way]])
                self.after[n][way] = len(self.blocks) - 1

    def _depth_first(self) -> tuple[list[int], set[tuple[int, int]]]:
        """Blocks so that each comes after those that lead to it, and the edges back that had to be left out."""
        order, back, state, stack = [], set(), {0: 1}, [(0, iter(self.after[0]))]
        while stack:
            n, rest = stack[-1]
            m = next(rest, None)
            if m is None:
                stack.pop()
                state[n] = 2
                order.append(n)
            elif state.get(m) == 1:
                back.add((n, m))
            elif m not in state:
                state[m] = 1
                stack.append((m, iter(self.after[m])))
        return order[::-1], back

    @functools.cached_property
    def loops(self) -> list[Loop]:
        before = collections.defaultdict(list)
        for n in self.order:
            for m in self.after[n]:
                before[m].append(n)
        found = []
        for head in sorted({m for _, m in self.back}):
            latches = tuple(n for n, m in sorted(self.back) if m == head)
            inside, todo = {head}, list(latches)
            while todo:
                n = todo.pop()
                if n not in inside:
                    inside.add(n)
                    todo += before[n]
            found.append(Loop(head, frozenset(inside), latches))
        return found

    def code(self, blocks: Collection[int]) -> list[Instruction]:
        return [i for n in sorted(blocks) for i in self.blocks[n]]

    def route(self, loop: Loop | None = None, worth: Worth | None = None) -> list[Instruction]:
        """The way through the kernel, or once through ``loop``, whose blocks are worth most: see `moves`.

        A loop on the way is gone through once.
        """
        worth = worth or self.moves
        start, allowed = (loop.head, loop.blocks) if loop else (0, frozenset(self.order))
        skip = {edge for edge in self.back if not (loop and edge[1] == loop.head)}
        ends = {n for n in allowed if loop and n in loop.latches} or {n for n in allowed if self._is_end(n)}
        best: dict[int, tuple[tuple[int, ...], int | None]] = {start: (worth(start), None)}
        for n in self.order:
            if n not in best or (loop and n in loop.latches and n != start):
                continue
            for m in self._onward(n, skip):
                if m in allowed and m != start:
                    total = tuple(a + b for a, b in zip(best[n][0], worth(m), strict=True))
                    if m not in best or total > best[m][0]:
                        best[m] = (total, n)
        reached = [n for n in ends if n in best]
        n = max(reached, key=lambda n: best[n][0]) if reached else None
        way: list[int] = []
        while n is not None:
            way.append(n)
            n = best[n][1]
        return [i for n in way[::-1] for i in self.blocks[n]]

    def _is_end(self, n: int) -> bool:
        return self.blocks[n][-1].name.startswith("EXIT") and not self.blocks[n][-1].guard

    def _onward(self, n: int, skip: set[tuple[int, int]]) -> list[int]:
        """List the blocks that follow block n; a jump back that is not taken leads to where its loop is left."""
        onward = [m for m in self.after[n] if (n, m) not in skip]
        if onward or not any((n, m) in skip for m in self.after[n]):
            return onward
        around = [x for x in self.loops if n in x.latches]
        return [m for x in around for k in x.blocks for m in self.after[k] if m not in x.blocks]

    def moves(self, n: int) -> tuple[int, ...]:
        """Bytes in vectors, bytes, few accesses, few instructions: what counts first comes first."""
        widths = [w for kind in ("LDG", "STG") for w in accesses(self.blocks[n], kind)]
        return sum(w for w in widths if w == 16), sum(widths), -len(widths), -len(self.blocks[n])

    def around_products(self) -> list[Instruction]:
        """The innermost loop that has the most matrix instructions, or FP32 ones where there are none; else all.

        Of a loop that also finishes what it has summed, the shortest way through all of them.
        """
        everything = self.code(range(len(self.blocks)))
        kind = PRODUCTS if any(PRODUCTS.match(i.name) for i in everything) else re.compile("FFMA")

        def products(n: int) -> int:
            return sum(bool(kind.match(i.name)) for i in self.blocks[n])

        def rank(loop: Loop) -> tuple[int, int]:
            return sum(map(products, loop.blocks)), -len(self.code(loop.blocks))

        best = max(self.loops, key=rank, default=None)
        if best is None or rank(best)[0] == 0:
            return everything
        code = self.code(best.blocks)
        if not accesses(code, "STG"):
            return code
        return self.route(best, lambda n: (products(n), -len(self.blocks[n])))

    def streaming(self) -> tuple[list[Instruction], bool]:
        """The way once through the loop that loads the most in vectors of 16 bytes, or through the kernel; if a loop"""
        ways = [self.route(loop) for loop in self.loops]
        best = max(ways, key=lambda way: sum(w for w in accesses(way, "LDG") if w == 16), default=[])
        in_loop = 16 in accesses(best, "LDG")
        return (best if in_loop else self.route()), in_loop
