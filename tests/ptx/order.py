"""The order in which threads that have branched apart take their blocks, so that they meet again where paths join."""

from __future__ import annotations

from collections.abc import Collection, Mapping

Edges = Mapping[int, Collection[int]]


def order(entry: int, edges: Edges) -> list[int]:
    """Return the blocks that are reached from ``entry``: each before those that follow it (Bourdoncle's weak order).

    All blocks of a loop come before what follows the loop: its entry, then the others in this order without the ways
    back to the entry.
    """
    found: list[int] = []
    for part in components(entry, edges):
        if len(part) == 1:
            found += part
        else:
            inner = {block: [to for to in edges[block] if to in part and to != part[0]] for block in part}
            found += order(part[0], inner)
    return found


def components(entry: int, edges: Edges) -> list[list[int]]:
    """Return the strongly connected components in topological order (Tarjan); each begins where it was entered."""
    number: dict[int, int] = {}
    lowest: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []

    def visit(block: int) -> None:
        number[block] = lowest[block] = len(number)
        stack.append(block)
        for to in edges[block]:
            if to not in number:
                visit(to)
                lowest[block] = min(lowest[block], lowest[to])
            elif to in stack:
                lowest[block] = min(lowest[block], number[to])
        if lowest[block] == number[block]:
            at = stack.index(block)
            found.append(stack[at:])
            del stack[at:]

    visit(entry)
    return found[::-1]
