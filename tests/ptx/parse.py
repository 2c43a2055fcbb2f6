"""PTX text -> basic blocks of instructions. What is not understood is an error that names the line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}


class PtxError(Exception):
    """A kernel does what no kernel may do, or what the executor does not know."""


@dataclass(frozen=True)
class Register:
    slot: int
    bits: int


@dataclass(frozen=True)
class Immediate:
    value: int  # as bits, negative where it was written so


@dataclass(frozen=True)
class Name:
    """A special register, a parameter, a variable in shared memory, or a label."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Name
    offset: int


@dataclass(frozen=True)
class Ignored:
    """``_``: a result that is not kept."""


Scalar = Register | Immediate | Name | Ignored
Operand = Scalar | Address | tuple[Scalar, ...]


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    source: str  # the line of Python
    guard: tuple[Register, bool] | None  # runs where the predicate has this value
    opcode: str
    operands: tuple[Operand, ...]

    def error(self, what: str) -> PtxError:
        return PtxError(f"PTX line {self.line}, `{self.text}`: {what} (source: {self.source or 'not known'})")


@dataclass
class Kernel:
    name: str
    params: list[tuple[str, str]]  # name, type
    threads: int
    bits: list[int] = field(default_factory=list)  # of each register
    blocks: list[list[Instruction]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> block


ENTRY = re.compile(r"\.visible \.entry (\w+)\((.*?)\)\s*((?:\.\w+ [\d, ]+\s*)*)\{", re.DOTALL)
PARAM = re.compile(r"\.param \.(\w+)(?: \.ptr \.global)?(?: \.align \d+)? (\w+)")
LOCATION = re.compile(r"\.loc\s+\d+ \d+ \d+\s*(?:, function_name [^/]*)?(?://\s*(.*))?")
STATEMENT = re.compile(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", re.DOTALL)
BRANCHES = ("bra", "bra.uni", "ret")


def parse(text: str) -> Kernel:
    """Return the one kernel of ``text``."""
    entries = list(ENTRY.finditer(text))
    if len(entries) != 1:
        raise PtxError(f"{len(entries)} kernels, expected 1")
    (entry,) = entries
    threads = re.search(r"\.reqntid (\d+)\s*$", entry[3].strip())
    if not threads:
        raise PtxError(f"{entry[1]}: expected .reqntid with one number, got {entry[3].strip()!r}")
    params = [(name, type) for type, name in PARAM.findall(entry[2])]
    if len(params) != entry[2].count(".param"):
        raise PtxError(f"{entry[1]}: parameters of an unknown kind: {entry[2]}")
    kernel = Kernel(entry[1], params, int(threads[1]))
    first = text[: entry.end()].count("\n") + 1
    Body(kernel).read(statements(text[entry.end() :], first))
    return kernel


def statements(body: str, line: int) -> Iterator[tuple[int, str, str]]:
    """(line, statement, source) until the kernel ends: instructions, declarations, labels with a colon, { and }."""
    source, depth = "", 0
    for number, full in enumerate(body.split("\n"), line):
        if location := LOCATION.match(full.strip()):
            source = location[1] or ""
            continue
        rest = full.split("//")[0].strip()
        while rest:
            if rest[0] in "{}":
                depth += 1 if rest[0] == "{" else -1
                if depth < 0:
                    return
                yield number, rest[0], source
                rest = rest[1:].strip()
            elif label := re.match(r"([$\w]+):", rest):
                yield number, label[0], source
                rest = rest[label.end() :].strip()
            else:
                statement, semicolon, rest = rest.partition(";")
                if not semicolon:
                    raise PtxError(f"PTX line {number}, `{full.strip()}`: no end of the statement")
                yield number, statement.strip(), source
                rest = rest.strip()
    raise PtxError("the kernel does not end")


class Body:
    """The body of a kernel while it is read."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.open = False  # the last block takes more

    def read(self, found: Iterator[tuple[int, str, str]]) -> None:
        for line, statement, source in found:
            if statement == "{":
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
            elif statement.endswith(":"):
                if not statement.startswith("$L__tmp"):  # of a line of source
                    self.kernel.labels[statement[:-1]] = len(self.kernel.blocks)
                    self.open = False
            elif statement.startswith(".reg"):
                self.declare(line, statement)
            elif not statement.startswith((".local", ".pragma")):  # a depot that is not used has no instructions
                self.add(self.instruction(line, statement, source))

    def add(self, instruction: Instruction) -> None:
        if not self.open:
            self.kernel.blocks.append([])
        self.kernel.blocks[-1].append(instruction)
        self.open = instruction.opcode not in BRANCHES

    def declare(self, line: int, statement: str) -> None:
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        if not found or found[1] not in BITS:
            raise PtxError(f"PTX line {line}, `{statement}`: an unknown kind of register")
        for name in found[2].split(","):
            several = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
            names = [f"{several[1]}{n}" for n in range(int(several[2]))] if several else [name.strip()]
            for each in names:
                self.scopes[-1][each] = Register(len(self.kernel.bits), BITS[found[1]])
                self.kernel.bits.append(BITS[found[1]])

    def instruction(self, line: int, statement: str, source: str) -> Instruction:
        match = STATEMENT.fullmatch(statement)
        if not match:
            raise PtxError(f"PTX line {line}, `{statement}`: no instruction")
        negated, guard, opcode, rest = match.groups()
        try:
            operands = tuple(self.operand(word) for word in split(rest))
            predicate = self.scalar(guard) if guard else None
        except ValueError as error:
            raise PtxError(f"PTX line {line}, `{statement}`: unknown operand {error}") from None
        if predicate is not None and not (isinstance(predicate, Register) and predicate.bits == 1):
            raise PtxError(f"PTX line {line}, `{statement}`: {guard} is no predicate")
        return Instruction(line, statement, source, (predicate, not negated) if predicate else None, opcode, operands)

    def operand(self, word: str) -> Operand:
        if "|" in word and word[0] != "[":
            return tuple(self.scalar(part.strip()) for part in word.split("|"))
        if word[0] == "{":
            return tuple(self.scalar(part.strip()) for part in word[1:-1].split(","))
        if word[0] != "[":
            return self.scalar(word)
        inside = re.fullmatch(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]", word)
        base = self.scalar(inside[1]) if inside else None
        if not inside or not isinstance(base, Register | Name):
            raise ValueError(word)
        return Address(base, int(inside[2] or 0))

    def scalar(self, word: str) -> Scalar:
        for scope in reversed(self.scopes):
            if word in scope:
                return scope[word]
        if word == "_":
            return Ignored()
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", word):
            return Immediate(int(word[2:], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", word):
            return Immediate(int(word.rstrip("U"), 0))
        if re.fullmatch(r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|[$A-Za-z_][$\w]*", word):
            return Name(word)
        raise ValueError(word)


def split(text: str) -> list[str]:
    """Operands, at the commas outside of braces."""
    return [word.strip() for word in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if word.strip()]
