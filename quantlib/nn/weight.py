"""weight[n, k] = decode(codes[n, k]) * scale[n // br, k // bk], computed when somebody reads it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from quantlib.ops.check import dtype_name

WAY_OUT = (
    "set_weight_(float_weight) quantizes another weight into the layer, "
    "and dequantize_(model) gives back float layers, which can be changed"
)


class QuantParameter(nn.Parameter):
    """A tensor of a quantized weight: its codes, scales or zero points.

    Its dtype is part of the number format, and says nothing of the dtype that the model computes in. So it does not
    count as floating point for those who ask a parameter: ``module.half()`` leaves it alone, and ``model.dtype`` of
    transformers and diffusers is that of the first float parameter. Codes and zero points never require a gradient:
    ``model.requires_grad_(True)`` and ``parameter.requires_grad = True`` pass over them, and are remembered for the
    float weight that `dequantize_` gives. ``data`` keeps its dtype.

    Attributes
    ----------
    asked : bool
        Whether a gradient was asked for last; True at first.
    """

    asked: bool = True

    @staticmethod
    def __new__(
        cls, data: Tensor, requires_grad: bool = True, asked: bool = True, dtype: torch.dtype | None = None
    ) -> Any:
        if dtype is not None:  # of the bytes of a pickle
            data = data.view(dtype)
        if isinstance(data, QuantParameter):  # `init_empty_weights` of accelerate makes each parameter anew
            asked, data = data.asked, data.data
        new = super().__new__(cls, data, requires_grad)
        if not asked:
            new.asked = False
        return new

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad":
            self.requires_grad_(value)
        elif name == "data" and value.dtype != self.dtype:
            narrow = value.to(self.dtype)
            # `prepare_model_for_kbit_training` of PEFT widens all floats of 16 bits: these stay as they are
            widened = value.dtype == torch.float32 and self.dtype in (torch.float16, torch.bfloat16)
            if not widened or not (value.is_meta or torch.equal(narrow.float(), value)):
                raise TypeError(f"data of {self._what} must be {dtype_name(self.dtype)}, got {dtype_name(value.dtype)}")
            super().__setattr__(name, narrow)
        else:
            super().__setattr__(name, value)

    @property
    def _what(self) -> str:
        if self.dtype == torch.float32:
            return "a scale"
        return "codes or a scale" if self.dtype.is_floating_point else "codes or zero points"

    def is_floating_point(self) -> bool:
        return False

    def requires_grad_(self, requires_grad: bool = True) -> QuantParameter:
        self.asked = requires_grad
        if self.dtype == torch.float32:  # a scale
            super().requires_grad_(requires_grad)
        return self

    def __deepcopy__(self, memo: Any) -> QuantParameter:
        new: QuantParameter = super().__deepcopy__(memo)  # type: ignore[no-untyped-call]
        new.asked = self.asked
        return new

    def detach(self) -> Tensor:
        if self.dtype.is_floating_point and (torch.compiler.is_compiling() or not made_a_parameter()):
            return super().detach()  # a float like any other, as forward derivatives take it
        new: Tensor = QuantParameter(self.data, requires_grad=False)
        return new

    def copy_(self, source: Tensor, non_blocking: bool = False) -> QuantParameter:
        """Copy codes only. A mean of equal codes, as `torch.optim.swa_utils` computes it, is rounded and not cut off.

        Raises
        ------
        TypeError
            For floats that are no codes.
        """
        if source.is_floating_point() and not self.dtype.is_floating_point:
            values, source = source, source.round()
            if not torch.allclose(values, source, rtol=0, atol=1e-3):
                raise TypeError(
                    f"{self._what} must be copied from their like, got {dtype_name(values.dtype)} in between"
                )
        super().copy_(source, non_blocking)
        return self

    def add_(self, other: Any, *, alpha: Any = 1) -> QuantParameter:
        """Add codes only, and zeros: an optimizer that is given all parameters, as LBFGS, moves these by nothing.

        Raises
        ------
        TypeError
            For floats that are to change codes.
        """
        if isinstance(other, Tensor) and other.is_floating_point() and not self.requires_grad:
            if not other.any():
                return self
            if not self.dtype.is_floating_point:
                raise TypeError(f"{self._what} must not be trained: give the optimizer what requires a gradient")
        super().add_(other, alpha=alpha)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.dtype.is_floating_point and self.itemsize == 1:  # which pickle alone does not know
            return QuantParameter, (self.data.view(torch.uint8), self.requires_grad, self.asked, self.dtype)
        return QuantParameter, (self.data, self.requires_grad, *(() if self.asked else (False,)))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"QuantParameter containing:\n{self.data!r}"


def made_a_parameter() -> bool:
    """True if ``nn.Parameter(data)`` calls the caller of this, ``data.detach()``: it asks for the type of ``data``."""
    return sys._getframe(2).f_code is nn.Parameter.__new__.__code__


torch.serialization.add_safe_globals([QuantParameter])  # as nn.Parameter is, for torch.load(weights_only=True)


class DecodedWeight(Tensor):
    """``layer.weight`` of a quantized layer: the float weight, without storage of its own.

    Dtype, device and shape cost nothing. An operation that takes it computes with the values that the codes stand for
    at that moment. A view of it is such a tensor too. It cannot be written to and takes no gradient.

    Parameters
    ----------
    like : Tensor
        On ``meta``: shape, strides and dtype.
    device : torch.device
        Where the values are.
    decode : callable () -> Tensor
        The values.
    owner : nn.Module, optional
        The quantized layer whose whole weight this is; None for a view of it.
    """

    _decode: Callable[[], Tensor]
    _owner: Any
    _is_data = False  # it is `layer.weight.data`, to which `+=` assigns
    _is_param = True  # `isinstance(layer.weight, nn.Parameter)`, as it is for a float layer
    _is_hf_initialized = True  # for transformers: there is nothing to draw at random

    @staticmethod
    def __new__(cls, like: Tensor, device: torch.device, decode: Callable[[], Tensor], owner: Any = None) -> Any:
        self = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=device
        )
        self._decode, self._owner = decode, owner
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        arguments = {a.name: a for a in func._schema.arguments}
        given = [*zip(func._schema.arguments, args, strict=False), *((arguments[k], v) for k, v in kwargs.items())]
        for argument, value in given:
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and any(isinstance(leaf, cls) for leaf in tree_leaves(value)):
                raise RuntimeError(f"weight must not be written to, it is decoded from codes: {WAY_OUT}")
        if args and isinstance(args[0], cls) and is_view(func):
            return args[0]._view(func, args[1:], kwargs)
        return func(*tree_map_only(cls, decoded, args), **tree_map_only(cls, decoded, kwargs))

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of a view, which decodes when it is read, as this does."""
        like = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        result = func(like, *args, **kwargs)
        owner = self._owner if func is torch.ops.aten.detach.default else None  # `weight.data` is the whole weight
        if isinstance(result, Tensor):
            return DecodedWeight(result, self.device, lambda: func(decoded(self), *args, **kwargs), owner)

        def nth(n: int) -> Callable[[], Tensor]:
            return lambda: func(decoded(self), *args, **kwargs)[n]

        return [DecodedWeight(part, self.device, nth(n)) for n, part in enumerate(result)]

    @property
    def data(self) -> Tensor:
        view: DecodedWeight = self.detach()  # type: ignore[assignment]
        view._is_data = True
        return view

    @data.setter
    def data(self, value: Tensor) -> None:
        if self._owner is None:
            raise RuntimeError(f"weight must not be written to, it is decoded from codes: {WAY_OUT}")
        if not isinstance(value, DecodedWeight) or value._owner != self._owner:
            self._owner.set_weight_(value)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Any:
        """``weight.data.copy_(w)`` of the whole weight: w is quantized into the layer, as ``weight.data = w`` does."""
        if not self._is_data or self._owner is None:
            raise RuntimeError(f"weight must not be written to, it is decoded from codes: {WAY_OUT}")
        self._owner.set_weight_(source.to(self.dtype).expand(self.shape))
        return self

    def _assign(self, function: Callable[[Tensor, Any], Tensor], other: Any) -> Any:
        """``weight.data += other``, which assigns the sum: it is quantized into the layer at once."""
        if not self._is_data or self._owner is None:
            raise RuntimeError(f"weight must not be written to, it is decoded from codes: {WAY_OUT}")
        other = other.detach().float() if isinstance(other, Tensor) else other
        self._owner.set_weight_(function(self._owner.values(torch.float32), other))
        return self

    def __iadd__(self, other: Any) -> Any:  # type: ignore[misc]
        return self._assign(torch.add, other)

    def __isub__(self, other: Any) -> Any:  # type: ignore[misc]
        return self._assign(torch.sub, other)

    def __imul__(self, other: Any) -> Any:  # type: ignore[misc]
        return self._assign(torch.mul, other)

    def __itruediv__(self, other: Any) -> Any:  # type: ignore[misc]
        return self._assign(torch.div, other)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> DecodedWeight:
        if requires_grad:
            raise RuntimeError(f"weight must not require a gradient, it is decoded from codes: {WAY_OUT}")
        return self

    def numpy(self, *, force: bool = False) -> Any:
        """A copy of the values."""
        return decoded(self).numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return decoded(self).__array__(*args, **kwargs)

    def tolist(self) -> Any:
        return decoded(self).tolist()

    def __format__(self, format_spec: str) -> str:
        return format(decoded(self), format_spec) if self.dim() == 0 else repr(self)

    def __dlpack__(self, **kwargs: Any) -> Any:
        return decoded(self).__dlpack__(**kwargs)

    def _no_memory(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(  # a RuntimeError too; callers who only want to know whether two are one expect it
            "weight must be read by operations of torch, it has no memory of its own: use weight.clone()"
        )

    data_ptr = storage = _typed_storage = untyped_storage = share_memory_ = apply_ = map_ = _no_memory

    def __deepcopy__(self, memo: Any) -> Tensor:
        return copy.deepcopy(decoded(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return decoded(self).__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DecodedWeight(shape={list(self.shape)}, dtype={self.dtype}, device='{self.device}')"


def refuse_computed(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make(module, name, ...)`` of torch, which has a tensor of a module computed from others, but not from codes.

    torch deletes the parameter of that name, which a quantized layer does not have: a bare KeyError.
    """

    @functools.wraps(make)
    def computed(*args: Any, **kwargs: Any) -> Any:
        module = args[0] if args else kwargs.get("module")
        name = args[1] if len(args) > 1 else kwargs.get("tensor_name")
        if isinstance(name, str) and isinstance(getattr(module, name, None), DecodedWeight):
            raise RuntimeError(f"{name} must not be computed from other tensors, it is decoded from codes: {WAY_OUT}")
        return make(*args, **kwargs)

    return computed


parametrize.register_parametrization = refuse_computed(parametrize.register_parametrization)
WeightNorm.apply = staticmethod(refuse_computed(WeightNorm.apply))  # type: ignore[method-assign]
SpectralNorm.apply = staticmethod(refuse_computed(SpectralNorm.apply))  # type: ignore[method-assign]


def decoded(weight: DecodedWeight) -> Tensor:
    """The values of ``weight``, a new tensor."""
    return weight._decode()


def is_view(func: Any) -> bool:
    """True if the results of an operator lie in the memory of its first argument."""
    returns = [r.alias_info for r in func._schema.returns]
    return bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
