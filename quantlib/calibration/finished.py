"""The layers that an interrupted calibration has finished: a safetensors file a stage, in a folder"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quantlib.calibration.stages import Call
from quantlib.nn.functional import Weight


def key_of(model: nn.Module, calls: Sequence[Call], *options: object) -> str:
    """Return the SHA-256 of everything that decides the codes: the model's values, the inputs and the options."""
    found = hashlib.sha256(json.dumps([str(option) for option in options]).encode())

    def add(name: str, x: Any) -> None:
        found.update(
            f"{name} {list(x.shape)} {x.dtype}\n".encode() if isinstance(x, Tensor) else f"{name} {x}".encode()
        )
        if isinstance(x, Tensor):
            found.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())

    for name, x in (*model.named_parameters(), *model.named_buffers()):
        add(name, x)
    for i, call in enumerate(calls):
        for place, x in (*enumerate(call.args), *sorted(call.kwargs.items())):
            add(f"{i} {place}", x)
    return found.hexdigest()


class Layer(NamedTuple):
    """A layer, or a weight of experts: its codes, its bias if that changed, and what the report says."""

    name: str
    weight: Weight
    bias: Tensor | None
    told: dict[str, Any]


class Finished:
    """The finished layers of the calibration ``key`` in ``folder``; files of another calibration are replaced."""

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.key, self.stages = folder, key, 0

    def read(self) -> Iterable[Layer]:
        """Return each finished layer, up to the first stage that is missing."""
        while (path := self._path()).exists():
            try:
                with safe_open(path, "pt") as file:
                    metadata = file.metadata() or {}
                    if metadata.get("key") != self.key:
                        return
                    parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
            except SafetensorError:
                return
            for name, told in json.loads(metadata["layers"]).items():
                weight = Weight(*(parts.get(f"{name}.{part}") for part in Weight._fields))  # type: ignore[arg-type]
                yield Layer(name, weight, parts.get(f"{name}.bias"), told)
            self.stages += 1

    def write(self, layers: Iterable[Layer]) -> None:
        """The layers of a stage, whole or not at all."""
        layers = list(layers)
        parts = {f"{x.name}.{k}": t for x in layers for k, t in {**x.weight._asdict(), "bias": x.bias}.items()}
        path = self._path()
        part = path.with_suffix(".part")
        told = json.dumps({x.name: x.told for x in layers})
        tensors = {name: t.detach().cpu().contiguous() for name, t in parts.items() if t is not None}
        save_file(tensors, part, metadata={"key": self.key, "layers": told})
        os.replace(part, path)
        self.stages += 1

    def _path(self) -> Path:
        return self.folder / f"{self.stages:04}.safetensors"
