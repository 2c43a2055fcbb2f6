"""The spec of a weight: a format, how many weights share a scale, symmetric or affine; and that of the activations.

As text, ``format[:per][:affine][:scale][:search][:hadamard][@activation[:static]]``, where a weight and an activation
are written alike::

    int8                 int8, one scale a row (per channel, the default of int8)
    int4:group:32        int4, one scale for 32 weights of a row
    int8:tile:128        int8, one scale for a tile of 128 x 128 weights
    uint8:row:affine     uint8 with a zero point
    int4:group:32:bfloat16    int4, whose scales are kept in bfloat16 or float16 instead of float32
    float4_e2m1fn:group:32:e8m0    E2M1, whose scales are powers of two, of a byte each: MXFP4
    int4:group:32:mse         int4, with the scales that leave the least error in place of those of the whole range
    int8:row:hadamard@int8:row    int8 weights and activations, both multiplied by a Hadamard matrix before
    nf4:group:64:signed_mse   the same of scales of either sign, for a code book whose values are not symmetric
    bfloat16             a plain cast: no scale
    int8:row@int8:row    int8 weights, and activations quantized to int8 per token as they arrive
    int8:channel@int8:token    the same: a channel is a row of the weight, a token is a row of the activations
    int8@int8:tensor:static    the same with one scale for all activations, which training or calibration found

or one of the names of `SCHEMES`, such as ``W8A16``, with words behind it: ``W4A16:mse``, which is another search than
the one that ``W4A16`` means, ``W8A8:hadamard``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, replace
from typing import Any

from quantlib import formats
from quantlib.formats import Format

# W<bits of a weight>A<bits of an activation>; 16 bits mean the dtype that the model computes in.
SCHEMES = {
    "w8a16": "int8:row",
    "w8a8": "int8:row@int8:row",
    # Once int4:group:128, then without the search: files and configurations spell the format.
    "w4a16": "nf4_bf16:group:128:bfloat16:signed_magnitude",
    "w4a8": "int4:group:128@int8:row",
    "fp16": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3fn:row",
    "fp4": "float4_e2m1fn:group:128",
}

GRAMMAR = (
    "format[:tensor|:row|:group:N|:tile:N][:affine][:bfloat16|:float16|:e8m0]"
    "[:[signed_]mse|:[signed_]magnitude][:hadamard][@activation[:static]], "
    "e.g. int8:row, int4:group:32, W8A16, W8A8"
)
TARGETS = tuple(f.name for f in formats.TABLE)
SCALES = {  # what a scale may be kept in, and its dtype
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "e8m0": "float8_e8m0fnu",
}
MOST_ROTATED = 1024  # columns of a Hadamard matrix
SIGNED = "signed_"  # begins the name of a search that tries scales of both signs
SEARCHES = ("mse", "magnitude", f"{SIGNED}mse", f"{SIGNED}magnitude")  # what the scales of a weight may be searched by


@dataclass(frozen=True)
class QuantSpec:
    """A number format and its granularity.

    Parameters
    ----------
    format : str or torch.dtype
        A row of `quantlib.formats`: ``float16``, ``bfloat16``, ``float8_e4m3fn``, ``float8_e5m2``, ``float4_e2m1fn``,
        ``nf4``, ``nf4_bf16``, ``int8``, ``uint8``, ``int4``.
    per : {"tensor", "row", "channel", "token", "group", "group:N", "tile:N"}, optional
        The weights that share a scale: all, an output row, N neighbours in a row, a tile of N x N. "channel" and
        "token" are other words for "row": that of a weight, and that of an activation. By default "row" for 8 bits,
        "group:64" for code books and "group:128" for other formats of 4; 16-bit floats have no scale by default and are
        cast.
    symmetric : bool, optional
        False gives integer formats a zero point. True by default; False for ``uint8``, whose codes have no sign.
    activation : QuantSpec or str, optional
        Quantize the input of the layer too, with scales taken from the input as it arrives, or static ones.
    static : bool
        True for a per-tensor activation whose scale is kept with the layer and does not follow the input. It comes from
        `prepare_qat_` and `convert_`.
    scale : {"float32", "bfloat16", "float16", "e8m0"}
        The dtype that the scales of a weight are kept in: 16 bits halve what they take, and E8M0, powers of two, is
        one byte. They are rounded before the codes are made, and are exact in float32, in which they are multiplied.
    search : {"minmax", "mse", "magnitude", "signed_mse", "signed_magnitude"}
        Of a weight: whether its scales are those of the whole range, or the parts of them that leave the least error,
        as `compute_scale` takes it for its method; those that begin with "signed" try scales of both signs, for a code
        book whose values are not symmetric. Only the time that it takes to make codes differs.
    hadamard : bool
        True for a linear layer whose columns, and whose input, are multiplied by a Hadamard matrix before they are
        quantized, which spreads outliers: `quantlib.hadamard`, in blocks of `rotation` columns.
    group_size : int, optional
        N of a scale per group; the attribute `per` says it afterwards.

    Raises
    ------
    ValueError
        For a word that is none of these, naming what was expected and what came.

    Examples
    --------
    >>> str(QuantSpec.parse("W4A16")), str(QuantSpec.parse("W4A16:mse"))
    ('nf4_bf16:group:128:bfloat16:signed_magnitude', 'nf4_bf16:group:128:bfloat16:mse')
    >>> QuantSpec("int4", per="group", group_size=32) == QuantSpec.parse("int4:group:32")
    True
    >>> QuantSpec("int8", per="group:64", symmetric=False).block((4096, 4096))
    (1, 64)
    """

    format: str
    per: str | None = None
    symmetric: bool | None = None
    activation: QuantSpec | None = None
    static: bool = False
    scale: str = "float32"
    search: str = "minmax"
    hadamard: bool = False
    group_size: InitVar[int | None] = None

    def __post_init__(self, group_size: int | None) -> None:
        row = formats.get(self.format)
        if row.name not in TARGETS:
            raise ValueError(f"format must be one of {', '.join(TARGETS)}, got {row.name}")
        wanted = self.per if group_size is None else per_group(self.per, group_size)
        per = default_per(row) if wanted is None else checked_per(wanted)
        symmetric = row.is_float or row.signed if self.symmetric is None else self.symmetric
        if not isinstance(symmetric, bool):
            raise TypeError(f"symmetric must be True, False or None, got {symmetric!r}")
        if row.is_float and not symmetric:
            raise ValueError(f"symmetric must be True for {row.name}, which has no zero point, got False")
        if not row.signed and symmetric:
            raise ValueError(f"symmetric must be False for {row.name}, which has no negative codes, got True")
        if self.static and (per != "tensor" or self.activation is not None):
            raise ValueError(f"static must be False but for an activation with one scale, per tensor, got per {per}")
        scale = str(self.scale).removeprefix("torch.")
        scale = "e8m0" if scale == SCALES["e8m0"] else scale
        if scale not in SCALES:
            *most, last = SCALES
            raise ValueError(f"scale must be {', '.join(most)} or {last}, got {self.scale!r}")
        if scale == "e8m0" and (getattr(row, "is_book", False) or self.search != "minmax"):
            what = f"{row.name}, a code book" if self.search == "minmax" else f"the search {self.search}"
            raise ValueError(f"scale must be float32, bfloat16 or float16 for {what}, got e8m0")
        if scale != "float32" and (per is None or self.static):
            what = "a static activation" if self.static else f"{row.name} without a scale"
            raise ValueError(f"scale must be float32 for {what}, got {scale}")
        if self.search not in ("minmax", *SEARCHES):
            raise ValueError(
                f"search must be minmax, {', '.join(SEARCHES[:-1])} or {SEARCHES[-1]}, got {self.search!r}"
            )
        if self.search != "minmax" and (per is None or self.static):
            what = "a static activation" if self.static else f"{row.name} without a scale"
            raise ValueError(f"search must be minmax for {what}, got {self.search}")
        if self.search.startswith(SIGNED) and row.is_symmetric:
            got = f"{self.search} for {row.name}, whose values are symmetric"
            raise ValueError(f"search must be {' or '.join(SEARCHES[:2])}, got {got}")
        if not isinstance(self.hadamard, bool):
            raise TypeError(f"hadamard must be True or False, got {self.hadamard!r}")
        if self.hadamard and (per is None or self.static):
            what = "a static activation" if self.static else f"{row.name} without a scale"
            raise ValueError(f"hadamard must be False for {what}, got True")
        activation = None if self.activation is None else QuantSpec.parse(self.activation)
        if activation is not None and activation.activation is not None:
            raise ValueError(f"activation must be a format without an activation of its own, got {activation}")
        if activation is not None and activation.per is None:
            raise ValueError(f"activation must have a scale, got {activation}, a plain cast: convert the input instead")
        if activation is not None and activation.scale != "float32":
            raise ValueError(f"activation must have scales of float32, got {activation}")
        if activation is not None and activation.hadamard:
            raise ValueError(f"activation must be rotated by the word hadamard of its weight, got {activation}")
        if activation is not None and activation.search != "minmax":
            raise ValueError(f"activation must have the scales of its range, got {activation}")
        settled = {"format": row.name, "per": per, "symmetric": symmetric, "activation": activation, "scale": scale}
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    @classmethod
    def parse(cls, spec: Any) -> QuantSpec:
        """The spec that ``spec`` means: a QuantSpec, a ``torch.dtype``, or text in the grammar of this module.

        Raises
        ------
        ValueError
            For anything else, with the grammar and what came.
        """
        if isinstance(spec, QuantSpec):
            return spec
        text = spec if isinstance(spec, str) else str(spec).removeprefix("torch.")
        weight, at, activation = text.strip().lower().partition("@")
        hadamard = weight.endswith(":hadamard")
        whole = weight.removesuffix(":hadamard") + at + activation
        weight, at, activation = SCHEMES.get(whole, whole).partition("@")
        scheme, _, search = weight.rpartition(":")
        if search in SEARCHES and (known := SCHEMES.get(scheme)):  # W8A8:mse, whose activation follows
            weight, at_scheme, of_scheme = known.partition("@")
            words = [word for word in weight.split(":") if word not in SEARCHES]  # but for the scheme's own search
            weight, at, activation = ":".join([*words, search]), at or at_scheme, activation or of_scheme
        name, *words = SCHEMES.get(weight, weight).split(":")
        static = words[-1:] == ["static"] and bool(words.pop())
        search = words.pop() if words[-1:] and words[-1] in SEARCHES else "minmax"
        scale = words.pop() if words[-1:] and words[-1] in SCALES else "float32"
        affine = words[-1:] == ["affine"] and bool(words.pop())
        try:
            if at and not activation:
                raise ValueError("an activation must follow the @")
            per = ":".join(words) or None
            symmetric = False if affine else None
            return cls(name, per, symmetric, activation or None, static, scale, search, hadamard)  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"spec must be {GRAMMAR}, got {spec!r}: {error}") from None

    @property
    def row(self) -> Format:
        """The row of the table of formats."""
        return formats.FORMATS[self.format]

    @property
    def scaled(self) -> bool:
        """True if codes are multiplied by a scale; if not, a weight is its own cast."""
        return self.per is not None

    @property
    def plain(self) -> bool:
        """True if scales are those of the whole range, kept as they are computed."""
        return self.scale == "float32" and self.search == "minmax"

    @property
    def weight_only(self) -> QuantSpec:
        """The same without the activation: all that a stored weight needs."""
        return replace(self, activation=None)

    @property
    def kept(self) -> QuantSpec:
        """The spec of a stored weight: this one without the activation and the search."""
        return replace(self, activation=None, search="minmax")

    @property
    def unrotated(self) -> QuantSpec:
        """Drop the Hadamard matrix: the spec of what has been multiplied by it."""
        return replace(self, hadamard=False)

    def rotation(self, columns: int) -> int:
        """The size of the Hadamard matrix: the largest power of two that divides ``columns``, at most 1024."""
        return min(columns & -columns, MOST_ROTATED) or 1

    def block(self, shape: Sequence[int]) -> tuple[int, int]:
        """(br, bk): rows and columns of the block that shares a scale, in a matrix [..., K] viewed as [M, K]."""
        M, K = matrix_shape(shape)
        kind, _, size = (self.per or "tensor").partition(":")
        rows, columns = {
            "tensor": (M, K),
            "row": (1, K),
            "group": (1, min(int(size or 0), K)),
            "tile": (min(int(size or 0), M), min(int(size or 0), K)),
        }[kind]
        return max(rows, 1), max(columns, 1)

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """[ceil(M / br), ceil(K / bk)]"""
        (M, K), (br, bk) = matrix_shape(shape), self.block(shape)
        return (M + br - 1) // br, (K + bk - 1) // bk

    def codes_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """``shape``, or [..., ceil(K / P)] bytes where P codes share one."""
        return (*shape[:-1], self.row.columns(shape[-1])) if self.row.packed else tuple(shape)

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of the codes, the scales and the zero points of a weight of ``shape``."""
        M, K = matrix_shape(self.codes_shape(shape))
        of_codes, rows, blocks = max(self.row.bits, 8) // 8, *(self.scale_shape(shape) if self.scaled else (0, 0))
        of_zero_points = 0 if self.symmetric else self.row.columns(blocks) * of_codes
        return M * K * of_codes + rows * (blocks * self.scale_bytes + of_zero_points)

    def zero_point_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the zero points, which are kept as codes are: P to a byte."""
        return self.codes_shape(self.scale_shape(shape))

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale."""
        return 1 if self.scale == "e8m0" else formats.FORMATS[self.scale].bits // 8

    def __str__(self) -> str:
        scale = "" if self.scale == "float32" else self.scale
        search = "" if self.search == "minmax" else self.search
        affine, static = "" if self.symmetric else "affine", "static" if self.static else ""
        words = (self.format, self.per, affine, scale, search, "hadamard" if self.hadamard else "", static)
        text = ":".join(word for word in words if word)
        return text if self.activation is None else f"{text}@{self.activation}"


