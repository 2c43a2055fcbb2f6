"""The compiled form of a kernel, of either language."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measured:
    """One configuration of a kernel on one architecture. A unit is an element of x, or a weight of a matmul."""

    language: str
    kernel: str
    op: str
    config: str
    arch: int
    compiler: str  # its version
    warps: int
    registers: int
    spilled: int  # bytes of the stack and of local memory
    shared: int
    instructions: float  # a unit
    read: float  # bytes a unit
    written: float
    units: float  # of a thread on the main path
    main: dict[str, int]  # instructions on the main path
    names: dict[str, int]  # all instructions
    inexact: list[str]
    scattered: list[str]  # reductions whose lanes do not lie side by side
    facts: dict[str, Any]  # what its contract asks
    overwritten: list[str] = field(default_factory=list)  # registers that a matrix instruction still reads
    plant: str = ""  # the fault that was put in on purpose

    @property
    def name(self) -> str:
        return f"{self.language} {self.kernel} {self.config}".rstrip()
