"""Every overload inside what torch does to an op: checked, compiled, exported, traced, batched, under autocast."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import GPU, Served
from defaults import default_dtype
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import quantlib
from quantlib import backends
from quantlib.nn import QuantLinear
from quantlib.testing import assert_same_bytes

quant = torch.ops.quantlib
M, K = 6, 35
HERE = ["cpu", *["cuda"] * GPU]


def x() -> Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(0))


def scale() -> Tensor:
    return torch.rand(M, 5, generator=torch.Generator().manual_seed(1)) + 0.5


def zero_point() -> Tensor:
    return torch.arange(M * 5, dtype=torch.int32).reshape(M, 5) % 7


def codes(columns: int = K) -> Tensor:
    return torch.randint(-9, 10, (M, columns), generator=torch.Generator().manual_seed(2), dtype=torch.int8)


def bias() -> Tensor:
    return torch.linspace(-3, 3, M)


def experts(of_one: Tensor) -> Tensor:
    """The same for each of three experts."""
    return torch.stack([of_one] * 3)


def step() -> tuple[Tensor, ...]:
    """A parameter, its gradient and its states in blocks of 32, and the constants of a step."""
    return (x(), x().flip(0), codes(), codes().abs().to(torch.uint8), scale()[:, :2].clone(), scale()[:, 2:4].clone(),
            torch.linspace(0.5, 1, 9))  # fmt: skip


BLOCK = [1, 8]
OFFSETS = torch.tensor([2, 2, 2], dtype=torch.int32)

# name -> (overload, its arguments): what stays out has tests of its own
CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "cast to 16": (quant.cast.default, (x(), "bfloat16", False)),
    "cast to 8": (quant.cast.default, (x(), "float8_e4m3fn", True)),
    "cast up": (quant.cast.default, (x().half(), "float32", False)),
    "hadamard": (quant.hadamard.default, (x()[:, :32].contiguous(), 16)),
    "compute_scale": (quant.compute_scale.default, (x(), "int8", BLOCK)),
    "compute_scale affine": (quant.compute_scale.affine, (x(), "int8", BLOCK)),
    "search_scale": (quant.search_scale.default, (x(), scale(), "int4", BLOCK, "mse", "bfloat16", zero_point())),
    "quantize": (quant.quantize.default, (x(), scale(), "int8", BLOCK, None)),
    "quantize packed": (quant.quantize.default, (x(), scale(), "int4", BLOCK, zero_point())),
    "dequantize": (quant.dequantize.default, (x().to(torch.int8), scale(), "int8", BLOCK, zero_point())),
    "dequantize packed": (
        quant.dequantize.default,
        (x()[:, :18].to(torch.uint8), scale(), "int4", BLOCK, None, torch.bfloat16, K),
    ),
    "dequantize_rows": (
        quant.dequantize_rows.default,
        (torch.tensor([[2, 0], [1, 2]]), codes(), scale(), "int8", BLOCK, zero_point()),
    ),
    "dequantize_rows packed": (
        quant.dequantize_rows.default,
        (
            torch.tensor([1, 0], dtype=torch.int32),
            x()[:, :18].to(torch.uint8),
            scale(),
            "int4",
            BLOCK,
            None,
            torch.bfloat16,
            K,
        ),
    ),
    "quantize_dynamic": (quant.quantize_dynamic.default, (x(), "int8", BLOCK)),
    "quantize_dynamic packed": (quant.quantize_dynamic.default, (x(), "float4_e2m1fn", BLOCK)),
    "quantize_dynamic affine": (quant.quantize_dynamic.affine, (x(), "uint8", BLOCK)),
    "dequant_matmul": (
        quant.dequant_matmul.default,
        (x(), codes(), scale(), "int8", BLOCK, zero_point(), bias(), "gelu"),
    ),
    "dequant_matmul tiled": (
        quant.dequant_matmul.tiled,
        (x(), quantlib.ops.tile(codes(), "int8"), scale(), "int8", BLOCK, M, None, bias().half(), "silu", True),
    ),
    "dequant_matmul_backward": (
        quant.dequant_matmul_backward.default,
        (x()[:, :M], codes(18).view(torch.uint8), scale(), "int4", BLOCK, None, K),
    ),
    "dequant_matmul_backward_scale": (
        quant.dequant_matmul_backward_scale.default,
        (x()[:, :M], x(), codes(), scale(), "int8", BLOCK),
    ),
    "scaled_matmul": (
        quant.scaled_matmul.default,
        (
            codes(),
            scale()[:, :1].clone(),
            codes(),
            scale(),
            "int8",
            BLOCK,
            None,
            zero_point(),
            bias(),
            "relu",
            torch.half,
        ),
    ),
    "adamw_step": (quant.adamw_step.default, (*step(), 32, None, [3, 0])),
    "dynamic_matmul": (quant.dynamic_matmul.default, (x(), codes(), scale(), "int8", BLOCK, None, bias(), "gelu_tanh")),
    "grouped_dequant_matmul": (
        quant.grouped_dequant_matmul.default,
        (
            x(),
            experts(codes()),
            experts(scale()),
            "int8",
            BLOCK,
            OFFSETS,
            experts(zero_point()),
            experts(bias()),
            "silu",
        ),
    ),
    "grouped_dequant_matmul_backward": (
        quant.grouped_dequant_matmul_backward.default,
        (x()[:, :M], experts(codes(18).view(torch.uint8)), experts(scale()), "int4", BLOCK, OFFSETS, None, K),
    ),
    "grouped_dynamic_matmul": (
        quant.grouped_dynamic_matmul.default,
        (x(), experts(codes()), experts(scale()), "int8", BLOCK, OFFSETS, None, experts(bias()), "relu"),
    ),
}
Call = tuple[Any, tuple[Any, ...]]

# op -> how many of its arguments have the rows of x; the others are a weight, or constants
WITH_ROWS = {
    "quantlib::adamw_step": 6,
    "quantlib::dequant_matmul": 1,
    "quantlib::dequant_matmul_backward": 1,
    "quantlib::dequant_matmul_backward_scale": 2,
    "quantlib::dynamic_matmul": 1,
    "quantlib::grouped_dequant_matmul": 1,
    "quantlib::grouped_dequant_matmul_backward": 1,
    "quantlib::grouped_dynamic_matmul": 1,
    "quantlib::scaled_matmul": 2,
}


def results(got: Any) -> tuple[Tensor, ...]:
    return (got,) if isinstance(got, Tensor) else tuple(got)


def out_form(function: Any) -> tuple[Any, list[str]]:
    """The overload that writes into tensors, and the names of those."""
    kind = function._overloadname
    out = getattr(function.overloadpacket, "out" if kind == "default" else f"{kind}_out")
    return out, [a.name for a in out._schema.arguments if a.kwarg_only]


def into(call: Call, dirty: int = 77) -> tuple[Any, dict[str, Tensor]]:
    """The out form of a call, and tensors for it."""
    out, names = out_form(call[0])
    given = [t.clone() for t in results(call[0](*call[1]))]
    for t in given:
        t.view(torch.uint8).fill_(dirty)
    return out, dict(zip(names, given, strict=True))


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def call(request: pytest.FixtureRequest) -> Call:
    function, arguments = request.param
    return function, arguments


def test_every_overload_is_called_here() -> None:
    called = {function._schema.name + "." + function._overloadname for function, _ in CALLS.values()}
    called |= {out._schema.name + "." + out._overloadname for out in (out_form(f)[0] for f, _ in CALLS.values())}
    ours = {f"quantlib::{name}" if "." in name else f"quantlib::{name}.default" for name in backends.SCHEMAS}
    assert {name for name in ours if "fake_quantize" not in name} == called


# ---- checks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def served_call(call: Call, served: Served) -> Call:
    """A call, and a backend that is forced on a device; not every backend has every op."""
    name = call[0]._schema.name.removeprefix("quantlib::")
    overload = f"{name}.{call[0]._overloadname}".removesuffix(".default")
    if why := served.refusal(overload):
        pytest.skip(f"{served}: {why}")
    return call[0], tuple(a.to(served.device) if isinstance(a, Tensor) else a for a in call[1])


def test_opcheck(served_call: Call, served: Served) -> None:
    if served.interpreted:
        pytest.skip("triton: torch sees the same Python layer as composite's")
    function, arguments = served_call
    torch.library.opcheck(function, arguments)


def test_opcheck_of_the_out_form(call: Call) -> None:
    out, given = into(call)
    utils = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not any(t.dtype.is_floating_point and t.itemsize == 1 for t in given.values()):
        utils.append("test_schema")  # it multiplies what it is given, which torch cannot do in 8 bits
    torch.library.opcheck(out, call[1], given, test_utils=utils)


# ---- traced and compiled --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_without_data(call: Call, kind: str) -> None:
    function, arguments = call
    want = results(function(*arguments))
    if kind == "meta":
        got = results(function(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)))
    else:
        with FakeTensorMode() as mode:
            got = results(function(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)))
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert a.device.type == ("meta" if kind == "meta" else "cpu")


@pytest.fixture
def fresh() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled whole, by the partitioner and its traces; what Inductor writes around an op is tested once below."""
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(call: Call, dynamic: bool, fresh: None) -> None:
    function, arguments = call
    # rows are free to vary: scale and zero_point have as many, unless they are a weight's
    varying = WITH_ROWS.get(function._schema.name, len(arguments))
    graph = compiled(function, dynamic=dynamic)
    for rows in (M, 3, 4) if dynamic else (M,):  # torch itself takes a second number of rows for a dynamic one
        given = [a[:rows] if isinstance(a, Tensor) and n < varying else a for n, a in enumerate(arguments)]
        for a, b in zip(results(graph(*given)), results(function(*given)), strict=True):
            assert_same_bytes(a, b, f"{function} {rows}")


