"""From two functions, what an op accepts and how a kernel is launched, to every registration the op needs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quantlib import backends, formats
from quantlib.ops.check import Block, Result, check_dense, check_outs, check_tensor, fail, overlap
from quantlib.ops.explain import worded
from quantlib.spec import matrix_shape

Kernel = Callable[..., None]


def declare(overload: str, results: Callable[..., list[Result]], launch: Callable[..., None]) -> tuple[Any, Any]:
    """Attach Python kernels, shape functions and batching rule to ``overload`` and to its out form: both overloads.

    ``results(*args)`` raises on bad arguments and says the shape and dtype of each result. ``launch(kernel, outs,
    *args)`` hands contiguous matrices to a backend's kernel, which writes into ``outs``.
    """
    op, _, kind = overload.partition(".")
    out_overload = f"{op}.{kind + '_' if kind else ''}out"
    names = re.findall(r"Tensor\(\w!\) (\w+)", backends.SCHEMAS[out_overload])
    packet = getattr(torch.ops.quantlib, op)
    function, out_function = getattr(packet, kind or "default"), getattr(packet, out_overload.partition(".")[2])
    inputs = [a.name for a in function._schema.arguments]
    optional = [str(a.type) != "Tensor" for a in function._schema.arguments]  # or no tensor

    def checked(args: Sequence[Any]) -> list[Result]:
        for name, may_be_none, value in zip(inputs, optional, args, strict=False):  # the rest are defaults
            if not (value.layout is torch.strided if isinstance(value, Tensor) else may_be_none):
                check_dense(op, name, value)
        return results(*args)

    def empty(args: Sequence[Any]) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device=args[0].device) for shape, dtype in checked(args)]

    def given(args: Sequence[Any], outs: dict[str, Tensor]) -> dict[str, Any]:
        return {**dict(zip(inputs, args, strict=False)), **outs}

    def fake(*args: Any) -> Any:
        return _result(empty(args))

    def fake_out(*args: Any, **outs: Tensor) -> None:
        for name, expected in zip(names, checked(args), strict=True):
            check_dense(op, name, outs[name])
            check_tensor(op, name, outs[name], expected, args[0].device)

    def bind(kernel: Kernel) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            try:
                outs = empty(args)
                if outs[0].numel():
                    launch(kernel, outs, *args)
            except Exception as error:
                raise worded(op, given(args, {}), error) from error
            return _result(outs)

        return call

    def bind_out(kernel: Kernel) -> Callable[..., Any]:
        def write(args: Sequence[Any], outs: dict[str, Tensor]) -> None:
            fake_out(*args, **outs)
            check_outs(op, outs)
            results = [outs[name] for name in names]
            if not results[0].numel():
                return
            read = [a for a in args if isinstance(a, Tensor)]
            dense = [
                torch.empty_like(out, memory_format=DENSE)
                if not out.is_contiguous() or any(overlap(out, a) for a in read)
                else out
                for out in results
            ]
            launch(kernel, dense, *args)
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
        """Tensors that are kept as their negatives, which torch itself resolves only for ops that return one."""
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
            none = [torch.empty((0, *shape), dtype=dtype, device=device) for shape, dtype in results(*shapes)]
            return (none[0], 0) if len(none) == 1 else (tuple(none), (0,) * len(none))
        calls = []
        for n in range(info.batch_size):
            example = (a.select(d, n) if isinstance(d, int) else a for a, d in zip(args, in_dims, strict=True))
            calls.append(function(*example))
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        return tuple(map(torch.stack, zip(*calls, strict=True))), (0,) * len(names)

    backends.vmap(overload, each)
    return function, out_function


DENSE = torch.contiguous_format
NESTED = ("NestedTensorCPU", "NestedTensorCUDA", "AutogradNestedTensor")  # dispatch keys without a kernel otherwise


def matrices(shape: Sequence[int], block: Block) -> tuple[int, int, tuple[int, int]]:
    """M, K and the block clamped to them, of a non-empty x of ``shape``."""
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
