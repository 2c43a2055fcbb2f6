"""The tile of a kernel: one frozen dataclass, chosen by one function of shape, block and device.

``QUANTLIB_SHOW_LAUNCH=1`` prints every choice.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from quantlib.formats import Format

Shape = tuple[int, int]

INTERPRETED = bool(triton.knobs.runtime.interpret)
ELEMENTS = 1 << 18 if INTERPRETED else 4096  # of a tile: 16 a thread on a device, as few programs as possible on none
WARPS = 8
HELD = 1 << 17  # bytes of x that a program holds in registers
PARTS = 1024  # programs that share the blocks of x where one is too large for that: no number of any device
STRADDLE = ELEMENTS if INTERPRETED else 1024  # from this width of a block on, a tile holds no more than two of them


@dataclass(frozen=True)
class Tile:
    """The part of x that one program maps: [rows, cols], with one scale for every ``run`` columns of a row."""

    rows: int
    cols: int
    run: int
    runs: int  # in a row; 2 without bk: the tile may straddle two blocks
    bk: int  # width of a block where a row of the tile holds several, else 0
    across: bool  # a block is as wide as x
    flat: bool  # x is one row
    own_rows: bool  # br is 1
    warps: int


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, by: int) -> int:
    """ceil(n / by). triton.cdiv would take microseconds on the host."""
    return -(-n // by)


def divisor(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n


def warps_of(format: Format, itemsize: int) -> int:
    """The warps of a tile; half of them beside a packed format, where a thread moves few bytes and what it does once
    counts: 32 elements a thread, if their values have 16 bits."""
    return WARPS // 2 if format.packed and itemsize <= 2 else WARPS


def flatten(shape: Shape, block: Shape, format: Format) -> tuple[Shape, Shape]:
    """The same elements as one row, where the elements of every block lie side by side."""
    (M, K), (br, bk) = shape, block
    if K % format.per_byte and M > 1:  # a row ends inside a byte
        return shape, block
    if bk == K:
        return (1, M * K), (1, br * K)
    if br == 1 and K % bk == 0:
        return (1, M * K), (1, bk)
    return shape, block


@functools.lru_cache(4096)
def choose_tile(shape: Shape, block: Shape, format: Format, itemsize: int = 2) -> Tile:
    """The tile of an elementwise kernel over x [M, K], whose values are kept in ``itemsize`` bytes."""
    (M, K), (br, bk) = shape, block
    elements, warps = ELEMENTS, warps_of(format, itemsize)
    cols = min(elements, max(power_of_2(K), 16))
    if STRADDLE <= bk < K:
        cols = min(cols, divisor(bk) if divisor(bk) >= STRADDLE else power_of_2(bk + 1) // 2)
    rows = min(elements // cols, power_of_2(M if br == 1 else br))
    if bk >= K or bk % cols == 0:
        run, runs, bk = cols, 1, 0
    elif bk >= cols:
        run, runs, bk = cols, 2, 0
    else:
        run = min(divisor(bk), cols)
        runs = cols // run
    warps = min(warps, max(1, rows * cols * warps // elements))
    return shown(Tile(rows, cols, run, runs, bk, block[1] == K, M == 1, br == 1, warps))


@dataclass(frozen=True)
class Blocks:
    """The part of x that one program reduces: ``count`` whole blocks, or every ``parts``-th chunk of one block."""

    count: int
    rows: int  # of a chunk
    cols: int
    chunks: int  # of a block, held in registers, below each other where rows > 1, else side by side; 0: too many
    parts: int  # programs that share a block
    exact: bool  # no chunk reaches past its block, no program past the last block
    bk: int  # width of a block where a program has several, else 0
    ragged: bool  # the last block of a row is narrower
    across: bool  # a block is as wide as x
    flat: bool  # x is one row
    warps: int


@functools.lru_cache(4096)
def choose_blocks(shape: Shape, block: Shape, itemsize: int, format: Format) -> Blocks:
    """The chunks of a reduction over the blocks of x [M, K]."""
    (M, K), (br, bk) = shape, block
    blocks = cdiv(M, br) * cdiv(K, bk)
    width = max(power_of_2(bk), 4)  # a conversion takes four values
    held = (br * width if br > 1 else bk) * itemsize
    fits = held <= HELD and (br == 1 or bk <= ELEMENTS)
    large = HELD // 4 < held <= HELD
    warps = 2 * WARPS if large else WARPS if held > ELEMENTS * itemsize else warps_of(format, itemsize)
    elements = 2 * ELEMENTS if large else ELEMENTS
    if bk > elements and divisor(bk) == elements // 2:
        elements //= 2  # then no chunk is ragged
    cols = min(elements, width)
    rows = min(elements // cols, power_of_2(br))
    count = min(elements // (rows * cols), power_of_2(blocks)) if br <= rows and bk <= cols else 1
    halves = count > 1 and format.packed and cols >= 128  # of a block: then a thread takes two vectors of it
    chunks = cdiv(br, rows) * cdiv(bk, cols) * (2 if halves else 1)
    elements //= 2 if halves else 1
    cols //= 2 if halves else 1
    parts = 1 if fits else min(PARTS // power_of_2(min(blocks, PARTS)), power_of_2(chunks))
    exact = M % br == 0 and K % bk == 0 and br % rows == 0 and bk % cols == 0 and blocks % count == 0
    return shown(
        Blocks(
            count=count,
            rows=rows,
            cols=cols,
            chunks=chunks if fits else 0,
            parts=parts,
            exact=exact,
            bk=bk if count > 1 else 0,
            ragged=K % bk > 0,
            across=bk == K,
            flat=M == 1,
            warps=max(1, warps * count * rows * cols // elements),
        )
    )


def tiles(shape: Shape, block: Shape, tile: Tile) -> int:
    """The number of tiles that cover x [M, K]; no tile straddles two block rows unless br is 1."""
    (M, K), (br, _) = shape, block
    row_tiles = cdiv(M, tile.rows) if br == 1 else cdiv(M, br) * cdiv(br, tile.rows)
    return row_tiles * cdiv(K, tile.cols)


CHOICES: dict[Any, Any] = {}  # each choice by its value


def shown(choice: Any) -> Any:
    """Return the one object that equals ``choice``: a launch is found again by the addresses of its constants."""
    if os.environ.get("QUANTLIB_SHOW_LAUNCH"):
        print(choice, file=sys.stderr)
    return CHOICES.setdefault(choice, choice)


@dataclass(frozen=True)
class Planned:
    """A device that kernels are compiled for ahead: what launchers are told of tensors on "meta", without memory."""

    arch: int
    name: str  # of the device, whose table of measurements is asked
    shared: int  # bytes of shared memory that a program may have


planned: Planned | None = None  # of a process that only compiles (warmup.py)


@functools.cache
def arch(device: torch.device) -> int:
    """Compute capability whose conversion instructions a kernel may use, 0 for none."""
    if INTERPRETED:
        return 0
    if planned and device.type == "meta":
        return planned.arch
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Bytes of shared memory that a program may have, by compute capability; of one not listed, the fewest.
SHARED = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 103: 232448}
LEAST_SHARED = 101376


@functools.cache
def properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; without a device, those of its architecture."""
    if device.type == "cuda":
        return properties(device).shared_memory_per_block_optin
    if planned and device.type == "meta":
        return planned.shared
    return SHARED[80] if INTERPRETED else SHARED.get(arch(device), LEAST_SHARED)


