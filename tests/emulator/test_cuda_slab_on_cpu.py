"""The CUDA library's glue on CPU tensors: a call of torch, slabs of a weight, the vendor's product of each."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator

import pytest
import torch
from cuda_on_cpu.emulator import COMPILER, FLAGS, HERE, RUNTIME, digest, keep_formats, make, with_small_slabs

import quantlib
from quantlib import _build, backends, formats
from quantlib.backends.packing import kept_zero_points
from quantlib.backends.tiles import TileLayout
from quantlib.testing import assert_same_bytes, bits

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"there is no {COMPILER[0]}")

KERNELS = ("slab", "cast", "widen", "dequant_matmul", "dequant_matmul_backward", "grouped_dequant_matmul")
M, N, K = 300, 200, 40  # two parts of x, two slabs, both ragged


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """torch.ops.quantlib_on_cpu: the glue of the CUDA backend and what it needs here, for slabs of few rows."""
    csrc = with_small_slabs(tmp_path_factory.mktemp("library"))
    keep_formats(csrc, "float16", "bfloat16", "float8_e4m3fn", "int8", "uint8", "int4")  # those of the tests below
    installed = _build.find_torch()
    folders = (HERE, csrc / "cuda", csrc, _build.PACKAGE)
    include = (*(f"-I{folder}" for folder in folders), "-isystem", str(installed / "include"), "-include", "on_cpu.h")
    kernels = [csrc / f"cuda/{name}.cu" for name in KERNELS]
    glue = [csrc / f"ops/{name}.cpp" for name in KERNELS[3:]]
    sources = (HERE / "library.cpp", *RUNTIME, csrc / "cuda/backend.cpp", *kernels)
    (csrc / "glue.cpp").write_text("".join(f'#include "{path}"\n' for path in (*glue, csrc / "cuda/backend.cpp")))
    compiled = [csrc / "glue.cpp" if path.stem == "backend" else path for path in sources]
    needed = ("-x", "none", str(installed / "lib/libtorch_cpu.so"))
    flags = (
        *FLAGS,
        *_build.COMMON[2:],
        "-DUSE_CUDA",
        '-DQL_TARGETS="a CPU"',
        "-fvisibility=hidden",
        "-fPIC",
        "-shared",
        "-O0",
    )
    read = (
        torch.__version__,
        digest((HERE, csrc)),
        [path.read_bytes() for path in (*sources, *glue, _build.PACKAGE / "ops.def")],
    )
    key = hashlib.sha256(repr((COMPILER, flags, read)).encode()).hexdigest()[:16]
    made = request.config.cache.mkdir("cuda_on_cpu") / f"library-{key}.so"
    torch.ops.load_library(make(made, [*COMPILER, *flags, *include, "-x", "c++", *map(str, compiled), *needed]))


Products = list[tuple[torch.Size, torch.Size]]


@pytest.fixture
def products(library: None) -> Iterator[Products]:
    """The shapes of the products that torch was asked for: the overload that the CPU lacks, made of one that it has."""
    made: Products = []

    def mm(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor) -> torch.Tensor:
        assert x.dtype == w.dtype != torch.float32 == dtype == out.dtype
        assert all(matrix.is_contiguous() for matrix in (x, w if w.is_contiguous() else w.T, out))
        made.append((x.shape, w.shape))
        return out.copy_(x.float() @ w.float())

    patch = torch.library.Library("aten", "IMPL")
    patch.impl("mm.dtype_out", mm, "CPU")
    yield made
    patch._destroy()


@pytest.mark.parametrize(
    ("format", "dtype", "block", "tiled", "out"),
    [
        ("int8", torch.bfloat16, (1, -1), False, True),
        ("int4", torch.float16, (3, -1), True, False),
        ("uint8", torch.bfloat16, (7, 8), True, True),
        ("float8_e4m3fn", torch.bfloat16, (-1, -1), False, False),
        ("float16", torch.float16, (1, -1), False, False),
        ("bfloat16", torch.bfloat16, (1, 4), False, True),
    ],
)
def test_slabs_give_the_bytes_of_exact_sums(
    products: Products, format: str, dtype: torch.dtype, block: tuple[int, int], tiled: bool, out: bool
) -> None:
    f, ops = formats.get(format), torch.ops.quantlib_on_cpu
    random = torch.Generator().manual_seed(0)
    br, bk = (size if b == -1 else b for size, b in zip((N, K), block, strict=True))
    shape = (-(-N // br), -(-K // bk))
    scale = torch.exp2(torch.randint(-3, 4, shape, generator=random))
    scale *= 1 - 2 * torch.randint(2, shape, generator=random)
    z = torch.randint(0, 4, shape, generator=random, dtype=torch.int32) if format == "uint8" else None
    x = torch.randint(-8, 9, (K, 2, M // 2), generator=random).to(dtype).permute(1, 2, 0)  # of any strides
    bias = torch.randint(-4, 5, (N,), generator=random).to(dtype)
    with backends.use_backend("composite"):
        w = torch.randint(-3, 4, (N, K), generator=random).float()
        w *= scale.repeat_interleave(br, 0)[:N].repeat_interleave(bk, 1)[:, :K]
        codes = quantlib.quantize(w, scale, format, block=block, zero_point=z)
        want = quantlib.dequant_matmul(x, codes, scale, format, block=block, zero_point=z, bias=bias, activation="gelu")
    args = (TileLayout(f).pack(codes, K) if tiled else codes, scale, format, [br, bk], *([N] if tiled else []))
    name = ("tiled" if tiled else "") + ("_" if tiled and out else "") + ("out" if out else "")
    op, y = getattr(ops.dequant_matmul, name or "default"), torch.empty(2, M // 2, N, dtype=dtype)
    if out:
        op(x, *args, z, bias, "gelu", False, out=y)
    else:
        y = op(x, *args, z, bias, "gelu", False)
    assert_same_bytes(bits(y), bits(want), format)
    assert products == [((m, K), (K, n)) for m in (256, 44) for n in (128, 72)]


def test_slabs_give_the_gradient(products: Products) -> None:
    random = torch.Generator().manual_seed(0)
    dy = torch.randint(-8, 9, (M, N), generator=random).bfloat16()
    codes = torch.randint(-3, 4, (N, 136), generator=random, dtype=torch.int8)
    scale = torch.exp2(torch.randint(-3, 4, (N, 17), generator=random))
    scale *= 1 - 2 * torch.randint(2, scale.shape, generator=random)
    got = torch.ops.quantlib_on_cpu.dequant_matmul_backward(dy, codes, scale, "int8", [1, 8])
    w = codes.double() * scale.double().repeat_interleave(8, 1)
    assert_same_bytes(bits(got), bits((dy.double() @ w).bfloat16()), "dx")
    assert products == [((m, N), (N, k)) for m in (256, 44) for k in (128, 8)]


@pytest.mark.parametrize(("format", "rows"), [("int4", 5), ("uint8", 3), ("int8", 300)])
def test_zero_points_as_codes_and_scales_of_a_byte_are_widened(products: Products, format: str, rows: int) -> None:
    f, random = formats.get(format), torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (N, f.columns(K)), generator=random, dtype=torch.uint8)
    codes = codes.view(torch.int8) if format == "int8" else codes
    scale = torch.exp2(torch.randint(-3, 4, (N, 5), generator=random))
    z = torch.randint(*f.code_range, (N, 5), generator=random, dtype=torch.int32)
    x = torch.randint(-8, 9, (rows, K), generator=random).bfloat16()
    results = [
        torch.ops.quantlib_on_cpu.dequant_matmul(x, codes, s, format, [1, 8], zero_point)
        for s, zero_point in ((scale, z), (scale.to(torch.float8_e8m0fnu), kept_zero_points(z, f)))
    ]
    assert_same_bytes(bits(results[1]), bits(results[0]), format)


def test_a_batch_invariant_product_takes_no_slabs(products: Products) -> None:
    x, codes, scale = torch.ones(M, K, dtype=torch.bfloat16), torch.ones(N, K, dtype=torch.int8), torch.ones(N, 1)
    for rows, invariant in ((M, True), (128, False)):
        arguments = (x[:rows], codes, scale, "int8", [1, K], None, None, None, invariant)
        y = torch.ops.quantlib_on_cpu.dequant_matmul(*arguments)
        assert_same_bytes(bits(y), bits(torch.full((rows, N), K, dtype=torch.bfloat16)), "y")
    assert products == []


@pytest.mark.parametrize(("format", "dtype"), [("int8", torch.bfloat16), ("int4", torch.float32)])
def test_experts_are_found_by_the_offsets(library: None, format: str, dtype: torch.dtype) -> None:
    """A call of torch: the bytes of a loop of calls, and zeros for rows of no expert."""
    ops, random, ends = torch.ops.quantlib_on_cpu, torch.Generator().manual_seed(0), (0, 2, 19, 19, 21)
    scale = torch.rand(5, 24, 1, generator=random)
    codes = torch.randint(-128 if format == "int8" else 0, 128, (5, 24, 64), generator=random)
    codes = codes.to(torch.int8 if format == "int8" else torch.uint8)
    size, bias = 64 * (1 + (format == "int4")), torch.randn(5, 24, generator=random)
    x = torch.randn(size, 23, generator=random).to(dtype).T  # of any strides
    offsets, rest = torch.tensor(ends, dtype=torch.int32), (None, bias, "silu", False)
    y = ops.grouped_dequant_matmul(x, codes, scale, format, [1, size], offsets, *rest)
    for e, (start, end) in enumerate(zip((0, *ends), ends, strict=False)):
        single = (x[start:end], codes[e], scale[e], format, [1, size], None, bias[e], "silu", True)
        assert_same_bytes(y[start:end], ops.dequant_matmul(*single), f"expert {e}")
    assert not y[ends[-1] :].any()
