"""Implementations to sweep: the reference, a backend on a device, and two oracles that share no code with quantlib."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import torch

from quantlib import backends, formats, ops, reference
from quantlib.formats import FloatFormat
from quantlib.testing.bytes import bits
from quantlib.testing.sweep import Array, Case

BLOCK = 3 << 13  # inputs NumPy works on at a time: its temporaries stay in the cache and cost no page faults


class Reference:
    """``quantlib.reference``, the executable form of the contract."""

    name = "reference"
    missing = None

    def refuses(self, case: Case) -> str | None:
        return None

    def __call__(self, case: Case, codes: Array) -> Array:
        blocks = (codes[start : start + BLOCK] for start in range(0, codes.size, BLOCK))
        return np.concatenate([bits(self.run(case, block)) for block in blocks])

    def run(self, case: Case, codes: Array) -> Array:
        if case.op == "dequantize":
            return self.dequantize(case, codes.view(case.projection.storage))
        x = decoded(case, codes)
        if case.op == "activation":
            with np.errstate(all="ignore"):
                return reference.activate(x + np.float32(0), case.activation)  # a sum starts at +0
        if case.op == "cast":
            return reference.cast(x, case.format, saturate=case.saturate)
        scale, zero_point = case.scale_and_zero_point()
        return reference.quantize(x, scale, case.format, block=(1, x.size), zero_point=zero_point)

    def dequantize(self, case: Case, codes: Array) -> Array:
        scale, zero_point = case.scale_and_zero_point()
        block = (1, codes.size * case.projection.per_byte)
        return reference.dequantize(codes, scale, case.source, block=block, zero_point=zero_point, dtype=case.format)


class Backend:
    """The public functions, served by one backend on one device."""

    missing = None

    def __init__(self, backend: str, device: str = "cpu") -> None:
        self.backend, self.device = backend, device
        self.name = f"{backend} on {device}"
        # Triton's interpreter keeps where in the grid it is in one place, for one thread.
        interpreted = backend == "triton" and device == "cpu"
        self.lock = threading.Lock() if interpreted else contextlib.nullcontext()

    def refuses(self, case: Case) -> str | None:
        return None

    def __call__(self, case: Case, codes: Array) -> Array:
        dtype = getattr(torch, formats.get(case.source).dtype_name)
        x = torch.from_numpy(codes.view(f"int{8 * codes.itemsize}")).view(dtype).to(self.device)
        with self.lock, self.forced():
            return bits(self.run(case, x))

    def forced(self) -> contextlib.AbstractContextManager[None]:
        """Force this backend inside the block; costs nothing if it is forced already."""
        already = backends.current() == self.backend
        return contextlib.nullcontext() if already else backends.use_backend(self.backend)

    def run(self, case: Case, x: torch.Tensor) -> torch.Tensor:
        if case.op == "activation":  # the epilogue of a product with 1
            one = torch.ones(1, 1, device=x.device)
            y = ops.dequant_matmul(
                x.view(-1, 1), one.to(torch.int8), one, "int8", block=(1, 1), activation=case.activation
            )
            return y.view(-1)
        if case.op == "cast":
            return ops.cast(x, case.format, saturate=case.saturate)
        scale, zero_point = (v if v is None else torch.from_numpy(v).to(x.device) for v in case.scale_and_zero_point())
        assert scale is not None
        if case.op == "quantize":
            return ops.quantize(x, scale, case.format, block=(-1, -1), zero_point=zero_point)
        dtype = getattr(torch, case.format)
        return ops.dequantize(x, scale, case.source, block=(-1, -1), zero_point=zero_point, dtype=dtype)


class MlDtypes:
    """The package ``ml_dtypes``: casts that do not saturate. NaN, whose bytes it leaves open, is set by C1."""

    name = "ml_dtypes"
    missing = None if importlib.util.find_spec("ml_dtypes") else "it is not installed"

    def refuses(self, case: Case) -> str | None:
        return None if case.op == "cast" and not case.saturate else "it casts without saturating, nothing else"

    def __call__(self, case: Case, codes: Array) -> Array:
        import ml_dtypes

        f = formats.get(case.format)
        assert isinstance(f, FloatFormat)
        x = decoded(case, codes)
        with np.errstate(all="ignore"):
            y = bits(x.astype(getattr(ml_dtypes, f.name, f.name)))
        return np.where(np.isnan(x), np.array(f.nan_code, y.dtype), y)


CUDA_CASTS = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#if __has_include(<cuda_fp4.h>)
#include <cuda_fp4.h>
#endif
#define CAST(NAME, CODE, VALUE)                                             \\
  extern "C" void NAME(const float* x, CODE* codes, unsigned long long n) { \\
    for (unsigned long long i = 0; i < n; ++i) codes[i] = VALUE;            \\
  }
CAST(float16_False, unsigned short, __half_as_ushort(__float2half_rn(x[i])))
CAST(bfloat16_False, unsigned short, __bfloat16_as_ushort(__float2bfloat16_rn(x[i])))
CAST(float8_e4m3fn_False, unsigned char, __nv_cvt_float_to_fp8(x[i], __NV_NOSAT, __NV_E4M3))
CAST(float8_e4m3fn_True, unsigned char, __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E4M3))
CAST(float8_e5m2_False, unsigned char, __nv_cvt_float_to_fp8(x[i], __NV_NOSAT, __NV_E5M2))
CAST(float8_e5m2_True, unsigned char, __nv_cvt_float_to_fp8(x[i], __NV_SATFINITE, __NV_E5M2))
#if __has_include(<cuda_fp4.h>)
CAST(float4_e2m1fn_True, unsigned char,
     __nv_cvt_float2_to_fp4x2(make_float2(x[2 * i], x[2 * i + 1]), __NV_E2M1, cudaRoundNearest))
#endif
"""


