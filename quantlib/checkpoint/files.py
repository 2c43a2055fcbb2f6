"""Safetensors files, read and written a piece at a time, so that memory does not grow with them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from quantlib.checkpoint.publish import Journal

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
NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the first bytes of another kind of file -> what it is
PICKLED = "one of torch.save: safetensors.torch.save_file(torch.load(path), new_path) makes the other of it"
OTHERS = {b"PK\x03\x04": PICKLED, b"\x80\x02": PICKLED, b"GGUF": "one of GGUF, which is not read"}
HEADER = 100_000_000  # bytes that safetensors allows a header
MOST = 2**63 - 1  # values of a tensor, and bytes of a file
CHUNK = 1 << 22  # bytes that are copied at a time
WORKERS = 8  # at most: more are no faster than the memory

Piece = tuple[str, int, Tensor]  # a tensor's name, the byte of it that the piece begins at, the values
Job = Callable[[], Iterable[Piece]]


@dataclass(frozen=True)
class Slot:
    """A tensor of a file: all that is known of it before its values."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Batch:
    """Tensors that are made together, by jobs that do not depend on each other."""

    slots: Sequence[Slot]
    jobs: Iterable[Job]
    done: Callable[[], Any] = lambda: None  # called after the last job: what there is to say of it, for JSON
    cost: int | None = None  # bytes that are read for it, where they are not those of tensors of the same names

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for slot in self.slots)


def whole(slots: Sequence[Slot], make: Callable[[], Sequence[Tensor]]) -> Batch:
    """Tensors that are in memory already."""
    return Batch(slots, [lambda: [(slot.name, 0, tensor) for slot, tensor in zip(slots, make(), strict=True)]])


def copied(reader: Reader, slot: Slot) -> Batch:
    """A tensor of a file as it is."""

    def job(start: int) -> list[Piece]:
        return [(slot.name, start, reader.chunk(slot.name, slice(start, min(start + CHUNK, slot.nbytes))))]

    return Batch([slot], [partial(job, start) for start in range(0, slot.nbytes, CHUNK)])