def test_compile_of_the_out_form(call: Call, fresh: None) -> None:
    out, given = into(call)

    def run(*tensors: Any, **outs: Tensor) -> Any:
        out(*tensors, **outs)
        return [t.clone() for t in outs.values()]

    got = compiled(run)(*call[1], **given)
    for a, b, want in zip(got, given.values(), results(call[0](*call[1])), strict=True):
        assert_same_bytes(a, want, "what the graph returns")
        assert_same_bytes(b, want, "what it wrote")


def everything(a: Tensor) -> tuple[Tensor, ...]:
    """The public functions in one graph, with arithmetic around them."""
    half = quantlib.cast(a * 2, "float16")
    s = quantlib.compute_scale(a, "int8", (1, -1))
    codes = quantlib.quantize(a + 1, s, "int8", block=(1, -1))
    y = quantlib.dequantize(codes, s, "int8", block=(1, -1), dtype=torch.bfloat16)
    packed, s4, z4 = quantlib.quantize_dynamic(a, torch.uint8, block=(2, 16), symmetric=False)
    eight, s8 = quantlib.quantize_dynamic(a.half(), "int4", block=(-1, -1))
    out = quantlib.cast(a, "bfloat16", out=torch.empty(a.shape, dtype=torch.bfloat16, device=a.device))
    return half, s, codes, y + 1, packed, s4, z4, eight, s8, out