class CudaHeaders:
    """NVIDIA's ``cuda_fp16.h``, ``cuda_bf16.h``, ``cuda_fp8.h`` and ``cuda_fp4.h``, compiled by the host's compiler."""

    name = "cuda-headers"

    def __init__(self) -> None:
        self.library, self.missing = _compile_cuda_casts()

    def refuses(self, case: Case) -> str | None:
        scaled = case.op in ("dequantize", "activation") or (case.op == "quantize" and case.scale != 1)
        if scaled or case.source != "float32":
            return "they cast float32 without a scale, nothing else"
        return None if hasattr(self.library, self._function(case)) else f"they have no {self._function(case)}"

    def __call__(self, case: Case, codes: Array) -> Array:
        f = formats.get(case.format)
        out = np.empty(codes.size // f.per_byte, f.storage)
        x, y = (ctypes.c_void_p(a.ctypes.data) for a in (codes, out))
        getattr(self.library, self._function(case))(x, y, ctypes.c_ulonglong(out.size))
        return out

    def _function(self, case: Case) -> str:
        return f"{case.format}_{case.op == 'quantize' or case.saturate}"  # a projection saturates


def cuda_include() -> Path | None:
    """The folder of CUDA's headers: of a toolkit, or of a package of pip's."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [str(Path(nvcc).resolve().parents[1])] if nvcc else []
    folders = [Path(home, "include") for home in homes if home]
    folders += [Path(root, "nvidia", name, "include") for root in sys.path for name in ("cu13", "cuda_runtime")]
    return next((folder for folder in folders if (folder / "cuda_fp8.h").exists()), None)


@functools.cache
def _compile_cuda_casts() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    include, compiler = cuda_include(), os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if include is None or compiler is None:
        return None, "CUDA's headers are not installed" if include is None else "there is no C++ compiler"
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "casts.cpp"), Path(folder, "casts.so")
        source.write_text(CUDA_CASTS)
        flags = ("-O2", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", f"-I{include}")
        command = [*shlex.split(compiler), *flags, str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            return None, f"{compiler} does not compile CUDA's headers: {done.stderr.decode(errors='replace')[-300:]}"
        return ctypes.CDLL(str(library)), None


# ---- codes ----------------------------------------------------------------------------------------------------------


def decoded(case: Case, codes: Array) -> Array:
    """[n] codes of the case's source -> [n] float32."""
    f = formats.get(case.source)
    assert isinstance(f, FloatFormat)
    return codes.view(np.float32) if f.bits == 32 else reference.decode_float(codes, f)
