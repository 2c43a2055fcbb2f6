"""Observers: they watch tensors and give the scale that their values ask for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from quantlib import formats
from quantlib.nn import ranks
from quantlib.ops.observe import Scale, lsq_scale, mse_scale, range_of, scale_of_range
from quantlib.ops.search_scale import search_scale
from quantlib.spec import QuantSpec, matrix_shape

if TYPE_CHECKING:
    from typing_extensions import Self

Initial = Literal["minmax", "mse", "lsq"]


class KeepsDtype(nn.Module):
    """A module whose own tensors move between devices but keep their dtype, as scales must."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def moved(t: Tensor) -> Tensor:
            y = fn(t)
            return y if y.dtype == t.dtype else t.to(y.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state of another float dtype, which ``load_state_dict(assign=True)`` would leave so."""
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            given = state_dict.get(f"{prefix}{name}")
            if own is not None and isinstance(given, Tensor) and given.dtype != own.dtype:
                state_dict[f"{prefix}{name}"] = given.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Observer(KeepsDtype):
    """Keeps of the tensors that it sees what their scales follow from, in buffers and without waiting for a device.

    Parameters
    ----------
    shape : sequence of int
        The tensor's shape. Where all of a tensor shares a scale, only the last size of an activation is asked for.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The format, and what shares a scale: tensor, row, group or tile.
    device : torch.device, optional

    Attributes
    ----------
    batches : Tensor, int64
        Tensors seen that held a finite value.
    nonfinite : Tensor, int64
        Values seen that were infinite or NaN. They are left out of every range, and reported once: at the time on the
        CPU, by `report` for a device.
    all_ranks : bool
        Whether all ranks count as one: in the forward of DDP or FSDP2 the tensor is then the whole batch, of which
        each rank has a part, and every rank keeps the same range. The ranks reduce their ranges in the forward, so
        that a layer which some of them leave out needs False, as ``join`` of DDP does.

    Raises
    ------
    ValueError
        For a spec without a scale; for an x with another number of blocks than ``shape``.
    """

    batches: Tensor
    nonfinite: Tensor
    all_ranks: bool = True

    def __init__(self, shape: Sequence[int], spec: Any, *, device: Any = None) -> None:
        super().__init__()
        self.spec = QuantSpec.parse(spec).weight_only
        if not self.spec.scaled:
            raise ValueError(f"spec must have a scale to observe, got {self.spec}")
        self.blocks = self.spec.scale_shape(shape)
        self.reported = False
        for name in ("batches", "nonfinite"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> x itself, seen."""
        if not x.numel() and not (x.shape[-1] and self.groups()):
            return x
        if x.numel() and self.spec.scale_shape(x.shape) != self.blocks:
            expected = " x ".join(map(str, self.blocks))
            raise ValueError(f"x must have {expected} scales, got {list(x.shape)} with {self.spec}")
        if x.numel():
            watched = x.detach().float().reshape(matrix_shape(x.shape))
            finite = watched.isfinite()
        else:  # a rank without a row of the batch learns what the others saw
            watched = torch.zeros(1, x.shape[-1], dtype=torch.float32, device=x.device)
            finite = torch.zeros_like(watched, dtype=torch.bool)
        counts = self._reduced(torch.stack([finite.numel() - finite.sum(), finite.any().long()]), "SUM")
        self.nonfinite.add_(counts[0])
        self.batches.add_(counts[1] > 0)
        self.update(torch.where(finite, watched, 0), finite, self.spec.block(watched.shape))
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            self.report()
        return x

    def update(self, x: Tensor, finite: Tensor, block: tuple[int, int]) -> None:
        """Take in x [M, K] float32, 0 where it was not finite."""
        raise NotImplementedError

    def scale(self) -> Scale:
        """[I, J] float32, and the int32 zero point of an affine spec, for everything seen so far."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything seen so far."""
        for buffer in self.buffers():
            buffer.zero_()
        self.reported = False

    def report(self) -> None:
        """Warn once of values that were not finite."""
        if not self.reported and not self.nonfinite.is_meta and (count := int(self.nonfinite)):
            self.reported = True
            of_all = "1 value that is" if count == 1 else f"{count} values that are"
            warnings.warn(
                f"{type(self).__name__} left {of_all} not finite out of its range", RuntimeWarning, stacklevel=3
            )

    def extra_repr(self) -> str:
        return str(self.spec)

    def groups(self) -> list[Any]:
        """The process groups that together see the batch of now; none where this process sees all of it."""
        return ranks.groups_of_batch() if self.all_ranks else []

    def _reduced(self, t: Tensor, op: str) -> Tensor:
        """Reduce ``t`` over all ranks that see a part of the batch; with one rank it stays as it is."""
        groups = self.groups()
        return ranks.reduce_(t, getattr(torch.distributed.ReduceOp, op), groups) if groups else t


class MinMaxObserver(Observer):
    """The widest range ever seen.

    Attributes
    ----------
    lowest, highest : Tensor [I, J] float32
        The range of each block, widened to hold 0.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, shape: Sequence[int], spec: Any, *, device: Any = None) -> None:
        super().__init__(shape, spec, device=device)
        for name in ("lowest", "highest"):
            self.register_buffer(name, torch.zeros(self.blocks, dtype=torch.float32, device=device))

    def update(self, x: Tensor, finite: Tensor, block: tuple[int, int]) -> None:
        lowest, highest, _ = self.range_of(x, finite, block)
        self.widen(lowest, highest)

    def range_of(self, x: Tensor, finite: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest and highest value of each block [I, J], and whether any value was finite, over all ranks."""
        lowest, highest = range_of(x, block)
        ends = self._reduced(torch.cat([-lowest.flatten(), highest.flatten(), finite.any().float().view(1)]), "MAX")
        n = lowest.numel()
        return -ends[:n].view(self.blocks), ends[n : 2 * n].view(self.blocks), ends[2 * n]

    def widen(self, lowest: Tensor, highest: Tensor) -> None:
        """Take in a range [I, J]."""
        self.lowest.copy_(torch.minimum(self.lowest, lowest))
        self.highest.copy_(torch.maximum(self.highest, highest))

    def scale(self) -> Scale:
        return scale_of_range(self.lowest, self.highest, self.spec.format, self.spec.symmetric is True)


class MovingAverageObserver(MinMaxObserver):
    """The range of the first tensor, moved by ``rate`` of the way to that of each later one.

    The first of a block is the first that is not all zeros there: a layer that starts at zero gives many of those.
    """

    def __init__(self, shape: Sequence[int], spec: Any, *, rate: float = 0.01, device: Any = None) -> None:
        super().__init__(shape, spec, device=device)
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be above 0 and at most 1, got {rate}")
        self.rate = rate

    def update(self, x: Tensor, finite: Tensor, block: tuple[int, int]) -> None:
        lowest, highest, any_finite = self.range_of(x, finite, block)
        unknown = (self.lowest == 0) & (self.highest == 0)
        share = torch.full_like(self.lowest, self.rate).masked_fill_(unknown, 1.0)
        share *= any_finite  # nothing is learned of NaN alone
        self.lowest.lerp_(lowest, share)
        self.highest.lerp_(highest, share)


class HistogramObserver(MinMaxObserver):
    """A histogram of each block, whose bins double in width as larger values come.

    Parameters
    ----------
    bins : int
        Even; 8 * bins bytes a block.

    Attributes
    ----------
    counts : Tensor [I * J, bins] int64
        How many values fell into each part of -top..top.
    top : Tensor [I * J, 1] float32
        A power of two above all that was seen.
    """

    counts: Tensor
    top: Tensor

    def __init__(self, shape: Sequence[int], spec: Any, *, bins: int = 2048, device: Any = None) -> None:
        super().__init__(shape, spec, device=device)
        if bins < 2 or bins % 2:
            raise ValueError(f"bins must be even and at least 2, got {bins}")
        n = self.blocks[0] * self.blocks[1]
        self.register_buffer("counts", torch.zeros((n, bins), dtype=torch.int64, device=device))
        self.register_buffer("top", torch.full((n, 1), formats.SCALE_MIN, dtype=torch.float32, device=device))

    def update(self, x: Tensor, finite: Tensor, block: tuple[int, int]) -> None:
        lowest, highest, _ = self.range_of(x, finite, block)
        self.widen(lowest, highest)
        values, counted = by_block(x, block), by_block(finite, block).long()
        half = self.counts.shape[1] // 2
        # 1. the power of two above the largest magnitude, from its exponent bits
        exponent = torch.maximum(-lowest, highest).view(-1, 1).view(torch.int32) & 0x7F800000
        top = torch.maximum(self.top, (exponent.view(torch.float32) * 2).clamp(max=2.0**127))
        # 2. the counts move to the wider bins that contain their old ones, halved an integer number of times
        centers = torch.arange(2 * half, dtype=torch.float32, device=x.device) + (0.5 - half)
        moved = (centers * (self.top / top) + half).floor().long()
        counts = torch.zeros_like(self.counts).scatter_add_(1, moved, self.counts)
        # 3. the new values
        bin_of_x = (values / top * half + half).floor().long().clamp(0, 2 * half - 1)
        new = self._reduced(torch.zeros_like(counts).scatter_add_(1, bin_of_x, counted), "SUM")
        self.counts.copy_(counts + new)
        self.top.copy_(top)

    def reset(self) -> None:
        super().reset()
        self.top.fill_(formats.SCALE_MIN)

    @property
    def centers(self) -> Tensor:
        """[I * J, bins] float32: the middle of each bin."""
        bins = self.counts.shape[1]
        n = torch.arange(bins, dtype=torch.float32, device=self.top.device)
        return (n + (0.5 - bins // 2)) * (2 / bins) * self.top


class PercentileObserver(HistogramObserver):
    """The range that holds a share of all values, the same number left out on either side; of magnitudes if symmetric.

    Parameters
    ----------
    percentile : float
        The share of the values inside the range, in percent.
    """

    def __init__(
        self, shape: Sequence[int], spec: Any, *, percentile: float = 99.9, bins: int = 2048, device: Any = None
    ) -> None:
        super().__init__(shape, spec, bins=bins, device=device)
        if not 50 < percentile <= 100:
            raise ValueError(f"percentile must be above 50 and at most 100, got {percentile}")
        self.percentile = percentile

    def scale(self) -> Scale:
        half, inside = self.counts.shape[1] // 2, self.percentile / 100
        below, above = self.counts[:, :half].flip(1), self.counts[:, half:]  # outwards from 0
        total = self.counts.sum(1, keepdim=True)
        if self.spec.symmetric:
            above = below = above + below
        else:
            inside = (1 + inside) / 2
        ends = []
        for side, other in ((below, total - below.sum(1, keepdim=True)), (above, total - above.sum(1, keepdim=True))):
            within = side.cumsum(1) + (0 if self.spec.symmetric else other)
            reached = torch.searchsorted(within.double(), (total * inside).double())
            ends.append(((reached + 1) * (self.top / half)).view(self.blocks))
        lowest, highest = torch.maximum(-ends[0], self.lowest), torch.minimum(ends[1], self.highest)
        return scale_of_range(lowest, highest, self.spec.format, self.spec.symmetric is True)


class MSEObserver(HistogramObserver):
    """The part of the range seen whose codes leave the least sum of squared errors over the histogram."""

    def scale(self) -> Scale:
        bins, format, symmetric = self.counts.shape[1], self.spec.format, self.spec.symmetric is True
        lowest, highest = self.lowest.view(-1, 1), self.highest.view(-1, 1)
        scale, zero_point = mse_scale(self.centers, lowest, highest, format, (1, bins), symmetric, self.counts)
        return scale.view(self.blocks), None if zero_point is None else zero_point.view(self.blocks)


OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
}


def by_block(x: Tensor, block: tuple[int, int]) -> Tensor:
    """[M, K] -> [I * J, br * bk]: a row a block, ragged tails filled with zeros."""
    (M, K), (br, bk) = x.shape, block
    padded = torch.nn.functional.pad(x, (0, -K % bk, 0, -M % br))
    return padded.reshape(-1, br, padded.shape[1] // bk, bk).transpose(1, 2).reshape(-1, br * bk)


@torch.no_grad()
def initial_scale(x: Tensor, spec: QuantSpec, how: Initial = "minmax") -> Scale:
    """The scale [I, J] and zero point that training starts from.

    A block of zeros asks for no scale: its own would be so small that every weight which leaves zero is out of range,
    and gets no gradient. It starts as wide as the other blocks are on average, or where all are zeros, as wide as
    ``nn.Linear`` draws its weights, 1 / sqrt(K).

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16.
    how : {"minmax", "mse", "lsq"}
        The scale of `quantize_` (C4), that of least squared error, or LSQ's 2 mean|x| / sqrt(Q).
    """
    if how not in ("minmax", "mse", "lsq"):
        raise ValueError(f"initial must be minmax, mse or lsq, got {how!r}")
    symmetric, block = spec.symmetric is True, spec.block(x.shape)
    x = x.detach().float().reshape(matrix_shape(x.shape))
    if how == "lsq" and not symmetric:
        raise ValueError(f"initial must be minmax or mse for a spec with a zero point, got lsq for {spec}")
    lowest, highest = range_of(x, block)
    size = torch.maximum(-lowest, highest)
    alive = size > formats.SCALE_MIN * formats.get(spec.format).max
    width = torch.where(alive, size, 0).sum() / alive.sum()
    width = torch.where(alive.any(), width, max(x.shape[1], 1) ** -0.5)
    lowest, highest = torch.where(alive, lowest, -width), torch.where(alive, highest, width)
    widest = scale_of_range(lowest, highest, spec.format, symmetric)
    if how == "minmax":
        scale, zero_point = widest
        if spec.search != "minmax":
            how_kept: dict[str, Any] = {"method": spec.search, "kept": spec.scale}
            scale = search_scale(x, scale, spec.format, block=block, zero_point=zero_point, **how_kept)
        return scale, zero_point
    if how == "lsq":
        uniform = width / math.sqrt(formats.get(spec.format).max)  # half of it is the mean
        return torch.where(alive, lsq_scale(x, spec.format, block), uniform), None
    return mse_scale(x, lowest, highest, spec.format, block, symmetric)  # the wider of two, so the whole one for zeros
