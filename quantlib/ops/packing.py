"""byte[i, j] = code[i, P j] | code[i, P j + 1] << bits | ...: codes that share bytes, P to each, in and out of them."""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib import formats
from quantlib.backends import packing
from quantlib.ops.check import check_dense, check_size, fail, host_values, one_of
from quantlib.ops.declare import format_name
from quantlib.ops.explain import explain

PACKED = tuple(f.name for f in formats.TABLE if f.packed)


def pack(codes: Tensor, format: str) -> Tensor:
    """Codes one a byte to codes that share bytes, as :func:`quantize` writes them.

    Parameters
    ----------
    codes : Tensor [..., K] of an integer dtype
        int4: -8..7; float4_e2m1fn, nf4, nf4_bf16: 0..15, the bits of the code.
    format : str
        A packed format, of four bits here.

    Returns
    -------
    Tensor [..., ceil(K / 2)] uint8
        Element 2j in the low nibble of byte j; the nibble past an odd K is 0.

    Raises
    ------
    RuntimeError
        For a dtype that is not an integer's, another format, or a code the format does not have; the codes of a
        tensor without values, on meta or of a tracer, are taken as they are.
    """
    try:
        check_dense("pack", "codes", codes)
        f = _packed("pack", format)
        if codes.is_floating_point() or codes.is_complex() or codes.dim() == 0:
            fail("pack", "codes", "integers [..., K]", f"{codes.dtype} {list(codes.shape)}")
        lowest, highest = f.code_range
        if values := host_values(codes, wait=True):
            least, most = map(int, values)
            if least < lowest or most > highest:
                fail("pack", "codes", f"in {lowest}..{highest}", least if least < lowest else most)
        return packing.pack(codes, f)
    except Exception as error:
        explain("pack", pack, locals(), error)


def unpack(packed: Tensor, format: str, size: int | None = None) -> Tensor:
    """Codes that share bytes to codes one a byte: the inverse of :func:`pack`.

    Parameters
    ----------
    packed : Tensor [..., ceil(K / 2)] uint8
    format : str
        A packed format, of four bits here.
    size : int, optional
        K; as many codes as fit in the bytes by default.

    Returns
    -------
    Tensor [..., K]
        int8 in -8..7 for int4, uint8 in 0..15 for float4_e2m1fn, nf4 and nf4_bf16.

    Raises
    ------
    RuntimeError
        For a dtype other than uint8, another format, or a size the bytes cannot hold.
    """
    try:
        check_dense("unpack", "packed", packed)
        f = _packed("unpack", format)
        if packed.dtype != torch.uint8 or packed.dim() == 0:
            fail("unpack", "packed", "uint8 [..., K / 2]", f"{packed.dtype} {list(packed.shape)}")
        return packing.unpack(packed, f, check_size("unpack", packed.shape[-1], f, size))
    except Exception as error:
        explain("unpack", unpack, locals(), error)


def _packed(op: str, format: str) -> formats.Format:
    name = format_name(format)
    if name not in PACKED:
        fail(op, "format", one_of(PACKED), name)
    return formats.get(name)
