"""The switch: what is forced runs or says why not, nests, unwinds, and holds for compiled graphs and threads."""

from __future__ import annotations

import inspect
import os
import threading
from pathlib import Path

import fresh
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

import quantlib
from quantlib import backends
from quantlib.testing import assert_same_bytes


def x() -> Tensor:
    return torch.linspace(-3, 3, 12).reshape(3, 4)


def which(device: str = "cpu") -> str:
    return backends.serving(device)


def test_switch_nests_and_unwinds() -> None:
    outer = which()
    with quantlib.use_backend("composite"):
        assert which() == "composite"
        with pytest.raises(NotImplementedError), quantlib.use_backend("cuda"):
            quantlib.cast(x(), "float16")
        assert which() == "composite"
        with quantlib.use_backend("auto"):
            assert which() == outer
            quantlib.cast(x(), "float16")
        assert which() == "composite"
        quantlib.cast(x(), "float16")
    assert which() == outer


def test_a_compiled_graph_follows_the_switch() -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    graph = torch.compile(lambda a: quantlib.cast(a, "float16"), fullgraph=True, backend=counter)
    want = graph(x())
    with quantlib.use_backend("composite"):
        assert_same_bytes(graph(x()), want)
    with (
        quantlib.use_backend("cuda"),
        pytest.raises(NotImplementedError, match="'cuda' refuses cpu tensors: serves cuda tensors only"),
    ):
        graph(x())
    assert_same_bytes(graph(x()), want)
    assert counter.frame_count == 1
    torch.compiler.reset()


def test_every_folder_is_a_backend() -> None:
    folders = {path.parent.name for path in Path(backends.__file__).parent.glob("*/__init__.py")}
    assert folders == set(backends.BACKENDS)
    assert list(backends.BACKENDS) == ["triton", "cuda", "cpp", "composite"], "the order of preference"
    assert backends.order("cpu") == backends.order("cpu:0") == ("cpp", "composite")
    assert backends.order("cuda") == ("triton", "cuda", "composite")
    assert backends.order("meta") == ("composite",)


@pytest.mark.parametrize("name", [b.name for b in backends.BACKENDS.values() if not b.compiled])
def test_a_kernel_has_the_signature_of_pure_torch(name: str) -> None:
    """More arguments may follow, with defaults."""
    if name == "triton":
        pytest.importorskip("triton")
    for op, kernel in backends.BACKENDS[name].kernels.items():
        expected = inspect.signature(backends.BACKENDS["composite"].kernels[op]).parameters
        got = inspect.signature(kernel).parameters
        assert list(got)[: len(expected)] == list(expected), op
        assert all(got[more].default is not inspect.Parameter.empty for more in list(got)[len(expected) :]), op


def test_pure_torch_has_a_kernel_of_every_op() -> None:
    assert tuple(backends.BACKENDS["composite"].kernels) == backends.OPS


@pytest.mark.parametrize("name", ["reference", "", "CPP", "gpu"])
def test_unknown_backend(name: str) -> None:
    with (
        pytest.raises(ValueError, match=f"^backend must be auto, composite, cpp, cuda, triton, got {name!r}$"),
        quantlib.use_backend(name),
    ):
        pass


def fresh_process(code: str, **environment: str) -> fresh.Done:
    return fresh.run(["-c", f"import torch, quantlib\n{code}"], env={**os.environ, **environment})


def test_environment_chooses_the_backend() -> None:
    code = "from quantlib import backends; quantlib.cast(torch.ones(2), 'float16'); print(backends.serving('cpu'))"
    done = fresh_process(code, QUANTLIB_BACKEND="composite")
    assert (done.stdout, done.returncode) == ("composite\n", 0), done.stderr
    done = fresh_process(code, QUANTLIB_BACKEND="cuda")
    assert "NotImplementedError: quantlib::cast: backend 'cuda' refuses cpu tensors" in done.stderr
    done = fresh_process(code, QUANTLIB_BACKEND="fast")
    assert "ValueError: backend must be auto, composite, cpp, cuda, triton, got 'fast'" in done.stderr


