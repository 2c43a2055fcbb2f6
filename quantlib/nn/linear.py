"""y[..., n] = bias[n] + sum over k of x[..., k] * decode(weight[n, k]) * weight_scale[n // br, k // bk]"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quantlib import backends, ops
from quantlib.backends.packing import kept_zero_points, wide_zero_points
from quantlib.nn.functional import SOURCES, Scale, Weight, autocast, integer_matmul, project, rotated, scale_dtype
from quantlib.nn.leaf import check_input, check_inside
from quantlib.nn.module import PARTS, QuantModule, check_kept, stored_dtype
from quantlib.nn.weight import QuantParameter
from quantlib.ops.check import dtype_name, dtype_of
from quantlib.ops.scaled_matmul import X_FORMATS
from quantlib.ops.sharding import cuts_columns
from quantlib.spec import QuantSpec, check_dynamic

if TYPE_CHECKING:
    from typing_extensions import Self

Kernel = Literal["linear", "dequant_matmul", "dynamic_matmul", "scaled_matmul"]
# kernel -> `QuantLinear.product`
PRODUCTS = {"linear": "whole", "dequant_matmul": "floats", "dynamic_matmul": "rows", "scaled_matmul": "integers"}
_packing = threading.Lock()


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
        The dtype of the bias, and of the layer that `dequantize` gives.
    spec : QuantSpec or what `QuantSpec.parse` takes
        The spec of the weight, and of the input if it has an activation.
    batch_invariant : bool
        Give a row of the input the same bytes whatever rows come with it. May be set at any time.

    Attributes
    ----------
    weight, weight_codes, weight_scale, weight_zero_point, spec, block, dtype
        As in `QuantModule`.
    bias : nn.Parameter [N], or None
    input_scale : nn.Parameter [1, 1] float32, or None
        The scale of all inputs, frozen; None unless the activation of the spec is static.
    input_zero_point : nn.Parameter [1, 1] int32, or None
        None unless the static activation is affine.
    kernel : {"dequant_matmul", "dynamic_matmul", "scaled_matmul", "linear"}
        The op that multiplies: one of quantlib, or ``F.linear`` with the whole weight.

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

    Gradients reach the input, the bias and, where it is float32 and made to require one, ``weight_scale``. Through the
    projection of an input they pass straight, and stop where it is out of the range of a static scale.

    For `quantlib.dequant_matmul` on a GPU, a layer in evaluation mode reorders its codes the first time it multiplies
    without gradients: `tile_` says how. ``weight_codes`` is another parameter then. ``state_dict``, copies, pickles,
    and a layer that is moved to another device or put into training mode have codes [N, K].
    """

    FLOAT = nn.Linear
    ROTATES = True
    KEPT = (*PARTS, "input_scale", "input_zero_point")
    OWN = (*QuantModule.OWN, "batch_invariant", "kernel", "_fixed")
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

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scale: Tensor,
        spec: Any,
        *,
        zero_point: Tensor | None = None,
        bias: Tensor | None = None,
        in_features: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer of codes and scales that were found elsewhere, by GPTQ, AWQ, HQQ or any other method.

        Its weight is decode(codes[n, k] - zero_point[n // br, k // bk]) * scale[n // br, k // bk].

        Parameters
        ----------
        codes : Tensor [N, K]
            One code an element: integers in the range of an integer format (-8..7 for int4, -128..127 for int8, 0..255
            for uint8), the bits 0..15 of float4_e2m1fn, nf4 and nf4_bf16, or float8 of the dtype of the format. Or
            packed already, [N, ceil(K / 2)] uint8 as `quantlib.pack` gives them, with ``in_features``. Copied.
        scale : Tensor [ceil(N / br), ceil(K / bk)]
            Floats that the dtype of the scales of the spec holds, float32 by default; [N] where each row has one, and a
            single one where all weights share it.
        spec : QuantSpec or what `QuantSpec.parse` takes
            The format and its blocks, and how inputs are quantized; not static ones.
        zero_point : Tensor of the shape of ``scale``, or kept as codes are, optional
            Integers, where the spec is affine: the code of zero.
        bias : Tensor [N], optional
        in_features : int, optional
            K of codes that are packed already.
        dtype : torch.dtype, optional
            The dtype of the layer that `dequantize` gives; by default that of ``bias``, or the default dtype.

        Raises
        ------
        TypeError, ValueError
            For tensors that do not fit the spec and each other, naming what was expected and what came.

        Examples
        --------
        >>> codes = torch.tensor([[-7, 3, 0], [1, 2, -8]])
        >>> layer = QuantLinear.from_codes(codes, torch.tensor([0.5, 0.25]), "int4:row")
        >>> layer.values().tolist()
        [[-3.5, 1.5, 0.0], [0.25, 0.5, -2.0]]
        """
        spec = QuantSpec.parse(spec)
        check_dynamic(spec)
        if not spec.scaled:
            raise ValueError(f"spec must have a scale, got {spec}: load a float weight instead")
        codes = checked_codes(codes, spec, in_features)
        shape = codes.shape[0], codes.shape[1] if in_features is None else in_features
        if in_features is None and spec.row.packed:
            codes = ops.pack(codes, spec.format)
        scale = blocks_as(scale, "scale", spec, shape)
        if (zero_point is None) != spec.symmetric:
            expected = "given" if zero_point is None else "left out"
            raise ValueError(f"zero_point must be {expected} for {spec}")
        if zero_point is not None:
            zero_point = blocks_as(zero_point, "zero_point", spec, shape)
        if bias is not None and (tuple(bias.shape) != shape[:1] or not bias.is_floating_point()):
            raise ValueError(f"bias must be [{shape[0]}] floats, got {bias.dtype} {list(bias.shape)}")
        dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        new = cls(shape[1], shape[0], bias is not None, codes.device, dtype, spec=spec)
        new._freeze(Weight(codes, scale, zero_point))
        if bias is not None:
            new.bias = nn.Parameter(bias.detach().clone())
        return new

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
        self.batch_invariant, self.kernel, self._fixed = False, kernel_of(spec, self.in_features), False

    def _resize(self, N: int) -> bool:
        if self.bias is not None and len(self.bias) != N:
            return False
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
        check_input(x, self.in_features)
        parameters = self._parameters  # to ask a module for one by its name takes half a microsecond
        codes, scale, zero_point = self.codes, parameters["weight_scale"], parameters["weight_zero_point"]
        bias: Tensor | None = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (asks both)
        check_kept(scale, spec)
        if self.batch_invariant:
            self._check_batch_invariant(x)
        if scale is None or x.dtype == torch.float64:
            x = x if activation is None else rotated(project(rotated(x, spec), activation, self._static()), spec)
            return F.linear(x, self.values(x.dtype), None if bias is None else bias.to(x.dtype))
        x = rotated(x, spec)
        bias = bias if bias is None or bias.dtype in SOURCES else bias.float()
        if self.kernel == "dynamic_matmul" and not cuts_columns(x):
            return ops.dynamic_matmul(x, codes, scale, spec.format, block=self.block, zero_point=zero_point, bias=bias)
        if activation is not None:
            static = self._static()
            if self.kernel in ("scaled_matmul", "dynamic_matmul"):
                weight = Weight(codes, scale, zero_point)
                return integer_matmul(x, activation, static, weight, spec.format, self.block, bias)
            x = project(x, activation, static)
        if on_gpu(x):
            codes = self._pack(x, codes)
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
        """The scale and the zero point of a static activation, or None."""
        return None if self.input_scale is None else Scale(self.input_scale, self.input_zero_point)

    @property
    def product(self) -> str:
        """An older word for `kernel`: "floats", "rows", "integers" or "whole"."""
        return PRODUCTS[self.kernel]

    @property
    def tiled(self) -> bool:
        """True if ``weight_codes`` is tiles, as `tile_` makes them."""
        return self.weight_codes.dim() == 3 and self.weight_codes.shape[-1] > 1

    def tile_(self) -> Self:
        """Keep the codes as tiles [ceil(N / 16), ceil(K / columns), 1024], the order in which a GPU multiplies them.

        A layer does so by itself where that is faster; there is no need to call this. It gives the same results. A
        weight that is shared with another module is shared no longer: the other keeps its codes.

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
        if self.kernel != "dequant_matmul":
            raise ValueError(f"spec must be of codes that are multiplied by as floats to be tiled, got {self.spec}")
        if not self.tiled:
            size = self.in_features if self.spec.row.packed else None
            self._keep_codes(ops.tile(self.codes, self.spec.format, size=size))
        return self

    def untile_(self) -> Self:
        """Keep the codes as [N, K] again: the inverse of `tile_`."""
        if self.tiled:
            self._keep_codes(self.plain.codes.view(stored_dtype(self.spec)))
        return self

    def _keep_codes(self, codes: Tensor) -> None:
        new, old = QuantParameter(codes, requires_grad=False), self.weight_codes
        new.asked = getattr(old, "asked", True)
        if codes.is_cuda:
            torch.cuda.synchronize(codes.device)  # work on other streams reads the old codes, or is about to read these
        self.weight_codes = new

    def _pack(self, x: Tensor, codes: Tensor) -> Tensor:
        """``codes``, to multiply ``x`` with on a GPU: they become tiles where nothing depends on their memory.

        They stay as they are for training, whose gradients read them as a matrix, where another module shares them,
        where a hook or a wrapper of the parameter may exchange them, while the call is traced or transformed, once
        a CUDA graph has recorded where they lie, and where there is no memory for a second copy of them.
        """
        if torch.compiler.is_compiling() or self._fixed:
            return codes
        if is_recorded(x):
            self._fixed = True
        elif not (codes.dim() == 3 or self.training or torch.is_grad_enabled()) and self._may_pack(x):
            try:
                with _packing, torch.inference_mode(False), torch.no_grad():
                    self.tile_()
            except torch.cuda.OutOfMemoryError:
                self._fixed = True
            return self.codes
        return codes

    def _may_pack(self, x: Tensor) -> bool:
        return (
            x.dtype.itemsize == 2  # tensor cores
            and self.spec.row.bits <= 8
            and type(self._parameters["weight_codes"]) is QuantParameter
            and not (self._fixed or self._shared or "_hf_hook" in vars(self))
            and not (torch._C._is_tracing() or torch._C._are_functorch_transforms_active())
            and backends.serving(x.device.type) != "composite"  # which would reorder them at every call
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode; codes are a matrix for training, unless a CUDA graph has recorded where the tiles lie."""
        if mode and not self._fixed:
            self.untile_()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        device = self.weight_codes.device
        if self.tiled and fn(torch.empty(0, device=device)).device != device:
            self.untile_()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """The attributes for a copy or a pickle: with codes [N, K], whose order no device decides."""
        state = vars(self) | {"_fixed": False}
        if self.tiled:
            codes = QuantParameter(self.plain.codes.view(stored_dtype(self.spec)), requires_grad=False)
            codes.asked = getattr(self.weight_codes, "asked", True)
            state["_parameters"] = self._parameters | {"weight_codes": codes}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "kernel" not in state:  # of a layer that was pickled when `kernel` was called `product`
            state = {name: value for name, value in state.items() if name != "product"}
            state |= {"kernel": kernel_of(state["spec"], state["in_features"]), "_fixed": False}
        super().__setstate__(state)  # type: ignore[no-untyped-call]

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
        self.untile_()
        return super().set_weight_(weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.tiled and not keep_vars:
            destination[f"{prefix}weight_codes"] = self.plain.codes.view(stored_dtype(self.spec))

    def _load_from_state_dict(self, *args: Any) -> None:
        self.untile_()
        super()._load_from_state_dict(*args)


def checked_codes(codes: Tensor, spec: QuantSpec, in_features: int | None) -> Tensor:
    """Codes of the format of ``spec`` [N, K], of its dtype; or [N, ceil(K / P)] packed, where K is given."""
    if codes.dim() != 2:
        raise ValueError(f"codes must be [N, K], got {list(codes.shape)}")
    row, codes = spec.row, codes.detach()
    if in_features is not None:
        expected = torch.uint8 if row.packed else dtype_of(row)
        if codes.dtype != expected or codes.shape[1] != row.columns(in_features):
            words = f"{dtype_name(expected)} [N, {row.columns(in_features)}] for {in_features} columns"
            raise ValueError(f"codes must be {words}, got {dtype_name(codes.dtype)} {list(codes.shape)}")
        return codes.clone(memory_format=torch.contiguous_format)
    if row.is_float and not row.packed:
        if codes.dtype != dtype_of(row):
            raise TypeError(f"codes must be {spec.format}, got {dtype_name(codes.dtype)}")
        return codes.clone(memory_format=torch.contiguous_format)
    if codes.is_floating_point() or codes.is_complex():
        raise TypeError(f"codes must be integers of {spec.format}, got {dtype_name(codes.dtype)}")
    lowest, highest = row.code_range
    if codes.numel() and not codes.is_meta:
        least, most = (int(value) for value in codes.aminmax())
        if least < lowest or most > highest:
            got = least if least < lowest else most
            raise ValueError(f"codes must be in {lowest}..{highest} for {spec.format}, got {got}")
    return codes if row.packed else codes.to(dtype_of(row), copy=True).contiguous()


def blocks_as(t: Tensor, name: str, spec: QuantSpec, shape: tuple[int, int]) -> Tensor:
    """A scale in the dtype of ``spec``, or a zero point as it is kept, one for each block of a weight of ``shape``."""
    expected, floats = spec.scale_shape(shape), name == "scale"
    given = t.detach()
    if given.is_floating_point() != floats or given.is_complex():
        raise TypeError(f"{name} must be {'floats' if floats else 'integers'}, got {dtype_name(t.dtype)}")
    if given.dim() < 2 and given.numel() == expected[0] * expected[1] and expected[1] == 1:
        given = given.reshape(expected)
    if not floats and given.dtype == dtype_of(spec.row) and tuple(given.shape) == spec.zero_point_shape(shape):
        given = wide_zero_points(given, spec.row, expected[1])  # kept as another layer keeps them
    if tuple(given.shape) != expected:
        raise ValueError(f"{name} must be {list(expected)} for {spec} of {list(shape)}, got {list(t.shape)}")
    if not floats:
        lowest, highest = spec.row.code_range
        if given.numel() and not given.is_meta and not lowest <= int(given.min()) <= int(given.max()) <= highest:
            raise ValueError(
                f"{name} must be in {lowest}..{highest} for {spec}, got {int(given.min())}..{int(given.max())}"
            )
        return kept_zero_points(given, spec.row)
    kept = given.to(scale_dtype(spec), copy=True).contiguous()
    if not kept.is_meta and not torch.equal(kept.double(), given.double()):
        raise ValueError(
            f"{name} must be what {spec.scale} holds for {spec}, got {dtype_name(t.dtype)} that it does not"
        )
    return kept


def kernel_of(spec: QuantSpec, K: int) -> Kernel:
    """The op that a layer multiplies with: floats with the whole weight, floats with codes, or codes with codes."""
    activation = spec.activation
    if not spec.scaled:
        return "linear"
    if activation is None or not K or spec.row.is_float or activation.format not in X_FORMATS:
        return "dequant_matmul"
    if activation == QuantSpec("int8", "row"):
        return "dynamic_matmul"
    return "scaled_matmul" if activation.per in ("row", "tensor") else "dequant_matmul"


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def is_recorded(x: Tensor) -> bool:
    """True if a CUDA graph records operations on ``x``."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
