"""A backend is a folder ``quantlib/backends/<name>/`` whose ``BACKEND`` is a :class:`Backend`. It is found there.

A *kernel* is the function that runs an op. It writes into tensors that it is given and returns nothing. Each op has one
signature, that of ``quantlib/backends/composite/<op>.py``:

- all tensors lie on one device; they are contiguous, and the results are not empty;
- ``x``, ``dy``, ``y``, ``dx``: matrices [M, K] of float32, float16 or bfloat16, in cast [n] of any float format;
- ``codes``: [M, K] of the format's dtype, or [M, ceil(K / 2)] uint8 where it is packed;
- ``scale``: float32 [ceil(M / br), ceil(K / bk)]; ``zero_point``: int32 of its shape, where it is learned float32;
- ``weight`` and ``epilogue``: the records of ``quantlib/backends/weight.py``;
- ``limits``: the lowest and the highest code;
- ``format``: a row of ``quantlib.formats``; ``block``: (br, bk), no larger than the matrix;
- an argument that may be left out is None; the results come last.

A kernel may have an attribute ``prepare``, a function of the same arguments that starts nothing. It returns the kernel
of all calls that differ from this one in nothing but the memory of their tensors, or None; that kernel reads no shapes,
and may be given tensors [..., K] as matrices.

Everything has been checked before a kernel is called: ``quantlib/ops/<op>.py``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

SCHEMAS: dict[str, str] = {
    schema[: schema.index("(")]: schema
    for schema in re.findall(r'^DEF\("(.+)"\)$', (Path(__file__).parents[1] / "ops.def").read_text(), re.MULTILINE)
}
OPS = tuple(dict.fromkeys(overload.partition(".")[0] for overload in SCHEMAS))  # each is the stem of its files

Kernel = Callable[..., None]


@dataclass(frozen=True)
class Backend:
    """One way to run the ops."""

    name: str  # its name in `use_backend` and QUANTLIB_BACKEND
    devices: tuple[str, ...]  # the device types that it may serve; tests run it on the first
    refuses: Callable[[torch.device], str | None]  # the reason why it cannot serve a device here; None if it can
    kernels: Mapping[str, Kernel] = field(default_factory=dict)  # by op; one without a kernel is refused by its name
    # By device type, or "any": where nothing is forced, the highest that does not refuse an op runs it. A device type
    # that is not here is served only where the backend is forced.
    preference: Mapping[str, int] = field(default_factory=dict)
    compiled: bool = False  # its kernels lie in the library of its one device type, which registers them with torch

    def prefers(self, device: str) -> int | None:
        """The preference for a device type; None: only where forced."""
        return self.preference.get(device, self.preference.get("any"))


class Kernels(Mapping[str, Kernel]):
    """The kernels of a backend's folder: of each op with a file ``<op>.py`` there, the function ``<op>`` in it.

    A file is imported when its kernel is first asked for.
    """

    def __init__(self, package: str) -> None:
        folder = Path(__file__).parent / package.rpartition(".")[2]
        self._package, self._ops = package, tuple(op for op in OPS if (folder / f"{op}.py").exists())

    def __getitem__(self, op: str) -> Kernel:
        if op not in self._ops:
            raise KeyError(op)
        kernel: Kernel = getattr(importlib.import_module(f"{self._package}.{op}"), op)
        return kernel

    def __iter__(self) -> Iterator[str]:
        return iter(self._ops)

    def __len__(self) -> int:
        return len(self._ops)
