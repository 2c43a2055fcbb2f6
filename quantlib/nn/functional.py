"""The ops with a `QuantSpec` in place of format, block and symmetry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quantlib import formats, ops
from quantlib.backends.packing import kept_zero_points
from quantlib.backends.weight import QuantizedWeight
from quantlib.formats import FloatFormat
from quantlib.nn import ranks
from quantlib.ops.autograd import StraightThrough, apply
from quantlib.ops.check import dtype_of, is_sharded
from quantlib.ops.dequant_matmul_backward import gradient_of_bias, tangent_of_product
from quantlib.ops.eager import recorded
from quantlib.ops.sharding import cuts_columns, size_of
from quantlib.spec import SCALES, QuantSpec

SLAB = 1 << 18  # elements of a weight at a time: a core's second cache holds them and their codes
SLAB_OF_A_GPU = 1 << 26  # each slab waits for the device once
SCALE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in SCALES.items()}
SOURCES = (torch.float32, torch.float16, torch.bfloat16)  # the dtypes that the ops take, and that are quantized


class Weight(NamedTuple):
    """A weight as it is kept: codes, and what turns them back into values."""

    codes: Tensor  # [..., K] of the format's dtype; [..., ceil(K / 2)] uint8 where it is packed
    scale: Tensor | None = None  # [ceil(M / br), ceil(K / bk)] float32, of 16 bits, or E8M0
    zero_point: Tensor | None = None  # codes of scale's shape, packed as those of the weight


Seen = Callable[[Tensor, Weight, QuantSpec], object]


def quantize_weight(x: Tensor, spec: QuantSpec, seen: Seen | None = None) -> Weight:
    """codes[i, j] = encode(x[i, j] / scale[i // br, j // bk]); the cast of x where ``spec`` has no scale.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16.
    seen : callable (x, weight, spec), optional
        Called with some rows of x [M, K] at a time and with their codes, while both are in a cache.
    """
    x = x.detach()
    if spec.hadamard:
        x, spec = rotated(x, spec), spec.unrotated
    if seen is not None and not x.is_meta:
        return _quantize_rows(x, spec, seen)
    return kept_weight(quantized(x, spec), spec)


def kept_weight(weight: Weight, spec: QuantSpec) -> Weight:
    """``weight`` with its zero points, int32 as the ops give them, as they are kept."""
    z = weight.zero_point
    return weight if z is None else weight._replace(zero_point=kept_zero_points(z, spec.row))


def quantized(x: Tensor, spec: QuantSpec) -> Weight:
    """`quantize_weight` as the ops give it: with zero points of int32."""
    if not spec.scaled:
        return Weight(ops.cast(x, spec.format))
    block, symmetric = spec.block(x.shape), spec.symmetric is True
    searched = spec.search != "minmax"
    if symmetric and not searched and cuts_columns(x):
        scale = kept_scale(ranks.scale_of_shards(x, spec.format, block), spec)
        return Weight(ops.quantize(x, scale, spec.format, block=block), scale)
    if spec.plain:
        return Weight(*ops.quantize_dynamic(x, spec.format, block=block, symmetric=symmetric))
    how: dict[str, Any] = {"method": spec.search, "kept": spec.scale} if searched else {}
    found = ops.compute_scale(x, spec.format, block=block, symmetric=symmetric, **how)
    scale, zero_point = (found, None) if isinstance(found, Tensor) else found
    scale = kept_scale(scale, spec)
    return Weight(ops.quantize(x, scale, spec.format, block=block, zero_point=zero_point), scale, zero_point)


def rotated(x: Tensor, spec: QuantSpec) -> Tensor:
    """x [..., K] as ``spec`` quantizes it: times a Hadamard matrix if it says so. Twice it is x, but for rounding."""
    if not spec.hadamard:
        return x
    narrow = x.float() if x.dtype == torch.float64 else x
    return _cast(ops.hadamard(narrow, spec.rotation(x.shape[-1])), x.dtype)


def continue_weight(weight: Weight, x: Tensor, kept: int, spec: QuantSpec) -> Weight:
    """Codes of x [M, K] whose first ``kept`` rows are those of ``weight``, which has them or more.

    Rows that share a scale with these are quantized with it, if it is large enough for them; else all that share it
    are quantized anew.
    """
    if spec.hadamard:
        x, spec = rotated(x, spec), spec.unrotated
    if not spec.scaled:
        return Weight(torch.cat([weight.codes[:kept], ops.cast(x[kept:], spec.format)]))
    br = spec.block(x.shape)[0]
    whole = kept // br * br  # rows of blocks without a new row
    known = rows_of(weight, slice(0, kept), br)
    if kept == len(x):
        return Weight(*(None if t is None else t.clone() for t in known))  # type: ignore[arg-type]
    parts = [rows_of(weight, slice(0, whole), br)]
    if whole < kept:
        rows, last = slice(whole, min(whole + br, len(x))), rows_of(weight, slice(whole, kept), br)
        fresh, (_, scale, z) = quantize_weight(x[rows], spec), last
        assert fresh.scale is not None
        assert scale is not None
        block = spec.block((br, x.shape[1]))
        codes = ops.quantize(x[rows], scale.float(), spec.format, block=block, zero_point=z)
        if z is None:
            fits = bool((fresh.scale.float() <= scale.float() * (1 + 2.0**-20)).all())
        else:  # no value is further than half a step, and a little, from that of its code
            off = x[rows].float() - dequantize_weight(Weight(codes, scale, z), spec, x.shape[1], torch.float32)
            fits = not ops.quantize(off, scale.float() * 1.01, "int8", block=block).any()
        if fits:
            codes[: kept - whole] = last.codes
            fresh = Weight(codes, scale, z)
        parts.append(fresh)
        whole = rows.stop
    if whole < len(x):
        parts.append(quantize_weight(x[whole:], spec))
    return Weight(*(None if t[0] is None else torch.cat(t) for t in zip(*parts, strict=True)))  # type: ignore[arg-type]


def replace_rows(weight: Weight, x: Tensor, rows: Tensor, spec: QuantSpec, br: int) -> Weight:
    """``weight`` with codes of ``x[rows]``, x [M, K], in their place; ``rows`` are whole blocks of ``br``, in order."""

    def replaced(t: Tensor | None, new: Tensor | None, at: Tensor) -> Tensor | None:
        if t is None or new is None:
            return t
        y = t.clone()
        _bytes(y).index_copy_(0, at, _bytes(new.to(y.dtype)))
        return y

    new, blocks = quantize_weight(x[rows], spec), rows[::br] // br
    parts = (replaced(t, n, rows if t is weight.codes else blocks) for t, n in zip(weight, new, strict=True))
    return Weight(*parts)  # type: ignore[arg-type]


def kept_scale(scale: Tensor, spec: QuantSpec) -> Tensor:
    """float32 scales in the dtype that ``spec`` keeps them in, rounded to nearest, ties to even.

    One of too large a magnitude becomes the largest finite value of that dtype, one of too small a magnitude the
    smallest above 0; the sign stays. E8M0 keeps a power of two, by the exponent of the largest magnitude.
    """
    if spec.scale == "e8m0":
        bits = scale.clamp(formats.SCALE_MIN, spec.row.scale_max).contiguous().view(torch.int32)
        code = (bits >> 23) + ((bits & 0x7FFFFF) >= formats.power_fraction(spec.row)).int()
        return torch.where(scale == scale, code, 255).to(torch.uint8).view(torch.float8_e8m0fnu)
    f = formats.get(spec.scale)
    assert isinstance(f, FloatFormat)
    if f.bits == 32:
        return scale
    # cast of quantlib, not of torch: subnormals are kept whatever the thread is set to
    clamped = scale.abs().clamp(f.smallest, f.max)
    return ops.cast(torch.where(scale < 0, -clamped, clamped), f.name)


def scale_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of the scales of ``spec``."""
    return SCALE_DTYPES[spec.scale]


def _quantize_rows(x: Tensor, spec: QuantSpec, seen: Seen) -> Weight:
    """`quantize_weight` of x [M, K]. Rows that have scales of their own stay in a cache until they have been seen."""
    size, br, device = spec.scale_shape(x.shape), spec.block(x.shape)[0] if spec.scaled else 1, x.device
    if not spec.scaled or br > 1:
        weight = quantize_weight(x, spec)
        for rows in slabs_of(x, br):
            seen(x[rows], rows_of(weight, rows, br), spec)
        return weight
    codes = torch.empty(spec.codes_shape(x.shape), dtype=dtype_of(spec.row), device=device)
    scale = torch.empty(size, dtype=scale_dtype(spec), device=device)
    zero_point = None
    if not spec.symmetric:
        zero_point = torch.empty(spec.zero_point_shape(x.shape), dtype=dtype_of(spec.row), device=device)
    weight = Weight(codes, scale, zero_point)
    for rows in slabs_of(x):
        part = rows_of(weight, rows, 1)
        outs = tuple(t for t in part if t is not None)
        if spec.plain and zero_point is None:
            ops.quantize_dynamic(x[rows], spec.format, block=spec.block(x[rows].shape), out=outs)
        else:
            made = (t for t in quantize_weight(x[rows], spec) if t is not None)
            for out, values in zip(outs, made, strict=True):
                out.copy_(values)
        seen(x[rows], part, spec)
    return weight


def slabs(rows: int, columns: int, multiple: int = 1, elements: int = SLAB) -> Iterator[slice]:
    """Runs of rows of a matrix [rows, columns] of about ``elements`` each, cut at multiples of ``multiple`` rows."""
    step = max(elements // max(columns, 1) // multiple, 1) * multiple
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def slabs_of(x: Tensor, multiple: int = 1) -> Iterator[slice]:
    """`slabs` of a matrix in memory."""
    rows, columns = x.shape
    return slabs(rows, columns, min(multiple, max(rows, 1)), SLAB if x.device.type == "cpu" else SLAB_OF_A_GPU)


def rows_of(weight: Weight, rows: slice, br: int) -> Weight:
    """Some rows of a weight [M, K], the first of which begins a block of ``br`` rows."""
    blocks = slice(rows.start // br, -(-rows.stop // br))
    return Weight(weight.codes[rows], *(None if t is None else t[blocks] for t in weight[1:]))


def dequantize_weight(weight: Weight, spec: QuantSpec, size: int, dtype: torch.dtype) -> Tensor:
    """y[i, j] = decode(codes[i, j]) * scale[i // br, j // bk], of ``dtype``, rotated back; ``size`` is K."""
    block = spec.block((*weight.codes.shape[:-1], size))
    if spec.hadamard:
        return _cast(rotated(_values(weight, spec.format, block, size, torch.float32), spec), dtype)
    return _values(weight, spec.format, block, size, dtype)


def dequantize_rows(
    weight: Weight, rows: Tensor | slice, format: str, block: tuple[int, int], size: int, dtype: torch.dtype
) -> Tensor:
    """y[r, j] = decode(codes[i, j]) * scale[i // br, j // bk], i = rows[r]: of a weight [M, K] only these rows.

    Parameters
    ----------
    rows : Tensor [...] of integers, or slice with a start and a stop
    block : (br, bk)
    size : int
        K
    """
    codes, scale, zero_point = weight
    if isinstance(rows, slice) and rows.start % block[0] == 0 and not is_sharded(codes):
        return _values(rows_of(weight, rows, block[0]), format, block, size, dtype)
    if isinstance(rows, slice):
        found, rows = codes[rows], torch.arange(rows.start, rows.stop, device=codes.device)
        return _values_of(found, weight, rows, format, block, size, dtype)
    if scale is not None and not is_sharded(codes) and not (scale.requires_grad and torch.is_grad_enabled()):
        narrow = torch.float32 if dtype == torch.float64 else dtype
        if torch.compiler.is_compiling() or recorded(scale):  # where a gradient would be lost it is refused
            y = ops.dequantize_rows(
                rows, codes, scale, format, block=block, zero_point=zero_point, dtype=narrow, size=size
            )
        else:
            y = torch.ops.quantlib.dequantize_rows.default(rows, codes, scale, format, block, zero_point, narrow, size)
        return y if narrow is dtype else y.to(dtype)
    shape, rows = rows.shape, rows.reshape(-1)
    if is_sharded(codes) and block[0] == 1:
        found = ranks.looked_up(_bytes(codes), rows).view(codes.dtype)
        scale, zero_point = (None if t is None else ranks.looked_up(t, rows) for t in weight[1:])
        y = _values(Weight(found, scale, zero_point), format, (1, block[1]), size, dtype)
    else:
        found = _bytes(codes).index_select(0, rows)
        if found.dtype != codes.dtype:  # `torch.jit` cannot trace a view of a dtype
            found = found.view(codes.dtype)
        y = _values_of(found, weight, rows, format, block, size, dtype)
    return y.view([*shape, size])


def _values_of(
    found: Tensor, weight: Weight, rows: Tensor, format: str, block: tuple[int, int], size: int, dtype: torch.dtype
) -> Tensor:
    """The values of the codes ``found`` in these rows of ``weight``."""
    _, scale, zero_point = weight
    if scale is None:
        return found.to(dtype)
    of_row = torch.div(rows, block[0], rounding_mode="floor") if block[0] > 1 else rows
    z = None if zero_point is None else zero_point.index_select(0, of_row)
    return _values(Weight(found, scale.index_select(0, of_row), z), format, (1, block[1]), size, dtype)


def _bytes(codes: Tensor) -> Tensor:
    """Codes as torch looks them up: FP8, which have no index_select, as uint8."""
    fp8 = codes.dtype.is_floating_point and codes.dtype.itemsize == 1
    return codes.view(torch.uint8) if fp8 else codes


def _values(weight: Weight, format: str, block: tuple[int, int], size: int, dtype: torch.dtype) -> Tensor:
    codes, scale, zero_point = weight
    if scale is None:
        return _cast(codes, dtype)
    own_size = size_of(codes, size)
    if scale.requires_grad and torch.is_grad_enabled():  # `dequantize` has no gradient: the same product, by torch
        units = ops.dequantize(codes, torch.ones_like(scale), format, block=block, zero_point=zero_point, size=own_size)
        rows, columns = (torch.arange(n, device=scale.device) // b for n, b in zip(units.shape, block, strict=True))
        return _cast(units * scale[rows][:, columns], dtype)
    narrow = torch.float32 if dtype == torch.float64 else dtype  # float64 holds what C7 gives, in float32, exactly
    y = ops.dequantize(codes, scale, format, block=block, zero_point=zero_point, dtype=narrow, size=own_size)
    return _cast(y, dtype)


def _cast(y: Tensor, dtype: torch.dtype) -> Tensor:
    """y.to(dtype); compiled, torch 2.11 loses the gradient of a function that ends in one that changes nothing."""
    return y if y.dtype == dtype else y.to(dtype)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast has its device multiply in; the ops themselves follow their arguments only."""
    try:
        device = x.device.type
    except AttributeError:  # an array, a list, None
        raise TypeError(f"input must be a tensor, got {type(x).__name__}") from None
    if device != "meta" and x.dtype in SOURCES and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


class Scale(NamedTuple):
    """The scale and the zero point of a static activation."""

    scale: Tensor  # [1, 1] float32
    zero_point: Tensor | None = None  # [1, 1] int32

    def blocks_of(self, x: Tensor, spec: QuantSpec) -> Scale:
        """One for each block of x: none where x is empty."""
        if x.numel():
            return self
        rows, columns = spec.scale_shape(x.shape)
        return Scale(*(None if t is None else t[:rows, :columns] for t in self))  # type: ignore[arg-type]


def project(x: Tensor, spec: QuantSpec, static: Scale | None = None) -> Tensor:
    """The values that codes of ``x`` stand for: y = dequantize(quantize(x)).

    x may be of any float dtype, and y is of the same; float64 is rounded to float32 first. The scale is taken from x,
    and the gradient passes straight through, since nothing is clipped; or it is ``static``, and the gradient stops
    where x is out of its range.
    """
    y: Tensor
    if static is None:
        return apply(_Project, x, spec)
    narrow = x.float() if x.dtype == torch.float64 else x
    scale, zero_point = static.blocks_of(x, spec)
    z = None if zero_point is None else zero_point.float()
    y = ops.fake_quantize(narrow, scale, spec.format, block=spec.block(x.shape), zero_point=z)
    return _cast(y, x.dtype)


class _Project(StraightThrough):
    @staticmethod
    def forward(x: Tensor, spec: QuantSpec) -> Tensor:
        narrow = x.float() if x.dtype == torch.float64 else x
        return dequantize_weight(quantized(narrow, spec), spec, x.shape[-1], x.dtype)


def _clipped(dy: Tensor, x: Tensor, spec: QuantSpec, static: Scale) -> Tensor:
    """The gradient of x through `project` with a static scale: dy, and 0 where x is out of its range."""
    scale, zero_point = static.blocks_of(x, spec)
    args = (spec.format, spec.block(x.shape))
    if zero_point is None:
        dx: Tensor = torch.ops.quantlib.fake_quantize_backward(dy, x, scale, *args)[0]
    else:
        dx = torch.ops.quantlib.fake_quantize_backward.affine(dy, x, scale, zero_point.float(), *args)[0]
    return dx


def integer_matmul(
    x: Tensor,
    activation: QuantSpec,
    static: Scale | None,
    weight: Weight,
    format: str,
    block: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    """y = scaled_matmul(quantize(x), codes), of x's dtype.

    Gradients of x, scale and bias are those of the product with the values of the codes, through `project` of x.

    Parameters
    ----------
    x : Tensor [..., K]
        float32, float16 or bfloat16.
    activation : QuantSpec
        int8 or uint8, a scale for each row or for all of x.
    static : Scale, optional
        The scale of a static activation; the scale of any other is taken from x.
    weight : Weight
        With a scale, of ``format`` and ``block``.
    bias : Tensor [N], optional
    """
    given = (None, None) if static is None else static
    codes, scale, zero_point = weight
    return apply(_IntegerMatmul, x, scale, bias, codes, zero_point, *given, activation, format, block)


class _IntegerMatmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        zero_point: Tensor | None,
        x_scale: Tensor | None,
        x_zero_point: Tensor | None,
        activation: QuantSpec,
        format: str,
        block: tuple[int, int],
    ) -> Tensor:
        if x_scale is None:
            x_codes, x_scale, x_zero_point = quantized(x, activation)
            assert x_scale is not None
        else:
            x_scale, x_zero_point = Scale(x_scale, x_zero_point).blocks_of(x, activation)
            block_of_x = activation.block(x.shape)
            x_codes = ops.quantize(x, x_scale, activation.format, block=block_of_x, zero_point=x_zero_point)
        return ops.scaled_matmul(
            x_codes,
            x_scale,
            codes,
            scale,
            format,
            block=block,
            x_zero_point=x_zero_point,
            zero_point=zero_point,
            bias=bias,
            dtype=x.dtype,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, bias, codes, zero_point, x_scale, x_zero_point, ctx.activation, ctx.format, ctx.block = inputs
        ctx.K, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        reads_x = ctx.needs_input_grad[1] or (ctx.needs_input_grad[0] and x_scale is not None)
        ctx.save_for_backward(x if reads_x else None, scale, codes, zero_point, x_scale, x_zero_point)
        ctx.save_for_forward(x, scale, codes, zero_point, x_scale, x_zero_point)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        x, scale, codes, zero_point, x_scale, x_zero_point = ctx.saved_tensors
        static = None if x_scale is None else Scale(x_scale, x_zero_point)
        weight = QuantizedWeight(codes, scale, formats.get(ctx.format), ctx.block, zero_point, (len(codes), ctx.K))
        dx = dscale = dbias = None
        if dy is not None and ctx.needs_input_grad[0]:
            dx = torch.ops.quantlib.dequant_matmul_backward(dy, *weight.arguments, size_of(codes, ctx.K))
            dx = dx if static is None else _clipped(dx, x, ctx.activation, static)
        if dy is not None and ctx.needs_input_grad[1]:
            values = project(x, ctx.activation, static)
            dscale = torch.ops.quantlib.dequant_matmul_backward_scale(dy, values, *weight.arguments)
        if dy is not None and ctx.needs_input_grad[2]:
            dbias = gradient_of_bias(dy, ctx.bias_dtype)
        return dx, dscale, dbias, *[None] * 7

    @staticmethod
    def tangent(ctx: Any, x_t: Tensor | None, scale_t: Tensor | None, bias_t: Tensor | None, *_: Any) -> Tensor:
        x, scale, codes, zero_point, x_scale, x_zero_point = ctx.saved_tensors
        static = None if x_scale is None else Scale(x_scale, x_zero_point)
        if x_t is not None and static is not None:
            x_t = _clipped(x_t, x, ctx.activation, static)
        values = x if scale_t is None else project(x, ctx.activation, static)
        weight = QuantizedWeight(codes, scale, formats.get(ctx.format), ctx.block, zero_point, (len(codes), ctx.K))
        return tangent_of_product(values, weight, x_t, scale_t, bias_t)
