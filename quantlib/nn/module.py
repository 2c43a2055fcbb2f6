"""weight ~ decode(codes[n, k]) * scale[n // br, k // bk]: what every module whose weight is codes has in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantlib.nn.functional import Weight, dequantize_weight, quantize_weight
from quantlib.ops.check import dtype_of
from quantlib.spec import QuantSpec

if TYPE_CHECKING:
    from typing_extensions import Self

FROZEN = {"weight": "codes", "weight_scale": "scale", "weight_zero_point": "zero_point"}  # parameter -> Weight's field


class QuantModule(nn.Module):
    """A module of codes: how they are made of a float weight, kept through whatever is done to a module, and saved.

    The weight is viewed as a matrix [N, K], N the outputs or the entries of a table and K all the rest. A subclass
    derives from this and from the float module that it stands for, `FLOAT`, and says how to build itself (`like`).

    Attributes
    ----------
    weight : nn.Parameter [N, K] of the format's dtype, or [N, ceil(K / 2)] uint8
        The codes, frozen.
    weight_scale : nn.Parameter [ceil(N / br), ceil(K / bk)] float32, or None
        What codes are multiplied by, frozen. None for a 16-bit float format without a scale.
    weight_zero_point : nn.Parameter, int32 of weight_scale's shape, or None
        The code of zero, frozen; None unless the spec is affine.
    spec : QuantSpec
    block : (br, bk)
        Rows and columns of [N, K] that share a scale.
    dtype : torch.dtype
        Of the float parameters, and of the module that `dequantize` gives.

    Notes
    -----
    ``.to(dtype)``, ``.half()`` and the like change the bias and leave the codes, scales and zero points alone, whose
    dtypes are part of the format. ``.to(device)`` moves all of them.

    ``state_dict`` holds plain tensors under the names of the parameters. Codes that need a scale have one axis more
    there than the float weight, ones at the end, so that no float module can load them as if they were its weight:
    [N, K, 1] for a linear layer. Codes without a scale have the shape of the float weight.
    """

    FLOAT: ClassVar[type[nn.Module]]
    KEPT: ClassVar[tuple[str, ...]] = tuple(FROZEN)  # the parameters whose dtypes are part of the format
    _version = 1  # of the state: what `load_state_dict` of this and every later version reads
    spec: QuantSpec
    block: tuple[int, int]
    dtype: torch.dtype
    weight: Tensor
    weight_scale: nn.Parameter | None
    weight_zero_point: nn.Parameter | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the float weight."""
        raise NotImplementedError

    @classmethod
    def like(cls, layer: Any, spec: QuantSpec) -> Self:
        """This module for the sizes of ``layer``, with its bias itself and codes on ``meta``."""
        raise NotImplementedError

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        """What about ``layer``, a `FLOAT`, this module cannot do; None if it serves it."""
        return None

    @classmethod
    def from_float(cls, layer: nn.Module, spec: Any) -> Self:
        """``layer`` with its weight projected; the bias is the same parameter, not a copy.

        Parameters
        ----------
        layer : nn.Module
            The float module that this one stands for; its weight is float32, float16 or bfloat16. Left as it is.
        spec : QuantSpec or what `QuantSpec.parse` takes

        Raises
        ------
        TypeError
            For another module, or one that is quantized already.
        ValueError
            For an unknown spec, one with static activations, and for what this module cannot do.
        """
        if not isinstance(layer, cls.FLOAT) or isinstance(layer, QuantModule):
            raise TypeError(f"layer must be an nn.{cls.FLOAT.__name__} with float weights, got {type(layer).__name__}")
        if why := cls.refuses(layer):
            raise ValueError(f"layer must be an nn.{cls.FLOAT.__name__} that {cls.__name__} can serve, got one {why}")
        new = cls.like(layer, QuantSpec.parse(spec))
        assert isinstance(layer.weight, Tensor)
        if not layer.weight.is_meta:  # a skeleton's scales are still to be loaded
            check_dynamic(new.spec)
        new._freeze(quantize_weight(layer.weight.detach().flatten(1), new.spec))
        return new.train(layer.training)

    def dequantize(self) -> nn.Module:
        """The float module of ``self.dtype`` with the values that the codes stand for; the bias is the same object."""
        return self.with_weight(nn.Parameter(self.values(self.dtype)))

    def with_weight(self, weight: nn.Parameter) -> nn.Module:
        """The float module that this one stands for, with ``weight`` and this one's bias."""
        raise NotImplementedError

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, of ``dtype`` and in the shape of the float weight."""
        return dequantize_weight(self.plain, self.spec, self._matrix[1], dtype).view(self.weight_shape)

    @property
    def plain(self) -> Weight:
        """The codes as [N, K], their scales and zero points."""
        return Weight(self.weight, self.weight_scale, self.weight_zero_point)

    def reset_parameters(self) -> None:
        """All zeros: a module of codes has nothing to draw at random."""
        with torch.no_grad():
            for parameter in self.parameters(recurse=False):
                parameter.zero_()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, spec={self.spec}"

    @property
    def _matrix(self) -> tuple[int, int]:
        N, *rest = self.weight_shape
        return N, math.prod(rest)

    def _allocate(self, spec: QuantSpec, dtype: torch.dtype | None, device: Any) -> None:
        """Codes of 0 for the weight of `weight_shape`, and scales of 1."""
        self.spec, self.block = spec, spec.block(self._matrix)
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        blocks = spec.scale_shape(self._matrix)
        codes = torch.zeros(spec.codes_shape(self._matrix), dtype=dtype_of(spec.row), device=device)
        scale = torch.ones(blocks, dtype=torch.float32, device=device) if spec.scaled else None
        zero_point = None if spec.symmetric else torch.zeros(blocks, dtype=torch.int32, device=device)
        self._freeze(Weight(codes, scale, zero_point))

    def share(self, other: QuantModule) -> None:
        """Have the weight of ``other``, the same parameters: a tied weight."""
        for name in FROZEN:
            self.register_parameter(name, other._parameters[name])

    def _freeze(self, weight: Weight) -> None:
        for name, field in FROZEN.items():
            tensor = getattr(weight, field)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        frozen = [p for name in self.KEPT if (p := self._parameters[name]) is not None]

        def keep_dtype(t: Tensor) -> Tensor:
            y = fn(t)
            return t.to(y.device) if y.dtype != t.dtype and any(t is p for p in frozen) else y

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            codes, axes = self.plain.codes.detach(), len(self.weight_shape) - 1
            stored = codes.view(*codes.shape, *(1,) * axes) if self.spec.scaled else codes.view(self.weight_shape)
            destination[f"{prefix}weight"] = stored
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
        elif wrong := [name for name in self.KEPT if not self._same_dtype(name, state_dict.get(prefix + name))]:
            for name in wrong:
                expected, got = self._parameters[name], state_dict[prefix + name]
                expected_dtype = "absent" if expected is None else expected.dtype
                error_msgs.append(f"{prefix}{name} must be {expected_dtype} for {self.spec}, got {got.dtype}")
        else:
            codes = state_dict.get(f"{prefix}weight")
            if codes is not None and tuple(codes.shape) == stored_shape(self.spec, self.weight_shape):
                state_dict[f"{prefix}weight"] = codes.reshape(self.spec.codes_shape(self._matrix))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _same_dtype(self, name: str, got: Tensor | None) -> bool:
        expected = self._parameters[name]
        return got is None or expected is None or got.dtype == expected.dtype


def check_of_weight(spec: QuantSpec) -> None:
    """The scale of a weight is kept with it in any case: only that of an activation is said to be static."""
    if spec.static:
        raise ValueError(f"spec must be static in its activation only, got {spec}")


def check_dynamic(spec: QuantSpec) -> None:
    """``spec`` is for a weight, and asks for nothing that only training or calibration can find."""
    check_of_weight(spec)
    if spec.activation is not None and spec.activation.static:
        raise ValueError(
            f"spec must have activations whose scales follow the input, got {spec}: "
            "static ones come from prepare_qat_, some forwards, and convert_"
        )


def is_sharded(t: Tensor) -> bool:
    """Whether ``t`` is a DTensor: of its values this process may hold a part."""
    return hasattr(t, "device_mesh")


def check_whole(model: nn.Module, way_out: str) -> None:
    """No module of ``model`` is sharded by FSDP2, whose parameters are whole only for a while, and no parameter is."""
    for name, module in model.named_modules():
        of_fsdp = any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)
        sharded = next((key for key, p in module._parameters.items() if p is not None and is_sharded(p)), None)
        if of_fsdp or sharded is not None:
            where = ".".join(filter(None, (name, sharded))) or "its root"
            raise ValueError(f"model must not be sharded, got one that is at {where}: {way_out}")


def stored_shape(spec: QuantSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the codes of a float weight of ``shape`` in a state: an axis more than it has, where they need a scale."""
    if not spec.scaled:
        return shape
    N, *rest = shape
    return (*spec.codes_shape((N, math.prod(rest))), *(1 for _ in rest))
