"""The ``quantization_config`` of quantlib: the spec, the layers that stay floats, the weights that were quantized."""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantlib.api import check_on_nonfinite
from quantlib.measure import OnNonfinite
from quantlib.record import ENTRY, LIBRARY, VERSION
from quantlib.spec import QuantSpec, check_dynamic


class Method(str, enum.Enum):
    """The name of the method, as both libraries ask for it."""

    QUANTLIB = LIBRARY


# names of arguments in the configs of other libraries -> what says the same here
OURS = {
    "skip=[...]": (
        "modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore", "modules_to_skip",
        "skip_modules", "exclude", "modules_to_exclude",
    ),
    "include=[...]": ("modules_to_convert", "targets", "modules_in_block_to_quantize", "include_modules"),
    "embeddings=True": ("include_input_output_embeddings", "quantize_embeddings", "include_embedding"),
    'spec="W8A16"': ("load_in_8bit", "llm_int8_threshold", "llm_int8_has_fp16_weight", "weights_dtype", "weights"),
    'spec="W8A8"': ("activation_scheme", "activations", "activation_dtype"),
    'spec="W4A16"': ("load_in_4bit", "quant_type", "scheme", "config_groups", "bits", "nbits", "wbits"),
    'spec="nf4:group:64"': ("bnb_4bit_quant_type", "bnb_4bit_quant_storage"),
    'spec="nf4:group:64:bfloat16", whose scales take 16 bits': ("bnb_4bit_use_double_quant", "use_double_quant"),
    'spec="int4:group:128"': ("group_size", "q_group_size", "block_size", "weight_block_size"),
    'spec="int4:group:128:affine"': ("sym", "zero_point", "symmetric", "asymmetric"),
    "from_pretrained(..., dtype=torch.bfloat16)": ("bnb_4bit_compute_dtype", "compute_dtype", "torch_dtype", "dtype"),
    "quantlib.calibrate, which is GPTQ": ("dataset", "damp_percent", "desc_act", "act_order", "true_sequential"),
}  # fmt: skip


def ours_for(given: Mapping[str, Any]) -> str:
    """The names of ``given``, arguments that `QuantlibConfig` does not have, each with what says the same here."""
    way = {other: ours for ours, others in OURS.items() for other in others}
    return ", ".join(f"{name!r}, which is {way[name]}" if name in way else repr(name) for name in given)


@register_quantization_config(LIBRARY)
class QuantlibConfig(QuantizationConfigMixin):
    """The way ``from_pretrained`` of transformers and diffusers quantizes a model.

    Parameters
    ----------
    spec : QuantSpec or what `QuantSpec.parse` takes
        The spec of the weights: ``"W8A16"``, ``"W8A8"``, ``"W4A16"``, ``"int4:group:32"`` ...
    skip : sequence of str
        Shell patterns of names of modules that stay floats, such as ``"model.layers.0.*"``.
    include : sequence of str
        Shell patterns of modules that are quantized although they stay floats by default, such as ``"lm_head"``.
        ``skip`` counts where both match.
    embeddings : bool
        Whether embeddings are quantized too. One that is tied to an output layer is quantized with it.
    convolutions : bool
        Whether ``nn.Conv1d`` and ``nn.Conv2d`` are quantized too: most of a U-Net.
    on_nonfinite : {"raise", "propagate"}
        As for `quantlib.quantize_`.

    Attributes
    ----------
    weights : dict
        Name of a weight -> ``{"spec": ..., "shape": [...]}``, of the float weight; filled once a model is quantized.

    Raises
    ------
    TypeError
        For an argument that is not known, and for ``skip`` or ``include`` that is a single string.
    ValueError
        For an unknown spec, one with static activations, another ``quant_method``, and a config that a later version
        of quantlib wrote.

    Notes
    -----
    Output layers, routers and adapters stay floats, as for the other quantizers of transformers. The report of a model,
    ``model.hf_quantizer.report``, names them.

    Examples
    --------
    >>> QuantlibConfig("W4A16", skip=["model.layers.0.*"]).spec
    'nf4_bf16:group:128:bfloat16:signed_magnitude'
    """

    def __init__(
        self,
        spec: Any = "W8A16",
        *,
        skip: Sequence[str] = (),
        include: Sequence[str] = (),
        embeddings: bool = False,
        convolutions: bool = False,
        on_nonfinite: OnNonfinite = "raise",
        weights: Mapping[str, Any] | None = None,
        version: int = VERSION,
        library: str = LIBRARY,
        quant_method: str = LIBRARY,
        **others: Any,
    ) -> None:
        if others:
            raise TypeError(f"QuantlibConfig must have arguments of quantlib, got {ours_for(others)}")
        for name, patterns in (("skip", skip), ("include", include)):
            if isinstance(patterns, str):
                raise TypeError(f"{name} must be a sequence of patterns, got the string {patterns!r}")
        if quant_method != LIBRARY or library != LIBRARY:
            raise ValueError(f"quant_method must be {LIBRARY!r}, got {quant_method!r}, library {library!r}")
        if type(version) is not int or not 1 <= version <= VERSION:
            why = "a later quantlib wrote it, update quantlib"
            raise ValueError(f"version must be an integer of at most {VERSION}, got {version!r}: {why}")
        check_on_nonfinite(on_nonfinite)
        parsed = QuantSpec.parse(spec)
        if not weights:  # a model that is quantized already may have been calibrated
            check_dynamic(parsed)
        super().__init__(quant_method=Method.QUANTLIB)  # type: ignore[arg-type] # a method that is not of its enum
        self.spec, self.on_nonfinite = str(parsed), on_nonfinite
        self.skip, self.include = list(skip), list(include)
        self.embeddings, self.convolutions = bool(embeddings), bool(convolutions)
        self.weights = dict(weights or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        given = {**config_dict, **kwargs}
        known = {"self", "others"} ^ inspect.signature(cls.__init__).parameters.keys()
        unknown = given.keys() - known
        config = cls(**{name: value for name, value in given.items() if name not in unknown})  # checks the version
        if unknown:
            names = ours_for({name: given[name] for name in sorted(unknown)})
            raise ValueError(f"{ENTRY} must have keys of quantlib, got {names}: update quantlib, or remove them")
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        told = {"quant_method": LIBRARY, "version": VERSION, "spec": self.spec, "weights": self.weights}
        rest = {name: getattr(self, name) for name in ("skip", "include", "embeddings", "convolutions")}
        return copy.deepcopy(told | {name: value for name, value in rest.items() if value})
