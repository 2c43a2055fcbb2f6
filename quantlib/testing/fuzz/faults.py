"""Changes to a valid call: some change nothing, some may be refused, and some are wrong."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from quantlib.testing.fuzz.draw import Call, Rng, pick


class After(enum.Enum):
    """The outcomes that a call may have after a change."""

    SERVED = "the right bytes"
    SAME = "the right bytes, or an error"
    ANY = "anything but a crash, or an error"
    ERROR = "an error"


@dataclass(frozen=True)
class Fault:
    """A change to one argument, or to the whole call if it has no ``fits``.

    ``change`` gives the new value, and raises where there is none; ``fits`` says to which values it can be done.
    """

    name: str
    after: After
    change: Callable[[Rng, Any], Any]
    fits: Callable[[Any], bool] = lambda value: isinstance(value, Tensor)
    typed: bool = False  # a Python type that the schema of an op does not have


class Plain(torch.Tensor):
    """A subclass that changes nothing."""


# ---- tensors --------------------------------------------------------------------------------------------------------


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def is_strided(value: Any) -> bool:
    """An ordinary tensor, which torch can stack and give a tangent."""
    return type(value) is Tensor and not value.is_nested and value.layout is torch.strided and not value.is_quantized


def spread_out(t: Tensor) -> Tensor:
    """The same values, every other element of memory."""
    return t.new_empty((*t.shape, 2))[..., 0].copy_(t)


def offset(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


def reversed_axes(t: Tensor) -> Tensor:
    axes = tuple(range(t.dim()))[::-1]
    return t.permute(axes).contiguous().permute(axes)


def inference(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def imaginary(t: Tensor) -> Tensor:
    """The same values as the imaginary part of a conjugate: negative and strided."""
    return torch.complex(t, -t).conj().imag


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


def unlike_dtype(rng: Rng, t: Tensor) -> Tensor:
    return t.to(pick(rng, [dtype for dtype in DTYPES if dtype != t.dtype]))


def other_bits(rng: Rng, t: Tensor) -> Tensor:
    """Any bytes: NaN, infinities, negative scales, zero points out of range."""
    raw = torch.from_numpy(rng.integers(0, 256, t.numel() * t.element_size(), np.uint8).view(np.int8))
    return raw.view(t.dtype).view(t.shape)


def filled(rng: Rng, t: Tensor) -> Tensor:
    if t.is_floating_point():
        return torch.full(t.shape, pick(rng, FLOATS)).to(t.dtype)
    info = torch.iinfo(t.dtype)
    return torch.full_like(t, pick(rng, (info.min, info.max, 0, 1)))


def other_shape(rng: Rng, t: Tensor) -> Tensor:
    """A neighbouring shape."""
    axis = int(rng.integers(max(t.dim(), 1)))
    shapes: list[Callable[[], Tensor]] = [
        lambda: t.unsqueeze(0),
        lambda: t.unsqueeze(-1),
        t.flatten,
        lambda: t.narrow(axis, 0, t.shape[axis] - 1),
        lambda: torch.cat([t, t.narrow(axis, 0, 1)], axis),
        lambda: t.select(axis, 0),
        lambda: t.mT,
        lambda: t.new_zeros(0),
        lambda: t.new_zeros([0] * t.dim()),
        lambda: t.new_zeros([1] * 70),
    ]
    new = pick(rng, shapes)()
    if new.shape == t.shape:
        raise ValueError("the same shape")
    return new  # type: ignore[no-any-return]


def huge(rng: Rng, t: Tensor) -> Tensor:
    """More elements than memory or an int64 holds, by strides of 0."""
    sizes = pick(rng, ((2**50, 4), (2**32, 2**31, 0), (2**62, 1), (0, 2**62), (2**31, 2**31)))
    return t.new_zeros(()).expand(sizes) if 0 not in sizes else t.new_empty(sizes)


FLOATS = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, -1.0, 1e-45, 3e38)
DTYPES = tuple(
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"),
        *("float8_e8m0fnu", "int8", "uint8", "int16", "uint16", "int32", "int64", "bool", "complex64", "complex32"),
    )
    if hasattr(torch, name)
)
TENSORS = (
    Fault("every other element of memory", After.SERVED, lambda rng, t: spread_out(t)),
    Fault("off alignment", After.SERVED, lambda rng, t: offset(t)),
    Fault("axes reversed in memory", After.SERVED, lambda rng, t: reversed_axes(t)),
    Fault("a negative view", After.SERVED, lambda rng, t: torch._neg_view(-t), is_float),
    Fault("a part of a conjugate", After.SERVED, lambda rng, t: imaginary(t), lambda t: is_float(t) and t.itemsize > 2),
    Fault("a parameter", After.SERVED, lambda rng, t: torch.nn.Parameter(t, requires_grad=False)),
    Fault("an inference tensor", After.SERVED, lambda rng, t: inference(t)),
    Fault("a subclass of Tensor", After.SERVED, lambda rng, t: t.as_subclass(Plain)),
    Fault("requires a gradient", After.SAME, lambda rng, t: leaf(t), is_float),
    Fault("sparse COO", After.SAME, lambda rng, t: t.to_sparse()),
    Fault("sparse CSR", After.SAME, lambda rng, t: t.to_sparse_csr()),
    Fault("mkldnn", After.SAME, lambda rng, t: t.to_mkldnn()),
    Fault("nested", After.ANY, lambda rng, t: torch.nested.nested_tensor([t, t])),
    Fault("jagged", After.ANY, lambda rng, t: torch.nested.nested_tensor([t, t], layout=torch.jagged)),
    Fault("on meta", After.ANY, lambda rng, t: t.to("meta")),
    Fault("quantized", After.ANY, lambda rng, t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), is_float),
    Fault("another dtype", After.ANY, unlike_dtype),
    Fault("another shape", After.ANY, other_shape),
    Fault("huge", After.ANY, huge),
    Fault("other bytes", After.ANY, other_bits),
    Fault("one value everywhere", After.ANY, filled),
    Fault("a NumPy array", After.ANY, lambda rng, t: t.numpy(), typed=True),
    Fault("a list", After.ANY, lambda rng, t: t.tolist(), typed=True),
    Fault("a number", After.ANY, lambda rng, t: pick(rng, (0, 1.5, True, float("nan"), np.float32(1))), typed=True),
    Fault("None", After.ANY, lambda rng, t: None, typed=True),
    Fault("text", After.ANY, lambda rng, t: "x", typed=True),
    Fault("a dtype", After.ANY, lambda rng, t: t.dtype, typed=True),
)

# ---- everything else ------------------------------------------------------------------------------------------------

TEXTS = ("", "int3", "INT8", "int8 ", "float32", "float64", "int4", "uint8", "tanh", "é", "a\0b", "x" * 5000)
SIZES = (0, -1, -2, 1, 7, 2**31, 2**62, 2**63 - 1, -(2**63))
OBJECTS: tuple[Any, ...] = (
    None,
    3,
    2.5,
    True,
    b"int8",
    [1],
    (),
    {},
    ...,
    float("nan"),
    torch.int8,
    torch.ones(2),
    np.int64(3),
)


def is_sizes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value)


def other_sizes(rng: Rng, value: Any) -> Any:
    return [pick(rng, SIZES) for _ in range(pick(rng, (2, 2, 2, 2, 0, 1, 3)))]


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


OTHERS = (
    Fault("another text", After.ANY, lambda rng, value: pick(rng, TEXTS), lambda value: isinstance(value, str)),
    Fault("other sizes", After.ANY, other_sizes, is_sizes),
    Fault("a tuple", After.SERVED, lambda rng, value: tuple(value), is_sizes),
    Fault("another number", After.ANY, lambda rng, value: pick(rng, (*SIZES, *FLOATS)), is_number),
    Fault(
        "another dtype",
        After.ANY,
        lambda rng, value: pick(rng, DTYPES),
        lambda value: isinstance(value, torch.dtype),
    ),
    Fault(
        "another type",
        After.ANY,
        lambda rng, value: pick(rng, OBJECTS),
        lambda value: not isinstance(value, Tensor) and value is not None,
        typed=True,
    ),
    Fault("a value for None", After.ANY, lambda rng, value: pick(rng, OBJECTS), lambda v: v is None, typed=True),
    Fault(
        "a format's dtype",
        After.SERVED,
        lambda rng, value: getattr(torch, value) if value != "uint8" else torch.uint8,
        lambda value: isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype),
        typed=True,
    ),
)

# ---- results --------------------------------------------------------------------------------------------------------


def over(call: Call, rng: Rng) -> After:
    """A result in the memory of an argument: the argument is read before it is lost, or the call is refused."""
    name = pick(rng, [n for n, v in call.arguments.items() if isinstance(v, Tensor) and n not in call.outs])
    given, (key, at, out) = call.arguments[name], pick(rng, outs_of(call))
    step = int(rng.integers(0, 3)) * max(given.itemsize, out.itemsize)
    size = max(given.nbytes, step + out.nbytes) + 16
    memory = torch.zeros(size // 16 * 16 + 16, dtype=torch.int8)

    def view(t: Tensor, start: int) -> Tensor:
        return memory[start : start + t.nbytes].view(t.dtype).view(t.shape)

    call.arguments[name] = view(given, 0).copy_(given)
    put_out(call, key, at, view(out, step))
    call.faults[-1] += f": {key} over {name}"
    return After.SAME


def overlapping(call: Call, rng: Rng) -> After:
    """Elements of a result that share memory."""
    key, at, out = pick(rng, outs_of(call))
    axis = pick(rng, [d for d, size in enumerate(out.shape) if size > 1 and out.numel()])
    put_out(call, key, at, out.narrow(axis, 0, 1).expand(out.shape))
    call.faults[-1] += f": {key}"
    return After.ERROR


def shared_outs(call: Call, rng: Rng) -> After:
    """Two results in one memory."""
    first, second, *_ = outs_of(call)
    a, b = first[2], second[2]
    memory = torch.zeros(max(a.nbytes, b.nbytes) // 16 * 16 + 16, dtype=torch.int8)
    for key, at, out in (first, second):
        put_out(call, key, at, memory[: out.nbytes].view(out.dtype).view(out.shape))
    return After.ERROR if a.numel() and b.numel() else After.ANY


def outs_of(call: Call) -> list[tuple[str, int | None, Tensor]]:
    """(argument, place in its tuple, tensor) of each result that is written to."""
    found: list[tuple[str, int | None, Tensor]] = []
    for key in call.outs:
        value = call.arguments[key]
        parts = list(enumerate(value)) if isinstance(value, tuple) else [(None, value)]
        found += [(key, at, out) for at, out in parts if isinstance(out, Tensor)]
    return found


def put_out(call: Call, key: str, at: int | None, out: Tensor) -> None:
    if at is None:
        call.arguments[key] = out
    else:
        parts = list(call.arguments[key])
        parts[at] = out
        call.arguments[key] = tuple(parts)


# ---- the call itself ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_dtype() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushing() -> Any:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "under no_grad": torch.no_grad,
    "under inference_mode": torch.inference_mode,
    "under autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "with float64 as default dtype": default_dtype,
    "with meta as default device": partial(torch.device, "meta"),
    "with deterministic algorithms": deterministic,
    "flushing denormals": flushing,
    "under anomaly detection": partial(torch.autograd.set_detect_anomaly, True),
}


def surroundings(call: Call, rng: Rng) -> After:
    name = pick(rng, CONTEXTS)
    call.contexts.append(CONTEXTS[name])
    call.faults[-1] = name
    return After.SERVED


def transformed(call: Call, rng: Rng) -> After:
    """vmap over two examples, each the call's own."""
    name = pick(rng, [n for n, v in call.arguments.items() if is_strided(v)])
    example = call.arguments[name]
    count = int(rng.integers(0, 3))

    def around(function: Callable[..., Any]) -> Any:
        def one(t: Tensor) -> Any:
            return call.function(**{**call.arguments, name: t})

        batch = torch.stack([example] * count) if count else example.new_empty((0, *example.shape))
        results = torch.func.vmap(one)(batch)
        results = results if isinstance(results, tuple) else (results,)
        return tuple(r[0] if count else r for r in results)

    call.around = around
    call.faults[-1] = f"vmap over {count} of {name}"
    return After.SAME if count and not call.outs else After.ANY