@functools.cache
def device_name(device: torch.device) -> str:
    """The name of the device in a table of measurements; "" in the interpreter."""
    if planned and device.type == "meta":
        return planned.name
    return "" if INTERPRETED else torch.cuda.get_device_name(device)


def processors(device: torch.device) -> int:
    """The number of programs that run at a time if each fills a multiprocessor; 3 without a GPU."""
    return properties(device).multi_processor_count if device.type == "cuda" else 3


class Handle(NamedTuple):
    """A compiled kernel: what Triton's own launch finds again at every call, in 15 us."""

    run: Callable[..., None]
    function: Any
    metadata: Any
    kept: tuple[Any, ...]  # the kernel and its constants, whose addresses are in the key


class Class(NamedTuple):
    """The calls of one kernel whose arguments have the same types."""

    key: Callable[..., tuple[Any, ...]]  # device, options, arguments -> all else that the compiler is told of them
    handles: dict[tuple[Any, ...], Handle]


_classes: dict[tuple[Any, ...], Class] = {}


def launch(kernel: Any, programs: int, device: torch.device, *args: Any, warps: int, **options: int) -> Handle | None:
    """Start ``programs`` programs on the current stream of ``device``; nothing waits for them.

    Products are never contracted into sums (C0).

    Returns
    -------
    Handle or None
        What has been started, which serves all arguments of this kind; None where that is not known.

    Raises
    ------
    RuntimeError
        Where a CUDA graph is captured and the kernel has not run yet with arguments of this kind: to compile and load
        it is no work of a stream.
    """
    if INTERPRETED:
        try:
            with context(device):
                kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=False, **options)
        except BaseException:  # Ctrl-C: the programs that have not run have left tickets
            _slots.clear()
            raise
        return None
    if planned and device.type == "meta":
        kernel.warmup(*args, grid=(programs,), num_warps=warps, enable_fp_fusion=False, **options)
        return None
    types = (id(kernel), *map(type, args))
    found = _classes.get(types)
    if found is None:
        found = _classes[types] = Class(key_function(kernel, args), {})
    key = found.key(device, warps, tuple(options.values()), *args)
    handle = found.handles.get(key)
    if handle is not None and current_device() == device.index and not profiled():
        run, function, metadata, _ = handle
        run(programs, 1, 1, current_stream(device.index), function, metadata, None, None, None, *args)
        return handle
    if handle is None and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.__name__} must have run with arguments of this kind before a CUDA graph captures it: make the "
            "same calls once before the capture; `quantlib warmup` compiles ahead what a model needs"
        )
    with context(device):
        compiled = kernel[(programs,)](*args, num_warps=warps, enable_fp_fusion=False, **options)
    if hasattr(compiled, "packed_metadata"):  # None where something else has taken the launch
        kept = (kernel, *(value for value, p in zip(args, kernel.params, strict=True) if p.is_constexpr))
        handle = found.handles[key] = Handle(compiled.run, compiled.function, compiled.packed_metadata, kept)
    return handle


