"""The words of a benchmark: a case is one thing to compute, a contender somebody who can, a row what came of it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from quantlib import backends
from quantlib.spec import QuantSpec
from quantlib.testing.bytes import Array, poisoned

Tensors = tuple[Tensor, ...]
Call = Callable[[], Any]

OURS, PEER, LIMIT = "ours", "peer", "limit"  # roles; a limit is what no op can beat by much: a plain copy
PLAIN_COPY, PLAIN_READ, READ_WRITE = "plain copy", "plain read", "read+write"  # limits by their name


@dataclass(frozen=True)
class Contender:
    """An implementation that can run a case.

    Parameters
    ----------
    name : str
        As it stands in the table: "quantlib cpp", "torch.compile".
    bind : (inputs, outs) -> call
        The call that is timed. It writes into ``outs`` and returns None, or returns tensors of its own. Raising means
        that the contender is missing or cannot do the case, which becomes a row that says so.
    role : {"ours", "peer", "limit"}
    read : returned -> results, optional
        The results of the timed call, as tensors to compare; () if its codes mean something else.
    note : str
        Facts that a reader needs to judge the time.
    moved : int
        Bytes it has to move where those are not the op's, e.g. of a weight in floating point; 0: as the op.
    case : Case, optional
        What it does where that is not the case it is listed in, e.g. the same product with x in another dtype: its
        bytes are compared with the reference of that one.
    within : () -> context manager
        Entered around every call and not timed: the switch of backends.
    """

    name: str
    bind: Callable[[Tensors, Tensors], Call]
    role: str = PEER
    read: Callable[[Any], Tensors] | None = None
    note: str = ""
    moved: int = 0
    case: Case | None = None
    within: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def results(self, returned: Any, outs: Tensors) -> Tensors:
        """The tensors that the call made or filled."""
        if self.read is not None:
            return self.read(returned)
        if returned is None:
            return outs
        return (returned,) if isinstance(returned, Tensor) else tuple(returned)


@dataclass(frozen=True)
class Limits:
    """The most that this machine can do, measured in the same run."""

    copy: float | None = None  # bytes a second that a plain copy of float32 reads and writes
    read: float | None = None  # bytes a second that a plain read takes in
    products: Mapping[str, float] = field(default_factory=dict)  # dtype -> FLOPs a second of torch's own products


@dataclass(frozen=True)
class Case:
    """One op on one input; a family is a subclass.

    Bytes and FLOPs are those of the op's own model, whoever does it: every input and output once, 2 M N K a product.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    backends: tuple[str, ...] = ()  # of quantlib's; the one that serves the device if none is named

    family: ClassVar[str]
    streams: ClassVar[bool] = True  # the limit is the machine's memory: a plain copy of float32
    calls: ClassVar[int] = 1  # a timed run is this many
    least: ClassVar[int] = 3  # timed runs of even the slowest contender

    @property
    def op(self) -> str:
        return self.family

    @property
    def conversion(self) -> str:
        """The dtypes of input and output: "float32 -> int8"."""
        raise NotImplementedError

    @property
    def format(self) -> str:
        """The format whose codes are read or written."""
        raise NotImplementedError

    @property
    def symmetric(self) -> bool:
        return True

    @property
    def per(self) -> str:
        """The elements that share a scale, in the words of QuantSpec."""
        return ""

    @property
    def name(self) -> str:
        return case_name(self.family, self.op, self.conversion, self.per)

    @property
    def multiplies(self) -> str:
        """The dtype of the products, "float32", "bfloat16" or "int8", whose peak is a limit; "" where there is none."""
        return ""

    @property
    def flops(self) -> int:
        """FLOPs of a call, additions and multiplications counted apart; 0 where nobody would ask."""
        return 0

    def moved(self, inputs: Tensors, outs: Tensors) -> int:
        """Bytes that a call has to move; 0 where nobody would ask."""
        return sum(t.nbytes for t in (*inputs, *outs)) if self.streams else 0

    @property
    def copied(self) -> int:
        """Bytes that the plain copy reads and writes; 0 where it is not the limit."""
        return 2 * 4 * math.prod(self.shape) if self.streams else 0

    def inputs(self) -> Tensors:
        """Make the inputs of the timed call."""
        raise NotImplementedError

    def timed_inputs(self, inputs: Tensors) -> Tensors:
        """The tensors that a GPU is timed with, if they are not those that bytes are compared for."""
        return inputs

    def outs(self, *inputs: Tensor) -> Tensors:
        """Ready memory for the results, full of poison."""
        raise NotImplementedError

    def expected(self, rows: slice, *inputs: Tensor) -> Iterator[tuple[slice, Array]]:
        """For each result, yield the rows to check and their bits by the reference; ``rows`` if independent."""
        return iter(())

    def contenders(self) -> list[Contender]:
        raise NotImplementedError

    def limits(self) -> list[Contender]:
        """Return the contenders that no streaming op can beat by much."""
        return [self.copy(), self.read_write()] if self.device == "cpu" else [self.copy()]

    def copy(self) -> Contender:
        """The limit: a plain copy of float32 into ready memory."""

        def bind(inputs: Tensors, outs: Tensors) -> Call:
            x, y = normal(self.shape, "float32", self.device), ready(self.shape, self.device)
            if self.device != "cpu":  # where calls take turns: each has memory of its own
                x, y = x.clone(), y.clone()
            return lambda: y.copy_(x)

        return Contender(PLAIN_COPY, bind, LIMIT, read=lambda _: (), moved=self.copied)

    def read_write(self) -> Contender:
        """The limit of an op that reads more than it writes, or less: as many bytes of both, and nothing computed."""

        def bind(inputs: Tensors, outs: Tensors) -> Call:
            return reads_and_writes(*(sum(t.nbytes for t in tensors) for tensors in (inputs, outs)))

        return Contender(READ_WRITE, bind, LIMIT, read=lambda _: ())  # its bytes are those of the op

    def ours(self, bind: Callable[[Tensors, Tensors], Call]) -> list[Contender]:
        """quantlib, once a backend."""
        serving = backends.serving(self.device)
        return [
            Contender(
                f"quantlib {name}",
                bind,
                OURS,
                within=contextlib.nullcontext if name == serving else functools.partial(backends.use_backend, name),
            )
            for name in self.backends or (serving,)
        ]


