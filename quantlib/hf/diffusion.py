"""Load, keep and save a model whose weights are codes in diffusers."""

from __future__ import annotations

from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor

from quantlib.api import account, dequantize_
from quantlib.checkpoint.files import some
from quantlib.hf.config import QuantlibConfig
from quantlib.hf.loading import Loading, adopt_codes, kept_by
from quantlib.nn.weight import QuantParameter
from quantlib.ops.check import dtype_of
from quantlib.record import ENTRY, LIBRARY, entry_of, weights_of
from quantlib.spec import QuantSpec, stored_shape


class QuantlibDiffusersQuantizer(Loading, DiffusersQuantizer):
    """Quantizes a float model of diffusers while it is loaded, or builds the layers for codes that were saved.

    Attributes
    ----------
    report : Report or None
        The report of a model that was quantized while it was loaded: see `quantlib.quantize_`.
    """

    quantization_config: Any  # a QuantlibConfig
    use_keep_in_fp32_modules = True  # as float models do

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._begin()

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError("device_map must not send layers to disk where quantlib quantizes a model of diffusers")

    # ---- before the files are read ----------------------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._prepare(model, self.pre_quantized)

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        if not self.pre_quantized:
            return loaded_keys
        return [f"{name}_codes" if name in self.quantization_config.weights else name for name in loaded_keys]

    # ---- while they are read ----------------------------------------------------------------------------------------

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {f"{name}_codes" if name in self.codes else name: x for name, x in state_dict.items()}

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        prefix, _, key = param_name.rpartition(".")
        return param_name in self.waiting or key in kept_by(model.get_submodule(prefix))

    def check_quantized_param_shape(self, name: str, expected: Tensor, value: Tensor) -> bool:
        raise ValueError(f"{name} must have the shape {list(expected.shape)}, got {list(value.shape)}")

    def create_quantized_param(  # type: ignore[override] # whose base names no arguments
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if param_name in self.waiting:
            self.quantize(model, param_name, param_value.to(target_device))
            return
        prefix, _, key = param_name.rpartition(".")
        part = state_dict[param_name]  # which ``param_value`` has in the dtype of the model
        model.get_submodule(prefix)._parameters[key] = QuantParameter(part.to(target_device), requires_grad=False)

    # ---- afterwards -------------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.places.clear()
        kept = ((f"{prefix}.{key}", m._parameters[key]) for prefix, m in model.named_modules() for key in kept_by(m))
        if missing := [name for name, p in kept if p is not None and p.is_meta]:
            raise ValueError(f"model must find all of its codes and scales in its files, got no {some(missing)}")
        adopt_codes(model)
        if self.report is not None:
            account(model, self.report)
        self.quantization_config.weights = weights_of(model)
        return model

    def dequantize(self, model: Any) -> Any:
        dequantize_(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The state as quantlib's files have it: codes under the name of the weight, with an axis more."""
        for name, entry in self.quantization_config.weights.items():
            spec, codes = QuantSpec.parse(entry["spec"]), state_dict.pop(f"{name}_codes")
            state_dict[name] = codes.view(dtype_of(spec.row)).view(stored_shape(spec, tuple(entry["shape"])))
        return state_dict, {}

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def keep(model: Any, weights: dict[str, Any]) -> None:
    """Have diffusers save ``model`` as one of quantlib; as one of floats if there are no ``weights``.

    A model that was not loaded with a quantizer may still be cast: ``model.is_quantized``, which forbids that, is not
    set.
    """
    entries = {name: value for name, value in model.config.items() if name != ENTRY}
    if weights:
        quantizer = vars(model).get("hf_quantizer")
        if not isinstance(quantizer, QuantlibDiffusersQuantizer):
            quantizer = QuantlibDiffusersQuantizer(QuantlibConfig(entry_of(weights)["spec"], weights=weights))
            model.hf_quantizer, model.quantization_method = quantizer, LIBRARY
        quantizer.quantization_config.weights = weights
        entries[ENTRY] = quantizer.quantization_config
    else:
        model.is_quantized = False
        vars(model).pop("hf_quantizer", None)
    model._internal_dict = FrozenDict(entries)  # type: ignore[no-untyped-call]


auto.AUTO_QUANTIZER_MAPPING[LIBRARY] = QuantlibDiffusersQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[LIBRARY] = QuantlibConfig
