"""Find the model at a path and the files that come with it, and check them before any work starts.

A model is a safetensors file or a folder. In a folder the index says which files and tensors are the model; without
one it is ``model.safetensors``, and where that is absent every safetensors file, none of which may hold what another
does. Other safetensors files with the same names are copies of it and are left out.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from quantlib.checkpoint.files import Reader, Slot, kind_of, some
from quantlib.checkpoint.publish import INDEX

log = logging.getLogger(__name__)

# A copy of a model folder leaves these out: the same weights in other containers, and files that are no part of it.
LEFT_OUT = (
    *("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf"),
    *("consolidated*.safetensors", ".git", ".cache"),
    *("checksums.sha256", "README.md"),  # which are written anew
)
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")  # the model where there is no index
CONFIG = "config.json"


@dataclass
class Model:
    """A model on disk, its files open.

    Attributes
    ----------
    path : Path
    readers : list of Reader
        One for each file of the model, with the tensors that are the model's.
    index : (Path, dict), optional
        The index and what it says.
    config : dict
        The contents of ``config.json``; empty if there is none.
    others : list of Path
        Other safetensors files of the folder.
    """

    path: Path
    readers: list[Reader] = field(default_factory=list)
    index: tuple[Path, dict[str, Any]] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    others: list[Path] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def open(cls, path: Path) -> Model:
        """The model at ``path``.

        Raises
        ------
        FileNotFoundError
            For a path that is absent, and for a file that the index names and the folder does not have.
        ValueError
            For a folder without a safetensors file, a file that is none, an index that does not fit, and tensors that
            are in several files of a folder without an index.
        """
        model = cls(path)
        with model._stack:
            if path.is_dir():
                model._open_folder()
            elif os.path.lexists(path):
                model._read(path)
            else:
                raise FileNotFoundError(f"{path} must be a safetensors file or a model folder, got nothing there")
            model._stack = model._stack.pop_all()
        return model

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def slots(self) -> dict[str, Slot]:
        """Every tensor of the model."""
        return {name: slot for reader in self.readers for name, slot in reader.slots.items()}

    def identity(self, rest: list[tuple[Path, Path]]) -> list[Any]:
        """Return sizes and times, which change if a file of the model or of the ``rest`` that comes with it changes."""
        found: list[Any] = []
        for path in [*(reader.path for reader in self.readers), *(path for path, _ in rest if path.is_file())]:
            status = path.stat()
            found.append([str(path.relative_to(self.path)), status.st_size, status.st_mtime_ns, status.st_ctime_ns])
        return [*found, self.index and self.index[1]]

    def _read(self, path: Path) -> Reader:
        reader = self._stack.enter_context(Reader(path))
        self.readers.append(reader)
        return reader

    def _open_folder(self) -> None:
        found = sorted(path for path in self.path.iterdir() if path.name.endswith(".safetensors"))
        if not found:
            raise ValueError(f"{self.path} must hold safetensors files, got {some(sorted(os.listdir(self.path)))}")
        self.config = read_config(self.path / CONFIG)
        indices = sorted(path for path in self.path.iterdir() if path.name.endswith(INDEX))
        usual = [path for path in indices if path.name.removesuffix(INDEX) + ".safetensors" in SINGLE]
        if len(usual or indices) > 1:
            got = some([path.name for path in indices])
            raise ValueError(f"{self.path} must have one index, or one named model{INDEX}, got {got}")
        if indices:
            path = (usual or indices)[0]
            self.index = path, read_index(path)
            self._open_indexed(*self.index)
        else:
            names = [path.name for path in found]
            single = [self.path / name for name in SINGLE if name in names]
            if not single:
                check_numbers(self.path, names)
            for path in single[:1] or found:
                self._read(path)
            self._check_apart()
        of_model = {reader.path for reader in self.readers}
        self.others = [path for path in found if path not in of_model]

    def _open_indexed(self, path: Path, index: dict[str, Any]) -> None:
        weight_map = index["weight_map"]
        for file in sorted(set(weight_map.values())):
            if not (self.path / file).exists():
                raise FileNotFoundError(f"{self.path} must hold {file}, which {path.name} names, got no such file")
            reader = self._read(self.path / file)
            # a file may hold more than the index lists, but not what the index says another file holds
            reader.slots = {name: slot for name, slot in reader.slots.items() if weight_map.get(name, file) == file}
            absent = sorted(name for name, of in weight_map.items() if of == file and name not in reader.slots)
            if absent:
                raise ValueError(f"{self.path / file} must hold what {path.name} says, got no {some(absent)}")
        self._check_apart()

    def _check_apart(self) -> None:
        """Check that no tensor is in two files."""
        held: dict[str, Path] = {}
        for reader in self.readers:
            for name in reader.slots:
                if name in held:
                    files = f"{held[name].name} and {reader.path.name}"
                    help = "name the files of the model in an index, or move the others away"
                    raise ValueError(f"{self.path} must hold each tensor once, got {name} in {files}: {help}")
                held[name] = reader.path

    def rest(self) -> Iterator[tuple[Path, Path]]:
        """(file or folder, its place in a copy) of everything that comes with the model, folders before contents.

        Raises
        ------
        ValueError
            For a link that leads out of the folder, to nothing or into itself, and for what is no file.
        """
        allowed = [self.path.resolve(), *blobs_of(self.path)]
        held = self.slots.keys()
        for path in sorted(self.path.iterdir()):
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_OUT):
                continue
            check_link(path, allowed)
            if path in self.others or path.name.endswith(INDEX):
                check_file(path)
            if path in self.others and (why := copy_of(path, held)):
                log.warning("left out %s, which is not the model: %s", path, why)
            elif path.name.endswith(INDEX):
                if self.index is None or path != self.index[0]:
                    log.warning("left out %s, which is not the index of the model", path)
            elif all(path != reader.path for reader in self.readers):
                yield from tree(path, Path(path.name), allowed, ())


def check_numbers(folder: Path, names: list[str]) -> None:
    """Raise FileNotFoundError where files are numbered, as ``-00001-of-00003`` is, and one of them is not there."""
    for name in names:
        if match := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", name):
            before, digits, of, total, after = match.groups()
            first = 0 if f"{before}{0:0{len(digits)}}{of}{total}{after}" in names else 1
            for number in range(first, min(first + int(total), first + len(names) + 1)):
                if (absent := f"{before}{number:0{len(digits)}}{of}{total}{after}") not in names:
                    raise FileNotFoundError(f"{folder} must hold {absent}, as {name} says, got no such file")


def tree(path: Path, target: Path, allowed: list[Path], inside: tuple[Path, ...]) -> Iterator[tuple[Path, Path]]:
    """``path`` and what is in it, links followed, each with its place below a copy."""
    real = check_link(path, allowed)
    if path.is_dir():
        if real in inside:
            raise ValueError(f"{path} must be a folder of its own, got a link to {real}, which it is in")
        yield path, target
        for entry in sorted(path.iterdir()):
            yield from tree(entry, target / entry.name, allowed, (*inside, real))
    else:
        check_file(path)
        yield path, target


def check_link(path: Path, allowed: list[Path]) -> Path:
    """Return the real place of ``path``, which must be below one of ``allowed``."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # a loop
        raise ValueError(f"{path} must lead to a file, got a link to {os.readlink(path)}") from None
    if not any(folder == real or folder in real.parents for folder in allowed):
        raise ValueError(f"{path} must stay in the folder of the model, got a link to {real}: copy it there first")
    if path.is_symlink() and path.parent.resolve().is_relative_to(real):
        raise ValueError(f"{path} must be a folder of its own, got a link to {real}, which it is in")
    return real


