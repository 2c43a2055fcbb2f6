"""``torch.onnx.export`` of a quantized model: w[n, k] = DequantizeLinear(codes[n, k], scale), y = MatMul(x, w^T)

`export` writes a model to a file. It gives torch the functions of `table`, each of which writes one op of quantlib as
operators of ONNX's opset 21. Both need the packages of ``pip install 'quantlib-torch[onnx]'``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from quantlib import formats
from quantlib.checkpoint.files import some
from quantlib.formats import SCALE_MIN, FloatFormat, Format, IntFormat
from quantlib.nn.observers import KeepsDtype
from quantlib.nn.qat import QATModule
from quantlib.nn.qat_experts import QATExperts
from quantlib.reference.numerics import decode_float
from quantlib.reference.packing import unpack

OPSET = 21  # the first one with INT4 and with blocks of DequantizeLinear
UNPACKED = "quantlib.unpacked"  # marks a node in the graph whose result is packed codes, one an element
Block = tuple[int, int]
Value = Any  # a value of the graph that is being built: onnxscript gives it no type


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...] = (),
    f: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Any:
    """Write a quantized model as a file of ONNX, its codes as they are.

    Parameters
    ----------
    model : nn.Module or torch.export.ExportedProgram
        A model in ``eval()``, some of whose layers `quantlib.quantize_` has quantized.
    args : tuple
        Inputs of the model, as for ``torch.onnx.export``.
    f : path, optional
        The file to write.
    **options
        Further arguments of ``torch.onnx.export``, such as ``dynamic_shapes`` and ``input_names``.

    Returns
    -------
    torch.onnx.ONNXProgram

    Raises
    ------
    ImportError
        Where ``onnx`` or ``onnxscript`` is not installed.
    ValueError
        For a model in quantization-aware training, an ``opset_version`` below 21, which has no INT4, and
        ``dynamo=False``.
    NotImplementedError
        For a layer that ONNX has no operators for: integer products with zero points, static activations with them.

    Notes
    -----
    Weights of int8, uint8 and int4 become DequantizeLinear and MatMul, with the codes of the model as initializers of
    type INT8, UINT8 and INT4. Codes of floats of 8 and 4 bits stay bytes and are looked up in a table. W8A8 becomes
    MatMulInteger. The values of weights and the sums of integers are the same to the bit. Sums of floats are made by
    the runtime in its own order.
    """
    if options.get("opset_version", OPSET) < OPSET:
        raise ValueError(f"opset_version must be at least {OPSET}, got {options['opset_version']}")
    if not options.get("dynamo", True):
        raise ValueError("dynamo must be True, got False: the older exporter knows no tables of translations")
    if isinstance(model, nn.Module):
        learning = [
            name for name, module in model.named_modules() if isinstance(module, (QATModule, QATExperts, KeepsDtype))
        ]
        if learning:
            raise ValueError(f"model must be converted before it is exported: convert_(model), got {some(learning)}")
    optimize = options.pop("optimize", True)
    options["custom_translation_table"] = table() | dict(options.get("custom_translation_table") or {})
    options = {"opset_version": OPSET} | options | {"optimize": False, "dynamo": True}
    try:
        program = torch.onnx.export(model, args, **options)
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, NotImplementedError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise NotImplementedError(str(cause)) from error
    assert program is not None
    store_packed(program.model)
    if optimize:
        program.optimize()
    if f is not None:
        program.save(f)
    return program


def table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ops of quantlib in operators of ONNX, for ``torch.onnx.export(custom_translation_table=...)``.

    Packed codes stay bytes in the file, and are unpacked when the file is run; `export` writes them as INT4.

    Raises
    ------
    ImportError
        Where ``onnxscript`` is not installed.
    """
    from onnxscript import opset21

    op: Any = opset21  # whose types know no values of a graph that torch builds

    def dequant_matmul(
        x: Value,
        codes: Value,
        scale: Value,
        format: str,
        block: Block,
        zero_point: Value = None,
        bias: Value = None,
        activation: str | None = None,
        batch_invariant: bool = False,
    ) -> Value:
        w = weight_of(op, codes, scale, formats.get(format), block, zero_point, int(x.shape[-1]))
        y = op.MatMul(op.Cast(x, to=FLOAT), op.Transpose(w, perm=[1, 0]))
        return epilogue(op, y, bias, activation, x.dtype)

    def dequantize(
        codes: Value,
        scale: Value,
        format: str,
        block: Block,
        zero_point: Value = None,
        dtype: int | None = None,
        size: int | None = None,
    ) -> Value:
        f = formats.get(format)
        w = weight_of(
            op, codes, scale, f, block, zero_point, int(codes.shape[-1]) * f.per_byte if size is None else size
        )
        return w if dtype is None else op.Cast(w, to=dtype)

    def dequantize_rows(
        indices: Value,
        codes: Value,
        scale: Value,
        format: str,
        block: Block,
        zero_point: Value = None,
        dtype: int | None = None,
        size: int | None = None,
    ) -> Value:
        f, (br, bk) = formats.get(format), block
        K = int(codes.shape[-1]) * f.per_byte if size is None else size
        flat = op.Reshape(indices, ints(op, -1))
        of_block = flat if br == 1 else op.Div(flat, op.CastLike(ints(op, br), flat))
        z = None if zero_point is None else looked_up(op, zero_point, of_block)
        w = weight_of(op, looked_up(op, codes, flat), looked_up(op, scale, of_block), f, (1, bk), z, K)
        shape = op.Concat(op.Shape(indices), ints(op, K), axis=0)
        y = op.Reshape(w, shape)
        return y if dtype is None else op.Cast(y, to=dtype)

    def quantize(x: Value, scale: Value, format: str, block: Block, zero_point: Value = None) -> Value:
        f = integer("quantize", format)
        if zero_point is not None or any(n != 1 for n in scale.shape):
            raise NotImplementedError("ONNX has no form for quantize with several scales or with a zero point")
        return project(op, op.Cast(x, to=FLOAT), op.Squeeze(effective(op, scale, f)), f)

    def scaled_matmul(
        x_codes: Value,
        x_scale: Value,
        codes: Value,
        scale: Value,
        format: str,
        block: Block,
        x_zero_point: Value = None,
        zero_point: Value = None,
        bias: Value = None,
        activation: str | None = None,
        dtype: int = FLOAT,
    ) -> Value:
        if x_zero_point is not None:
            raise NotImplementedError("ONNX has no form for scaled_matmul with a zero point of x")
        f = integer("scaled_matmul", format)
        y = scaled(op, x_codes, effective(op, x_scale, f), codes, scale, f, block, zero_point, int(x_codes.shape[-1]))
        return epilogue(op, y, bias, activation, dtype)

    def dynamic_matmul(
        x: Value,
        codes: Value,
        scale: Value,
        format: str,
        block: Block,
        zero_point: Value = None,
        bias: Value = None,
        activation: str | None = None,
    ) -> Value:
        int8, wide = integer("dynamic_matmul", "int8"), op.Cast(x, to=FLOAT)
        largest = op.ReduceMax(op.Abs(wide), ints(op, -1), keepdims=1)
        x_scale = effective(op, op.Div(largest, number(op, int8.max)), int8)
        x_codes = project(op, wide, x_scale, int8)
        f, K = integer("dynamic_matmul", format), int(x.shape[-1])
        y = scaled(op, x_codes, x_scale, codes, scale, f, block, zero_point, K)
        return epilogue(op, y, bias, activation, x.dtype)

    def view(x: Value, dtype: int) -> Value:
        return op.Identity(x)  # the bytes of FP8, which are looked up as they are

    ops = torch.ops.quantlib
    return {
        ops.dequant_matmul.default: dequant_matmul,
        ops.dequantize.default: dequantize,
        ops.dequantize_rows.default: dequantize_rows,
        ops.quantize.default: quantize,
        ops.scaled_matmul.default: scaled_matmul,
        ops.dynamic_matmul.default: dynamic_matmul,
        torch.ops.aten.view.dtype: view,
    }


