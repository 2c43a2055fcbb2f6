"""``quantization_config=QuantlibConfig("W4A16")``: transformers and diffusers quantize a model while they load it.

Importing this module registers the method ``"quantlib"`` with both: from then on ``from_pretrained`` also reads
the folders that ``save_pretrained`` and ``quantlib quantize`` write. Where peft is installed, adapters over quantized
layers merge into codes, and unmerge to the codes of before.
"""

from __future__ import annotations

import importlib.util

from quantlib.hf.config import QuantlibConfig

try:
    from quantlib.hf.quantizer import QuantlibQuantizer
except ImportError as error:
    import transformers

    raise ImportError(f"transformers must be 5.20 or newer for quantlib.hf, got {transformers.__version__}") from error

if importlib.util.find_spec("peft") is not None:
    import quantlib.hf.lora  # for what it changes in peft
if importlib.util.find_spec("diffusers") is not None:
    import quantlib.hf.diffusion  # noqa: F401 # which registers the method with diffusers

__all__ = ["QuantlibConfig", "QuantlibQuantizer"]
