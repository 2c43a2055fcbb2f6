"""weight[e] ~ decode(codes[e, n, k]) * scale[e, n // br, k // bk]: the experts of a layer, a stack of E matrices.

Experts are no layers of their own: one module holds ``gate_up_proj`` [E, N, K] and ``down_proj`` [E, N, K], or both
with the last two axes exchanged, and multiplies each token by the matrices of the experts that a router chose for it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib import ops
from quantlib.backends.packing import kept_zero_points
from quantlib.nn.functional import (
    SOURCES,
    Weight,
    autocast,
    dequantize_weight,
    integer_matmul,
    project,
    quantize_weight,
    scale_dtype,
)
from quantlib.nn.leaf import Leaf
from quantlib.nn.linear import kernel_of
from quantlib.nn.module import (
    check_came,
    other_codes,
    parts_came,
    rebind_hooks,
    taken_over,
    zero_codes,
    zero_points_of_0,
)
from quantlib.nn.weight import DecodedWeight, QuantParameter
from quantlib.ops.check import dtype_name, dtype_of, is_sharded
from quantlib.spec import QuantSpec, check_unrotated

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS = ("codes", "scale", "zero_point")
Way = str  # the layout of a float weight: a word of `WAYS`

# E matrices [N, K] that are multiplied by from the right after they are transposed, as the weight of nn.Linear is; the
# same as [E, K, N]; and both with the first two axes as one.
WAYS = ("enk", "ekn", "(en)k", "(ek)n")


class Stack(NamedTuple):
    """A weight of E matrices [N, K], and how the float module has it."""

    E: int
    N: int
    K: int
    way: Way

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float weight."""
        E, N, K, way = self
        return {"enk": (E, N, K), "ekn": (E, K, N), "(en)k": (E * N, K), "(ek)n": (E * K, N)}[way]

    @property
    def transposed(self) -> bool:
        return self.way in ("ekn", "(ek)n")

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """[N, K]"""
        return self.N, self.K

    def stored_shape(self, spec: QuantSpec, experts: bool = True) -> tuple[int, ...]:
        """Shape in a file of the codes [E, N, K], or [N, K] where this is no stack of experts.

        They have an axis more than the float weight where they are of no use without a scale or lie otherwise.
        """
        kept = spec.codes_shape(self.matrix_shape)
        return (*((self.E,) * experts), *kept, *((1,) * (spec.scaled or self.transposed)))

    @staticmethod
    def of_shape(shape: Sequence[int], way: Way, E: int) -> Stack:
        """The stack whose float weight has ``shape``."""
        *rows, columns = shape
        inner = rows[-1] // E if len(rows) == 1 else rows[-1]
        return Stack(E, columns, inner, way) if way in ("ekn", "(ek)n") else Stack(E, inner, columns, way)

    def join(self, matrices: Sequence[Tensor]) -> Tensor:
        """The float weight of E matrices [N, K]."""
        return torch.stack([m.t() for m in matrices] if self.transposed else list(matrices)).reshape(self.shape)

    def rows(self, weight: Tensor) -> Tensor:
        """[E * N, K]: the matrices of a float weight below each other."""
        experts = weight.view(self.E, -1, weight.shape[-1])
        return (experts.transpose(1, 2) if self.transposed else experts).reshape(self.E * self.N, self.K)

    def whole(self, rows: Tensor) -> Tensor:
        """The float weight of matrices [E * N, K] below each other."""
        experts = rows.view(self.E, self.N, self.K)
        return (experts.transpose(1, 2) if self.transposed else experts).reshape(self.shape)

    def matrix(self, weight: Tensor, e: int) -> Tensor:
        """[N, K] of expert ``e`` of a float weight."""
        expert = weight.view(self.E, -1, weight.shape[-1])[e]
        return expert.t() if self.transposed else expert


