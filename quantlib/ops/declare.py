"""Make every registration of an op from two functions: the check of its arguments, and the launch of a kernel.

Both take the arguments of the schema by name, those of a weight and of an epilogue as one record each: `Binder`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlib import backends, formats
from quantlib.backends.packing import wide_zero_points
from quantlib.backends.weight import Epilogue, QuantizedWeight
from quantlib.ops.check import (
    TARGETS,
    Block,
    Result,
    check_dense,
    check_format,
    check_outs,
    check_size,
    check_tensor,
    fail,
    last_size,
    looks,
    overlap,
)
from quantlib.ops.eager import eager, into
from quantlib.ops.explain import worded
from quantlib.ops.prepared import MOST, Prepared, likeness_function, prepare
from quantlib.ops.sharding import register_if_imported
from quantlib.spec import matrix_shape

Kernel = Callable[..., None]
Arguments = dict[str, Any]


class Binder:
    """The arguments of a call by the names of the schema, with one record for a weight, and one for an epilogue.

    ``codes`` or ``tiles``, ``scale``, ``format``, ``block``, ``zero_point`` and ``size`` of an op that reads a weight
    become ``weight``, a `QuantizedWeight`; ``bias``, ``activation`` and ``dtype`` of an op with an activation become
    ``epilogue``, an `Epilogue`. Each stands where the first of its arguments does. A ``format`` is its row of the
    table, one of ``accepted``.
    """

    def __init__(self, overload: str, accepted: Sequence[str] = TARGETS) -> None:
        self.op, self.accepted = overload.partition(".")[0], accepted
        packet, kind = getattr(torch.ops.quantlib, self.op), overload.partition(".")[2]
        self.schema = getattr(packet, kind or "default")._schema.arguments
        self.names = [a.name for a in self.schema]
        self.defaults = {a.name: a.default_value for a in self.schema if a.has_default_value()}
        self.tiled, self.grouped = "tiles" in self.names, "offsets" in self.names
        self.x = next((name for name in ("x", "x_codes") if name in self.names), None)
        reads = "codes" in self.names or self.tiled
        of_weight = ("codes", "tiles", "scale", "format", "block", "zero_point", "size") if reads else ()
        of_epilogue = Epilogue._fields if "activation" in self.names else ()
        records = dict.fromkeys(of_weight, "weight") | dict.fromkeys(of_epilogue, "epilogue")
        order = dict.fromkeys(records.get(name, name) for name in self.names)
        make = {"weight": self._weight, "epilogue": self._epilogue}
        self.order = [(name, make.get(name) or operator.itemgetter(name)) for name in order]

    def __call__(self, args: Sequence[Any]) -> Arguments:
        """Bound arguments of the positional ``args``, the last of which may be left to their defaults."""
        given = dict(zip(self.names, args, strict=False))
        return self.bound(given if len(args) == len(self.names) else self.defaults | given)

    def bound(self, given: Arguments) -> Arguments:
        """Bound arguments of those of the schema, by their names."""
        if "format" in given:
            given["format"] = check_format(self.op, given["format"], self.accepted)
        return {name: of(given) for name, of in self.order}

    def _weight(self, given: Arguments) -> QuantizedWeight:
        scale, format, block, zero_point = given["scale"], given["format"], tuple(given["block"]), given["zero_point"]
        if self.tiled:  # of which a schema says N, and calls it size
            shape = given["size"], last_size(self.op, "x", given["x"])
            return QuantizedWeight(given["tiles"], scale, format, block, zero_point, shape, "tiles")
        codes = given["codes"]
        if self.grouped and codes.dim() != 3:
            fail(self.op, "codes", "[E, N, K], a matrix of each expert", list(codes.shape))
        if self.x is None:
            K = check_size(self.op, matrix_shape(codes.shape)[1], format, given.get("size"))
        else:
            K = last_size(self.op, self.x, given[self.x])
        N = codes.shape[-2] if codes.dim() == 2 or self.grouped else matrix_shape(codes.shape)[0]
        return QuantizedWeight(codes, scale, format, block, zero_point, (N, K))

    def _epilogue(self, given: Arguments) -> Epilogue:
        return Epilogue(given["bias"], given["activation"], given.get("dtype"))


def launch_matrices(kernel: Kernel, outs: list[Tensor], **arguments: Any) -> None:
    """Call ``kernel(*arguments, *outs)`` with tensors as contiguous matrices, and blocks inside them."""
    if "block" in arguments:
        _, _, arguments["block"] = matrices(arguments["x"].shape, arguments["block"])
    if (z := arguments.get("zero_point")) is not None and z.dtype != torch.float32:  # which fake_quantize learns
        arguments["zero_point"] = wide_zero_points(z, arguments["format"], arguments["scale"].shape[1])
    if "scale" in arguments and arguments["scale"].dtype == torch.float8_e8m0fnu:
        arguments["scale"] = arguments["scale"].float()
    kernel(*map(_ready, arguments.values()), *map(_matrix, outs))


def _ready(value: Any) -> Any:
    if isinstance(value, (QuantizedWeight, Epilogue)):
        return value.for_kernel()
    return _matrix(value.contiguous()) if isinstance(value, Tensor) else value


def _matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.view(matrix_shape(x.shape))


def declare(
    overload: str,
    results: Callable[..., list[Result]],
    launch: Callable[..., None] = launch_matrices,
    accepted: Sequence[str] = TARGETS,
    differentiable: bool = False,
) -> tuple[Any, Any]:
    """Attach Python kernels, shape functions and batching rule to ``overload`` and to its out form: both overloads.

    Parameters
    ----------
    results : (**arguments) -> the shape and the dtype of each result
        Raises for bad arguments, which are as `Binder` binds them.
    launch : (kernel, outs, **arguments)
        Hands contiguous matrices to a backend's kernel, which writes into ``outs``.
    accepted : sequence of str
        Names of formats.
    differentiable : bool
        True if the op has an autograd kernel (autograd.py), which a call that records nothing goes around.
    """
    op, _, kind = overload.partition(".")
    out_overload = f"{op}.{kind + '_' if kind else ''}out"
    names = re.findall(r"Tensor\(\w!\) (\w+)", backends.SCHEMAS[out_overload])
    packet = getattr(torch.ops.quantlib, op)
    function, out_function = getattr(packet, kind or "default"), getattr(packet, out_overload.partition(".")[2])
    bound = Binder(overload, accepted)
    optional = [str(a.type) != "Tensor" for a in bound.schema]  # or no tensor

    def checked(args: Sequence[Any]) -> tuple[Arguments, list[Result]]:
        for name, may_be_none, value in zip(bound.names, optional, args, strict=False):  # the rest are defaults
            if not (value.layout is torch.strided if isinstance(value, Tensor) else may_be_none):
                check_dense(op, name, value)
        arguments = bound(args)
        return arguments, results(**arguments)

    def empty(results: list[Result], args: Sequence[Any]) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device=args[0].device) for shape, dtype in results]

    def given(args: Sequence[Any], outs: dict[str, Tensor]) -> dict[str, Any]:
        return {**dict(zip(bound.names, args, strict=False)), **outs}

    def fake(*args: Any) -> Any:
        register_if_imported()  # DTensor asks for shapes before it asks for a rule
        return _result(empty(checked(args)[1], args))

    def fake_out(*args: Any, **outs: Tensor) -> None:
        check_results(args, outs)

    def check_results(args: Sequence[Any], outs: dict[str, Tensor]) -> Arguments:
        arguments, expected = checked(args)
        for name, result in zip(names, expected, strict=True):
            check_dense(op, name, outs[name])
            check_tensor(op, name, outs[name], result, args[0].device)
        return arguments

    likeness_of = likeness_function(bound.schema)

    def bind(kernel: Any) -> Callable[..., Any]:
        # by what calls have in common; None where nothing can be prepared, as where a tensor is missing or not dense
        known: dict[Any, Prepared | None] = {None: None}

        def call(*args: Any) -> Any:
            try:
                likeness: Any = likeness_of(*args)
                prepared = known.get(likeness)
            except (AttributeError, RuntimeError, TypeError):
                likeness = prepared = None
            try:
                if prepared is None:
                    return _result(first(likeness, args))
                device = args[0].device
                # of which torch finds the arguments sooner than those of `torch.empty`
                outs = [
                    torch.empty_strided(shape, strides, dtype=dtype, device=device)
                    for shape, strides, dtype in prepared.results
                ]
                prepared.kernel(*prepared.arguments(*outs, *args))
            except Exception as error:
                raise worded(op, given(args, {}), error) from error
            return outs[0] if len(outs) == 1 else tuple(outs)

        def first(likeness: Any, args: Sequence[Any]) -> list[Tensor]:
            """Call the kernel, and prepare the calls like this one."""
            before = looks()
            arguments, expected = checked(args)
            outs, calls = empty(expected, args), []

            def noted(*given: Any) -> None:
                calls.append(given)
                kernel(*given)

            if outs[0].numel():
                launch(kernel if likeness in known else noted, outs, **arguments)
            if likeness not in known:
                if len(known) > MOST:
                    known.clear()
                    known[None] = None
                can_be = len(calls) == 1 and before == looks()
                known[likeness] = prepare(bound.schema, args, outs, kernel, calls[0]) if can_be else None
            return outs

        return call

    def bind_out(kernel: Kernel) -> Callable[..., Any]:
        def write(args: Sequence[Any], outs: dict[str, Tensor]) -> None:
            arguments = check_results(args, outs)
            check_outs(op, outs)
            results = [outs[name] for name in names]
            if not results[0].numel():
                return
            read = [(n, a) for n, a in zip(bound.names, args, strict=False) if isinstance(a, Tensor)]
            dense = [
                out
                if out.is_contiguous() and not any(overlap(out, a) and not in_place(name, out, n, a) for n, a in read)
                else torch.empty_like(out, memory_format=DENSE)
                for name, out in zip(names, results, strict=True)
            ]
            launch(kernel, dense, **arguments)
            for out, written in zip(results, dense, strict=True):
                if written is not out:
                    out.copy_(written)

        def call_out(*args: Any, **outs: Tensor) -> None:
            try:
                write(args, outs)
            except Exception as error:
                raise worded(op, given(args, outs), error) from error

        return call_out

    def out_of_negative(*args: Any, **outs: Tensor) -> None:
        """Resolve tensors that are stored as their negatives, which torch does only for ops that return one."""
        plain = {name: out.resolve_neg() for name, out in outs.items()}
        out_function(*(a.resolve_neg() if isinstance(a, Tensor) else a for a in args), **plain)
        for name, out in outs.items():
            if plain[name] is not out:
                out.copy_(plain[name])

    def refuse_layouts(*args: Any, **outs: Tensor) -> None:
        for name, value in given(args, outs).items():
            if isinstance(value, Tensor):
                check_dense(op, name, value)

    def refuse_examples(*args: Any, **outs: Tensor) -> None:
        fail(op, names[0], "left out under vmap", "a tensor")

    backends.attach(overload, bind, fake)
    backends.attach(out_overload, bind_out, fake_out)
    backends.implement(out_overload, out_of_negative, "Negative")
    backends.implement(out_overload, refuse_examples, "FuncTorchBatched")
    for name in (overload, out_overload):
        for key in NESTED:
            backends.implement(name, refuse_layouts, key)

    def each(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        """One call an example: a block never spans two of them."""
        refuse_layouts(*args)
        if not info.batch_size:
            shapes = (
                torch.empty(a.movedim(d, 0).shape[1:], dtype=a.dtype, device="meta") if isinstance(d, int)
                else a.to("meta") if isinstance(a, Tensor) else a
                for a, d in zip(args, in_dims, strict=True)
            )  # fmt: skip
            device = next(a.device for a in args if isinstance(a, Tensor))
            none = [
                torch.empty((0, *shape), dtype=dtype, device=device) for shape, dtype in results(**bound(list(shapes)))
            ]
            return (none[0], 0) if len(none) == 1 else (tuple(none), (0,) * len(none))
        calls = []
        for n in range(info.batch_size):
            example = (a.select(d, n) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
            calls.append(function(*example))
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(names)

    backends.vmap(overload, each)
    return eager(function) if differentiable else function, into(op, out_function)


def in_place(name: str, out: Tensor, argument: str, value: Tensor) -> bool:
    """True if the result ``m_out`` is the argument ``m`` itself: a kernel reads its elements before it writes them."""
    if name != f"{argument}_out":
        return False
    return (out.data_ptr(), out.shape, out.stride()) == (value.data_ptr(), value.shape, value.stride())


DENSE = torch.contiguous_format
NESTED = ("NestedTensorCPU", "NestedTensorCUDA", "AutogradNestedTensor")  # dispatch keys without a kernel otherwise


def matrices(shape: Sequence[int], block: Block) -> tuple[int, int, tuple[int, int]]:
    """Return M, K and the block clamped to them, for a non-empty x of ``shape``."""
    M, K = matrix_shape(shape)
    return M, K, (min(block[0], M), min(block[1], K))


def format_name(format: Any) -> str:
    """The name of a format given by name or as a dtype; what names there are is for the op to say."""
    return format if type(format) is str else formats.get(format).name


def whole_axes(op: str, x: Tensor, block: Block, size: int | None = None) -> Block:
    """``block`` with -1 replaced by the size of its axis of x viewed as [M, K]; ``size`` stands in for K."""
    if not isinstance(block, (tuple, list)):
        fail(op, "block", "two sizes >= 1", repr(block))
    if -1 not in block or len(block) != 2:
        return block
    br, bk = block
    if br == -1:
        br = max(matrix_shape(x.shape)[0], 1)
    if bk == -1:
        bk = max((x.shape[-1] if x.dim() else 1) if size is None else size, 1)
    return br, bk


def _result(outs: list[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return outs[0] if len(outs) == 1 else tuple(outs)