class Reader:
    """A safetensors file: ``slots`` and ``metadata`` at once, values by `read`, `rows` and `chunk`.

    Values are read into memory of their own and not mapped: a file that is cut off meanwhile is an error, and what was
    read stays as it is.

    Raises
    ------
    FileNotFoundError, OSError
    ValueError
        For a file that is truncated, is no safetensors file, or holds a dtype that torch does not have.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # which opens a pipe without a writer
        try:
            status = os.fstat(self._file)
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} must be a file, got {kind_of(status.st_mode)}")
            self.slots, self._starts, self.metadata = self._header(status.st_size)
        except BaseException:
            os.close(self._file)
            raise

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        slot = self.slots[name]
        return self._tensor(slot, slot.shape, 0)

    def rows(self, name: str, rows: slice) -> Tensor:
        """The rows of a tensor [N, ...]."""
        slot = self.slots[name]
        shape = (rows.stop - rows.start, *slot.shape[1:])
        return self._tensor(slot, shape, rows.start * math.prod(slot.shape[1:]) * slot.dtype.itemsize)

    def part(self, name: str, row: int, shape: tuple[int, ...]) -> Tensor:
        """Return as many rows as ``shape`` [R, ...] has, from row ``row``, of a tensor seen as rows of that size."""
        slot = self.slots[name]
        return self._tensor(slot, shape, row * math.prod(shape[1:]) * slot.dtype.itemsize)

    def columns(self, name: str, rows: slice, columns: slice) -> Tensor:
        """Some columns of some rows of a tensor [..., C], seen as a matrix."""
        slot = self.slots[name]
        size, C = slot.dtype.itemsize, slot.shape[-1]
        tensor = torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=slot.dtype, device="cpu")
        if tensor.numel():
            data, width = bytes_of(tensor), tensor.shape[1] * size
            start = self._starts[name] + (rows.start * C + columns.start) * size
            for i in range(len(tensor)):
                self._fill(data[i * width : (i + 1) * width], start + i * C * size)
        return tensor

    def chunk(self, name: str, chunk: slice) -> Tensor:
        """Bytes of a tensor, uint8."""
        slot = Slot(name, torch.uint8, (chunk.stop - chunk.start,))
        return self._tensor(slot, slot.shape, chunk.start)

    def _tensor(self, slot: Slot, shape: tuple[int, ...], skip: int) -> Tensor:
        tensor = torch.empty(shape, dtype=slot.dtype, device="cpu")
        if tensor.numel():
            self._fill(bytes_of(tensor), self._starts[slot.name] + skip)
        return tensor

    def _fill(self, data: memoryview, start: int) -> None:
        done = 0
        while done < len(data):
            try:
                got = os.preadv(self._file, [data[done:]], start + done)
            except OSError as error:
                raise OSError(error.errno, f"{error.strerror} while reading {self.path.name}") from error
            if not got:
                raise ValueError(f"{self.path} must be a whole safetensors file, got cut off while it was read")
            done += got

    def _header(self, size: int) -> tuple[dict[str, Slot], dict[str, int], dict[str, str]]:
        """Slots, where their values start, and the metadata."""
        whole = f"{self.path} must be a whole safetensors file, got {size:,} bytes"
        if size < 8:
            raise ValueError(f"{whole}: a header is longer")
        data = memoryview(bytearray(8))
        self._fill(data, 0)
        length = int.from_bytes(data, "little")
        if length > min(size - 8, HEADER):  # all that OTHERS begin with is as a length far more
            other = next((what for start, what in OTHERS.items() if bytes(data).startswith(start)), None)
            raise ValueError(
                f"{self.path} must be a whole safetensors file, got {other}"
                if other
                else f"{whole} with a header of {length:,}"
            )
        data = memoryview(bytearray(length))
        self._fill(data, 8)
        try:
            header = json.loads(str(data, "utf-8"), object_pairs_hook=unique)
            metadata = header.pop("__metadata__", None) or {}
            entries = {name: (entry["dtype"], entry["shape"], entry["data_offsets"]) for name, entry in header.items()}
            if not all(isinstance(word, str) for pair in metadata.items() for word in pair):
                raise ValueError("metadata that are not text")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{whole} with a header that cannot be read: {some_words(error)}") from None
        slots, starts, spans = {}, {}, []
        for name, (dtype, shape, offsets) in entries.items():
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise ValueError(f"{self.path}: {name} must be of {', '.join(DTYPES)}, got {some_words(dtype)}")
            slots[name] = Slot(name, DTYPES[dtype], checked_shape(f"{self.path}: {name}", shape))
            if not is_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != slots[name].nbytes:
                expected = f"{slots[name].nbytes:,} bytes, as {dtype} {list(shape)} takes"
                raise ValueError(f"{self.path}: {name} must have {expected}, got data_offsets {some_words(offsets)}")
            starts[name] = 8 + length + offsets[0]
            spans.append((offsets[0], offsets[1], name))
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise ValueError(f"{whole}: {name} begins at {start:,} of its data, where {end:,} is due")
            end = stop
        if 8 + length + end != size:
            raise ValueError(f"{whole}, where its header tells of {8 + length + end:,}")
        return slots, starts, metadata

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without a name that stands twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice")
    return found


def is_sizes(value: Any) -> bool:
    """True if ``value`` is a list of whole numbers >= 0; true and 1.0 are not whole numbers."""
    return isinstance(value, (list, tuple)) and all(type(size) is int and size >= 0 for size in value)


def checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    """``shape`` as torch can hold it: whole numbers whose product, zeros aside, fits into 64 bits."""
    if not is_sizes(shape) or math.prod(max(size, 1) for size in shape) > MOST:
        raise ValueError(f"{name} must have a shape of sizes >= 0 and at most 2^63 - 1 values, got {some_words(shape)}")
    return tuple(shape)


def some_words(value: object) -> str:
    """Return ``value`` as text for a message, at most one line."""
    try:
        text = str(value) if isinstance(value, Exception) else repr(value)
    except (RecursionError, ValueError):  # nested too deep, a number too long
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def kind_of(mode: int) -> str:
    """Return the kind of a file that is not a regular file."""
    kinds = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def header_of(slots: Iterable[Slot], metadata: dict[str, str], file: str) -> tuple[bytes, dict[str, int]]:
    """Return the header of a file of ``slots``, and the offset of each slot's values after it.

    Wide dtypes come first, as safetensors itself orders them: every tensor is then aligned to its dtype.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    offsets: dict[str, int] = {}
    end = 0
    for slot in sorted(slots, key=lambda slot: (-slot.dtype.itemsize, slot.name)):
        if slot.name in offsets:
            raise ValueError(f"{file} must have one tensor of each name, got {slot.name} twice")
        offsets[slot.name] = end
        start, end = end, end + slot.nbytes
        header[slot.name] = {"dtype": NAMES[slot.dtype], "shape": slot.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets


def write(
    path: Path,
    batches: Sequence[Batch],
    metadata: dict[str, str],
    written: Callable[[Batch, Any, bool], None] = lambda batch, note, before: None,
    journal: Journal | None = None,
) -> str:
    """Write a safetensors file, a few pieces in memory at a time.

    The jobs of all batches run in a few threads.

    Parameters
    ----------
    written : callable (batch, note, before)
        Called after each batch, in their order, with what `Batch.done` gave, and whether it was there before.
    journal : Journal, optional
        Batches that it lists are in the file already. Empty, or of this very file.

    Returns
    -------
    str
        The SHA-256 of the file, which is on the disk then.
    """
    text, offsets = header_of([slot for batch in batches for slot in batch.slots], metadata, path.name)
    data = len(text)
    with naming(path):
        if journal is not None and journal.notes and not begins_with(path, text):
            journal.begin()
        again = [] if journal is None else journal.notes[: len(batches)]
        for batch, note in zip(batches, again, strict=False):
            written(batch, note, True)
        if journal is not None and journal.checksum is not None:
            return journal.checksum
        if not again:
            path.unlink(missing_ok=True)
        target = os.open(path, os.O_RDWR | os.O_CLOEXEC | (0 if again else os.O_CREAT | os.O_EXCL), 0o666)
        try:
            if not again:
                dump(target, memoryview(text), 0)

            def run(job: Job) -> None:
                for name, skip, tensor in job():
                    dump(target, bytes_of(tensor), data + offsets[name] + skip)

            for batch in in_threads(run, batches[len(again) :]):
                note = batch.done()
                if journal is not None:
                    journal.add(note)
                written(batch, note, False)
            os.fsync(target)
        finally:
            os.close(target)
        checksum = checksum_of(path)
        if journal is not None:
            journal.close_with(checksum)
        return checksum


def begins_with(path: Path, text: bytes) -> bool:
    """True if the file at ``path`` exists and begins with ``text``."""
    try:
        with path.open("rb") as file:
            return file.read(len(text)) == text
    except FileNotFoundError:
        return False


def checksum_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    found, buffer = hashlib.sha256(), bytearray(CHUNK)
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            found.update(memoryview(buffer)[:size])
    return found.hexdigest()


def in_threads(run: Callable[[Job], None], batches: Sequence[Batch]) -> Iterator[Batch]:
    """Run the jobs of ``batches`` in threads; each batch when its jobs and those before it are done."""
    threads = torch.get_num_threads()
    workers = min(max(threads, 2), WORKERS)  # two at least: one computes while another waits for the disk
    waiting: deque[tuple[Batch | None, Future[None] | None]] = deque()  # a batch comes with the last of its jobs
    with ThreadPoolExecutor(workers, "quantlib", torch.set_num_threads, (1,)) as pool:
        try:
            for batch in batches:
                job: Job | None = None
                for job in batch.jobs:
                    waiting.append((None, pool.submit(run, job)))
                    while len(waiting) > 4 * workers:
                        yield from _first(waiting)
                waiting.append((batch, None))
            while waiting:
                yield from _first(waiting)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)  # also what threads of torch that start later begin with