def forward_mode(call: Call, rng: Rng) -> After:
    """A forward derivative: right, or an error, but never lost.

    Below the public functions torch drops the tangents of a raw op that has no derivative, as of any operator.
    """
    function: Any = call.function
    if call.raw and not torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "Autograd"):
        raise ValueError("not of a raw op without a derivative")
    name = pick(rng, [n for n, v in call.arguments.items() if is_strided(v) and is_float(v) and n not in call.outs])
    primal = call.arguments[name]

    def around(function: Callable[..., Any]) -> Any:
        import torch.autograd.forward_ad as forward

        with forward.dual_level():
            dual = forward.make_dual(primal.detach().clone(), torch.ones_like(primal))
            results = call.function(**{**call.arguments, name: dual})
            results = results if isinstance(results, tuple) else (results,)
            parts = [forward.unpack_dual(r) for r in results if isinstance(r, Tensor)]
            if parts and primal.numel() and not call.outs and all(part.tangent is None for part in parts):
                raise AssertionError(f"the derivative by {name} is lost")
            return tuple(part.primal for part in parts)

    call.around = around
    call.faults[-1] = f"forward derivative by {name}"
    return After.SAME


def all_fake(call: Call, rng: Rng) -> After:
    """The shapes alone, as torch.compile and torch.export ask for them."""
    if call.around is not None:  # torch itself cannot make a dual number of a FakeTensor
        raise ValueError("not inside of a transform")
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # a later change may put in an ordinary tensor
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            call.arguments[name] = mode.from_tensor(value)
        elif name in call.outs and value is not None:
            call.arguments[name] = tuple(map(mode.from_tensor, value))
    call.contexts.append(lambda: mode)
    return After.ANY


