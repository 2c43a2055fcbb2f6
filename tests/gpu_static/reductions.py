"""Reductions that Triton 3.6 compiles to wrong code, found in its intermediate language.

Lanes of a warp that share a result add up by shuffles over 1, 2, 4, ... places, from the first bit of a lane's number
that lies along the axis. If the bits along it do not lie side by side, as after a reshape of two axes that have a third
between them, other lanes are added. The interpreter has no lanes, and gives what is right. Triton 3.7 has mended it.
"""

from __future__ import annotations

import re

LINEAR = re.compile(r"^(#\w+) = #ttg\.linear<\{.*?lane = \[(.*?)\], warp", re.MULTILINE)
REDUCE = re.compile(
    r"\"tt\.reduce\"\(.*?\) <\{axis = (\d+) : i32\}>.*?^ *\}\) : \((.*?)\) -> ", re.MULTILINE | re.DOTALL
)
SLICE = re.compile(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>$")


def scattered(ttgir: str) -> list[str]:
    """List the operands of reductions whose lanes along the axis are not bits that lie side by side."""
    lanes = {name: numbers(bases) for name, bases in LINEAR.findall(ttgir)}
    found = []
    for axis, operands in REDUCE.findall(ttgir):
        for tensor in re.findall(r"tensor<[^ ]*x\w+, (.*?)>(?=, tensor|$)", operands):
            bases = bases_of(tensor, lanes)
            bits = [bit for bit, base in enumerate(bases) if base[int(axis)]]
            if bits and bits != list(range(bits[0], bits[-1] + 1)):
                found.append(f"axis {axis} of {operands} lies along bits {bits} of a lane's number")
    return found


def bases_of(layout: str, lanes: dict[str, list[list[int]]]) -> list[list[int]]:
    """List what each bit of a lane's number adds to each coordinate; nothing for a layout that is no linear one."""
    if outer := SLICE.match(layout):
        dropped = int(outer[1])
        return [base[:dropped] + base[dropped + 1 :] for base in bases_of(outer[2], lanes)]
    return lanes.get(layout, [])


def numbers(bases: str) -> list[list[int]]:
    """[0, 1], [2, 0] -> its numbers."""
    return [[int(n) for n in re.findall(r"\d+", base)] for base in re.findall(r"\[(.*?)\]", bases)]
