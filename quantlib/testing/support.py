"""The support table: every overload of ops.def x format, run on every backend that is there.

``python -m quantlib.testing.support FILE`` writes the table to FILE, and keeps from it what only another machine can
tell. A kernel that silently stops being reached shows as a ``-`` where a name was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantlib import backends, formats, ops  # noqa: F401 (the ops have to be there)
from quantlib.ops.adamw_step import states_of
from quantlib.testing.bytes import poisoned

COLUMNS = tuple(reversed(backends.BACKENDS))
BLOCK = (1, 8)
SHAPE = (2, 16)
HEAD = (
    "# Which backends run an overload for a format: written by `python -m quantlib.testing.support tests/support.txt`\n"
)
COLUMNS_ARE = "# Columns: overload, format, zero point, "


@dataclass(frozen=True)
class Row:
    overload: str
    format: str
    affine: bool

    def __str__(self) -> str:
        return f"{self.overload:37}{self.format:15}{'affine' if self.affine else '':8}"


def device_of(backend: str) -> str:
    """The device type on which ``backend`` is asked for."""
    devices = backends.BACKENDS[backend].devices
    return next((device for device in devices if _refusal(backend, device) is None), devices[0])


def refusal(backend: str) -> str | None:
    """Return why ``backend`` cannot be tested on this machine, or None."""
    return _refusal(backend, device_of(backend))


def _refusal(backend: str, device: str) -> str | None:
    if device == "cuda" and not torch.cuda.is_available():
        return "there is no CUDA device"
    return backends.refuses(backend, device)


@functools.cache
def rows() -> tuple[Row, ...]:
    """Every overload and format that go together: pure torch accepts them."""
    return tuple(row for row in _candidates() if _accepts(row))


def serves(backend: str, row: Row) -> bool:
    """True if ``backend``, forced, runs the call; it must refuse others with NotImplementedError."""
    with backends.use_backend(backend):
        try:
            _call(row, device_of(backend))
        except NotImplementedError:
            return False
    return True


def column(backend: str) -> list[str]:
    """The entries of ``backend``, one a row."""
    return [backend if serves(backend, row) else "-" for row in rows()]


def recorded(text: str, backend: str) -> dict[str, str]:
    """The entries of ``backend`` in a table that was written before, by the name of their row; none of a new one."""
    name, columns, found = len(str(rows()[0])), list[str](), dict[str, str]()
    for line in text.splitlines():
        if line.startswith(COLUMNS_ARE):
            columns = line.removeprefix(COLUMNS_ARE).split()
        elif not line.startswith("#") and backend in columns:
            found[line[:name].strip()] = line[name:].split()[columns.index(backend)]
    return found


def table(before: str = "") -> str:
    """The table, with the columns that cannot be found out here as they were in ``before``."""
    columns = []
    for backend in COLUMNS:
        if refusal(backend) is None:
            columns.append(column(backend))
        else:
            known = recorded(before, backend)
            columns.append([known.get(str(row).strip(), "?") for row in rows()])
    lines = [HEAD + COLUMNS_ARE + " ".join(COLUMNS)]
    for row, entries in zip(rows(), zip(*columns, strict=True), strict=True):
        padded = (f"{entry:{len(name) + 1}}" for name, entry in zip(COLUMNS, entries, strict=True))
        lines.append(f"{row}{''.join(padded)}".rstrip())
    return "".join(f"{line}\n" for line in lines)


def _candidates() -> Iterator[Row]:
    for overload, schema in backends.SCHEMAS.items():
        optional = "Tensor? zero_point" in schema
        for f in formats.FORMATS.values():
            yield Row(overload, f.name, False)
            if optional:
                yield Row(overload, f.name, True)


def _accepts(row: Row) -> bool:
    try:
        with backends.use_backend("composite"):
            _call(row, "cpu")
    except NotImplementedError:
        raise
    except RuntimeError:  # this op has no such format
        return False
    return True


def _call(row: Row, device: str) -> None:
    op, _, name = row.overload.partition(".")
    packet = getattr(torch.ops.quantlib, op)
    function = getattr(packet, name or "default")
    arguments, outs = [], []
    for argument in function._schema.arguments:
        if argument.kwarg_only:
            outs.append(argument.name)
        else:
            arguments.append(_argument(argument, row, device))
    if not outs:
        function(*arguments)
        return
    functional = getattr(packet, name.removesuffix("out").removesuffix("_") or "default")
    with backends.use_backend("composite"):
        results: Any = functional(*arguments)
    results = (results,) if isinstance(results, torch.Tensor) else results
    function(*arguments, **{n: poisoned(t.shape, t.dtype, device) for n, t in zip(outs, results, strict=True)})


def _argument(argument: Any, row: Row, device: str) -> Any:
    value = _of_one(argument, row, device)
    if not row.overload.startswith("grouped"):
        return value
    if argument.name == "offsets":
        return torch.tensor([SHAPE[0]], dtype=torch.int32, device=device)
    return value[None] if argument.name in ("codes", "scale", "zero_point") and value is not None else value


def _of_one(argument: Any, row: Row, device: str) -> Any:
    f, (M, K) = formats.get(row.format), SHAPE
    blocks = M // BLOCK[0], K // BLOCK[1]
    if argument.name == "zero_point":
        is_float = row.overload.startswith("fake_quantize")  # there it is learned
        optional = argument.has_default_value() and not row.affine
        dtype = torch.float32 if is_float else torch.int32
        return None if optional else torch.ones(blocks, dtype=dtype, device=device)
    if argument.name == "codes":
        dtype = getattr(torch, f.dtype_name)
        return torch.ones(M, f.columns(K), device=device).to(dtype)
    given: dict[str, Any] = {"x": torch.ones(SHAPE, device=device), "scale": torch.ones(blocks, device=device)}
    given |= {"x_codes": given["x"].to(torch.int8), "x_scale": torch.ones(M, 1, device=device)}
    given |= {"dy": given["x"][:, :M] if "matmul" in row.overload else given["x"]}
    given |= {"indices": torch.ones(M, dtype=torch.int64, device=device)}
    given |= {"format": row.format, "block": list(BLOCK), "saturate": True, "method": "mse", "kept": "float32"}
    if row.overload.startswith("adamw_step"):  # whose formats are those of its states
        given |= _step(row, device)
    if row.overload.startswith("hadamard"):  # whose format is that of x
        given |= {"x": given["x"].to(getattr(torch, f.dtype_name)), "block": BLOCK[1]}
    return given.get(argument.name, argument.default_value)


def _step(row: Row, device: str) -> dict[str, Any]:
    block = {"float32": 0, "int8": 32}.get(row.format, -1)
    shapes = states_of(*SHAPE, max(block, 0))
    states = {name: torch.ones(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()}
    x = torch.ones(SHAPE, device=device)
    return {"parameter": x, "gradient": x, **states, "constants": x[0, :9].contiguous(), "block": block}


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(table(path.read_text() if path.exists() else ""))
    for backend in COLUMNS:
        if why := refusal(backend):
            print(f"{backend}: kept as it was: {why}")