def left_out(call: Call, rng: Rng) -> After:
    name = pick(rng, call.arguments)
    del call.arguments[name]
    call.outs = tuple(out for out in call.outs if out != name)
    call.faults[-1] = f"without {name}"
    return After.ANY


def unknown_argument(call: Call, rng: Rng) -> After:
    call.arguments["axis" if "axis" not in call.arguments else "dim"] = 1
    return After.ERROR


WHOLE: tuple[tuple[str, Callable[[Call, Rng], After]], ...] = (
    ("result over an argument", over),
    ("result over an argument", over),
    ("result that overlaps itself", overlapping),
    ("results in one memory", shared_outs),
    ("surroundings", surroundings),
    ("surroundings", surroundings),
    ("vmap", transformed),
    ("FakeTensors", all_fake),
    ("forward derivative", forward_mode),
    ("an argument left out", left_out),
    ("an unknown argument", unknown_argument),
)


def inflict(call: Call, rng: Rng) -> tuple[After, bool]:
    """Make one change to ``call``; return the outcomes it may have, and True if the schema of an op refuses it."""
    for _ in range(20):  # some do not fit
        call.faults.append("")
        try:
            if rng.random() < 0.25:
                name, change = pick(rng, WHOLE)
                call.faults[-1] = name
                return change(call, rng), name in ("an argument left out", "an unknown argument")
            argument = pick(rng, call.arguments)
            value = call.arguments[argument]
            fault = pick(rng, [f for f in (*TENSORS, *OTHERS) if f.fits(value)])
            if argument in call.outs and fault.name == "an inference tensor":
                continue  # torch's own rule of writing to one
            new = fault.change(rng, value)
            call.faults[-1] = f"{argument}: {fault.name}, {value_of(new)}"
        except Exception:  # not with this value
            call.faults.pop()
            continue
        call.arguments[argument] = new
        after = fault.after
        if argument in call.outs and after is After.SERVED:
            after = After.SAME
        return after, fault.typed
    return After.SERVED, False


def value_of(value: Any) -> str:
    from quantlib.testing.fuzz.draw import shown

    return shown(value)
