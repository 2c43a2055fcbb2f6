"""The functions that theorems are about, in each language and as public ops."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from quantlib.formats import SCALE_MIN, FloatFormat, Format, IntFormat
from quantlib.proof import terms, words
from quantlib.proof.cxx import Object, Program, Value
from quantlib.proof.description import IntDescription
from quantlib.proof.terms import Term
from quantlib.proof.theorem import Array, Function
from quantlib.proof.words import TYPES


def number(value: float | bool, type: str) -> Value:
    """A number of Python as a value of C++."""
    return Value(TYPES[type], words.literal(value, TYPES[type]))


def tensor(value: Array | None, dtype: Any = None) -> Any:
    """One element as [1, 1]; None stays."""
    import torch

    if value is None:
        return None

    return torch.from_numpy(np.array(value if dtype is None else value.astype(dtype)).reshape(1, 1))


def bits(y: Any) -> Array:
    """[...] tensor -> its bits, as unsigned integers of its size."""
    import torch

    size = y.element_size()
    raw: Array = y.reshape(-1).contiguous().view(getattr(torch, f"int{8 * size}")).numpy().view(f"uint{8 * size}")
    return raw


def codes(f: Format, values: Array) -> Any:
    """Codes as the ops take them: packed where the format is, with the nibble past the row 0."""
    import torch

    if f.dtype_name != f.name:
        return tensor(values.astype(np.uint8) & ((1 << f.bits) - 1), np.uint8)
    raw = torch.from_numpy(values.astype(f"int{f.bits}").reshape(1, 1))
    return raw.view(getattr(torch, f.dtype_name))


def accepted_zero_point(f: Format, affine: bool = False) -> Callable[..., Term]:
    """The zero points that ops of projections do not refuse; they take any scale."""

    def accepts(**inputs: Term) -> Term:
        z = inputs.get("z")
        return (
            IntDescription(f, affine).holds(z) if affine and isinstance(f, IntFormat) and z is not None else terms.TRUE
        )

    return accepts


def effective(f: Format, affine: bool) -> Callable[..., Term]:
    """Scales within their bounds, which an op does not change."""
    accepts = accepted_zero_point(f, affine)

    def within(**inputs: Term) -> Term:
        low, high = (terms.float_const(bound) for bound in (SCALE_MIN, f.scale_max))
        magnitude = terms.fp("abs", inputs["s"])
        return terms.and_(accepts(**inputs), terms.fp("leq", low, magnitude), terms.fp("leq", magnitude, high))

    return within


def not_zero(**inputs: Term) -> Term:
    """The scales that ops of training do not refuse."""
    s = inputs["s"]
    return terms.not_(terms.or_(terms.fp("isZero", s), terms.fp("isNaN", s)))


# ---- floats ---------------------------------------------------------------------------------------------------------


@functools.cache
def encode_float(f: FloatFormat, saturate: bool) -> Function:
    """x -> code (C3)"""

    def op(x: Array) -> Array:
        from quantlib import ops

        if f.dtype_name == f.name:
            return bits(ops.cast(tensor(x), f.name, saturate=saturate))
        return bits(ops.quantize(tensor(x), tensor(np.ones(1, np.float32)), f.name, block=(1, 1)))

    return Function(
        f"encode_float<{f.name}>{' saturating' if saturate else ''}",
        {"x": "float32"},
        {"code": f.storage},
        lambda modules, x: modules.numerics.encode_float(x, f, saturate),
        lambda program, x: stored(f, program.call("encode_float", x, number(saturate, "bool"), template=(f.name,))),
        op if saturate or f.dtype_name == f.name else None,
    )


def stored(f: Format, code: Value) -> Value:
    """A code as it is written to memory: its low bits."""
    to = TYPES[f.storage]
    return Value(to, words.convert(code.term, code.type, to))


@functools.cache
def decode_float(f: FloatFormat) -> Function:
    """code -> value, exact"""

    def op(code: Array) -> Array:
        from quantlib import ops

        if f.dtype_name == f.name:
            return bits(ops.cast(codes(f, code), "float32"))
        return bits(ops.dequantize(codes(f, code), tensor(np.ones(1, np.float32)), f.name, block=(1, 1), size=1))

    return Function(
        f"decode_float<{f.name}>",
        {"code": "uint32"},
        {"y": "float32"},
        lambda modules, code: modules.numerics.decode_float(code, f),
        lambda program, code: program.call("decode_float", code, template=(f.name,)),
        op,
    )


# ---- integers -------------------------------------------------------------------------------------------------------


@functools.cache
def encode_int(f: IntFormat, affine: bool) -> Function:
    """t in units of the scale, zero point -> code (C5)"""

    def op(t: Array, z: Array | None = None) -> Array:
        from quantlib import ops

        y = ops.quantize(
            tensor(t), tensor(np.ones(1, np.float32)), f.name, block=(1, 1), zero_point=tensor(z, np.int32)
        )
        return bits(y)

    def reference(modules: SimpleNamespace, t: Any, z: Any = None) -> Any:
        return modules.numerics.encode_int(t, z if affine else zero(modules), f, affine)

    def header(program: Program, t: Value, z: Value | None = None) -> Value:
        clamped = program.call("clamp_zero_point", z or number(0, "int32"), template=(f.name, affine))
        code = program.call("encode_int", t, clamped, template=(f.name, affine))
        assert isinstance(code, Value)
        return code

    inputs = {"t": "float32", **({"z": "int32"} if affine else {})}
    return Function(
        f"encode_int<{f.name}>",
        inputs,
        {"code": "int32"},
        reference,
        header,
        op,
        code_bits=f.bits,
        accepts=accepted_zero_point(f, affine),
    )


@functools.cache
def clamp_zero_point(f: IntFormat) -> Function:
    """any int32 -> the zero point that it means"""
    return Function(
        f"clamp_zero_point<{f.name}>",
        {"z": "int32"},
        {"z_used": "int32"},
        lambda modules, z: modules.numerics.clamp_zero_point(z, f, True),
        lambda program, z: program.call("clamp_zero_point", z, template=(f.name, True)),
    )


def zero(modules: SimpleNamespace) -> Any:
    """The zero point that the reference takes where there is none."""
    return modules.numerics.np.zeros((), modules.numerics.np.int32)


@functools.cache
def decode_int(f: IntFormat, affine: bool) -> Function:
    """code, scale within its bounds, zero point -> value (C7)"""

    def op(code: Array, s: Array, z: Array | None = None) -> Array:
        from quantlib import ops

        y = ops.dequantize(
            codes(f, code),
            tensor(s),
            f.name,
            block=(1, 1),
            zero_point=tensor(z, np.int32),
            size=1 if f.packed else None,
        )
        return bits(y)

    def reference(modules: SimpleNamespace, code: Any, s: Any, z: Any = None) -> Any:
        return modules.numerics.decode_int(code, s, z if affine else zero(modules), f, affine)

    def header(program: Program, code: Value, s: Value, z: Value | None = None) -> Value:
        clamped = program.call("clamp_zero_point", z or number(0, "int32"), template=(f.name, affine))
        y = program.call("decode_int", code, s, clamped)
        assert isinstance(y, Value)
        return y

    inputs = {"code": "int32", "s": "float32", **({"z": "int32"} if affine else {})}
    outputs = {"y": "float32"}
    return Function(f"decode_int<{f.name}>", inputs, outputs, reference, header, op, accepts=effective(f, affine))


# ---- scales ---------------------------------------------------------------------------------------------------------


def code_of_one(f: Format) -> int:
    if not isinstance(f, FloatFormat):
        return 1
    return f.values.index(1.0) if f.is_book else f.bias << f.fraction_bits


@functools.cache
def effective_scale(f: Format) -> Function:
    """scale -> the one that is used (C4); the op is the value of code 1"""

    def op(s: Array) -> Array:
        from quantlib import ops

        one = np.array([code_of_one(f)])
        return bits(ops.dequantize(codes(f, one), tensor(s), f.name, block=(1, 1), size=1 if f.packed else None))

    return Function(
        f"effective_scale<{f.name}>",
        {"s": "float32"},
        {"s_eff": "float32"},
        lambda modules, s: modules.numerics.effective_scale(s, f),
        lambda program, s: program.call("effective_scale", s, template=(f.name,)),
        op,
    )


@functools.cache
def symmetric_scale(f: Format) -> Function:
    """bits of the largest magnitude -> scale (C4)"""

    def op(amax: Array) -> Array:
        from quantlib import ops

        return bits(ops.compute_scale(tensor(amax.astype(np.uint32).view(np.float32)), f.name, (1, 1)))

    return Function(
        f"symmetric_scale<{f.name}>",
        {"amax": "uint32"},
        {"s": "float32"},
        lambda modules, amax: modules.numerics.symmetric_scale(amax, f),
        lambda program, amax: program.call("symmetric_scale", amax, template=(f.name,)),
        op,
    )


@functools.cache
def affine_scale(f: IntFormat) -> Function:
    """range -> scale and zero point (C4)"""

    def op(lowest: Array, highest: Array) -> tuple[Array, Array]:
        import torch

        from quantlib import ops

        x = torch.from_numpy(np.concatenate([lowest, highest]).reshape(1, 2))
        s, z = ops.compute_scale(x, f.name, (1, 2), symmetric=False)
        return bits(s), bits(z)

    def header(program: Program, lowest: Value, highest: Value) -> tuple[Value, Value]:
        made = program.call("affine_scale", lowest, highest, template=(f.name,))
        return made.members["scale"], made.members["zero_point"]

    return Function(
        f"affine_scale<{f.name}>",
        {"lowest": "float32", "highest": "float32"},
        {"s": "float32", "z": "int32"},
        lambda modules, lowest, highest: modules.numerics.affine_scale(lowest, highest, f),
        header,
        op,
    )


@functools.cache
def reciprocal(f: Format) -> Function:
    """scale -> what x is multiplied by"""

    def reference(modules: SimpleNamespace, s: Any) -> Any:
        n = modules.numerics
        return n.project(n.np.float32(1), n.effective_scale(s, f))

    def header(program: Program, s: Value) -> Value:
        r = program.call("reciprocal", program.call("effective_scale", s, template=(f.name,)))
        assert isinstance(r, Value)
        return r

    return Function(f"reciprocal<{f.name}>", {"s": "float32"}, {"r": "float32"}, reference, header)


@functools.cache
def project(f: Format) -> Function:
    """x, scale -> t"""

    def reference(modules: SimpleNamespace, x: Any, s: Any) -> Any:
        return modules.numerics.project(x, modules.numerics.effective_scale(s, f))

    def header(program: Program, x: Value, s: Value) -> Value:
        r = program.call("reciprocal", program.call("effective_scale", s, template=(f.name,)))
        t = program.call("mul", x, r)
        assert isinstance(t, Value)
        return t

    return Function(f"project<{f.name}>", {"x": "float32", "s": "float32"}, {"t": "float32"}, reference, header)


# ---- whole projections ----------------------------------------------------------------------------------------------


@functools.cache
def quantize(f: Format, affine: bool = False) -> Function:
    """x, scale, zero point -> code (C5, C6)"""

    def op(x: Array, s: Array, z: Array | None = None) -> Array:
        from quantlib import ops

        zero_point = tensor(z, np.int32)
        return bits(ops.quantize(tensor(x), tensor(s), f.name, block=(1, 1), zero_point=zero_point))

    def reference(modules: SimpleNamespace, x: Any, s: Any, z: Any = None) -> Any:
        n = modules.numerics
        t = n.project(x, n.effective_scale(s, f))
        if isinstance(f, FloatFormat):
            return n.encode_float(t, f, saturate=True)
        return n.encode_int(t, z if affine else zero(modules), f, affine)

    def header(program: Program, x: Value, s: Value, z: Value | None = None) -> Value:
        r = program.call("reciprocal", program.call("effective_scale", s, template=(f.name,)))
        t = program.call("mul", x, r)
        if f.is_float:
            return stored(f, program.call("encode_float", t, number(True, "bool"), template=(f.name,)))
        clamped = program.call("clamp_zero_point", z or number(0, "int32"), template=(f.name, affine))
        code = program.call("encode_int", t, clamped, template=(f.name, affine))
        assert isinstance(code, Value)
        return code

    inputs = {"x": "float32", "s": "float32", **({"z": "int32"} if affine else {})}
    outputs = {"code": f.storage if f.is_float else "int32"}
    return Function(
        f"quantize<{f.name}>",
        inputs,
        outputs,
        reference,
        header,
        op,
        code_bits=f.bits,
        accepts=accepted_zero_point(f, affine),
    )


@functools.cache
def dequantize(f: Format, affine: bool = False) -> Function:
    """code, scale, zero point -> value (C7)"""
    if isinstance(f, IntFormat):
        inner = decode_int(f, affine)

        def reference(modules: SimpleNamespace, code: Any, s: Any, **z: Any) -> Any:
            return inner.reference(modules, code, modules.numerics.effective_scale(s, f), **z)

        def header(program: Program, code: Value, s: Value, **z: Value) -> Value:
            assert inner.header is not None
            y = inner.header(program, code, program.call("effective_scale", s, template=(f.name,)), **z)
            assert isinstance(y, Value)
            return y

        outputs = {"y": "float32"}
        accepts = accepted_zero_point(f, affine)
        return Function(f"dequantize<{f.name}>", inner.inputs, outputs, reference, header, inner.op, accepts=accepts)

    def op(code: Array, s: Array) -> Array:
        from quantlib import ops

        return bits(ops.dequantize(codes(f, code), tensor(s), f.name, block=(1, 1), size=1 if f.packed else None))

    def of_float(modules: SimpleNamespace, code: Any, s: Any) -> Any:
        n = modules.numerics
        return n.canonical(n.decode_float(code, f) * n.effective_scale(s, f))

    def float_header(program: Program, code: Value, s: Value) -> Value:
        s_eff = program.call("effective_scale", s, template=(f.name,))
        y = program.call(
            "canonical", program.call("mul", program.call("decode_float", code, template=(f.name,)), s_eff)
        )
        assert isinstance(y, Value)
        return y

    inputs = {"code": "uint32", "s": "float32"}
    return Function(
        f"dequantize<{f.name}>", inputs, {"y": "float32"}, of_float, float_header, op, accepts=accepted_zero_point(f)
    )


# ---- training -------------------------------------------------------------------------------------------------------


def _shared(program: Program, f: Format, s: Value, z: Value | None) -> tuple[Any, Object, Object, str]:
    """The values that a block's elements share in csrc/fake_quantize.h, its limits, and the format's name there."""
    s_eff = program.call("effective_scale", s, template=(f.name,))
    r = program.call("reciprocal", s_eff)
    qmin, qmax = f.range(z is not None) if isinstance(f, IntFormat) else (0, 0)
    limits = program.struct("Limits")
    q = Object(limits, {"qmin": number(qmin, "float32"), "qmax": number(qmax, "float32")})
    code = number(0, "float32") if z is None else program.call("code_of", z, q)
    shared = program.struct("Shared", TYPES["float32"])
    return s_eff, Object(shared, {"r": r, "s": s_eff, "z": code}), q, f.name if f.is_float else "Integer"


@functools.cache
def fake_quantize(f: Format, affine: bool) -> Function:
    """x, scale, a learned zero point -> value (C10)"""

    def op(x: Array, s: Array, z: Array | None = None) -> Array:
        from quantlib import ops

        zero_point = tensor(z)
        return bits(ops.fake_quantize(tensor(x), tensor(s), f.name, block=(1, 1), zero_point=zero_point))

    def reference(modules: SimpleNamespace, x: Any, s: Any, z: Any = None) -> Any:
        return modules.fake_quantize.fake_quantize(x, s, f.name, block=(1, 1), zero_point=z)

    def header(program: Program, x: Value, s: Value, z: Value | None = None) -> Value:
        _, shared, q, name = _shared(program, f, s, z)
        y = program.call("fake_quantized", x, shared, q, template=(name,))
        assert isinstance(y, Value)
        return y

    inputs = {"x": "float32", "s": "float32", **({"z": "float32"} if affine else {})}
    outputs = {"y": "float32"}
    return Function(f"fake_quantize<{f.name}>", inputs, outputs, reference, header, op, accepts=not_zero)


@functools.cache
def gradients(f: Format, affine: bool, lsq: bool) -> Function:
    """dy, x, scale, a learned zero point -> dx and the terms of dscale and dzero_point (C10)"""

    def op(dy: Array, x: Array, s: Array, z: Array | None = None) -> tuple[Array, ...]:
        import torch

        import quantlib  # noqa: F401  registers the ops

        namespace = torch.ops.quantlib.fake_quantize_backward
        options = {"block": (1, 1), "lsq_mask": lsq}
        if affine:
            results = namespace.affine(tensor(dy), tensor(x), tensor(s), tensor(z), f.name, **options)
            return tuple(bits(r) for r in results)
        return tuple(bits(r) for r in namespace(tensor(dy), tensor(x), tensor(s), f.name, **options))

    def reference(modules: SimpleNamespace, dy: Any, x: Any, s: Any, z: Any = None) -> tuple[Any, ...]:
        g = modules.fake_quantize.fake_quantize_backward(dy, x, s, f.name, block=(1, 1), zero_point=z, lsq_mask=lsq)
        return (g.dx, g.dscale, g.dzero_point) if affine else (g.dx, g.dscale)

    def header(program: Program, dy: Value, x: Value, s: Value, z: Value | None = None) -> tuple[Value, ...]:
        _, shared, q, name = _shared(program, f, s, z)
        g = program.call("gradients", dy, x, shared, q, template=(name, lsq)).members
        dx = Value(dy.type, terms.ite(g["inside"].term, dy.term, words.literal(0, dy.type)))
        return (dx, g["scale"], g["zero_point"]) if affine else (dx, g["scale"])

    inputs = {"dy": "float32", "x": "float32", "s": "float32", **({"z": "float32"} if affine else {})}
    outputs = {"dx": "float32", "dscale": "float32", **({"dzero_point": "float32"} if affine else {})}
    return Function(f"gradients<{f.name}>", inputs, outputs, reference, header, op, sums=True, accepts=not_zero)
