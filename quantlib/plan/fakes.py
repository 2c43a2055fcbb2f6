"""A model of tensors that have shapes and no memory, and how much memory a run of it would have taken.

Every operation runs on fake tensors of the CPU: shapes, dtypes and strides are those of a real run, and so is the
choice of kernels (the fused attention). A tracker sums the storages that are alive: what it finds for a model with
memory is, byte for byte, what the allocator of the CPU reports.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quantlib.plan.source import like


@dataclass(frozen=True)
class Peak:
    """Bytes of storages that a run made and that are alive at one moment.

    Attributes
    ----------
    bytes : int
        At the moment with the most.
    largest : int
        Bytes of the largest one that was made.
    kept : int
        At the end.
    """

    bytes: int
    largest: int
    kept: int


class Tracker(TorchDispatchMode):
    """Sum the storages that operations make inside the block.

    A value that a program reads of a tensor without memory is 1: that no token is padded, and no sequence packed.

    Parameters
    ----------
    known : iterable of Tensor
        Tensors that exist before, and do not count.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.largest = 0
        self._seen = weakref.WeakKeyDictionary[Any, int]()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = STAND_INS.get(func) if args and isinstance(args[0], FakeTensor) else None
        out = func(*args, **(kwargs or {})) if made is None else made(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.now += size
        self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size

    @property
    def found(self) -> Peak:
        return Peak(self.peak, self.largest, self.now)


def one(tensor: Tensor) -> float | int | bool:
    """Return the value that is read from a tensor without values."""
    return True if tensor.dtype == torch.bool else 1.0 if tensor.dtype.is_floating_point else 1


def grouped_mm(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: Any = None) -> Tensor:
    """The result of a product of each group of rows with a matrix of its own, of which torch knows bfloat16 only.

    [T, N] for a [T, K] and b [E, K, N]; [E, M, N], the gradient of b, for a [M, T] and b [T, N].
    """
    shape = (a.shape[0], b.shape[2]) if b.dim() == 3 else (offs.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(shape, dtype=out_dtype or a.dtype)


# op -> what it gives for tensors without values
STAND_INS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._local_scalar_dense.default: one,
    torch.ops.aten._grouped_mm.default: grouped_mm,
}


class Known(NamedTuple):
    """A value in place of a tensor."""

    value: int

    def item(self) -> int:
        return self.value


class Even(TorchFunctionMode):
    """Spread tokens evenly over experts: the ends of their groups, when a program reads them, are evenly apart."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[int, tuple[Tensor, int]] = {}  # id of the ends of groups -> they, and how many rows there are

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.unbind and id(args[0]) in self._rows:  # `tolist` of a fake tensor calls it
            ends, rows = self._rows.pop(id(args[0]))
            return tuple(Known(rows * (e + 1) // len(ends)) for e in range(len(ends)))
        out = func(*args, **(kwargs or {}))
        if func is torch.searchsorted:
            self._rows[id(out)] = out, args[0].numel()
        return out


MODE = FakeTensorMode(allow_non_fake_inputs=True)


def faked(model: nn.Module) -> nn.Module:
    """A copy of ``model``, on meta, whose tensors are fake ones of the CPU; what is shared stays shared."""
    memo: dict[int, Any] = {}
    with MODE:
        for tensor in (*model.parameters(), *model.buffers()):
            data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            memo[id(tensor)] = like(tensor, data) if isinstance(tensor, nn.Parameter) else data
    return copy.deepcopy(model, memo)


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@contextlib.contextmanager
def as_if_real() -> Iterator[None]:
    """Have transformers see no fake tensors: it takes them for a sign of tracing, and masks then where it would not."""
    try:
        from transformers.utils import import_utils as words
    except ImportError:
        yield
        return
    before = words.is_fake_tensor
    words.is_fake_tensor = lambda x: False
    try:
        yield
    finally:
        words.is_fake_tensor = before


def peak_of(run: Callable[[nn.Module], Any], model: nn.Module) -> Peak:
    """Return the peak memory of ``run(model)`` beside the parameters of ``model``, which is `faked`."""
    with as_if_real(), MODE, Tracker(tensors_of(model)) as tracker, Even():
        kept = run(model)
        del kept
    found: Peak = tracker.found
    return found