def default_per(row: Format) -> str | None:
    """The default ``per`` of a format: fewer bits, fewer weights a scale. Other libraries have this for code books."""
    if isinstance(row, formats.FloatFormat) and row.is_book:
        return "group:64"
    return {16: None, 8: "row"}.get(row.bits, "group:128")


def per_group(per: str | None, group_size: object) -> str:
    """Combine ``per`` and ``group_size``."""
    if per not in (None, "group"):
        raise ValueError(f'per must be "group" where group_size is given, got {per!r}')
    if isinstance(group_size, bool) or not isinstance(group_size, int) or group_size < 1:
        raise ValueError(f"group_size must be a whole number >= 1, got {group_size!r}")
    return f"group:{group_size}"


def checked_per(per: object) -> str:
    """Return ``per`` as it is written in `QuantSpec.per`."""
    if per in ("channel", "token"):  # a row of the weight, a row of the activations
        return "row"
    if isinstance(per, str) and re.fullmatch(r"tensor|row|(group|tile):0*[1-9][0-9]*", per):
        return per if ":" not in per else f"{per.partition(':')[0]}:{int(per.partition(':')[2])}"
    raise ValueError(f"per must be tensor, row (or channel, token), group:N or tile:N with N >= 1, got {per!r}")


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """[..., K] viewed as [M, K]; 0-d as [1, 1]."""
    M = 1
    for size in shape[:-1]:
        M *= size
    return M, (shape[-1] if len(shape) else 1)