# ---- what the ops share ---------------------------------------------------------------------------------------------

FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # of ``onnx.TensorProto.DataType``: the file format fixes these numbers
CODES = {"int8": 3, "uint8": 2, "int4": 22}  # integer format -> the type of its codes there


def number(op: Any, value: float) -> Value:
    return op.Constant(value_float=float(value))


def ints(op: Any, *values: int) -> Value:
    return op.Constant(value_ints=list(values))


def integer(name: str, format: str) -> IntFormat:
    f = formats.get(format)
    if not isinstance(f, IntFormat):
        raise NotImplementedError(f"ONNX has no form for {name} of {format}")
    return f


def effective(op: Any, scale: Value, f: Format) -> Value:
    """The scale within the bounds of C4."""
    wide = scale if scale.dtype is None or int(scale.dtype) == FLOAT else op.Cast(scale, to=FLOAT)
    clamped = op.Clip(op.Abs(wide), number(op, SCALE_MIN), number(op, f.scale_max))
    return op.Where(op.Less(wide, number(op, 0.0)), op.Neg(clamped), clamped)


def weight_of(op: Any, codes: Value, scale: Value, f: Format, block: Block, zero_point: Value, K: int) -> Value:
    """w [N, K] float32 = (codes - zero_point) * scale"""
    br, bk = block[0], K if block[1] == -1 else min(block[1], K)
    whole = bk == K and all(n == 1 for n in scale.shape)  # one scale for all
    N, codes, scale = codes.shape[0], unpacked(op, codes, f, K), effective(op, scale, f)
    if isinstance(f, FloatFormat):
        worth = decode_float(np.arange(1 << f.bits, dtype=f.storage), f)
        looked = op.Gather(op.Constant(value_floats=worth.tolist()), op.Cast(codes, to=INT32))
        return op.Mul(looked, columns(op, scale if whole else rows(op, scale, N, br), K, bk))
    parts = [scale]
    if zero_point is not None:
        lowest, highest = (op.Cast(number(op, q), to=INT32) for q in f.code_range)
        if zero_point.dtype is None or int(zero_point.dtype) == INT32:
            zero_point = op.Clip(zero_point, lowest, highest)
        else:  # kept as codes
            zero_point = unpacked(op, zero_point, f, -(-K // bk))
        parts.append(op.Cast(zero_point, to=CODES[f.name]))
    if whole:
        return op.DequantizeLinear(codes, *(op.Squeeze(part) for part in parts))
    parts = [rows(op, part, N, br) for part in parts]
    if bk == K:
        return op.DequantizeLinear(codes, *(op.Squeeze(part, ints(op, 1)) for part in parts), axis=0)
    return op.DequantizeLinear(codes, *parts, axis=1, block_size=bk)


def looked_up(op: Any, part: Value, indices: Value) -> Value:
    """[N, C] and [R] -> [R, C]; onnxscript infers no shapes, and `weight_of` asks for C."""
    import onnx_ir as ir

    found = op.Gather(part, indices, axis=0)
    found.shape = ir.Shape([None, int(part.shape[1])])
    return found


def unpacked(op: Any, codes: Value, f: Format, K: int) -> Value:
    """[N, K] codes of the type in `CODES`; of a float format their bits, as UINT8."""
    if f.name not in CODES and not isinstance(f, FloatFormat):
        raise NotImplementedError(f"ONNX has no type for {f.name}")
    if not f.packed:
        return codes
    mask = op.Cast(ints(op, (1 << f.bits) - 1), to=UINT8)
    shifts = [op.Cast(ints(op, i * f.bits), to=UINT8) for i in range(f.per_byte)]
    places = [op.BitwiseAnd(op.BitShift(codes, shift, direction="RIGHT"), mask) for shift in shifts]
    flat = op.Reshape(op.Concat(*(op.Unsqueeze(p, ints(op, -1)) for p in places), axis=-1), ints(op, 0, -1))
    flat = op.Slice(flat, ints(op, 0), ints(op, K), ints(op, 1))
    if isinstance(f, FloatFormat):
        return flat
    if f.signed:
        sign = op.Cast(ints(op, 1 << (f.bits - 1)), to=UINT8)
        flat = op.Sub(op.Cast(op.BitwiseXor(flat, sign), to=INT8), op.Cast(sign, to=INT8))
    flat = op.Cast(flat, to=CODES[f.name])
    flat.producer().metadata_props[UNPACKED] = f"{f.name} {K}"
    return flat


def rows(op: Any, part: Value, N: int, br: int) -> Value:
    """[ceil(N / br), ...] -> [N, ...]"""
    return part if br == 1 else op.Gather(part, ints(op, *(n // br for n in range(N))), axis=0)


def columns(op: Any, part: Value, K: int, bk: int) -> Value:
    """[..., ceil(K / bk)] -> [..., K], or [..., 1] where bk = K"""
    return part if bk == K else op.Gather(part, ints(op, *(k // bk for k in range(K))), axis=1)


def project(op: Any, x: Value, scale: Value, f: IntFormat) -> Value:
    """Codes without a zero point, by C5: t = x * (1 / s), a NaN t becomes 0, q = clamp(RNE(t))."""
    t = op.Mul(x, op.Div(number(op, 1), scale))
    t = op.Where(op.IsNaN(t), number(op, 0), t)
    lowest, highest = f.range(affine=False)
    return op.Cast(op.Clip(op.Round(t), number(op, lowest), number(op, highest)), to=CODES[f.name])


def scaled(
    op: Any, x: Value, x_scale: Value, codes: Value, scale: Value, f: IntFormat, block: Block, zero_point: Value, K: int
) -> Value:
    """y [..., N] float32 = sum over blocks J of (x_J w_J^T) s_J, times the scale of x; x [..., K] int8"""
    N, br, bk = codes.shape[0], block[0], K if block[1] == -1 else min(block[1], K)
    if zero_point is not None:
        raise NotImplementedError("ONNX has no form for an integer product with zero points of the weight")
    one = all(n == 1 for n in scale.shape)
    scale = effective(op, scale, f)
    scale = op.Transpose(scale if one else rows(op, scale, N, br), perm=[1, 0])  # [blocks, N]
    w = op.Transpose(op.Cast(unpacked(op, codes, f, K), to=INT8 if f.signed else UINT8), perm=[1, 0])
    if bk == K:
        sums = op.Cast(op.MatMulInteger(x, w), to=FLOAT)
        return op.Mul(op.Mul(sums, x_scale), op.Squeeze(scale, ints(op, 0)))
    y = None
    for J, k in enumerate(range(0, K, bk)):
        begin, end = ints(op, k), ints(op, min(k + bk, K))
        part = op.MatMulInteger(op.Slice(x, begin, end, ints(op, -1)), op.Slice(w, begin, end, ints(op, 0)))
        part = op.Mul(op.Cast(part, to=FLOAT), op.Gather(scale, op.Constant(value_int=J), axis=0))
        y = part if y is None else op.Add(y, part)
    return op.Mul(y, x_scale)


def epilogue(op: Any, y: Value, bias: Value, activation: str | None, dtype: int) -> Value:
    """encode(activation(y + bias))"""
    if bias is not None:
        y = op.Add(y, op.Cast(bias, to=FLOAT))
    if activation == "relu":
        y = op.Relu(y)
    elif activation == "silu":
        y = op.Mul(y, op.Sigmoid(y))
    elif activation is not None:
        y = op.Gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return op.Cast(y, to=dtype)


def store_packed(model: Any) -> None:
    """Have packed codes that ``model``, an ``onnx_ir.Model``, unpacks when it is run as initializers of their type."""
    import onnx_ir as ir

    graph = model.graph
    for node in list(graph):
        if UNPACKED not in node.metadata_props:
            continue
        format, K = node.metadata_props.pop(UNPACKED).split()
        source = node.inputs[0]
        while (producer := source.producer()) is not None and producer.op_type != "Gather":
            source = producer.inputs[0]
        if source.const_value is None:  # rows that an embedding looks up are unpacked afterwards
            continue
        type_there = ir.DataType(CODES[format])
        codes = unpack(source.const_value.numpy(), formats.get(format), int(K)).astype(type_there.numpy())
        value = ir.val(f"{source.name}.{format}", const_value=ir.tensor(codes, type_there))
        graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
    ir.passes.common.RemoveUnusedNodesPass()(model)