def _first(waiting: deque[tuple[Batch | None, Future[None] | None]]) -> Iterator[Batch]:
    batch, future = waiting.popleft()
    if future is not None:
        future.result()
    if batch is not None:
        yield batch


def dump(target: int, data: memoryview, start: int) -> None:
    """Write ``data`` at ``start`` of an open file."""
    done = 0
    while done < len(data):
        done += os.pwrite(target, data[done:], start + done)


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, a copy of any other's."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, data: bytes) -> None:
    """A small file, on the disk when this returns."""
    with naming(path), path.open("xb", buffering=0) as file:
        dump(file.fileno(), memoryview(data), 0)
        os.fsync(file.fileno())


def copy(source: Path, target: Path) -> None:
    """A file with its permissions and times, on the disk when this returns."""
    with naming(target):
        shutil.copy2(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the file system names the file, which that of a full disk does not.

    A file that is the whole output is written as ``.NAME.quantlib/new``, and is NAME to the user.
    """
    folder = path.parent.name
    name = folder[1 : -len(".quantlib")] if path.name == "new" and folder.endswith(".quantlib") else path.name
    try:
        yield
    except OSError as error:
        if " while reading " in str(error.strerror):
            raise
        raise OSError(error.errno, f"{error.strerror or error} while writing {name}") from error


def some(names: Sequence[str]) -> str:
    """A few of ``names``, for a message."""
    return f"{', '.join(names[:5])}{f' and {len(names) - 5} more' if len(names) > 5 else ''}" or "none"
