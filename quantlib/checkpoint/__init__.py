"""Quantized models on disk: plain safetensors, shard by shard, a few pieces of tensors in memory at a time.

`save_quantized` and `load_quantized` are for a model, `quantize_file` and `dequantize_file` for one that is on disk
and stays there. Both write the same files, which `quantlib.checkpoint.stored` describes.
"""

from quantlib.checkpoint.convert import dequantize_file, quantize_file
from quantlib.checkpoint.exchange import convert_file
from quantlib.checkpoint.look import compare_checkpoints, inspect_checkpoint
from quantlib.checkpoint.manifest import Check, check_checkpoint
from quantlib.checkpoint.model import load_quantized, save_quantized

__all__ = [
    "Check",
    "check_checkpoint",
    "compare_checkpoints",
    "convert_file",
    "dequantize_file",
    "inspect_checkpoint",
    "load_quantized",
    "quantize_file",
    "save_quantized",
]
