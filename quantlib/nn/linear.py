"""y[..., n] = bias[n] + sum over k of x[..., k] * decode(weight[n, k]) * weight_scale[n // br, k // bk]"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib.nn.functional import Weight, dequantize_weight, project, quantize_weight
from quantlib.ops.check import dtype_of
from quantlib.spec import QuantSpec

FROZEN = {"weight": "codes", "weight_scale": "scale", "weight_zero_point": "zero_point"}  # parameter -> Weight's field


class QuantLinear(nn.Linear):
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
        What the weight is projected to.

    Attributes
    ----------
    weight : nn.Parameter [N, K] of the format's dtype, or [N, ceil(K / 2)] uint8
        The codes, frozen.
    weight_scale : nn.Parameter [ceil(N / br), ceil(K / bk)] float32, or None
        What codes are multiplied by, frozen. None for a 16-bit float format without a scale.
    weight_zero_point : nn.Parameter, int32 of weight_scale's shape, or None
        The code of zero, frozen; None unless the spec is affine.
    bias : nn.Parameter [N], or None

    Notes
    -----
    ``forward`` multiplies by the dequantized weight, in the dtype of its input; the bias follows. With an activation
    in the spec (W8A8) the input is projected first, so that the result is that of the projected operands.

    ``.to(dtype)``, ``.half()`` and the like change the bias and leave the codes, scales and zero points alone, whose
    dtypes are part of the format. ``.to(device)`` moves all of them.

    ``state_dict`` holds plain tensors under the names of the parameters. Codes that need a scale have a trailing axis
    of one there, [N, K, 1], so that no float layer can load them as if they were its weight: shapes do not match.
    """

    _version = 1  # of the state: what `load_state_dict` of this and every later version reads
    weight_scale: nn.Parameter | None
    weight_zero_point: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        spec: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.spec = QuantSpec.parse(spec)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = (out_features, in_features)
        blocks = self.spec.scale_shape(shape)
        codes = torch.zeros(self.spec.codes_shape(shape), dtype=dtype_of(self.spec.row), device=device)
        scale = torch.ones(blocks, dtype=torch.float32, device=device) if self.spec.scaled else None
        zero_point = None if self.spec.symmetric else torch.zeros(blocks, dtype=torch.int32, device=device)
        self._freeze(Weight(codes, scale, zero_point))
        zeros = nn.Parameter(torch.zeros(out_features, dtype=self.dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_float(cls, linear: nn.Linear, spec: Any) -> QuantLinear:
        """``linear`` with its weight projected; the bias is the same parameter, not a copy.

        Parameters
        ----------
        linear : nn.Linear
            Its weight is float32, float16 or bfloat16. Left as it is.
        spec : QuantSpec or what `QuantSpec.parse` takes

        Raises
        ------
        TypeError
            For a module that is not an ``nn.Linear`` with float weights.
        ValueError
            For an unknown spec.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear, QuantLinear):
            raise TypeError(f"linear must be an nn.Linear with float weights, got {type(linear).__name__}")
        new = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            device="meta",
            dtype=linear.weight.dtype,
            spec=spec,
        )
        new._freeze(quantize_weight(linear.weight, new.spec))
        new.bias = linear.bias
        return new.train(linear.training)

    def dequantize(self) -> nn.Linear:
        """An ``nn.Linear`` of ``self.dtype`` with the values that the codes stand for; the bias is the same object."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta", dtype=self.dtype)
        linear.weight = nn.Parameter(self.values(self.dtype))
        linear.bias = self.bias
        return linear.train(self.training)

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] of ``dtype``: the weight that the codes stand for."""
        weight = Weight(self.weight, self.weight_scale, self.weight_zero_point)
        return dequantize_weight(weight, self.spec, self.in_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] of any float dtype -> [..., N] of the same."""
        if self.spec.activation is not None:
            x = project(x, self.spec.activation)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.values(x.dtype), bias)

    def reset_parameters(self) -> None:
        """All zeros: a layer of codes has nothing to draw at random."""
        with torch.no_grad():
            for parameter in self.parameters(recurse=False):
                parameter.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, spec={self.spec}"

    def _freeze(self, weight: Weight) -> None:
        for name, field in FROZEN.items():
            tensor = getattr(weight, field)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        frozen = [p for name in FROZEN if (p := self._parameters[name]) is not None]

        def keep_dtype(t: Tensor) -> Tensor:
            y = fn(t)
            return t.to(y.device) if y.dtype != t.dtype and any(t is p for p in frozen) else y

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.spec.scaled and not keep_vars:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].unsqueeze(-1)
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]]["spec"] = str(self.spec)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        error_msgs: list[str] = args[-1]
        version, spec = local_metadata.get("version") or 0, QuantSpec.parse(local_metadata.get("spec", self.spec))
        if version > self._version:
            error_msgs.append(f"{prefix}weight must be of version {self._version} or older, got version {version}")
        elif spec.weight_only != self.spec.weight_only:
            error_msgs.append(f"{prefix}weight must be codes of {self.spec.weight_only}, got {spec.weight_only}")
        elif wrong := [name for name in FROZEN if not self._same_dtype(name, state_dict.get(prefix + name))]:
            for name in wrong:
                expected, got = self._parameters[name], state_dict[prefix + name]
                expected_dtype = "absent" if expected is None else expected.dtype
                error_msgs.append(f"{prefix}{name} must be {expected_dtype} for {self.spec}, got {got.dtype}")
        else:
            codes = state_dict.get(f"{prefix}weight")
            if codes is not None and codes.dim() == 3 and codes.shape[-1] == 1:
                state_dict[f"{prefix}weight"] = codes.squeeze(-1)
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _same_dtype(self, name: str, got: Tensor | None) -> bool:
        expected = self._parameters[name]
        return got is None or expected is None or got.dtype == expected.dtype