def check_of_weight(spec: QuantSpec) -> None:
    """A weight has no static scale: the scale is kept with the codes in any case.

    Raises
    ------
    ValueError
        For a spec whose weight is static.
    """
    if spec.static:
        raise ValueError(f"spec must be static in its activation only, got {spec}")


def check_unrotated(spec: QuantSpec, what: str) -> None:
    """Check that ``spec`` is without a Hadamard matrix, for ``what`` multiplies no input by one.

    Raises
    ------
    ValueError
        For a spec with one.
    """
    if spec.hadamard:
        raise ValueError(f"spec must be without hadamard for {what}, got {spec}")


def check_dynamic(spec: QuantSpec) -> None:
    """Check that ``spec`` is for a weight, and needs nothing that only training or calibration can find.

    Raises
    ------
    ValueError
        For a spec with a static scale.
    """
    check_of_weight(spec)
    if spec.activation is not None and spec.activation.static:
        raise ValueError(
            f"spec must have activations whose scales follow the input, got {spec}: "
            "static ones come from prepare_qat_, some forwards, and convert_"
        )


def stored_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a file of the codes of a float weight of ``shape``; codes with scales have one axis more: [N, K, 1]."""
    if not spec.scaled:
        return shape
    N, *rest = shape
    return (*spec.codes_shape((N, math.prod(rest))), *(1 for _ in rest))


W8A16 = QuantSpec.parse("W8A16")
W8A8 = QuantSpec.parse("W8A8")
W4A16 = QuantSpec.parse("W4A16")
W4A8 = QuantSpec.parse("W4A8")
