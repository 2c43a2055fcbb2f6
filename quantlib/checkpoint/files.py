"""Files that are whole or absent: safetensors read and written a tensor at a time, outputs renamed into place."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# safetensors' name -> dtype
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
INDEX = ".safetensors.index.json"  # how the name of an index ends
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Slot:
    """A tensor of a file: all that is known of it before its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


@dataclass(frozen=True)
class Batch:
    """Tensors that are made together, when it is their turn to be written."""

    slots: Sequence[Slot]
    make: Callable[[], Sequence[Tensor]]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


class Reader:
    """A safetensors file: ``slots`` and ``metadata`` at once, values by `read`.

    Raises
    ------
    FileNotFoundError
    ValueError
        For a file that is truncated, is no safetensors file, or holds a dtype that torch does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        self._file: Any
        try:
            self._file = safe_open(str(path), framework="pt")
            headers = {name: self._file.get_slice(name) for name in self._file.keys()}  # noqa: SIM118
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} must be a whole safetensors file, got {size:,} bytes: {error}") from None
        self.slots: dict[str, Slot] = {}
        for name, header in headers.items():
            if header.get_dtype() not in DTYPES:
                raise ValueError(f"{path}: {name} must be of {', '.join(DTYPES)}, got {header.get_dtype()}")
            self.slots[name] = Slot(name, DTYPES[header.get_dtype()], tuple(header.get_shape()))

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, trace)


def write(path: Path, batches: Sequence[Batch], metadata: dict[str, str], written: Callable[[Batch], None]) -> None:
    """Write a safetensors file, one batch in memory at a time.

    Wide dtypes come first, as safetensors itself orders them: every tensor is then aligned to its dtype. ``written``
    is called after each batch.
    """
    slots = [slot for batch in batches for slot in batch.slots]
    header: dict[str, object] = {"__metadata__": metadata}
    offsets: dict[str, int] = {}
    end = 0
    for slot in sorted(slots, key=lambda slot: (-slot.dtype.itemsize, slot.name)):
        if slot.name in offsets:
            raise ValueError(f"{path.name} must have one tensor of each name, got {slot.name} twice")
        offsets[slot.name] = end
        start, end = end, end + slot.nbytes
        header[slot.name] = {"dtype": NAMES[slot.dtype], "shape": slot.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _naming(path), path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data = file.tell()
        for batch in batches:
            for slot, tensor in zip(batch.slots, batch.make(), strict=True):
                assert (tuple(tensor.shape), tensor.dtype) == (slot.shape, slot.dtype), slot
                file.seek(data + offsets[slot.name])
                _dump(file, tensor)
            written(batch)
        file.flush()
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """A file or a folder with all that is in it; links become what they point to."""
    with _naming(target):
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)


@contextlib.contextmanager
def replacing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A path to write to that becomes ``path`` when the block ends well, and nothing when it does not.

    Raises
    ------
    FileExistsError
        If ``path`` exists, unless ``overwrite``; and if it is a folder without a safetensors file in any case.
    FileNotFoundError
        If the folder that ``path`` is to be in does not exist.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(f"{parent} must be a folder to write {path.name} in, got none")
    if os.path.lexists(path):
        if not overwrite:
            raise FileExistsError(f"{path} must not exist yet, or overwrite must be asked for")
        if path.is_dir() and not any(path.glob("*.safetensors")) and any(path.iterdir()):
            raise FileExistsError(f"{path} must be a model to be overwritten, got a folder without a safetensors file")
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    new, old = scratch / "new", scratch / "old"
    try:
        yield new
        if path.is_dir() and not path.is_symlink():  # a folder cannot be renamed over another
            path.rename(old)
        try:
            new.replace(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the file system names the file, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error} while writing {path.name}") from error


def _dump(file: IO[bytes], tensor: Tensor) -> None:
    if tensor.numel():
        file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def weights_of(path: Path) -> list[Path]:
    """The safetensors files of a model: the file itself, or those of the folder, in order.

    Raises
    ------
    FileNotFoundError
        For a path that is absent, and for a file that an index names and the folder does not have.
    ValueError
        For a folder without any.
    """
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path} must be a safetensors file or a model folder, got nothing there")
        return [path]
    found = sorted(path.glob("*.safetensors"))
    if not found:
        names = sorted(p.name for p in path.iterdir())
        raise ValueError(f"{path} must hold safetensors files, got {some(names)}")
    for index in path.glob(f"*{INDEX}"):
        for name in sorted(set(read_index(index)["weight_map"].values())):
            if not (path / name).exists():
                raise FileNotFoundError(f"{path} must hold {name}, which {index.name} names, got no such file")
    return found


def read_index(path: Path) -> dict[str, Any]:
    """The index of a sharded model: ``{"metadata": ..., "weight_map": {tensor: file}}``."""
    try:
        index = json.loads(path.read_text())
        if all(isinstance(name, str) for name in index["weight_map"].values()):
            return dict(index)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} must be JSON with a weight_map of names, got something else")


def write_json(path: Path, value: dict[str, Any]) -> None:
    with _naming(path):
        path.write_text(json.dumps(value, indent=2) + "\n")


def some(names: Sequence[str]) -> str:
    """A few of ``names``, for a message."""
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" or "none"