def check_file(path: Path) -> None:
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a file, got {kind_of(mode)}")


def blobs_of(path: Path) -> list[Path]:
    """The folder to which the files of a snapshot in the hub's cache are links: models--x/snapshots/y -> ../../blobs"""
    real = path.resolve()
    return [p.parent.parent / "blobs" for p in (real, *real.parents) if p.parent.name == "snapshots"]


def copy_of(path: Path, held: Any) -> str | None:
    """Return why a safetensors file that is not part of the model stays behind; None if it has other tensors."""
    try:
        with Reader(path) as reader:
            again = sorted(held & reader.slots.keys())
    except (OSError, ValueError) as error:
        return str(error)
    return f"it holds {some(again)} again" if again else None


def read_index(path: Path) -> dict[str, Any]:
    """The index of a sharded model: ``{"metadata": {...}, "weight_map": {tensor: file}}``, other metadata as none."""
    index = read_object(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{path} must be JSON with a weight_map of names, got something else")
    for file in weight_map.values():
        if file in ("", ".", "..") or "/" in file or "\0" in file:
            raise ValueError(f"{path} must name files of its folder, got {file!r}")
    metadata = index.get("metadata")
    return {**index, "metadata": metadata if isinstance(metadata, dict) else {}}


def read_config(path: Path) -> dict[str, Any]:
    """The contents of config.json; empty for one that is absent.

    Raises
    ------
    ValueError
        For anything else than an object: the output would have another one, without what stands in this.
    """
    if not os.path.lexists(path):
        return {}
    check_file(path)
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must be JSON with an object, got something else")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object, with or without a byte order mark; empty for anything else, as for a file that is absent."""
    try:
        if path.is_file():
            value = json.loads(path.read_bytes().decode("utf-8-sig"))
            return value if isinstance(value, dict) else {}
    except (ValueError, RecursionError):
        pass
    return {}