@pytest.mark.parametrize("where", HERE)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_inductor(dynamic: bool, where: str, fresh: None) -> None:
    graph = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for shape in [(M, K), (5, 37)] if dynamic else [(M, K)]:  # torch itself takes a second shape for a dynamic one
        a = torch.randn(shape, device=where)
        for got, want in zip(graph(a), everything(a), strict=True):
            assert_same_bytes(got, want)


class Everything(torch.nn.Module):
    def forward(self, a: Tensor) -> tuple[Tensor, ...]:
        return everything(a)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export_save_load(dynamic: bool, tmp_path: Path) -> None:
    shapes = {"a": {0: torch.export.Dim("rows", min=3, max=64)}} if dynamic else None
    program = torch.export.export(Everything(), (x(),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    module = torch.export.load(tmp_path / "program.pt2").module()
    for a in [x(), torch.randn(4, K)] if dynamic else [x()]:
        for got, want in zip(module(a), everything(a), strict=True):
            assert_same_bytes(got, want)


class Model(torch.nn.Module):
    """A layer of every product, then `everything`, which passes a dtype: AOTInductor of torch 2.11 passes another."""

    def __init__(self) -> None:
        super().__init__()
        words = ("int8", "int4:group:16", "W8A8", "float8_e4m3fn", "int8@uint8:tensor:affine")
        self.layers = torch.nn.Sequential(*(QuantLinear.from_float(torch.nn.Linear(K, K), w) for w in words))

    def forward(self, a: Tensor) -> tuple[Tensor, ...]:
        y = self.layers(a)
        return (y, *everything(y)) if torch.__version__ >= "2.13" else (y,)


@pytest.mark.slow
@pytest.mark.parametrize("where", HERE)
def test_aot_inductor(where: str, tmp_path: Path) -> None:
    """A compiled package calls the kernels through the dispatcher, as anyone else does."""
    if where == "cpu" and (why := backends.refuses("cpp", "cpu")):
        pytest.skip(f"cpp: {why}")
    model, a = Model().to(where), x().to(where)
    with torch.no_grad():
        program = torch.export.export(model, (a,))
    # The package runs without Python: of a GPU's kernels, with those of CUDA C++.
    with quantlib.use_backend("cuda" if where == "cuda" else "auto"), torch.no_grad():
        # For one package torch's headers are not compiled ahead, nor is what calls the kernels optimised.
        options = {"aot_inductor.precompile_headers": False, "aot_inductor.compile_wrapper_opt_level": "O0"}
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "program.pt2"), inductor_configs=options
        )
        for got, want in zip(torch._inductor.aoti_load_package(path)(a), model(a), strict=True):
            assert_same_bytes(got, want)
    if where == "cpu":
        program = aoti_program(tmp_path)
        call = [program, str(quantlib.library_path()), path, *map(str, a.shape)]
        done = subprocess.run(call, input=a.numpy().tobytes(), capture_output=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        with torch.no_grad():
            assert done.stdout == model(a)[0].numpy().tobytes()


def aoti_program(folder: Path) -> str:
    """A C++ program that runs a package, with libtorch and without Python."""
    torch_folder = Path(torch.__file__).parent
    include, lib = torch_folder / "include", torch_folder / "lib"
    source = Path(__file__).parent.parent / "native" / "aoti_program.cpp"
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", source,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{lib}", f"-Wl,-rpath,{lib}",
        "-ltorch", "-ltorch_cpu", "-lc10", "-ldl", "-o", folder / "program",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(folder / "program")


def test_the_path_of_the_library() -> None:
    if why := backends.refuses("cpp", "cpu"):
        with pytest.raises(RuntimeError, match="library of cpu kernels must be loaded, got none: "):
            quantlib.library_path()
        pytest.skip(f"cpp: {why}")
    path = quantlib.library_path()
    assert path.is_file()
    assert str(path) in torch.ops.loaded_libraries
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        quantlib.library_path("tpu")
    if torch.version.cuda is None:
        with pytest.raises(
            RuntimeError, match=r"library of cuda kernels must be loaded, got none: torch .* without CUDA"
        ):
            quantlib.library_path("cuda")


# ---- batched --------------------------------------------------------------------------------------------------------


def test_vmap(call: Call) -> None:
    """One example at a time: no block spans two."""
    function, arguments = call
    batch = [torch.stack([a, a.flip(0), a]) if isinstance(a, Tensor) else a for a in arguments]
    tensors = [n for n, a in enumerate(arguments) if isinstance(a, Tensor)]

    def run(*given: Tensor) -> Any:
        mixed = list(arguments)
        for n, a in zip(tensors, given, strict=True):
            mixed[n] = a
        return function(*mixed)

    got = results(torch.vmap(run)(*(batch[n] for n in tensors)))
    for example in range(3):
        want = results(run(*(batch[n][example] for n in tensors)))
        for a, b in zip(got, want, strict=True):
            assert_same_bytes(a[example], b)
    along_last = results(torch.vmap(run, in_dims=-1)(*(batch[n].movedim(0, -1) for n in tensors)))
    for a, b in zip(along_last, got, strict=True):
        assert_same_bytes(a, b)
    in_dims = (0, *[None] * (len(tensors) - 1))
    shared = results(torch.vmap(run, in_dims=in_dims)(batch[0], *(arguments[n] for n in tensors[1:])))
    for a, b in zip(shared, results(function(*arguments)), strict=True):
        assert_same_bytes(a[0], b)


# ---- modes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode",
    [
        lambda device: torch.autocast(device, dtype=torch.bfloat16),
        lambda device: torch.inference_mode(),
        lambda device: torch.no_grad(),
    ],
    ids=["autocast", "inference_mode", "no_grad"],
)
def test_modes_change_no_byte(served_call: Call, served: Served, mode: Callable[[str], Any]) -> None:
    function, arguments = served_call
    want = results(function(*arguments))
    out, given = into(served_call)
    with mode(served.device):
        got = results(function(*arguments))
        out(*arguments, **given)
    for a, b, c in zip(got, want, given.values(), strict=True):
        assert a.dtype == b.dtype
        assert_same_bytes(a, b)
        assert_same_bytes(c, b)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_default_dtype_changes_no_byte(served_call: Call, dtype: torch.dtype) -> None:
    function, arguments = served_call
    want = results(function(*arguments))
    with default_dtype(dtype):
        got = results(function(*arguments))
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a, b)


def test_cast_passes_the_gradient_straight_through(served: Served) -> None:
    a = x().to(served.device).requires_grad_()
    y = quantlib.cast(a, "bfloat16")
    dy = torch.randn(M, K).bfloat16()
    y.backward(dy)
    assert a.grad is not None
    assert_same_bytes(a.grad, dy.float())
