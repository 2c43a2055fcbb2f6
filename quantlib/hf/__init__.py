"""``quantization_config=QuantlibConfig("W4A16")``: transformers quantizes a model while it loads it.

Importing this module registers the method ``"quantlib"`` with transformers: from then on ``from_pretrained`` also reads
the folders that ``save_pretrained`` and ``quantlib quantize`` write.
"""

from __future__ import annotations

from quantlib.hf.config import QuantlibConfig
from quantlib.hf.quantizer import QuantlibQuantizer

__all__ = ["QuantlibConfig", "QuantlibQuantizer"]
