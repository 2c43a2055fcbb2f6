"""Inspect a checkpoint, and measure the distance between two: some rows of a tensor in memory at a time."""

from __future__ import annotations

import fnmatch
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from quantlib import ops
from quantlib.checkpoint.files import NAMES, WORKERS, Reader, Slot
from quantlib.checkpoint.folder import Model
from quantlib.checkpoint.foreign import Found, find
from quantlib.nn.functional import slabs
from quantlib.ops.check import dtype_name, dtype_of
from quantlib.spec import QuantSpec

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
EXPONENTS = 256  # bins of a histogram of magnitudes, one for each exponent of float32


@dataclass
class TensorReport:
    """A tensor of a checkpoint.

    Attributes
    ----------
    name, shape, format : str, tuple, str
        Those of the float weight if it is quantized, with the spec, or the library and why no spec holds it.
    bytes : int
        With its scales.
    scale_min, scale_max : float, optional
        The range of the scales of codes.
    codes_used, codes : int, optional
        How many different codes there are, and how many its format has.
    clipped, zeroed : float, optional
        The shares of codes that are the lowest or the highest, and of values that are 0.
    nonfinite : int
        Values that are infinite or NaN.
    least, most : float
        The range of the values, those aside.
    histogram : list of int
        How often each code comes, the lowest first; of floats, how often each exponent does: entry e counts
        magnitudes in [2^(e - 127), 2^(e - 126)), the first one all that are smaller.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    scale_min: float | None = None
    scale_max: float | None = None
    codes_used: int | None = None
    codes: int | None = None
    clipped: float | None = None
    zeroed: float = 0.0
    nonfinite: int = 0
    least: float = math.inf
    most: float = -math.inf
    histogram: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)


@dataclass
class Difference:
    """A tensor that two checkpoints have.

    Attributes
    ----------
    name, shape, formats : str, tuple, (str, str)
    sqnr_db : float
        10 log10 of the sum of squares of A over that of A - B; infinite where they are equal.
    cosine : float
    relative : float
        The norm of A - B over that of A: what a tolerance is compared with.
    largest : float
        The largest |A - B|.
    ulp : int
        The largest distance in representable values, of the dtype of both, or of float32 where that differs.
    differ : int
        Values that are not equal.
    output_db : float, optional
        The same ratio as sqnr_db of x A^T to x (A - B)^T for given inputs x of the layer.
    histogram : list of int
        Exponents of |A - B|, as in `TensorReport`.
    """

    name: str
    shape: tuple[int, ...]
    formats: tuple[str, str]
    sqnr_db: float
    cosine: float
    relative: float
    largest: float
    ulp: int
    differ: int
    output_db: float | None = None
    histogram: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)


@dataclass
class TokenDivergence:
    """The difference of the next-token distributions of two language models, over all places of the given texts.

    Attributes
    ----------
    tokens : int
        Places.
    kl, kl_max : float
        The divergence KL(A || B) in nats: the mean, and the largest.
    top1 : float
        The share of places where both find the same token most likely.
    """

    tokens: int
    kl: float
    kl_max: float
    top1: float


@dataclass
class Comparison:
    """The comparison of two checkpoints: the tensors of both, and the names that only one of them has."""

    tensors: list[Difference] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)  # of different shapes
    tokens: TokenDivergence | None = None

    def exceeds(self, tolerance: float) -> list[str]:
        """Return a line for each difference that is larger than ``tolerance``."""
        lines = [
            f"{d.name}: {d.relative:.3g} apart"
            for d in self.tensors
            if not d.relative <= tolerance  # NaN exceeds anything
        ]
        lines += [
            f"{name}: only in {which}" for which in "AB" for name in (self.only_a if which == "A" else self.only_b)
        ]
        return lines + self.misfits

    def as_dict(self) -> dict[str, Any]:
        """Return a dict for JSON."""
        return asdict(self)


def inspect_checkpoint(
    path: str | Path, *, only: Sequence[str] = (), progress: Progress | None = None
) -> list[TensorReport]:
    """Every tensor of a checkpoint, whoever quantized it.

    Parameters
    ----------
    path : path
        A model folder or a safetensors file.
    only : sequence of str
        Shell patterns of names; all by default.
    progress : callable (name, bytes done, bytes in all), optional

    Raises
    ------
    FileNotFoundError, ValueError
        As for `convert_file`; ValueError also for a pattern that no tensor matches.
    """
    with Model.open(Path(path)) as model:
        every = entries_of(model)
        check_patterns(only, every)
        entries = [e for name, e in every.items() if not only or matches(name, only)]
        return in_threads(report_of, entries, [sizes_of(e, model) for e in entries], progress)


def compare_checkpoints(
    a: str | Path,
    b: str | Path,
    *,
    inputs: str | Path | None = None,
    only: Sequence[str] = (),
    progress: Progress | None = None,
) -> Comparison:
    """Measure how far the weights of ``b`` are from those of ``a``, both decoded as their own libraries do.

    Parameters
    ----------
    a, b : path
        Model folders or safetensors files of any format that `convert_file` reads, or of floats.
    inputs : path, optional
        A safetensors file with inputs x [..., K] of layers, under the name of the layer or of its weight; and with
        ``input_ids`` [B, T], integers, for which both folders are loaded by transformers, one after the other, and
        their next-token distributions are compared.
    only, progress
        As for `inspect_checkpoint`.

    Raises
    ------
    FileNotFoundError, ValueError
        As for `convert_file`; ValueError also for inputs that do not fit, for a pattern that no tensor matches, and for
        two checkpoints that have no tensor in common.
    """
    with Model.open(Path(a)) as model_a, Model.open(Path(b)) as model_b:
        of_a, of_b = entries_of(model_a), entries_of(model_b)
        check_patterns(only, [*of_a, *of_b])
        if not of_a.keys() & of_b.keys():
            first_a, first_b = (repr(next(iter(names), "no tensor")) for names in (of_a, of_b))
            raise ValueError(f"{b} must have a tensor of {a}, such as {first_a}, got none of them: it has {first_b}")
        names = [name for name in of_a if not only or matches(name, only)]
        found = Comparison(only_b=[name for name in of_b if name not in of_a and (not only or matches(name, only))])
        xs = read_inputs(inputs, of_a)
        pairs: list[tuple[Found, Found, Tensor | None]] = []
        for name in names:
            if name not in of_b:
                found.only_a.append(name)
            elif of_a[name].float_shape != of_b[name].float_shape:
                shapes = f"{list(of_a[name].float_shape)} in A, {list(of_b[name].float_shape)} in B"
                found.misfits.append(f"{name}: {shapes}")
            else:
                pairs.append((of_a[name], of_b[name], xs.get(name)))
        costs = [sizes_of(x, model_a) + sizes_of(y, model_b) for x, y, _ in pairs]
        found.tensors = in_threads(difference_of, pairs, costs, progress)
    if IDS in xs:
        found.tokens = divergence_of_tokens(Path(a), Path(b), xs[IDS])
    return found


def divergence_of_tokens(a: Path, b: Path, ids: Tensor) -> TokenDivergence:
    """Compare two folders that AutoModelForCausalLM loads; one of them is in memory at a time."""
    logits = [log_probabilities(path, ids) for path in (a, b)]
    p, q = logits[0].double(), logits[1].double()
    if p.shape != q.shape:
        raise ValueError(f"B must have {p.shape[-1]} words as A has, got {q.shape[-1]}")
    kl = (p.exp() * (p - q)).nan_to_num(0.0).sum(-1)  # a word that cannot come counts 0
    return TokenDivergence(
        kl.numel(), float(kl.mean()), float(kl.max()), float((p.argmax(-1) == q.argmax(-1)).float().mean())
    )


@torch.no_grad()
def log_probabilities(path: Path, ids: Tensor) -> Tensor:
    """[B, T, V] float32"""
    try:
        import transformers

        importlib.import_module("quantlib.hf")  # which has transformers load codes of quantlib
    except ImportError as error:
        raise ImportError(f"{IDS} need transformers to load {path}: {error}") from None
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path)
    model.eval()
    return model(input_ids=ids).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def check_patterns(only: Sequence[str], names: Iterable[str]) -> None:
    """Check that each pattern of ``only`` matches a name: a comparison of nothing finds no difference."""
    names = list(names)
    for pattern in only:
        if not any(matches(name, [pattern]) for name in names):
            example = f", such as {names[0]!r}" if names else ""
            raise ValueError(f"only must be patterns of names of tensors{example}, got {pattern!r}, which matches none")


def matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def entries_of(model: Model) -> dict[str, Found]:
    """Every weight and float tensor of a model by the name that the float model has."""
    found = {weight.name: weight for weight in find(model.readers, model.config)}
    taken = {part for weight in found.values() for part in weight.parts}
    for reader in model.readers:
        for name, slot in reader.slots.items():
            if name not in taken and slot.dtype.is_floating_point:
                found[name] = as_found(reader, slot)
    return found


def as_found(reader: Reader, slot: Slot) -> Found:
    """A float tensor."""
    N, K = (slot.shape[0], math.prod(slot.shape[1:])) if len(slot.shape) > 1 else (1, math.prod(slot.shape))

    def values(rows: slice) -> Tensor:
        x = reader.rows(slot.name, rows) if len(slot.shape) > 1 else reader.read(slot.name)
        return x.view(-1, K) if x.numel() else x.reshape(rows.stop - rows.start, K)

    return Found(slot.name, "", (N, K), slot.dtype, (slot.name,), values=values, float_shape=slot.shape or (1,))


def sizes_of(entry: Found, model: Model) -> int:
    return sum(reader.slots[part].nbytes for reader in model.readers for part in entry.parts if part in reader.slots)


def format_of(entry: Found) -> str:
    """The spec, with the library that it comes from; the dtype of a float."""
    if entry.spec is not None:
        return str(entry.spec) if entry.method == "quantlib" else f"{entry.spec} ({entry.method})"
    return entry.method or dtype_name(entry.dtype)


def read_inputs(path: str | Path | None, entries: dict[str, Found]) -> dict[str, Tensor]:
    """Name of a weight -> inputs [M, K] of its layer."""
    if path is None:
        return {}
    found = {}
    with Reader(Path(path)) as reader:
        for name, slot in reader.slots.items():
            if name == IDS and slot.dtype in (torch.int64, torch.int32) and len(slot.shape) == 2:
                found[name] = reader.read(name).long()
                continue
            weight = next(
                (w for w in (name, f"{name}.weight", f"{name.removesuffix('.input')}.weight") if w in entries), None
            )
            if (
                weight is None
                or not slot.shape
                or slot.shape[-1] != entries[weight].shape[1]
                or slot.dtype not in FLOATS
            ):
                expected = "[..., K] floats of a layer of both checkpoints"
                raise ValueError(
                    f"{path}: {name} must be inputs {expected}, got {NAMES[slot.dtype]} {list(slot.shape)}"
                )
            found[weight] = reader.read(name).reshape(-1, slot.shape[-1]).float()
    return found


IDS = "input_ids"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def rows_of(*entries: Found) -> Iterator[slice]:
    """Slabs of rows that begin where a block of each entry does."""
    (N, K), step = entries[0].shape, 1
    for entry in entries:
        if entry.spec is not None and entry.spec.scaled:
            step = math.lcm(step, entry.spec.block(entry.shape)[0])
    yield from slabs(N, K, step if step < N else max(N, 1))


def report_of(entry: Found) -> TensorReport:
    found = TensorReport(entry.name, entry.float_shape, format_of(entry), 0)
    spec, zeros, clipped, scales = entry.spec, 0, 0, (math.inf, -math.inf)
    size = math.prod(entry.shape)
    counts = torch.zeros(EXPONENTS, dtype=torch.int64, device="cpu")
    low = 0
    if spec is not None and spec.row.bits <= 8:
        low = spec.row.code_range[0]
        counts = torch.zeros(1 << spec.row.bits, dtype=torch.int64, device="cpu")
    for rows in rows_of(entry) if size else ():
        y = entry.decoded(rows, torch.float32)
        least, most = (float(value) for value in y.aminmax())
        if not math.isfinite(most - least):  # an infinity, or NaN, which spreads
            finite = y.isfinite()
            found.nonfinite += int((~finite).sum())
            y = torch.where(finite, y, 0)
            least, most = (float(value) for value in y.aminmax())
        found.least, found.most = min(found.least, least), max(found.most, most)
        zeros += y.numel() - int(y.count_nonzero())
        if spec is not None and entry.codes is not None and len(counts) < 1 << 16 and spec.row.bits <= 8:
            weight = entry.codes(rows)
            counts += histogram_of(weight.codes, spec.format, entry.shape[1], low, len(counts))
            if weight.scale is not None:
                low_scale, high_scale = weight.scale.float().aminmax()  # min of E8M0 does not exist
                scales = min(scales[0], float(low_scale)), max(scales[1], float(high_scale))
        else:
            counts += exponents_of(y)
    entry.forget()
    found.zeroed = zeros / size if size else 0.0
    found.histogram = counts.tolist()
    if spec is not None and spec.row.bits <= 8:
        found.codes_used, found.codes = int((counts > 0).sum()), len(counts)
        clipped = int(counts[ends_of(spec, low, len(counts))].sum())
        found.clipped = clipped / size if size else 0.0
        found.scale_min, found.scale_max = scales if scales[0] <= scales[1] else (None, None)
    return found


def ends_of(spec: QuantSpec, low: int, bins: int) -> Tensor:
    """Return a mask of the codes with the least or greatest value, or beyond -max of a symmetric format."""
    index = torch.arange(bins, device="cpu")
    if not spec.symmetric:
        return (index == 0) | (index == bins - 1)
    codes = (index + low).to(torch.int8 if low < 0 else torch.uint8)
    row = codes[None]
    stored = ops.pack(row, spec.format) if spec.row.packed else row.view(dtype_of(spec.row))
    one = torch.ones(1, 1, dtype=torch.float32, device="cpu")
    y = ops.dequantize(stored, one, spec.format, block=(1, bins), size=bins).flatten()
    finite = torch.where(y.isfinite(), y, 0)
    return (finite == finite.max()) | (finite == finite.min()) | (finite <= -finite.max())


def histogram_of(codes: Tensor, format: str, K: int, low: int, bins: int) -> Tensor:
    """Count each code, the lowest first; codes of floats are ordered by their bits."""
    if codes.dtype == torch.uint8 and bins < 256:
        codes = ops.unpack(codes, format, K)
    counts = torch.bincount(codes.view(torch.uint8).flatten(), minlength=256)
    return torch.roll(counts, -low)[:bins]  # a negative code is that much below 256 as a byte


def exponents_of(y: Tensor) -> Tensor:
    """Count each exponent: see `TensorReport.histogram`."""
    exponents = (y.contiguous().flatten().view(torch.int32) >> 23).to(torch.uint8)  # whose ninth bit is the sign
    return torch.bincount(exponents, minlength=EXPONENTS)


def difference_of(pair: tuple[Found, Found, Tensor | None]) -> Difference:
    a, b, x = pair
    dtype = a.dtype if a.dtype == b.dtype and a.dtype in FLOATS else torch.float32
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    signal = noise = other = product = largest = 0.0
    out_signal = out_noise = 0.0
    ulp = differ = 0
    counts = torch.zeros(EXPONENTS, dtype=torch.int64, device="cpu")
    for rows in rows_of(a, b) if math.prod(a.shape) else ():
        p, q = (entry.decoded(rows) for entry in (a, b))
        wide_p, wide_q = p.to(wide), q.to(wide)
        error = wide_p - wide_q
        worst = max((abs(float(value)) for value in error.aminmax()), key=lambda v: math.inf if math.isnan(v) else v)
        if not worst < math.inf:
            error[wide_p == wide_q] = 0  # infinities that are equal
            error[wide_p.isnan() & wide_q.isnan()] = 0
            worst = float(error.abs().max())
        signal += dot(wide_p, wide_p)
        other += dot(wide_q, wide_q)
        product += dot(wide_p, wide_q)
        differ += int(error.count_nonzero())
        largest = math.nan if math.isnan(worst) or math.isnan(largest) else max(largest, worst)
        counts += exponents_of(torch.nan_to_num(error).float())
        if worst != 0:
            noise += dot(error, error)
            ulp = max(ulp, steps_between(p.to(dtype), q.to(dtype)))
        if x is not None:
            out_signal += float((x @ wide_p.float().T).double().square().sum())
            out_noise += float((x @ error.float().T).double().square().sum())
    for entry in (a, b):
        entry.forget()
    return Difference(
        a.name,
        a.float_shape,
        (format_of(a), format_of(b)),
        decibels(signal, noise),
        product / math.sqrt(signal * other) if signal * other > 0 else float(signal == other),
        math.sqrt(noise / signal) if signal > 0 else (0.0 if noise == 0 else math.inf),
        largest,
        ulp,
        differ,
        None if x is None else decibels(out_signal, out_noise),
        counts.tolist(),
    )


def dot(p: Tensor, q: Tensor) -> float:
    """The sum of p * q, in float32 where that keeps its range."""
    p, q = p.flatten(), q.flatten()
    found = float(torch.dot(p, q))
    return found if 1e-20 < abs(found) < 1e30 else float(torch.dot(p.double(), q.double()))


def decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf and noise < math.inf else math.nan


def steps_between(p: Tensor, q: Tensor) -> int:
    """The largest number of representable values from p to q; of NaN and anything else, from infinity."""
    integer = {8: torch.int64, 4: torch.int32, 2: torch.int16}[p.dtype.itemsize]

    def ordered(t: Tensor) -> Tensor:
        bits = torch.where(t.isnan(), torch.inf, t).contiguous().view(integer).to(torch.int64)
        lowest = -(1 << (8 * t.dtype.itemsize - 1))
        return torch.where(bits < 0, lowest - bits, bits)

    return int((ordered(p) - ordered(q)).abs().max()) if p.numel() else 0


def in_threads(
    make: Callable[[Any], T], items: Sequence[Any], costs: Sequence[int], progress: Progress | None
) -> list[T]:
    """``make`` of each item, in order, a few at a time."""
    threads, found, done, total = torch.get_num_threads(), [], 0, sum(costs)
    pool = ThreadPoolExecutor(min(max(threads, 1), WORKERS), "quantlib", torch.set_num_threads, (1,))
    try:
        for item, made, cost in zip(items, pool.map(make, items), costs, strict=True):
            found.append(made)
            done += cost
            if isinstance(made, TensorReport):
                made.bytes = cost
            if progress is not None:
                entry = item if isinstance(item, Found) else item[0]
                progress(entry.name, done, total)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return found