INT8 = QuantSpec("int8")


@dataclass(frozen=True)
class Scaled(Case):
    """A case whose codes have a scale: format and granularity are a QuantSpec."""

    spec: QuantSpec = INT8

    @property
    def format(self) -> str:
        return self.spec.format

    @property
    def symmetric(self) -> bool:
        return bool(self.spec.symmetric)

    @property
    def conversion(self) -> str:
        return f"{self.dtype} -> {self.format}"

    @property
    def per(self) -> str:
        return f"{self.spec.per}{'' if self.spec.symmetric else ' affine'}"

    def block(self, x: Tensor) -> tuple[int, int]:
        return self.spec.block(x.shape)

    def codes(self, x: Tensor) -> Tensor:
        """Ready memory for the codes of x."""
        dtype = getattr(torch, self.spec.row.dtype_name)
        return poisoned(self.spec.codes_shape(x.shape), dtype, self.device)

    def scales(self, x: Tensor) -> Tensors:
        """Ready memory for the scale, and the zero point if there is one."""
        dtypes = (torch.float32,) if self.spec.symmetric else (torch.float32, torch.int32)
        return tuple(poisoned(self.spec.scale_shape(x.shape), dtype, self.device) for dtype in dtypes)

    def given_scales(self, x: Tensor) -> Tensors:
        """Static scales of the size that normally distributed values want, no two alike, and zero points."""
        shape, generator = self.spec.scale_shape(x.shape), torch.Generator().manual_seed(1)
        scale = (1 + torch.rand(shape, generator=generator)) / 32 * (127 / float(self.spec.row.max))
        if self.spec.symmetric:
            return (scale.to(self.device),)
        lowest, highest = self.spec.row.range(affine=True)
        zero_point = torch.randint(lowest // 2, highest // 2, shape, generator=generator, dtype=torch.int32)
        return scale.to(self.device), zero_point.to(self.device)


@functools.lru_cache(maxsize=2)
def normal(shape: tuple[int, ...], dtype: str, device: str) -> Tensor:
    """[...] standard normal, the same in every run."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(device, getattr(torch, dtype))


@functools.lru_cache(maxsize=1)
def ready(shape: tuple[int, ...], device: str) -> Tensor:
    """[...] float32 memory that has been written to."""
    return torch.zeros(shape, device=device)


@functools.lru_cache(maxsize=2)
def memory(nbytes: int, which: int) -> Tensor:
    """[nbytes / 4] int32 that has been written to."""
    return torch.full((-(-nbytes // 4),), which, dtype=torch.int32)


def reads_and_writes(read: int, written: int) -> Call:
    """Copies as many bytes as are both read and written, then reads or writes the rest; on as many threads as torch."""
    both, threads = min(read, written) // 64 * 64, torch.get_num_threads()
    source, target = memory(read, 1), memory(written, 2)
    cuts = [both * k // threads // 64 * 64 for k in range(threads)] + [both]
    pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def moved(k: int) -> None:
        ctypes.memmove(target.data_ptr() + cuts[k], source.data_ptr() + cuts[k], cuts[k + 1] - cuts[k])

    def by_libc() -> None:
        """Past the caches, where the C library thinks that worth while."""
        for _ in map(moved, range(threads)) if pool is None else pool.map(moved, range(threads)):
            pass

    words = both // 4
    copied_by_torch = functools.partial(target[:words].copy_, source[:words])
    copy = min((copied_by_torch, by_libc), key=lambda call: min(_once(call) for _ in range(3)))
    rest = source[words:] if read > written else target[words:]
    last = functools.partial(torch.amax, rest) if read > written else functools.partial(rest.fill_, 3)

    def call() -> None:
        copy()
        if len(rest):
            last()

    return call


def _once(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def case_name(family: str, op: str, conversion: str, per: str) -> str:
    """Return the name of a case in the targets: "quantize float32 -> int8 row"."""
    return " ".join(word for word in (family, op if op != family else "", conversion, per) if word)


def of_block_rows(rows: slice, br: int) -> slice:
    """The rows of ``scale`` that serve ``rows`` of x."""
    return slice(rows.start // br, -(-rows.stop // br))


def numbers(x: Tensor) -> Array:
    """The values of x in the float32 that the reference takes; exact."""
    return x.float().cpu().numpy()


@dataclass(frozen=True)
class Row:
    """The seconds of one contender in one case; None if it is missing, failed or got a byte wrong."""

    family: str
    op: str
    conversion: str
    per: str
    shape: tuple[int, ...]
    backend: str
    role: str
    dtype: str = ""
    device: str = "cpu"
    runs: int = 0
    min: float | None = None
    median: float | None = None
    spread: float | None = None  # distance between the quartiles, as a share of the median
    bytes: int | None = None
    gb_per_s: float | None = None
    of_copy: float | None = None  # share of the bytes a second of a plain copy, of the same rounds where there is one
    of_read: float | None = None  # of products: share of the bytes a second of a plain read, likewise
    of_read_write: float | None = None  # time that as many bytes take to be read and written / own time
    flops: int | None = None
    tflop_per_s: float | None = None
    of_peak: float | None = None  # share of the FLOPs a second of torch's own products in `multiplies`
    speedup: float | None = None  # time of the best peer / own time
    above: float | None = None  # own time less the limit's
    differing: int | None = None  # elements whose bytes are not the reference's
    compared: int | None = None
    note: str = ""
    error: str = ""

    @property
    def intensity(self) -> float | None:
        """FLOPs a byte."""
        return self.flops / self.bytes if self.flops and self.bytes else None

    @property
    def case(self) -> str:
        return case_name(self.family, self.op, self.conversion, self.per)


def seconds(value: float | None, sign: bool = False) -> str:
    """Three digits and a unit."""
    if value is None:
        return ""
    plus = "+" if sign and value >= 0 else ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= 0.9995 * size:
            digits = max(0, 2 - len(str(int(abs(value) / size))) + 1)
            return f"{plus}{value / size:.{digits}f} {unit}"
    return f"{plus}{value / 1e-9:.0f} ns"


def described(error: Exception) -> str:
    """Describe an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
