"""op(shard of x) = shard of op(x): what an op computes of DTensors without communication.

An axis of n elements is cut over ``parts`` ranks as ``torch.chunk`` cuts it, every ceil(n / parts). An op follows a cut
that goes through no block, and through no byte of packed codes: the scales are cut with their blocks, or are whole on
every rank where one block spans the axis. Arguments that are cut in another way are gathered first. Only the codes of
a product are not, which are cut so that they need not be gathered: that is an error.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantlib import backends, formats
from quantlib.formats import Format
from quantlib.ops.check import fail, is_sharded
from quantlib.spec import matrix_shape

DTENSOR = "torch.distributed.tensor"
# Placements on one axis of a mesh: of the results, and of the arguments by name, which are whole where it names none.
Sharding = tuple[Sequence[Any], dict[str, Any]]


def size_of(codes: Tensor, K: int) -> int | None:
    """K as the ``size`` of an op; None where columns are sharded, of which each rank has what its own codes say."""
    return None if cuts_columns(codes) else K


def cuts_columns(x: Any) -> bool:
    """True if x [..., K] is a DTensor of which a rank has a part of each row."""
    return is_sharded(x) and any(p.is_shard(x.dim() - 1) for p in x.placements)


class Matrix(NamedTuple):
    """A tensor viewed as [M, K] and the scales of its blocks."""

    shape: Sequence[int]  # [..., K]
    block: Sequence[int]  # br, bk
    per_byte: int = 1  # elements of a row that share a byte
    blocks_per_byte: int = 1  # blocks of a row whose zero points share a byte

    def scale(self, dim: int, parts: int) -> int | None:
        """The axis of the scales that is cut where ``dim`` of [..., K] is: -1 if none is, None if a block would be."""
        (M, K), last = matrix_shape(self.shape), dim == len(self.shape) - 1
        n, block = (K, self.block[1]) if last else (M, self.block[0])
        each = -(-self.shape[dim] // parts)
        if last and (K % self.per_byte or each % self.per_byte):
            return None
        if block >= n:
            return -1
        if not last:
            if math.prod(self.shape[:dim]) > 1:  # rows of a rank that are no neighbours
                return None
            inside = math.prod(self.shape[dim + 1 : -1])
            if inside > 1 and self.shape[dim] % parts:  # scales would be cut elsewhere
                return None
            each *= inside
        return None if each % (block * self.blocks_per_byte if last else block) else int(last)


def refusal(weight: Matrix, dim: int, parts: int) -> tuple[str, str] | None:
    """Say what a cut of a weight [N, K] along ``dim`` must be, what came, and a way out; None if all is well."""
    if parts == 1 or weight.scale(dim, parts) is not None:
        return None
    n, block, per_byte = weight.shape[dim], weight.block[dim], weight.per_byte if dim else 1
    block *= weight.blocks_per_byte if dim else 1
    each, words, others = -(-n // parts), ("rows", "columns"), ("ColwiseParallel", "RowwiseParallel")
    cuts_bytes = n % per_byte or each % per_byte
    ways = [f"cut {words[1 - dim]} ({others[1 - dim]})"] if weight.scale(1 - dim, parts) is not None else []
    fits = [p for p in range(parts - 1, 1, -1) if weight.scale(dim, p) is not None]
    ways += [f"use {fits[0]} ranks"] if fits else []
    ways += [] if cuts_bytes else [f"quantize with blocks that divide {each}"]
    expected = f"cut between bytes of {per_byte} codes" if cuts_bytes else f"cut between blocks of {block} {words[dim]}"
    got = f"{n} {words[dim]} over {parts} ranks, {each} each: {', or '.join([*ways, 'leave the layer whole'])}"
    return expected, got


class Call(NamedTuple):
    """The arguments of an op by name: of tensors what a DTensor says of itself."""

    op: str
    given: dict[str, Any]
    mesh: Any

    def __getattr__(self, name: str) -> Any:
        return self.given.get(name)

    @property
    def format_row(self) -> Format:
        return formats.FORMATS[self.given["format"]]

    @property
    def per_byte(self) -> int:
        return self.format_row.per_byte if self.format_row.packed else 1

    @property
    def blocks_per_byte(self) -> int:
        z = self.zero_point
        return 1 if z is None or z.tensor_meta.dtype == torch.int32 else self.per_byte

    @property
    def parts(self) -> list[int]:
        """The number of parts that each axis of the mesh cuts, and that all of them cut together."""
        sizes = tuple(self.mesh.shape)
        return sorted({*sizes, math.prod(sizes)} - {1}) or [1]

    def cuts(self, matrix: Matrix) -> Iterator[tuple[Any, Any]]:
        """Each placement of ``matrix`` that an op follows, with that of its scales."""
        from torch.distributed.tensor import Replicate, Shard

        for dim in range(len(matrix.shape)):
            scales = {matrix.scale(dim, p) for p in self.parts}
            if len(scales) == 1 and (axis := scales.pop()) is not None:
                yield Shard(dim), Replicate() if axis < 0 else Shard(axis)

    def elements(self, name: str = "x") -> Iterator[tuple[Any, Any]]:
        """`cuts` of the values ``name`` [..., K]."""
        return self.cuts(Matrix(self.given[name].shape, self.block, self.per_byte))

    def weight(self) -> dict[int, Any]:
        """Axes of the codes that may be cut, and the placement of the scales then.

        Raises
        ------
        RuntimeError
            Where the codes are cut already, through a block or a byte.
        """
        N, columns = self.codes.shape
        x = next((self.given[name] for name in ("x", "x_codes") if name in self.given), None)
        K = columns * self.per_byte if x is None else x.shape[-1]
        matrix = Matrix((N, K), self.block, self.per_byte, self.blocks_per_byte)
        for dim in range(2):
            parts = math.prod(n for n, p in zip(self.mesh.shape, self.codes.placements, strict=True) if p.is_shard(dim))
            if why := refusal(matrix, dim, parts):
                fail(self.op, "codes", *why)
        return {placement.dim: scale for placement, scale in self.cuts(matrix)}


def of_sums(scale: Any) -> Any:
    """The placement of what is summed over a block, where ``scale`` is that of its scale."""
    from torch.distributed.tensor import Partial

    return Partial() if scale.is_replicate() else scale


def cast(c: Call) -> Iterator[Sharding]:
    from torch.distributed.tensor import Shard

    for dim in range(len(c.x.shape)):
        yield [Shard(dim)], {"x": Shard(dim)}


def compute_scale(c: Call) -> Iterator[Sharding]:
    for x, scale in c.elements():
        if scale.is_shard():  # NaN would be lost in a maximum over ranks
            yield [scale, scale], {"x": x}


def search_scale(c: Call) -> Iterator[Sharding]:
    from torch.distributed.tensor import Replicate, Shard

    for x, scale in c.elements():
        if scale.is_shard():
            energy = Shard(0) if x.dim == len(c.x.shape) - 1 else Replicate()
            yield [scale], {"x": x, "scale": scale, "zero_point": scale, "energy": energy}


def quantize(c: Call) -> Iterator[Sharding]:
    for x, scale in c.elements():
        yield [x], {"x": x, "scale": scale, "zero_point": scale}


def quantize_dynamic(c: Call) -> Iterator[Sharding]:
    for x, scale in c.elements():
        if scale.is_shard():
            yield [x, scale, scale], {"x": x}


def dequantize(c: Call) -> Iterator[Sharding]:
    *rows, columns = c.codes.shape
    for x, scale in c.cuts(Matrix((*rows, c.size or columns * c.per_byte), c.block, c.per_byte, c.blocks_per_byte)):
        if c.size is None or x.dim < len(rows):  # a size is of all columns, not of those of a rank
            yield [x], {"codes": x, "scale": scale, "zero_point": scale}


def dequantize_rows(c: Call) -> Iterator[Sharding]:
    """Rows are cut as their indices are; columns as those of the table, whose rows are gathered."""
    from torch.distributed.tensor import Shard

    last, (N, columns) = len(c.indices.shape), c.codes.shape
    for dim in range(last):
        yield [Shard(dim)], {"indices": Shard(dim)}
    for x, scale in c.cuts(Matrix((N, columns * c.per_byte), c.block, c.per_byte)):
        if c.size is None and x.dim == 1:
            yield [Shard(last)], {"codes": x, "scale": scale, "zero_point": scale}


def fake_quantize_backward(c: Call) -> Iterator[Sharding]:
    for x, scale in c.elements():
        sums = of_sums(scale)
        yield [x, sums, sums], {"dy": x, "x": x, "scale": scale, "zero_point": scale}


def dequant_matmul(c: Call) -> Iterator[Sharding]:
    """The cuts of a product y [..., N] of x [..., K] and codes: rows of x, rows of codes, or the axis of the sum."""
    from torch.distributed.tensor import Partial, Shard

    name = "x" if c.x is not None else "x_codes"
    shape = c.given[name].shape
    last, axes = len(shape) - 1, c.weight()
    for dim in range(last):
        rows = {name: Shard(dim)}
        if c.x_scale is not None:
            axis = Matrix(shape, (1, shape[-1])).scale(dim, c.parts[-1]) if c.x_scale.shape[0] > 1 else -1
            if axis is None:
                continue
            if axis >= 0:
                rows |= {"x_scale": Shard(axis), "x_zero_point": Shard(axis)}
        yield [Shard(dim)], rows
    if 0 in axes:
        yield [Shard(last)], {"codes": Shard(0), "scale": axes[0], "zero_point": axes[0], "bias": Shard(0)}
    if 1 in axes and c.activation is None and c.op != "dynamic_matmul":  # whose scales are of whole rows of x
        yield [Partial()], {
            name: Shard(last), "codes": Shard(1), "scale": axes[1], "zero_point": axes[1], "bias": Partial()
        }  # fmt: skip


def dequant_matmul_backward(c: Call) -> Iterator[Sharding]:
    from torch.distributed.tensor import Partial, Shard

    last, axes = len(c.dy.shape) - 1, c.weight()
    for dim in range(last):
        yield [Shard(dim)], {"dy": Shard(dim)}
    if 0 in axes:
        yield [Partial()], {"dy": Shard(last), "codes": Shard(0), "scale": axes[0], "zero_point": axes[0]}
    if 1 in axes and c.size is None:
        yield [Shard(last)], {"codes": Shard(1), "scale": axes[1], "zero_point": axes[1]}


def dequant_matmul_backward_scale(c: Call) -> Iterator[Sharding]:
    from torch.distributed.tensor import Partial, Shard

    last, axes = len(c.x.shape) - 1, c.weight()
    for dim in range(last):
        yield [Partial()], {"dy": Shard(dim), "x": Shard(dim)}
    for axis, name in enumerate(("dy", "x")):
        if axis in axes:
            scale = axes[axis]
            yield (
                [of_sums(scale)],
                {name: Shard(last), "codes": Shard(axis), "scale": scale, "zero_point": scale},
            )


def gathered(c: Call) -> Iterator[Sharding]:
    """The rule of an op without one: tiles, stacks of experts and optimizer steps are gathered on each rank."""
    return iter(())


RULES: dict[str, Callable[[Call], Iterator[Sharding]]] = {
    "cast": cast,
    "compute_scale": compute_scale,
    "compute_scale.affine": compute_scale,
    "search_scale": search_scale,
    "quantize": quantize,
    "dequantize": dequantize,
    "dequantize_rows": dequantize_rows,
    "quantize_dynamic": quantize_dynamic,
    "quantize_dynamic.affine": quantize_dynamic,
    "fake_quantize": quantize,
    "fake_quantize_backward": fake_quantize_backward,
    "fake_quantize_backward.affine": fake_quantize_backward,
    "dequant_matmul": dequant_matmul,
    "dequant_matmul_backward": dequant_matmul_backward,
    "dequant_matmul_backward_scale": dequant_matmul_backward_scale,
    "scaled_matmul": dequant_matmul,
    "dynamic_matmul": dequant_matmul,
}
_registered: list[str] = []


def register_if_imported() -> None:
    """Give the ops their rules once somebody has imported ``torch.distributed.tensor``, which takes seconds."""
    if not _registered and DTENSOR in sys.modules:
        register()


def register() -> None:
    """Register a rule for every overload that returns its results."""
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    _registered.extend(RULES)
    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for overload in (name for name in backends.SCHEMAS if not name.endswith("out")):
        rule = RULES.get(overload, gathered)
        name, _, kind = overload.partition(".")
        op = getattr(getattr(torch.ops.quantlib, name), kind or "default")
        register_sharding(op)(shardings(op, name, rule, Replicate()))
        # torch would not tell calls by their formats, blocks and dtypes, and take one's placements for another's
        known[op] = RuntimeSchemaInfo(1, needs_pytree=True)


def shardings(op: Any, name: str, rule: Callable[[Call], Iterator[Sharding]], whole: Any) -> Callable[..., Any]:
    """``rule`` as `register_sharding` takes it."""
    names, results = [a.name for a in op._schema.arguments], len(op._schema.returns)

    def of_call(*args: Any) -> list[tuple[list[Any], list[Any]]]:
        given = dict(zip(names, args, strict=False))
        tensors = [key for key, value in given.items() if hasattr(value, "placements")]
        call = Call(name, given, given[tensors[0]].mesh)
        found: list[Sharding] = [([whole] * results, {}), *rule(call)]
        return [(list(outs[:results]), [ins.get(key, whole) for key in tensors]) for outs, ins in found]

    return of_call