def repeated(
    kernel: Any, programs: int, device: torch.device, constants: tuple[Any, ...], *, warps: int, **options: int
) -> Callable[..., None]:
    """Make ``start(*tensors)``, which is `launch` with ``*tensors, *constants`` and keeps the handle that it finds.

    Each of the tensors has the same dtype in every call, or is None in every call. Where all begin at multiples of 16,
    as those of torch's allocator do, they are of one kind.
    """
    found: Handle | None = None

    def start(*tensors: torch.Tensor | None) -> None:
        nonlocal found
        addresses = 0
        for t in tensors:
            if t is not None:
                addresses |= t.data_ptr()
        if found is None or addresses & 15 or current_device() != device.index or profiled():
            handle = launch(kernel, programs, device, *tensors, *constants, warps=warps, **options)
            if not addresses & 15:
                found = handle
            return
        run, function, metadata, _ = found
        run(
            programs, 1, 1, current_stream(device.index), function, metadata, None, None, None, *tensors, *constants
        )  # fmt: skip

    return start


def key_function(kernel: Any, args: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]]:
    """Make the function that gives what the compiler is told of arguments of these types, or more, without calls.

    It is told the value or address of a constant; the dtype of a tensor and whether its address is a multiple of 16;
    and of an integer whether it is divisible by 16, is 1, or has more than 31 bits.
    """
    names, words = [f"a{n}" for n in range(len(args))], []
    for name, value, parameter in zip(names, args, kernel.params, strict=True):
        if parameter.is_constexpr:  # strings and tuples of an op are new ones at every call, formats and tiles are not
            words.append(name if isinstance(value, int | str | tuple) else f"id({name})")
        elif isinstance(value, torch.Tensor):
            words += [f"{name}.dtype", f"{name}.data_ptr() & 15 > 0"]
        elif isinstance(value, int):
            words.append(f"1 if {name} == 1 else 2 + ({name} & 15 > 0) + 2 * ({name} > 2147483647)")
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            words += [f"{name}.base.dtype", f"*{name}.block_shape"]
        else:
            assert value is None or isinstance(value, float), f"{kernel.__name__}: {parameter.name} is {value!r}"
    text = f"lambda device, warps, options, {', '.join(names)}: (device, warps, options, {', '.join(words)})"
    made: Callable[..., tuple[Any, ...]] = eval(text)  # of names that are made above
    return made


