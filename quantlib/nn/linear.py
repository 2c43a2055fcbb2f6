"""y[..., n] = bias[n] + sum over k of x[..., k] * decode(weight[n, k]) * weight_scale[n // br, k // bk]"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib import ops
from quantlib.nn.functional import SOURCES, Scale, Weight, autocast, integer_matmul, project
from quantlib.nn.leaf import check_inside
from quantlib.nn.module import PARTS, QuantModule, stored_dtype
from quantlib.nn.weight import QuantParameter
from quantlib.ops.scaled_matmul import X_FORMATS
from quantlib.spec import QuantSpec

if TYPE_CHECKING:
    from typing_extensions import Self

Product = Literal["whole", "floats", "rows", "integers"]


class QuantLinear(QuantModule, nn.Linear):
    """``nn.Linear`` whose weight is codes and their scales.

    Parameters
    ----------
    in_features, out_features : int
        K and N.
    bias : bool
        Whether there is a bias, which stays a float and may be trained.
    device : torch.device, optional
    dtype : torch.dtype, optional
        Of the bias, and of the layer that `dequantize` gives.
    spec : QuantSpec or what `QuantSpec.parse` takes
        What the weight is projected to, and the input where the spec has an activation.
    batch_invariant : bool
        Give a row of the input the same bytes whatever rows come with it. May be set at any time.

    Attributes
    ----------
    weight, weight_codes, weight_scale, weight_zero_point, spec, block, dtype
        As in `QuantModule`.
    bias : nn.Parameter [N], or None
    input_scale : nn.Parameter [1, 1] float32, or None
        Of all inputs, frozen; None unless the activation of the spec is static.
    input_zero_point : nn.Parameter [1, 1] int32, or None
        None unless the static activation is affine.

    Notes
    -----
    The weight is multiplied by as codes: no float copy of it is made, forward or backward.

    - Without an activation (W8A16, W4A16): `quantlib.dequant_matmul`.
    - Activations of ``int8:row`` on an integer weight (W8A8): `quantlib.dynamic_matmul`. Other int8 and uint8
      activations with a scale for each row or for all of the input: `quantlib.scaled_matmul`. The sums are exact
      integers, and what is too long for an int32 is that op's error.
    - Any other activation: the input is projected, then multiplied as without one.
    - Codes without a scale, and a float64 input, for which there is no kernel: ``F.linear`` with the whole weight in
      the dtype of the input.

    Gradients reach the input, the bias and, where it is made to require one, ``weight_scale``. Through the projection
    of an input they pass straight, and stop where it is out of the range of a static scale.
    """

    FLOAT = nn.Linear
    KEPT = (*PARTS, "input_scale", "input_zero_point")
    OWN = (*QuantModule.OWN, "batch_invariant", "product")
    input_scale: nn.Parameter | None
    input_zero_point: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        spec: Any,
        batch_invariant: bool = False,
    ) -> None:
        self._take(nn.Linear(in_features, out_features, bias, device="meta"), spec, dtype, device)
        self.batch_invariant = batch_invariant

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self._rows(self.out_features), self.in_features

    def _allocate(self, spec: QuantSpec, dtype: torch.dtype | None, device: Any) -> None:
        super()._allocate(spec, dtype, device)
        activation, static = spec.activation, None
        if activation is not None and activation.static:
            zero_point = None if activation.symmetric else torch.zeros(1, 1, dtype=torch.int32, device=device)
            static = Scale(torch.ones(1, 1, dtype=torch.float32, device=device), zero_point)
        self.set_input_scale(static)
        self.batch_invariant, self.product = False, product_of(spec, self.in_features)

    def _resize(self, N: int) -> bool:
        self.out_features = N
        return True

    def set_input_scale(self, static: Scale | None) -> None:
        """Keep what static activations are projected with; None where they are not static."""
        for name, tensor in zip(("input_scale", "input_zero_point"), static or (None, None), strict=True):
            self.register_parameter(name, None if tensor is None else QuantParameter(tensor, requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        """x [..., K] of any float dtype -> [..., N] of the same."""
        check_inside(input)
        x, spec, activation = autocast(input), self.spec, self.spec.activation
        parameters = self._parameters  # to ask a module for one by its name takes half a microsecond
        codes, scale, zero_point = self.codes, parameters["weight_scale"], parameters["weight_zero_point"]
        bias: Tensor | None = self.bias
        if self.batch_invariant:
            self._check_batch_invariant(x)
        if scale is None or x.dtype == torch.float64:
            x = x if activation is None else project(x, activation, self._static())
            return F.linear(x, self.values(x.dtype), None if bias is None else bias.to(x.dtype))
        bias = bias if bias is None or bias.dtype in SOURCES else bias.float()
        if self.product == "rows":
            return ops.dynamic_matmul(x, codes, scale, spec.format, block=self.block, zero_point=zero_point, bias=bias)
        if activation is not None:
            static = self._static()
            if self.product == "integers":
                weight = Weight(codes, scale, zero_point)
                return integer_matmul(x, activation, static, weight, spec.format, self.block, bias)
            x = project(x, activation, static)
        layout, rows = ("tiles", self.out_features) if codes.dim() == 3 else ("plain", None)
        return ops.dequant_matmul(
            x,
            codes,
            scale,
            spec.format,
            block=self.block,
            zero_point=zero_point,
            bias=bias,
            batch_invariant=self.batch_invariant,
            layout=layout,
            rows=rows,
        )

    def _static(self) -> Scale | None:
        """What a static activation is quantized with."""
        return None if self.input_scale is None else Scale(self.input_scale, self.input_zero_point)

    @property
    def tiled(self) -> bool:
        """Whether ``weight_codes`` is tiles, as `tile_` makes them."""
        return self.weight_codes.dim() == 3

    def tile_(self) -> Self:
        """Keep the codes as tiles [ceil(N / 16), ceil(K / columns), 1024], the order in which a GPU multiplies them.

        The layer gives the same results. ``state_dict`` still holds plain codes, and ``load_state_dict`` takes them.
        A weight that is shared with another module is shared no longer: the other keeps its codes.

        Returns
        -------
        QuantLinear
            The layer itself.

        Raises
        ------
        ValueError
            For codes without a scale, and for a weight that is multiplied by as integers (W8A8): those are not read
            as tiles.
        RuntimeError
            For a format of 16 bits.
        """
        if self.product != "floats":
            raise ValueError(f"spec must be of codes that are multiplied by as floats to be tiled, got {self.spec}")
        if not self.tiled:
            size = self.in_features if self.spec.row.packed else None
            tiles = ops.tile(self.codes, self.spec.format, size=size)
            self.weight_codes = QuantParameter(tiles, requires_grad=False)
        return self

    def untile_(self) -> Self:
        """Keep the codes as [N, K] again: the inverse of `tile_`."""
        if self.tiled:
            self.weight_codes = QuantParameter(self.plain.codes.view(stored_dtype(self.spec)), requires_grad=False)
        return self

    @property
    def plain(self) -> Weight:
        codes = ops.untile(self.codes, self.spec.format, self.weight_shape) if self.tiled else self.codes
        return Weight(codes, self.weight_scale, self.weight_zero_point)

    def extra_repr(self) -> str:
        words = [name for name in ("batch_invariant", "tiled") if getattr(self, name)]
        return ", ".join([super().extra_repr(), *(f"{word}=True" for word in words)])

    def _check_batch_invariant(self, x: Tensor) -> None:
        activation = self.spec.activation
        if not self.spec.scaled or x.dtype == torch.float64:
            what = f"an input of {x.dtype}" if self.spec.scaled else f"codes of {self.spec}, which have no scale"
            raise RuntimeError(f"batch_invariant must be False for F.linear to multiply, got {what}")
        shared = activation is not None and (activation.per or "").partition(":")[0] in ("tensor", "tile")
        if activation is not None and shared and not activation.static:
            raise RuntimeError(f"batch_invariant must be False where rows share a scale, got activations {activation}")

    def set_weight_(self, weight: Tensor) -> Self:
        tiled = self.tiled
        self.untile_()
        super().set_weight_(weight)
        return self.tile_() if tiled else self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled and not keep_vars:
            destination[f"{prefix}weight_codes"] = self.plain.codes.view(stored_dtype(self.spec))

    def _load_from_state_dict(self, *args: Any) -> None:
        tiled = self.tiled
        self.untile_()
        super()._load_from_state_dict(*args)
        if tiled:
            self.tile_()


def product_of(spec: QuantSpec, K: int) -> Product:
    """How a layer multiplies: by the whole weight in floating point, by codes with floats, or by codes with codes."""
    activation = spec.activation
    if not spec.scaled:
        return "whole"
    if activation is None or not K or spec.row.is_float or activation.format not in X_FORMATS:
        return "floats"
    if activation == QuantSpec("int8", "row"):
        return "rows"
    return "integers" if activation.per in ("row", "tensor") else "floats"