def test_a_forced_backend_says_why_it_refuses() -> None:
    code = "with quantlib.use_backend('triton'): quantlib.cast(torch.ones(2), 'float16')"
    if not torch.cuda.is_available():
        done = fresh_process(code, TRITON_INTERPRET="0")
        assert "NotImplementedError: quantlib::cast: backend 'triton' refuses cpu tensors: " in done.stderr
    code = "with quantlib.use_backend('cpp'): quantlib.cast(torch.ones(2), 'float16')"
    done = fresh_process(code, QUANTLIB_BUILD="0", QUANTLIB_CACHE="/nowhere")
    if done.returncode:  # a wheel brings its library
        assert "backend 'cpp' refuses cpu tensors: QUANTLIB_BUILD=0 forbids compiling" in done.stderr


def test_the_switch_holds_for_every_thread() -> None:
    seen = []
    with quantlib.use_backend("composite"):
        thread = threading.Thread(target=lambda: seen.append(which()))
        thread.start()
        thread.join()
    assert seen == ["composite"]


def test_threads_that_force_different_backends_each_get_theirs() -> None:
    names, seen, wrong = ("composite", "cpp", "auto", "triton"), [], []
    together = threading.Barrier(len(names))
    want = quantlib.cast(x(), "float16")

    def run(name: str) -> None:
        for _ in range(20):
            together.wait()
            try:
                with quantlib.use_backend(name):
                    seen.append((name, backends.current()))
                    if name != "triton":
                        assert_same_bytes(quantlib.cast(x(), "float16"), want)
            except NotImplementedError:
                if backends.refuses(name, "cpu") is None:
                    wrong.append(name)
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(name == got for name, got in seen)
    assert_same_bytes(quantlib.cast(x(), "float16"), want)


def test_blocks_may_be_left_in_any_order_and_by_any_thread() -> None:
    outer, inner = quantlib.use_backend("composite"), quantlib.use_backend("auto")
    before = backends.current()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert backends.current() == "auto"
    thread = threading.Thread(target=inner.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    assert backends.current() == before
    quantlib.cast(x(), "float16")


@pytest.mark.parametrize(
    ("capability", "serves", "why"),
    [
        ((7, 5), "composite", "is compiled for sm_80, sm_90, compute_90, got compute capability 7.5"),
        ((8, 6), "cuda", None),
        ((12, 0), "cuda", None),
    ],
)
def test_a_gpu_that_no_kernel_was_compiled_for_gets_pure_torch(
    capability: tuple[int, int], serves: str, why: str | None, tmp_path: Path
) -> None:
    """A torch that says it has such a GPU, and a CUDA library that registers kernels which cannot start."""
    code = f"""if True:
        import sys; sys.argv[0] = "quantlib"  # `import quantlib` alone then loads no kernels
        import pathlib, torch
        from quantlib import _build
        torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
        torch.cuda.get_device_capability = lambda device: {capability}
        file = pathlib.Path("{tmp_path}/_C_cuda.so")
        file.write_bytes(b"ELF" + _build.TARGETS.encode() + b"sm_80 sm_90 compute_90" + bytes(3))
        library, load = _build.library, torch.ops.load_library
        _build.library = lambda name, build=True: file if name == "cuda" else library(name, build)
        kernels = torch.library.Library("quantlib", "IMPL")
        def no_image(*args): raise RuntimeError("no kernel image")
        def load_library(path):
            from quantlib.backends import SCHEMAS
            for overload in SCHEMAS if path == str(file) else (): kernels.impl(overload, no_image, "CUDA")
            if path != str(file): load(path)
        torch.ops.load_library = load_library
        from quantlib import backends, ops
        from quantlib.cli.info import server
        print(backends.serving("cuda"), *{{server(op, "cuda") for op in ops.__dict__ if op in backends.OPS}})
        print(backends.refuses("cuda", "cuda"))
        cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        print(torch.library.get_kernel("quantlib::cast", "CUDA").call_boxed(cuda, torch.ones(3), "float16", False))
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # so that Triton serves no GPU
    done = fresh.run(["-c", code], env=environment)
    assert done.stdout.splitlines()[:2] == [f"{serves} {serves}", str(why)], done.stderr
    assert ("no kernel image" in done.stderr) == (serves == "cuda")
    assert ("dtype=torch.float16" in done.stdout) == (serves == "composite")
