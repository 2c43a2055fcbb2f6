"""tiles[n // 16, k // columns, byte] = codes[n, k]: a weight in the order in which matrix instructions take it"""

from __future__ import annotations

import torch
from torch import Tensor

from quantlib.backends.tiles import TileLayout
from quantlib.ops.check import (
    check_dense,
    check_format,
    check_size,
    check_tensor,
    described,
    dtype_of,
    fail,
    no_gradient,
)
from quantlib.ops.declare import format_name
from quantlib.ops.explain import explain


def tile(codes: Tensor, format: str | torch.dtype, *, size: int | None = None) -> Tensor:
    """The codes of a weight as tiles of 1024 bytes, which `dequant_matmul` on a GPU reads without a shuffle.

    Parameters
    ----------
    codes : Tensor [N, K] of the format's dtype
        [N, ceil(K / 2)] uint8 for a format of four bits.
    format : str or torch.dtype
        A row of ``quantlib.formats`` of at most eight bits.
    size : int, optional
        K, for packed codes whose last byte holds one code only; twice the bytes by default.

    Returns
    -------
    Tensor [ceil(N / 16), ceil(K / columns), 1024] uint8
        ``columns`` is 64, or 128 for a format of four bits. Codes past the end are 0.

    Raises
    ------
    RuntimeError
        For an argument that is not as above.
    """
    try:
        check_dense("tile", "codes", codes)
        no_gradient("tile", "codes", codes)
        f = check_format("tile", format_name(format), TileLayout.FORMATS)
        if codes.dim() != 2 or codes.dtype != dtype_of(f):
            got = described(codes.shape, codes.dtype, codes.device)
            fail("tile", "codes", f"{f.dtype_name} [N, {f'ceil(K / {f.per_byte})' if f.packed else 'K'}]", got)
        return TileLayout(f).pack(codes.contiguous(), check_size("tile", codes.shape[1], f, size))
    except Exception as error:
        explain("tile", tile, locals(), error)


def untile(tiles: Tensor, format: str | torch.dtype, shape: tuple[int, int]) -> Tensor:
    """The codes that `tile` was given.

    Parameters
    ----------
    tiles : Tensor [ceil(N / 16), ceil(K / columns), 1024] uint8
    format : str or torch.dtype
        A row of ``quantlib.formats`` of at most eight bits.
    shape : (N, K)

    Returns
    -------
    Tensor [N, K] of the format's dtype, or [N, ceil(K / 2)] uint8

    Raises
    ------
    RuntimeError
        For an argument that is not as above.
    """
    try:
        check_dense("untile", "tiles", tiles)
        no_gradient("untile", "tiles", tiles)
        f = check_format("untile", format_name(format), TileLayout.FORMATS)
        check_tensor("untile", "tiles", tiles, (TileLayout(f).shape(*shape), torch.uint8), tiles.device)
        return TileLayout(f).unpack(tiles.contiguous(), *shape)
    except Exception as error:
        explain("untile", untile, locals(), error)