class LowRank(NamedTuple):
    """An adapter of low rank of E matrices [N, K]: scaling * b[e] @ a[e] is added to that of expert e."""

    a: Tensor  # [E, r, K]
    b: Tensor  # [E, N, r]
    scaling: float

    def of(self, x: Tensor, e: int) -> Tensor:
        """Return what the adapter adds to x @ weight[e].T"""
        y: Tensor = F.linear(F.linear(x.to(self.a.dtype), self.a[e]), self.b[e])
        return (y * self.scaling).to(x.dtype)

    def values(self) -> Tensor:
        """[E, N, K]"""
        return self.scaling * (self.b @ self.a)


class Routed(Leaf):
    """A module of experts that multiplies the rows of each expert at once, by a product of its own.

    It stands for one of transformers whose decorator says what it computes; others run their own forward.
    """

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the float module; a group of tokens is multiplied by the codes of its expert."""
        if "_is_expert_parallel" in vars(self):  # transformers says what all experts of its own kind compute
            return self._routed(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y[t] = sum over j of top_k_weights[t, j] * expert(hidden_states[t]), the expert top_k_index[t, j].

        Rows are sorted by their expert, so that an expert multiplies all of its rows at once, and summed in the order
        of j. An index of E, which no expert has, adds nothing.
        """
        x: Any = hidden_states
        (tokens, chosen), E = top_k_index.shape, self.num_experts
        owner, order = top_k_index.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(owner, torch.arange(E, device=owner.device, dtype=owner.dtype), right=True)
        first, last = ("gate_up_proj", "down_proj") if self.has_gate else ("up_proj", "down_proj")
        h = self._product(first, x[order // chosen], ends)
        h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
        h = self._product(last, h, ends)
        h = self.post_expert_norm(h) if self.has_post_expert_norm else h
        h = h * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        y = torch.empty_like(h).index_copy(0, order, h)
        return y.view(tokens, chosen, y.shape[-1]).sum(1).to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """y[t] = x[t] @ weight[e].T + bias[e], ends[e - 1] <= t < ends[e]; 0 for rows of no expert."""
        raise NotImplementedError


class QuantExperts(Routed):
    """A module of experts whose matrices are codes and their scales, in place of one whose weights are floats.

    It derives from the float module too, whose methods and attributes it keeps. A weight ``w`` of that module still
    reads as the float weight, but has no memory of its own: ``w[e]`` and products with it decode or multiply by the
    codes of expert e alone.

    Attributes
    ----------
    stacks : dict of str to Stack
        The weights by name, and how the float module has them.
    <name>_codes : QuantParameter [E, N, K] or [E, N, ceil(K / codes a byte)]
        Frozen, in the dtype in which `QuantLinear` keeps codes.
    <name>_scale : QuantParameter [E, ceil(N / br), ceil(K / bk)] float32 or what the spec says
    <name>_zero_point : QuantParameter, the codes of zero, one for each scale, kept as codes are, or None
    spec : QuantSpec
    dtype : torch.dtype
        The dtype of the float module that `dequantize` gives.
    """

    FLOAT: ClassVar[type[nn.Module]]
    OWN: ClassVar[tuple[str, ...]] = ("stacks", "spec", "dtype", "_adapters", "_alone")
    _alone: Mapping[str, frozenset[str]] = MappingProxyType({})  # see `parts_came`
    _version = 2
    stacks: dict[str, Stack]
    spec: QuantSpec
    dtype: torch.dtype
    _adapters: dict[str, list[LowRank]]  # name of a weight -> what is added to its matrices for now

    @classmethod
    def like(cls, experts: nn.Module, spec: Any) -> QuantExperts:
        """The module in place of ``experts``, a float module that `ways_of` knows, with codes on meta."""
        if not ways_of(experts):
            got = type(experts).__name__
            raise TypeError(f"experts must be a module of experts that quantlib knows, got {got}")
        form = form_of(type(experts), QuantExperts)
        new: QuantExperts = form.__new__(form)
        vars(new).update(taken_over(experts))
        new.spec, new.stacks, new._adapters = QuantSpec.parse(spec), {}, {}
        check_unrotated(new.spec, "experts")
        for name, way in ways_of(experts).items():
            weight = new._parameters.pop(name)
            assert weight is not None
            stack = Stack.of_shape(weight.shape, way, number_of(experts))
            new.stacks[name], new.dtype = stack, weight.dtype
            new._keep(name, new._allocate(stack))
        rebind_hooks(new)
        return new

    @classmethod
    def from_float(cls, experts: nn.Module, spec: Any) -> QuantExperts:
        """``experts`` with its matrices quantized, one after another; everything else is taken over.

        Raises
        ------
        TypeError
            For a module whose experts are not known to be matrices.
        """
        new = cls.like(experts, spec)
        for name in new.stacks:
            new.quantize(name, getattr(experts, name).detach())
        return new

    @torch.no_grad()
    def quantize(self, name: str, weight: Tensor) -> None:
        """Have the codes of ``weight``, floats in the shape of the float module's, for the weight ``name``."""
        stack = self.stacks[name]
        parts = self._allocate(stack, weight.device)
        if not weight.is_meta:
            for e in range(stack.E):
                found = quantize_weight(stack.matrix(weight, e).contiguous(), self.spec)
                for part, one in zip(parts, found, strict=True):
                    if part is not None and one is not None:
                        part[e] = one.view(part.dtype)
        self._keep(name, parts)

    def take(self, name: str, weight: Weight) -> None:
        """Have the codes, scales and zero points [E, ...] of ``weight``, found elsewhere, for the weight ``name``."""
        like = self._allocate(self.stacks[name])
        parts = (t if t is None or p is None else t.view(p.dtype) for t, p in zip(weight, like, strict=True))
        self._keep(name, Weight(*parts))  # type: ignore[arg-type]

    def dequantize(self) -> nn.Module:
        """The float module of ``self.dtype`` with the values that the codes stand for."""
        new = self.FLOAT.__new__(self.FLOAT)
        vars(new).update({name: value for name, value in taken_over(self).items() if name not in self.OWN})
        rest = {name: p for name, p in new._parameters.items() if name not in self.kept}
        new._parameters = {**{name: nn.Parameter(self.values(name)) for name in self.stacks}, **rest}
        rebind_hooks(new)
        return new

    def values(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that the codes stand for, of ``dtype`` or ``self.dtype``, in the shape of the float weight."""
        matrices = [self.matrix(name, e).values(dtype or self.dtype) for e in range(self.stacks[name].E)]
        return self.stacks[name].join(matrices)

    @contextlib.contextmanager
    def adapted(self, name: str, adapters: Sequence[LowRank]) -> Iterator[None]:
        """Add ``adapters`` to the weight ``name`` inside the block; gradients reach them."""
        before = self._adapters.get(name, [])
        self._adapters[name] = [*before, *adapters]
        try:
            yield
        finally:
            self._adapters[name] = before

    def parts(self, name: str) -> Weight:
        """Codes [E, ...], scales and zero points as they are kept."""
        codes, scale, zero_point = (own(self._parameters[f"{name}_{part}"]) for part in PARTS)
        assert codes is not None
        return Weight(codes, scale, zero_point)

    @property
    def kept(self) -> tuple[str, ...]:
        """The parameters whose dtypes are part of the format."""
        return tuple(f"{name}_{part}" for name in self.stacks for part in PARTS)

    def __getattr__(self, name: str) -> Any:
        stacks = vars(self).get("stacks", ())
        return self._decoded(name) if name in stacks else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vars(self).get("stacks", ()):
            raise RuntimeError(
                f"{name} must not be assigned, it is decoded from codes: quantize(name, weight) quantizes another "
                "weight, and dequantize_(model) gives back float experts, which can be changed"
            )
        super().__setattr__(name, value)

    def _product(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """y[t] = x[t] @ weight[e].T + bias[e], ends[e - 1] <= t < ends[e]; 0 for rows of no expert."""
        bias = own(getattr(self, f"{name}_bias")) if self.has_bias else None
        y = self.matrices(name).multiply(x, ends, bias)
        for adapter in self._adapters.get(name, ()):
            y = y + by_expert(adapter.of, x, ends)
        return y

    def _decoded(self, name: str) -> Tensor:
        stack, adapters = self.stacks[name], self._adapters.get(name)
        if adapters:  # a weight that others multiply by, and that takes a gradient: it has to be a whole one
            matrices = torch.stack([adapter.values() for adapter in adapters]).sum(0).unbind()
            whole: Tensor = self.values(name) + stack.join(matrices).to(self.dtype)
            return whole
        if torch.compiler.is_compiling():
            return self.values(name)
        like = torch.empty(stack.shape, dtype=self.dtype, device="meta")
        owner = Owner(self, name)
        decoded: DecodedStack = DecodedStack(like, self.parts(name).codes.device, owner.values, owner)
        decoded._matrices, decoded._stack = self.matrices(name), stack
        return decoded

    def matrix(self, name: str, e: int) -> Matrix:
        """The codes of expert ``e``."""
        return self.matrices(name)[e]

    def matrices(self, name: str) -> Matrices:
        """The codes of all experts."""
        if self._alone:
            check_came(self, f"{name}_codes")
        codes, scale, zero_point = self.parts(name)
        codes = codes.flatten(2)  # [E, N, K], where a file may have an axis more
        if codes.dtype != dtype_of(self.spec.row):
            codes = codes.view(dtype_of(self.spec.row))
        return Matrices(Weight(codes, scale, zero_point), self.spec, self.stacks[name].K)

    def _allocate(self, stack: Stack, device: Any = "meta") -> Weight:
        E, N, K, _ = stack
        spec, blocks = self.spec, self.spec.scale_shape((N, K))
        codes = zero_codes(spec, (E, *spec.codes_shape((N, K))), device)
        scale = torch.ones(E, *blocks, dtype=scale_dtype(spec), device=device) if spec.scaled else None
        zero_point = None
        if not spec.symmetric:
            zero_point = zero_points_of_0(spec, (N, K), device).expand(E, -1, -1).contiguous()
        return Weight(codes, scale, zero_point)

    def _keep(self, name: str, weight: Weight) -> None:
        for part, tensor in zip(PARTS, weight, strict=True):
            known = self._parameters.get(f"{name}_{part}")
            if known is not None and tensor is not None and not known.is_meta:
                known.data = tensor
                continue
            kept = None if tensor is None else QuantParameter(tensor, requires_grad=False)
            self.register_parameter(f"{name}_{part}", kept)
        self._alone = {codes: absent for codes, absent in self._alone.items() if codes != f"{name}_codes"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        frozen = [p for name in self.kept if (p := self._parameters[name]) is not None]

        def keep_dtype(t: Tensor) -> Tensor:
            if not any(t is p for p in frozen):
                return fn(t)
            y = fn(t.data)
            return y if y.dtype == t.dtype else t.data.to(y.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=frozen[0].device)).dtype
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        for name in self.kept:
            if type(p := self._parameters[name]) is nn.Parameter:
                self._parameters[name] = QuantParameter(p.data, requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            for name in self.kept:
                if (p := self._parameters[name]) is not None:
                    destination[prefix + name] = p.data
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] |= {"spec": str(self.spec)}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        errors: list[str] = args[-1]
        has_codes = any(f"{prefix}{name}_codes" in state_dict for name in self.stacks)
        if why := other_codes(self, self.spec, local_metadata, has_codes):
            errors.append(f"{prefix.removesuffix('.')} must be {why}")
        for name in self.stacks:
            if (floats := state_dict.get(prefix + name)) is not None:
                found = f"{dtype_name(floats.dtype)} {list(floats.shape)}"
                errors.append(
                    f"{prefix}{name} must be codes of {self.spec}, got {found}: load floats into the float model, "
                    "then quantize_ it"
                )
        for name in self.kept:
            kept, got = self._parameters[name], state_dict.get(prefix + name)
            if name.endswith("_zero_point") and isinstance(got, Tensor) and got.dtype == torch.int32:
                got = state_dict[prefix + name] = kept_zero_points(got, self.spec.row)  # as older versions have them
            if kept is not None and isinstance(got, Tensor) and got.dtype != kept.dtype:
                expected = dtype_name(kept.dtype)
                errors.append(f"{prefix}{name} must be {expected} for {self.spec}, got {dtype_name(got.dtype)}")
        if not errors:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            for name in self.stacks:
                parts_came(self, [f"{name}_{part}" for part in PARTS], state_dict, prefix)

    def extra_repr(self) -> str:
        shapes = (f"{name}={list(stack.shape)}" for name, stack in self.stacks.items())
        return ", ".join([*shapes, f"spec={self.spec}"])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return remade, (self.FLOAT, vars(self))


def own(t: Any) -> Any:
    """``t``, or of experts that are dealt out over ranks those of this one."""
    return t.to_local() if is_sharded(t) else t


class Owner(NamedTuple):
    """The module and the name of a weight, as `DecodedWeight` asks for them."""

    experts: QuantExperts
    name: str

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.experts.values(self.name, dtype)

    def set_weight_(self, weight: Tensor) -> None:
        expected = list(self.experts.stacks[self.name].shape)
        if list(weight.shape) != expected:
            raise ValueError(f"{self.name} must be {expected}, got {list(weight.shape)}")
        if not weight.isfinite().all():
            raise ValueError(f"{self.name} must be finite, got {float(weight[~weight.isfinite()][0]):g}")
        self.experts.quantize(self.name, weight.detach())


class Matrix(NamedTuple):
    """The codes of one matrix [N, K]."""

    weight: Weight
    spec: QuantSpec
    K: int

    def values(self, dtype: torch.dtype) -> Tensor:
        """[N, K] of ``dtype``."""
        return dequantize_weight(self.weight, self.spec, self.K, dtype)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """y[m, n] = bias[n] + sum over k of x[m, k] * weight[n, k], as `QuantLinear` computes it."""
        x, (codes, scale, zero_point), spec = autocast(x), self.weight, self.spec
        activation = spec.activation
        if scale is None or x.dtype == torch.float64:
            x = x if activation is None else project(x, activation)
            return F.linear(x, self.values(x.dtype), None if bias is None else bias.to(x.dtype))
        bias = bias if bias is None or bias.dtype in SOURCES else bias.float()
        block, kernel = spec.block((codes.shape[0], self.K)), kernel_of(spec, self.K)
        if kernel == "dynamic_matmul":
            return ops.dynamic_matmul(x, codes, scale, spec.format, block=block, zero_point=zero_point, bias=bias)
        if activation is not None:
            if kernel == "scaled_matmul":
                return integer_matmul(x, activation, None, self.weight, spec.format, block, bias)
            x = project(x, activation)
        return ops.dequant_matmul(x, codes, scale, spec.format, block=block, zero_point=zero_point, bias=bias)


class Matrices:
    """The codes of E matrices [N, K], one an expert."""

    def __init__(self, weight: Weight, spec: QuantSpec, K: int) -> None:
        self.weight, self.spec, self.K = weight, spec, K

    def __getitem__(self, e: int) -> Matrix:
        return Matrix(Weight(*(None if t is None else t[e] for t in self.weight)), self.spec, self.K)  # type: ignore[arg-type]

    def multiply(self, x: Tensor, ends: Tensor, bias: Tensor | None = None) -> Tensor:
        """y[t] = bias[e] + x[t] @ weight[e].T, ends[e - 1] <= t < ends[e], as `Matrix` computes it; 0 for rows behind.

        One call for all experts, whose number of rows the host need not know.
        """
        x, (codes, scale, zero_point), spec = autocast(x), self.weight, self.spec
        activation, kernel = spec.activation, kernel_of(spec, self.K)
        by_rows = activation is None or activation.per in ("row", "group")
        if scale is None or x.dtype == torch.float64 or kernel == "scaled_matmul" or not by_rows:
            return by_expert(lambda x, e: self[e].multiply(x, None if bias is None else bias[e]), x, ends)
        bias = bias if bias is None or bias.dtype in SOURCES else bias.float()
        op = ops.grouped_dynamic_matmul if kernel == "dynamic_matmul" else ops.grouped_dequant_matmul
        if activation is not None and kernel != "dynamic_matmul":
            x = project(x, activation)
        block = spec.block((codes.shape[1], self.K))
        return op(x, codes, scale, spec.format, ends, block=block, zero_point=zero_point, bias=bias)


def by_expert(product: Callable[[Tensor, int], Tensor], x: Tensor, ends: Tensor) -> Tensor:
    """``product(rows, e)`` of the rows of x of one expert after the other, and 0 for rows of none."""
    bounds = [0, *ends.tolist()]
    sizes = [end - start for start, end in itertools.pairwise(bounds)]
    rows = x.split([*sizes, len(x) - bounds[-1]])  # whose gradients become one tensor at once
    last = len(sizes) - 1
    parts = [product(rows[e], e) for e, size in enumerate(sizes) if size or (e == last and not bounds[-1])]
    return torch.cat([*parts, parts[0].new_zeros(len(rows[-1]), *parts[0].shape[1:])])


class DecodedStack(DecodedWeight):
    """The float weight of E experts, or of one of them, or either transposed: decoded when it is read.

    ``weight[e]`` is the matrix of one expert, and a product with such a matrix multiplies by its codes.
    """

    _matrices: Matrices
    _stack: Stack
    _one: int | None = None  # the expert that this is the matrix of
    _turned: bool = False  # that matrix is the transpose of the float module's

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not kwargs and name in PRODUCTS and (y := PRODUCTS[name](*args)) is not None:
            return y
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = super()._view(func, args, kwargs)
        if kwargs or not isinstance(result, DecodedWeight):
            return result
        name, stack, one = func.overloadpacket.__name__, self._stack, self._one
        if one is None and name == "select" and args[0] == 0 and self.dim() == 3:
            return self._like(result, args[1] % stack.E, self._turned)
        if one is None and name == "view" and result.dim() == 3 and result.shape[0] == stack.E and self.dim() == 2:
            return self._like(result, None, False)
        swapped = (
            name == "t"
            or (name == "transpose" and {a % self.dim() for a in args} == {self.dim() - 2, self.dim() - 1})
            or (name == "permute" and list(args[0]) == [*range(self.dim() - 2), self.dim() - 1, self.dim() - 2])
        )
        if name in ("detach", "alias", "view_as") or (name == "view" and result.shape == self.shape):
            return self._like(result, one, self._turned)
        if swapped and self.dim() > 1 and (one is not None or self.dim() == 3):
            return self._like(result, one, not self._turned)
        return result

    def _like(self, view: DecodedWeight, one: int | None, turned: bool) -> DecodedStack:
        decode = view._decode if one is None else functools.partial(self._decode_one, one, turned)
        like = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device="meta")
        new: DecodedStack = DecodedStack(like, view.device, decode, view._owner)
        new._matrices, new._stack, new._one, new._turned = self._matrices, self._stack, one, turned
        return new

    def _decode_one(self, e: int, turned: bool) -> Tensor:
        values = self._matrices[e].values(self.dtype)
        return values.t() if self._stack.transposed != turned else values

    @property
    def _is_kn(self) -> bool:
        """True if the last two axes are [K, N], so that rows [.., K] are multiplied by it from the right."""
        return self._stack.transposed != self._turned


def product(x: Tensor, w: DecodedStack, e: int, bias: Tensor | None = None) -> Tensor:
    """x @ w[e] by the codes."""
    matrix = w._matrices[e]
    if w._is_kn:
        return matrix.multiply(x, bias)
    codes, scale, zero_point = matrix.weight
    block = matrix.spec.block((codes.shape[0], matrix.K))
    y: Tensor = torch.ops.quantlib.dequant_matmul_backward(
        x, codes, scale, matrix.spec.format, block, zero_point, matrix.K
    )
    return y if bias is None else y + bias


def is_served(x: Any, w: Any) -> bool:
    """True if x @ w multiplies a float matrix by a stack whose codes the kernels can multiply by."""
    if not isinstance(w, DecodedStack) or isinstance(x, DecodedWeight) or x.dtype != w.dtype:
        return False
    return x.dtype in SOURCES and w._matrices.weight.scale is not None


def mm(x: Tensor, w: Any) -> Tensor | None:
    return product(x, w, w._one) if is_served(x, w) and w._one is not None else None


def addmm(bias: Tensor, x: Tensor, w: Any) -> Tensor | None:
    return product(x, w, w._one, bias) if is_served(x, w) and w._one is not None and bias.dim() == 1 else None


def bmm(x: Tensor, w: Any) -> Tensor | None:
    if not is_served(x, w) or w._one is not None or w.dim() != 3:
        return None
    E, rows, _ = x.shape
    codes, scale, zero_point = w._matrices.weight
    spec, K = w._matrices.spec, w._matrices.K
    block, x = spec.block((codes.shape[1], K)), x.reshape(E * rows, -1)
    ends = torch.arange(1, E + 1, dtype=torch.int32, device=x.device) * rows
    if w._is_kn:
        y: Tensor = w._matrices.multiply(x, ends)
    else:
        backward = torch.ops.quantlib.grouped_dequant_matmul_backward
        y = backward(x, codes, scale, spec.format, block, ends, zero_point, K)
    found: Tensor = y.view(E, rows, -1)
    return found


def linear(x: Tensor, w: Any, bias: Tensor | None = None) -> Tensor | None:
    return product(x, w.t(), w._one, bias) if is_served(x, w) and w._one is not None else None


PRODUCTS: dict[str, Callable[..., Tensor | None]] = {"mm": mm, "addmm": addmm, "bmm": bmm, "linear": linear}


# Experts of transformers that its decorator does not describe: how the weights of the class lie.
OUTSIDE: dict[str, dict[str, Way]] = {
    "Llama4TextExperts": {"gate_up_proj": "ekn", "down_proj": "ekn"},
    "Step3p7Experts": {"gate_up_proj": "enk", "down_proj": "enk"},
    "JetMoeParallelExperts": {"weight": "enk"},
    "InklingSharedExperts": {"gate_proj": "enk", "up_proj": "enk", "down_proj": "enk"},
    "DbrxExpertGLU": {"w1": "(en)k", "v1": "(en)k", "w2": "(ek)n"},
}


def ways_of(module: nn.Module) -> dict[str, Way]:
    """The weights of ``module`` that are stacks of experts, and how they lie; none where it is no module of experts.

    Experts of transformers say so themselves: its decorator ``use_experts_implementation`` sets ``is_transposed``.
    """
    if isinstance(module, Routed):
        return {}
    attributes, name = vars(module), type(module).__name__
    if "_is_expert_parallel" in attributes and "is_transposed" in attributes:
        way = "ekn" if attributes["is_transposed"] else "enk"
        return {key: way for key, p in module._parameters.items() if p is not None and p.dim() == 3}
    if type(module).__module__.startswith("transformers."):
        return OUTSIDE.get(name, {})
    return {}


def number_of(experts: nn.Module) -> int:
    """E"""
    for name in ("num_experts", "moe_num_experts", "n_shared_experts"):
        if isinstance(E := vars(experts).get(name), int):
            return E
    first = next(p for p in experts._parameters.values() if p is not None and p.dim() == 3)
    return first.shape[0]


FORMS: dict[tuple[type[nn.Module], type[nn.Module]], Any] = {}
R = TypeVar("R", bound=Routed)


def form_of(cls: type[nn.Module], kind: type[R]) -> type[R]:
    """The class of ``kind``, `QuantExperts` or `QATExperts`, that stands for the experts of class ``cls``."""
    if (cls, kind) not in FORMS:
        name = f"{kind.__name__.removesuffix('Experts')}{cls.__name__}"
        words = {"FLOAT": cls, "__module__": kind.__module__, "__qualname__": name, "__doc__": kind.__doc__}
        FORMS[cls, kind] = type(name, (kind, cls), words)
    form: type[R] = FORMS[cls, kind]
    return form


def remade(cls: type[nn.Module], attributes: dict[str, Any], kind: type[Routed] = QuantExperts) -> Routed:
    """Rebuild a module for pickle, which cannot find its class by name."""
    form = form_of(cls, kind)
    new = form.__new__(form)
    vars(new).update(attributes)
    return new
