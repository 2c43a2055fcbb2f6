"""The recorded needs of every kernel: instructions a unit and registers, in ``tests/gpu_budgets.txt``.

A line a configuration: its name, then ``instructions/registers`` on each architecture, "-" where it is not in use.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gpu_static.contract import SHARED
from gpu_static.measured import Measured

PATH = Path(__file__).parent.parent / "gpu_budgets.txt"
HEAD = "# Written by `make gpu-static ARGS=--record`: instructions a unit / registers on"
Budget = tuple[float, int]


class Budgets:
    """The file: (name, architecture) -> budget, and the compilers that it comes of."""

    def __init__(self, compilers: dict[str, str], of: dict[tuple[str, int], Budget]) -> None:
        self.compilers = compilers
        self.of = of

    @classmethod
    def read(cls, path: Path = PATH) -> Budgets:
        lines = path.read_text().splitlines() if path.exists() else []
        compilers = dict(re.findall(r"(\w+) ([\d.]+)", lines[1])) if lines else {}
        archs = [int(arch) for arch in re.findall(r"sm_(\d+)", lines[0])] if lines else []
        found = {}
        for line in lines[2:]:
            name, *columns = re.split(r"\s{2,}", line)
            for arch, column in zip(archs, columns, strict=True):
                if column != "-":
                    instructions, registers = column.split("/")
                    found[name, arch] = float(instructions), int(registers)
        return cls(compilers, found)

    def get(self, m: Measured) -> Budget | None:
        return self.of.get((m.name, m.arch))

    def is_stale(self, m: Measured) -> bool:
        """Say if another compiler was measured."""
        return self.compilers.get(m.language) != m.compiler

    def record(self, measured: Iterable[Measured], path: Path = PATH) -> None:
        """Write what was measured; what was not, stays."""
        for m in measured:
            self.of[m.name, m.arch] = round(m.instructions, 2), m.registers
            self.compilers[m.language] = m.compiler
        lines = [f"{HEAD} {', '.join(f'sm_{arch}' for arch in SHARED)}"]
        lines.append("# " + ", ".join(map(" ".join, sorted(self.compilers.items()))))
        for name in sorted({name for name, _ in self.of}):
            columns = (self.of.get((name, arch)) for arch in SHARED)
            texts = (f"{b[0]:.2f}/{b[1]}" if b else "-" for b in columns)
            lines.append(f"{name:96}" + "".join(f"{text:>14}" for text in texts))
        path.write_text("\n".join(lines) + "\n")
