"""Broken contracts that are known: shown in the table, not counted. One that no kernel breaks any more has to go."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gpu_static.contract import SHARED
from gpu_static.measured import Measured


@dataclass(frozen=True)
class Known:
    """Kernels by name, what is wrong with them, and why it stays."""

    name: str  # searched in `language kernel config`
    fault: str
    why: str
    archs: tuple[int, ...] = tuple(SHARED)
    compiler: str = ""  # the version of Triton, or of nvcc, that alone makes it so

    def excuses(self, m: Measured, fault: str) -> bool:
        if m.arch not in self.archs or not m.compiler.startswith(self.compiler):
            return False
        return bool(re.search(self.name, m.name) and re.match(self.fault, fault))


KNOWN: tuple[Known, ...] = (
    Known(
        r"^triton (quantize|quantize_dynamic|compute_scale|fake_quantize\w*)_kernel \S+ (int4|float4_e2m1fn|nf4\w*) ",
        "above the ceiling",
        "a B200 moves more bytes a clock than any other: 14 to 20 instructions an element, of 13 beside bfloat16",
        (100,),
    ),
    Known(
        r"^triton (quantize|fake_quantize)_kernel bfloat16 (int8|float8_e4m3fn) 4096x4096 tile:128",
        "above the ceiling",
        "16.1 instructions an element of 15.6, and 22.2 of 20.8: a scale for each 128 columns, on a B200",
        (100,),
    ),
    Known(
        r"^triton (quantize_dynamic|compute_scale)_kernel \S+ u?int8 4096x4096 row affine",
        "above the ceiling",
        "both ends of a range are reduced: 20.1 instructions an element of 15.6, and 13.7 of 10.4, on a B200",
        (100,),
    ),
    Known(
        r"^triton compute_scale_kernel \S+ int4 .* affine",
        "above the ceiling",
        "both ends of the range of a group of 128 are reduced; a ninth too many",
        (90,),
    ),
    Known(
        r"^triton cast_kernel float8\S+ float8",
        "above the ceiling",
        "two bytes an element, and no instruction that converts",
        (80,),
    ),
    Known(
        r"^triton partial_gradients_kernel bfloat16 float8_e4m3fn",
        "spills 8 bytes",
        "the compiler settles for 80 registers; 8-bit floats take integer steps here",
        (80, 86),
    ),
    Known(
        r"^triton dequant_matmul_kernel bfloat16 int4 M=1 .* affine",
        "above the ceiling",
        "zero points take instructions of their own",
        (90, 100),
    ),
    Known(
        r"^triton dequant_matmul_kernel (bfloat16|float16) nf4_bf16 M=16 ",
        "above the ceiling",
        "4.45 instructions a weight, of 3.9: the two bytes of a value are looked up apart, and 16 rows take some too",
        (90,),
    ),
    Known(
        r"^triton dequant_matmul_kernel (bfloat16|float16) (int4|nf4_bf16|float4_e2m1fn) M=(1|4|16) ",
        "above the ceiling",
        "a B200 moves more bytes a clock than any other: 2.6 instructions a weight, of more than 2.8",
        (100,),
    ),
    Known(
        r"^triton dequant_matmul_kernel bfloat16 nf4_bf16 M=256 4096x4096 group:128 tiled",
        "spills 8 bytes",
        "at 168 registers a thread; what takes them has not been found",
        (80,),
    ),
    Known(
        r"^triton dequant_matmul_kernel (bfloat16|float16) int4 M=64 ",
        r"spills \d+ bytes",
        "two warps: on an H200 they take 0.8 to 0.97 of the time of four, which spill nothing",
        (90, 100),
    ),
    Known(
        r"^triton dequant_matmul_kernel float16 int4 M=4 ",
        "spills 8 bytes",
        "outside of its loop",
        (100,),
    ),
    Known(
        r"^triton (cast_kernel bfloat16 float8_e4m3fn 4095x4097"
        r"|dequant_matmul_kernel (bfloat16|float16) (int8|float8_e4m3fn) M=(128|256) 4096x4096 (row|group:128) tiled"
        r"|dequant_matmul_kernel float32 int4 M=64 )",
        r"spills (8|16) bytes",
        "one or two values, outside of every loop; three of elements in a cast whose rows begin anywhere",
        (120,),
    ),
    Known(
        r"^triton dequant_matmul_kernel bfloat16 int8 M=64 8192x8192 row tiled",
        r"spills \d+ bytes",
        "two warps of 128 by 64 sums, some of which are spilled after the loop, where the sums of four programs meet",
        (90,),
    ),
    Known(
        r"^triton dequant_matmul_kernel bfloat16 nf4_bf16 M=1 .*NVIDIA H200",
        "above the ceiling",
        "3.91 instructions a weight, of 3.9; on an H200 this tile was faster than the default, which takes 3.88",
        (90,),
    ),
    Known(
        r"^triton dequant_matmul_kernel \S+ float8",
        r"\d+ stores to shared memory|above the ceiling",
        "no instruction converts eight bits, which go the way of four",
        (80, 86),
    ),
    Known(
        r"^triton dequant_matmul_kernel float32 (int8|uint8|float8\S+) M=(64|128|256) ",
        r"spills (8|16) bytes",
        "FP32 products of 64 by 64; the loop itself keeps all it has in registers",
        (86, 89),
    ),
    Known(
        r"^triton scaled_matmul_kernel \S+ int4 M=1 .* affine",
        "spills 8 bytes",
        "sums of both operands beside the products",
        (90,),
    ),
    Known(
        r"^triton dequant_matmul_kernel bfloat16 nf4_bf16 M=1 ",
        "above the ceiling",
        "3.91 instructions a weight, of 3.9; Triton 3.6 makes 3.88",
        (90,),
        "3.9",
    ),
    Known(
        r"^triton dequant_matmul_kernel bfloat16 nf4_bf16 M=256 ",
        r"spills \d+ bytes",
        "at 255 registers a thread, as with Triton 3.6, whose ptxas spills none",
        (90,),
        "3.9",
    ),
    Known(
        r"^triton dequant_matmul_kernel float32 int4 M=(64|128) ",
        r"spills \d+ bytes",
        "ptxas of Triton 3.9 settles for 32 registers, where that of 3.6 takes 112: 198 instructions a weight, of 84",
        (80,),
        "3.9",
    ),
    Known(
        r"^triton dequant_matmul_kernel (\S+ int8 M=(64|128)|float32 int4 M=32) ",
        r"spills \d+ bytes",
        "at 255 registers a thread; ptxas of Triton 3.6 spills none at 127, 128 and 253",
        (80,),
        "3.9",
    ),
    Known(
        r"^triton (adamw_step_kernel float32 float32|partial_gradients_kernel float32 int8 \S+ tensor affine)",
        "spills 8 bytes",
        "ptxas of Triton 3.9 settles for 64 and 128 registers",
        (100,),
        "3.9",
    ),
    Known(
        r"^cuda (dequant_matmul|decode_slab)_kernel nf4",
        "spills 8 bytes",
        "the table of a code book takes eight registers of the 128 that two blocks on a multiprocessor leave",
        (80, 86, 89, 90),
    ),
    Known(
        r"^cuda fake_quantize_backward_kernel bfloat16 nf4",
        "spills 8 bytes",
        "fifteen midpoints beside two vectors of eight, in the 64 registers that nvcc settles for",
        (86, 89),
    ),
    Known(
        r"^cuda ",
        "above the ceiling",
        "C++ rounds 16-bit and 8-bit floats in portable integer steps; Triton comes first where it is installed",
    ),
)


def reason(m: Measured, fault: str) -> str | None:
    return next((known.why for known in KNOWN if known.excuses(m, fault)), None)


def unused(found: list[tuple[Measured, str]]) -> list[Known]:
    """List the known faults of every compiler that excuse nothing of what was found."""
    always = [known for known in KNOWN if not known.compiler]
    return [known for known in always if not any(known.excuses(m, fault) for m, fault in found)]