def current_device() -> int:
    index: int = torch._C._cuda_getDevice()  # a tensor of CUDA is there: torch.cuda.current_device() would ask
    return index


def current_stream(index: int) -> int:
    """The address of the current stream of a device."""
    stream: int = torch._C._cuda_getCurrentRawStream(index)
    return stream


def profiled() -> bool:
    """True if a hook of Triton asks to be told of launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


def workspace(
    shape: tuple[int, int, int], dtype: torch.dtype, tiles: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Sums of the splits of a matmul, [splits, M, N], and a ticket for each tile of it, 0; None without splits."""
    splits, M, N = shape
    if splits == 1:
        return None, None
    return torch.empty_strided(shape, (M * N, N, 1), dtype=dtype, device=device), tickets(tiles, device)


TICKETS, SLOTS = 1024, 1024
_slots: dict[tuple[torch.device, int, int], torch.Tensor] = {}
_numbers: dict[torch.device, Iterator[int]] = {}


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """[count or more] int32, all 0, for a kernel that is next on the current stream and leaves them 0.

    The kernels of a stream follow each other, and share a slot that is zeroed once. A graph that is captured has slots
    of its own, for it may be replayed beside anything, and zeroes them once a replay. Where there is no slot, the
    tickets are of one call.
    """
    stream, capture = place(device)
    found = _slots.get((device, stream, capture)) if count <= TICKETS else None
    if found is None:
        new = capture == 0 or (capture > 0 and device in _numbers)  # no memory is made while a graph is captured
        number = next(_numbers.setdefault(device, itertools.count())) if new and count <= TICKETS else SLOTS
        if number >= SLOTS:
            return torch.zeros(count, dtype=torch.int32, device=device)
        found = arena(device)[number]
        if device.type == "cuda" and not capture:  # the memory may come of work there
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        _slots[device, stream, capture] = found.zero_()
    return found


@functools.cache
def arena(device: torch.device) -> torch.Tensor:
    """The memory of all slots of a device. A thread of its own makes it: what this one allocates may be a graph's, and
    end with the graph."""
    with ThreadPoolExecutor(1) as other:
        made = functools.partial(torch.empty, SLOTS, TICKETS, dtype=torch.int32, device=device)
        return other.submit(made).result()


def place(device: torch.device) -> tuple[int, int]:
    """The current stream of a device and the capture that it is in: 0 for none, -1 for one that cannot be named."""
    if device.type != "cuda":
        return threading.get_ident(), 0
    stream = current_stream(device.index)
    if current_device() != device.index:  # whose streams are asked next
        return stream, -1
    return stream, capture_of(stream) if torch.cuda.is_current_stream_capturing() else 0


def capture_of(stream: int) -> int:
    """The number of the capture that a stream is in, which no other has; -1 where the driver does not say."""
    status, number = ctypes.c_int(), ctypes.c_ulonglong()
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return -1
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return -1 if failed else number.value


def codes_of(t: torch.Tensor) -> torch.Tensor:
    """View 8-bit floats as their codes: sm_80 takes no pointer to them. A kernel reinterprets wider ones itself."""
    return t.view(torch.uint8) if t.dtype.is_floating_point and t.dtype.itemsize == 1 else t


def context(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if INTERPRETED:
        import numpy as np

        return np.errstate(all="ignore")
    return torch.cuda.device(device.index)
