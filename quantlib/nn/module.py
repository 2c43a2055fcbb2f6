"""weight ~ decode(codes[n, k]) * scale[n // br, k // bk]: the common base of every module whose weight is codes."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from quantlib.backends.packing import kept_zero_points
from quantlib.nn.functional import (
    SOURCES,
    Seen,
    Weight,
    continue_weight,
    dequantize_weight,
    quantize_weight,
    replace_rows,
    rows_of,
    scale_dtype,
    slabs_of,
)
from quantlib.nn.leaf import Leaf
from quantlib.nn.weight import WAY_OUT, DecodedWeight, QuantParameter
from quantlib.ops.check import dtype_name, dtype_of, is_sharded
from quantlib.ops.flops import register_if_counting
from quantlib.ops.sharding import Matrix, refusal
from quantlib.spec import QuantSpec, check_dynamic, check_unrotated, stored_shape

if TYPE_CHECKING:
    from typing_extensions import Self

# parameter -> field of `Weight`
PARTS = {"weight_codes": "codes", "weight_scale": "scale", "weight_zero_point": "zero_point"}


class QuantModule(Leaf):
    """A module with a quantized weight: how it is made of a float one, kept through whatever is done to it, and saved.

    The weight is viewed as a matrix [N, K], N the outputs or the entries of a table and K all the rest. A subclass
    derives from this and from the float module that it stands for, `FLOAT`.

    Attributes
    ----------
    weight : Tensor of the shape of the float weight and of ``dtype``
        The values of the codes, read-only: a tensor without storage, decoded by the operation that takes it.
    weight_codes : QuantParameter [N, K] or [N, ceil(K / 2)]
        The codes, frozen: int8, uint8 for unsigned and packed formats and for the bytes of FP8, or a 16-bit float.
    weight_scale : QuantParameter [ceil(N / br), ceil(K / bk)] float32 or what the spec says, or None
        The scales of the codes, frozen. None for a 16-bit float format without a scale.
    weight_zero_point : QuantParameter, or None
        The codes of zero, one for each scale, kept as ``weight_codes`` are; frozen. None unless the spec is affine.
    spec : QuantSpec
    block : (br, bk)
        Rows and columns of [N, K] that share a scale.
    dtype : torch.dtype
        The dtype of the float parameters, of ``weight``, and of the module that `dequantize` gives.

    Notes
    -----
    ``.to(dtype)``, ``.half()`` and the like change the bias and leave the codes, scales and zero points alone, whose
    dtypes are part of the format. ``.to(device)`` moves all of them.

    ``state_dict`` holds plain tensors under the names and in the shapes of the parameters. A float module refuses
    them, whether ``strict`` or not. States in which the codes are called ``weight`` and have the shape [N, K, 1],
    which version 1 wrote, still load.
    """

    FLOAT: ClassVar[type[nn.Module]]
    KEPT: ClassVar[tuple[str, ...]] = tuple(PARTS)  # the parameters whose dtypes are part of the format
    OWN: ClassVar[tuple[str, ...]] = (
        "spec",
        "block",
        "dtype",
        "_viewed",
        "_shared",
        "_alone",
    )  # attributes that the float module does not have
    ROTATES: ClassVar[bool] = False  # True if it multiplies its input as a spec with hadamard says
    _version = 3  # of the state: what `load_state_dict` of this and every later version reads
    spec: QuantSpec
    block: tuple[int, int]
    dtype: torch.dtype
    _viewed: torch.dtype | None
    _shared: bool = False  # True if another module has the same parameters, or once had
    _alone: Mapping[str, frozenset[str]] = MappingProxyType({})  # see `parts_came`
    weight_codes: Tensor
    weight_scale: nn.Parameter | None
    weight_zero_point: nn.Parameter | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the float weight."""
        raise NotImplementedError

    @classmethod
    def refuses(cls, layer: Any) -> str | None:
        """Return why this module cannot serve ``layer``, a `FLOAT`; None if it can."""
        return None

    @classmethod
    def like(cls, layer: Any, spec: QuantSpec) -> Self:
        """Make this module for ``layer``: its bias, buffers, submodules, hooks and attributes, and codes on meta."""
        new = cls.__new__(cls)
        vars(new).update(taken_over(layer))
        dtype = new._parameters.pop("weight").dtype  # type: ignore[union-attr]
        new._allocate(spec, dtype, "meta")
        rebind_hooks(new)
        return new

    @classmethod
    def from_float(cls, layer: nn.Module, spec: Any, *, seen: Seen | None = None) -> Self:
        """``layer`` with its weight quantized; the bias is the same parameter, not a copy.

        Parameters
        ----------
        layer : nn.Module
            The float module that this one stands for; its weight is float32, float16 or bfloat16. Left as it is.
            Its buffers, submodules, hooks and attributes are taken over.
        spec : QuantSpec or what `QuantSpec.parse` takes
        seen : callable (x, weight, spec), optional
            Called with some rows of the weight [N, K] at a time and with their codes.

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
        new._freeze(quantize_weight(cls.as_matrix(layer.weight.detach()), new.spec, seen))
        if isinstance(new.weight_codes, QuantParameter):  # not where a subclass of Tensor holds the codes
            new.weight_codes.requires_grad_(layer.weight.requires_grad)  # which they only remember
        return new

    def dequantize(self) -> nn.Module:
        """The float module of ``self.dtype`` with the values that the codes stand for; the bias is the same object.

        Its weight requires a gradient unless the weight that was quantized did not, or ``requires_grad_(False)`` has
        been called since.
        """
        asked = getattr(self.weight_codes, "asked", True)
        return self.with_weight(nn.Parameter(self.values(self.dtype), requires_grad=asked))

    def with_weight(self, weight: nn.Parameter) -> nn.Module:
        """The float module that this one stands for, with ``weight``, and with all else that this one has."""
        check_plain(self)
        new = self.FLOAT.__new__(self.FLOAT)
        vars(new).update({name: value for name, value in taken_over(self).items() if name not in self.OWN})
        rest = {name: p for name, p in new._parameters.items() if name not in self.KEPT}
        new._parameters = {"weight": weight, **rest}
        rebind_hooks(new)
        return new

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, of ``dtype`` and in the shape of the float weight."""
        return dequantize_weight(self.plain, self.spec, self._matrix[1], dtype).view(self.weight_shape)

    @torch.no_grad()
    def set_weight_(self, weight: Tensor) -> Self:
        """Quantize ``weight`` by the spec of this layer and keep its codes: the parameters stay the same objects.

        Parameters
        ----------
        weight : Tensor [N, ...]
            float32, float16 or bfloat16, on any device, which becomes that of the codes. N may differ from that of an
            embedding or of a linear layer without a bias, as after ``resize_token_embeddings`` of transformers; the
            rest of the shape may not.

        Raises
        ------
        TypeError
            For another dtype.
        ValueError
            For another shape, or a weight that is not finite.

        Notes
        -----
        Rows with the values that the layer has now keep their codes and scales, and only the others are quantized: a
        table of tokens grows, shrinks, and gets another vector for one of them without loss. New rows that share a
        scale with old ones, and do not fit it, change those too.
        """
        if not isinstance(weight, Tensor) or weight.dtype not in SOURCES:
            got = dtype_name(weight.dtype) if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight must be a tensor of float32, float16 or bfloat16, got {got}")
        weight = weight.detach()
        N, *rest = self.weight_shape
        before = self._matrix[0]
        if tuple(weight.shape[1:]) != tuple(rest) or not weight.dim():
            expected = ", ".join(map(str, ("N", *rest)))
            raise ValueError(f"weight must be [{expected}], got {list(weight.shape)}")
        if weight.shape[0] != N and not self._resize(weight.shape[0]):
            raise ValueError(f"weight must be {list(self.weight_shape)}, got {list(weight.shape)}")
        if not weight.is_meta and not weight.isfinite().all():
            raise ValueError(f"weight must be finite, got {float(weight[~weight.isfinite()][0]):g}")
        matrix, whole = self.as_matrix(weight), not self._alone
        new = (self._continued(matrix, before) if whole else None) or quantize_weight(matrix, self.spec)
        self.block = self.spec.block(matrix.shape)
        for name, tensor in self._parts(new).items():
            if tensor is not None:
                self._parameters[name].data = tensor  # type: ignore[union-attr]
        self._alone = {}
        return self

    def _continued(self, x: Tensor, before: int) -> Weight | None:
        """Codes of x [M, K] with those of now for the rows of ``before`` that stay; None where none of them does."""
        old, kept, br = self.plain, min(before, len(x)), self.block[0]
        if x.is_meta or old.codes.device != x.device or is_sharded(old.codes) or not kept:
            return None
        stays = torch.cat(
            [
                (dequantize_weight(rows_of(old, rows, br), self.spec, x.shape[1], x.dtype) == x[rows]).all(1)
                for rows in slabs_of(x[:kept], br)
            ]
        )
        if not stays.all() and br > 1:  # rows that share a scale stay together
            blocks = torch.cat([stays, stays.new_ones(-kept % br)]).view(-1, br).all(1)
            stays = blocks.repeat_interleave(br)[:kept]
        if not stays.any():
            return None
        if not stays.all():
            old = replace_rows(old, x, (~stays).nonzero().squeeze(1), self.spec, br)
        return continue_weight(old, x, kept, self.spec)

    @property
    def codes(self) -> Tensor:
        """``weight_codes`` in the dtype of the format, as the ops take them: only FP8 differs."""
        if self._alone:
            check_came(self, "weight_codes")
        codes: Tensor | None = self._parameters.get("weight_codes")
        if codes is None:
            raise RuntimeError(f"weight_codes must be a parameter of the layer, got none: {WAY_OUT}")
        if codes.dim() > 2 and codes.shape[-1] == 1:  # as a file has them, from which accelerate takes them for a call
            codes = codes.view(stored_dtype(self.spec)).view(codes.shape[:2])
        if self._viewed is None or codes.dim() != 2:
            return codes
        if not torch.compiler.is_compiling() and torch._C._is_tracing():  # an assertion of torch fails for it
            raise RuntimeError(f"layer must have no codes of FP8 for torch.jit.trace, got {self.spec}: export it")
        return codes.view(self._viewed)

    @property
    def plain(self) -> Weight:
        """The codes as [N, K], their scales and zero points."""
        scale = self.weight_scale  # `nn.Module` looks a parameter up in a microsecond
        check_kept(scale, self.spec)
        return Weight(self.codes, scale, self.weight_zero_point)

    @property
    def weight(self) -> Tensor:
        if torch.compiler.is_compiling():  # which leaves out what is not used: the dtype alone costs nothing
            return self.values(self.dtype)
        like = torch.empty(self.weight_shape, dtype=self.dtype, device="meta")
        whole: Tensor = DecodedWeight(like, self.weight_codes.device, lambda: self.values(self.dtype), self)
        return whole

    @weight.setter
    def weight(self, value: Any) -> None:
        if not isinstance(value, DecodedWeight) or not isinstance(value._owner, QuantModule):
            raise RuntimeError(f"weight must not be assigned, it is decoded from codes: {WAY_OUT}")
        self.share(value._owner)  # as `tie_weights` of transformers does

    @weight.deleter
    def weight(self) -> None:
        raise RuntimeError(f"weight must not be deleted, it is decoded from codes: {WAY_OUT}")

    def shard_(self, mesh: Any, dim: int, src_data_rank: int | None = 0) -> Self:
        """Keep a part of the weight [N, K] on each rank: its rows (0) or its columns (1), whole blocks and bytes.

        Parameters
        ----------
        mesh : torch.distributed.device_mesh.DeviceMesh
            Of one axis.
        dim : {0, 1}
        src_data_rank : int, optional
            Whose values all ranks get, as `torch.distributed.tensor.distribute_tensor` takes it; None for their own.

        Returns
        -------
        QuantModule
            The module itself, whose codes, scales and zero points are DTensors.

        Raises
        ------
        ValueError
            For a cut through a block of weights or through a byte of codes, with a way out.
        """
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        self.untile_()
        per_byte = self.spec.row.per_byte if self.spec.row.packed else 1
        shared = 1 if self.spec.symmetric else per_byte
        weight = Matrix(self._matrix, self.block if self.spec.scaled else (1, 1), per_byte, shared)
        if why := refusal(weight, dim, mesh.size()):
            raise ValueError("weight must be {}, got {}".format(*why))
        axis = weight.scale(dim, mesh.size())
        for name in PARTS:
            if (p := self._parameters[name]) is not None:
                cut = dim if name == "weight_codes" else axis
                placement = Replicate() if cut in (None, -1) else Shard(cut)
                part = distribute_tensor(p.data, mesh, [placement], src_data_rank=src_data_rank)
                self.register_parameter(name, nn.Parameter(part, requires_grad=p.requires_grad))
        return self

    def register_parameter(self, name: str, param: Any) -> None:
        if name == "weight" and is_sharded(param):  # what `RowwiseParallel` of torch does
            self.shard_(param.device_mesh, next(p.dim for p in param.placements if p.is_shard()))
            return
        if name == "weight" or isinstance(param, DecodedWeight):  # `torch.nn.utils.prune` keeps it under another name
            raise RuntimeError(f"weight must not be registered as a parameter, it is decoded from codes: {WAY_OUT}")
        kept = [p for key in self.KEPT if (p := self._parameters.get(key)) is not None]
        if name not in self.KEPT and any(param is p for p in kept):
            raise RuntimeError(f"{name} must not take the place of a part of a quantized weight: {WAY_OUT}")
        if param is None and name in PARTS and self._parameters.get(name) is not None:
            raise RuntimeError(f"{name} must be a parameter of a layer of {self.spec}, got None: {WAY_OUT}")
        super().register_parameter(name, param)

    def __delattr__(self, name: str) -> None:
        if name in self.KEPT and self.spec.scaled:  # FSDP exchanges floats without a scale in this way
            raise RuntimeError(f"{name} must not be deleted or computed, it is a part of a quantized weight: {WAY_OUT}")
        super().__delattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would make a parameter of it
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def share(self, other: QuantModule) -> None:
        """Share the weight of ``other``, the same parameters: a tied weight.

        Raises
        ------
        ValueError
            For a weight of another shape or another format.
        """
        mine, theirs = (f"{m.spec.weight_only} {list(m.weight_shape)}" for m in (self, other))
        if mine != theirs:
            raise ValueError(f"weight must be {mine} to be shared, got {theirs}")
        other.untile_()
        self._shared = other._shared = True
        for name in PARTS:
            self.register_parameter(name, other._parameters[name])
        self._alone = dict(other._alone)

    def untile_(self) -> Self:
        """Keep the codes as [N, K], which they always are but in a `QuantLinear`."""
        return self

    def reset_parameters(self) -> None:
        """All zeros: a module of codes has nothing to draw at random."""
        with torch.no_grad():
            for name, parameter in self.named_parameters(recurse=False):
                parameter.fill_(self.spec.row.zero_byte if name == "weight_codes" else 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, spec={self.spec}"

    def _rows(self, otherwise: int) -> int:
        """N by the codes, which another module that shares them may have resized; ``otherwise`` where none tell."""
        codes = self._parameters.get("weight_codes")
        return codes.shape[0] if codes is not None and codes.dim() == 2 else otherwise

    @staticmethod
    def as_matrix(weight: Tensor) -> Tensor:
        """A float weight of `weight_shape` as [N, K]."""
        return weight.flatten(1)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the codes in a file: see `stored_shape`."""
        return stored_shape(self.spec, self.weight_shape)

    @property
    def _matrix(self) -> tuple[int, int]:
        N, *rest = self.weight_shape
        return N, math.prod(rest)

    def _resize(self, N: int) -> bool:
        """Change to N rows, before the weight follows; return False if this kind of module cannot."""
        return False

    def _take(self, template: nn.Module, spec: Any, dtype: torch.dtype | None, device: Any) -> None:
        """Take over all of ``template``, a float module on meta made for this, with codes in place of its weight."""
        vars(self).update(vars(template))
        self._parameters.pop("weight")
        self._allocate(QuantSpec.parse(spec), dtype, device)
        if self._parameters.get("bias") is not None:
            N = self.weight_shape[0]
            self._parameters["bias"] = nn.Parameter(torch.zeros(N, dtype=self.dtype, device=device))

    def _allocate(self, spec: QuantSpec, dtype: torch.dtype | None, device: Any) -> None:
        """Codes of 0 for the weight of `weight_shape`, and scales of 1."""
        register_if_counting()
        if not self.ROTATES:
            check_unrotated(spec, f"an nn.{self.FLOAT.__name__}")
        self.spec, self.block = spec, spec.block(self._matrix)
        self._viewed = dtype_of(spec.row) if is_fp8(spec) else None
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        blocks = spec.scale_shape(self._matrix)
        codes = zero_codes(spec, spec.codes_shape(self._matrix), device)
        scale = torch.ones(blocks, dtype=scale_dtype(spec), device=device) if spec.scaled else None
        zero_point = None if spec.symmetric else zero_points_of_0(spec, self._matrix, device)
        self._freeze(Weight(codes, scale, zero_point))

    def _freeze(self, weight: Weight) -> None:
        for name, tensor in self._parts(weight).items():
            self.register_parameter(name, None if tensor is None else QuantParameter(tensor, requires_grad=False))

    def _parts(self, weight: Weight) -> dict[str, Tensor | None]:
        """Name of a parameter -> the tensor that it holds."""
        parts = {name: getattr(weight, field) for name, field in PARTS.items()}
        return parts | {"weight_codes": parts["weight_codes"].view(stored_dtype(self.spec))}

    def _keep_kinds(self) -> None:
        """Make plain parameters that torch has created anew `QuantParameter` again."""
        for name in self.KEPT:
            if type(p := self._parameters.get(name)) is nn.Parameter:
                self._parameters[name] = QuantParameter(p.data, requires_grad=p.requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        frozen = [p for name in self.KEPT if (p := self._parameters[name]) is not None]

        def keep_dtype(t: Tensor) -> Tensor:
            if not any(t is p for p in frozen):
                return fn(t)
            y = fn(t.data)
            return y if y.dtype == t.dtype else t.data.to(y.device)

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_codes.device)).dtype
        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._keep_kinds()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.KEPT:
            if not keep_vars and (p := self._parameters.get(name)) is not None:
                destination[prefix + name] = p.data
        if hasattr(destination, "_metadata"):
            # of the oldest version that has it: version 3 keeps zero points as codes
            version = 2 if self.spec.symmetric else self._version
            destination._metadata[prefix[:-1]] |= {"spec": str(self.spec), "version": version}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        error_msgs: list[str] = args[-1]
        self._rename_codes(state_dict, prefix)
        if why := other_codes(self, self.spec, local_metadata, f"{prefix}weight_codes" in state_dict):
            error_msgs.append(f"{prefix}weight must be {why}")
        elif f"{prefix}weight" in state_dict:
            got = state_dict[f"{prefix}weight"]
            error_msgs.append(
                f"{prefix}weight must be codes of {self.spec.weight_only}, got {dtype_name(got.dtype)} "
                f"{list(got.shape)}: load floats into the float model, then quantize_ it"
            )
        elif wrong := [name for name in self.KEPT if not self._same_dtype(name, state_dict.get(prefix + name))]:
            for name in wrong:
                expected, got = self._parameters[name], state_dict[prefix + name]
                expected_dtype = "absent" if expected is None else dtype_name(expected.dtype)
                error_msgs.append(
                    f"{prefix}{name} must be {expected_dtype} for {self.spec}, got {dtype_name(got.dtype)}"
                )
        else:
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
            self._keep_kinds()
            parts_came(self, self.KEPT, state_dict, prefix)

    def _rename_codes(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Rename and reshape codes that a state holds as version 1 and files do to those of the parameter."""
        name, old = f"{prefix}weight_codes", state_dict.get(f"{prefix}weight")
        if isinstance(old, Tensor) and name not in state_dict and old.dtype == dtype_of(self.spec.row):
            shapes = self.stored_shape, self.spec.codes_shape(self._matrix)
            if tuple(old.shape) in shapes:
                state_dict[name] = state_dict.pop(f"{prefix}weight").reshape(shapes[1])
        codes = state_dict.get(name)
        if isinstance(codes, Tensor) and is_fp8(self.spec) and codes.dtype == dtype_of(self.spec.row):
            state_dict[name] = codes.view(torch.uint8)
        name = f"{prefix}weight_zero_point"
        if isinstance(z := state_dict.get(name), Tensor) and z.dtype == torch.int32 and not self.spec.symmetric:
            state_dict[name] = kept_zero_points(z, self.spec.row)  # as version 2 has them

    def _same_dtype(self, name: str, got: Tensor | None) -> bool:
        expected = self._parameters[name]
        return got is None or expected is None or got.dtype == expected.dtype


def parts_came(module: Any, parts: Sequence[str], state_dict: Mapping[str, Any], prefix: str) -> None:
    """Note which of ``parts``, codes and what belongs to them, a state brought: codes wait for the rest of them.

    A state may lack some if ``strict`` is not set, and codes mean other values with the scales that were there. The
    rest may come with the next file of a checkpoint, so a module refuses to use codes alone, not to load them. Scales
    alone may be what was trained over codes that stay.
    """
    whole = frozenset(name for name in parts if module._parameters.get(name) is not None)
    if given := {name for name in whole if prefix + name in state_dict}:
        others = {codes: names for codes, names in module._alone.items() if codes != parts[0]}
        absent = module._alone.get(parts[0], whole) - given
        module._alone = others | {parts[0]: absent} if absent else others


def check_came(module: Any, codes: str) -> None:
    """Check that the parameter ``codes`` of ``module`` was not loaded without its scales: see `parts_came`."""
    absent = module._alone.get(codes, ())
    if absent and codes not in absent:
        raise RuntimeError(
            f"{' and '.join(sorted(absent))} must be loaded with {codes}, got a state without it, "
            "of which load_state_dict(strict=False) took the rest: load a whole one"
        )


def check_plain(layer: nn.Module) -> None:
    """Check that no parameter of ``layer`` is computed by torch's ``parametrize``, which changes its class."""
    if computed := getattr(layer, "parametrizations", None):
        raise ValueError(
            f"{' and '.join(computed)} must be a parameter, got one that is computed: "
            "torch.nn.utils.parametrize.remove_parametrizations makes it permanent"
        )


def taken_over(layer: nn.Module) -> dict[str, Any]:
    """The attributes of ``layer`` for a module that takes its place, the containers of ``nn.Module`` as copies.

    What ``layer.compile()`` has left there is not: it calls ``layer``.
    """
    return {
        name: copy.copy(value) if name.startswith("_") and isinstance(value, (dict, set)) else value
        for name, value in vars(layer).items()
        if name != "_compiled_call_impl"
    }


def rebind_hooks(module: nn.Module) -> None:
    """Make hooks that hold the module they were registered on hold ``module``."""
    hooks: dict[int, Any] = module._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        if hook.with_module:
            hooks[key] = type(hook)(hook.hook, module)
    if forward := hooked_forward(module):
        plain = type(module).forward.__get__(module)
        new = functools.update_wrapper(functools.partial(forward.func, module), plain)
        vars(module).update(_old_forward=plain, forward=new)


def hooked_forward(layer: nn.Module) -> functools.partial[Any] | None:
    """The ``forward`` that accelerate gave to ``layer`` to run its hook around the layer's own; None without one."""
    forward = vars(layer).get("forward")
    return forward if "_hf_hook" in vars(layer) and isinstance(forward, functools.partial) else None


def refuse_codes(load: Callable[..., None]) -> Callable[..., None]:
    """``nn.Module._load_from_state_dict`` for a module with a float weight that is given codes.

    torch reports names that a module does not have only where ``strict`` is set. Without it a float layer would keep
    the values that it was initialized with, and nobody would know.
    """

    def _load_from_state_dict(self: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._parameters:
            codes = f"{name}_codes"
            if f"{prefix}{codes}" in state_dict and codes not in self._parameters:
                args[-1].append(
                    f"{prefix}{name} must be a float weight, got codes: quantize_ the model with the spec of this "
                    "state before load_state_dict, or use quantlib.checkpoint.load_quantized"
                )
        load(self, state_dict, prefix, *args)

    return _load_from_state_dict


nn.Module._load_from_state_dict = refuse_codes(nn.Module._load_from_state_dict)  # type: ignore[method-assign]


def other_codes(module: nn.Module, spec: QuantSpec, told: Mapping[str, Any], has_codes: bool) -> str | None:
    """Return what codes of ``spec`` must be and are not, by the metadata ``told`` of the state that is loaded into
    ``module``; None where nothing says so.

    Formats of equal dtypes and shapes differ in nothing else: int4 reads as float4_e2m1fn. ``torch.save`` keeps the
    metadata of a ``state_dict()``. A state of names and tensors alone, as safetensors gives it, has none, and nobody
    can tell: a warning says once what its codes are taken for. (A tensor that names the format would be in every
    state, which older versions refuse, and a buffer, which DDP broadcasts at each forward.)
    """
    version, latest = told.get("version") or 0, module._version
    if version > latest:
        return f"of version {latest} or older, got version {version}"
    if "spec" in told:
        saved = QuantSpec.parse(told["spec"])
        return None if saved.kept == spec.kept else f"codes of {spec.weight_only}, got {saved.weight_only}"
    if has_codes and spec.scaled:
        warnings.warn(
            f"state_dict has no metadata that names the format of its codes, they are taken for {spec.weight_only}: "
            "torch.save(model.state_dict()) keeps it, quantlib.checkpoint.save_quantized writes it into safetensors",
            stacklevel=2,
        )
    return None


def is_fp8(spec: QuantSpec) -> bool:
    """True if codes are kept as bytes: gloo, and much else, does not know the dtypes of FP8."""
    return spec.row.is_float and spec.row.bits == 8


def stored_dtype(spec: QuantSpec) -> torch.dtype:
    """The dtype of ``weight_codes``."""
    return torch.uint8 if is_fp8(spec) else dtype_of(spec.row)


def check_kept(scale: Tensor | None, spec: QuantSpec) -> None:
    """A scale is of the dtype that ``spec`` keeps it in: a policy of mixed precision may have cast it.

    Raises
    ------
    RuntimeError
        For another dtype.
    """
    if scale is not None and scale.dtype != scale_dtype(spec):
        raise RuntimeError(f"weight_scale must be {spec.scale} for {spec}, got {dtype_name(scale.dtype)}")


def zero_points_of_0(spec: QuantSpec, matrix: tuple[int, int], device: Any) -> Tensor:
    """Zero points 0 of a weight of the shape ``matrix``."""
    return torch.zeros(spec.zero_point_shape(matrix), dtype=dtype_of(spec.row), device=device)


def zero_codes(spec: QuantSpec, shape: Sequence[int], device: Any) -> Tensor:
    """Codes of 0, of the shape that they are stored in."""
    return torch.zeros(tuple(shape), dtype=stored_dtype(spec), device=device).fill_(spec.row.zero_byte)


def check_whole(model: nn.Module, way_out: str) -> None:
    """Check that FSDP shards no module and no parameter of ``model``: its parameters are whole only for a while."""
    for name, module in model.named_modules():
        of_fsdp = any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)
        sharded = next((key for key, p in module._parameters.items() if p is not None and is_sharded(p)), None)
        if of_fsdp or sharded is not None:
            where = ".".join(filter(None, (name, sharded))) or "its root"
            raise ValueError(f"model must not be sharded, got one that is at {where}: {way_out}")
