"""Every op and out-variant in a CUDA graph: captured once, then replayed on inputs that it has not seen.

Where there is no CUDA device the same calls run against a graph that only remembers them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import GPU, SERVED, Served, forced
from test_torch import CALLS, Call, into, results
from torch import Tensor

from quantlib import backends
from quantlib.testing import assert_same_bytes

quant = torch.ops.quantlib
X, SCALE = torch.randn(6, 35, generator=torch.Generator().manual_seed(5)), torch.full((6, 5), 0.07)
LEARNED: dict[str, Call] = {
    "fake_quantize": (quant.fake_quantize.default, (X, SCALE, "int8", [1, 8], SCALE)),
    "fake_quantize_backward": (quant.fake_quantize_backward.default, (X.flip(0), X, SCALE, "int4", [1, 8])),
    "fake_quantize_backward affine": (
        quant.fake_quantize_backward.affine,
        (X.flip(1), X, SCALE, SCALE * 30, "int8", [1, 8], None, True),
    ),
}
EVERY = CALLS | LEARNED


class Remembered:
    """A stand-in for a graph where there is none: it calls again."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.replay = function


@pytest.fixture(params=[s for s in SERVED if s.device != "cpu" or s.backend == "composite"], ids=str)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend of a GPU in turn; on the CPU one is enough to see that this test can be passed."""
    yield from forced(request.param)


def captured(function: Callable[[], object], device: str) -> Any:
    """``function`` in a graph, after the runs that compile what it starts and make what it keeps."""
    if device != "cuda":
        return Remembered(function)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def moved(call: Call, device: str) -> Call:
    return call[0], tuple(a.to(device, copy=True) if isinstance(a, Tensor) else a for a in call[1])


def other(call: Call) -> list[Any]:
    """Inputs of the same shapes: rows in another order."""
    return [a.flip(0) if isinstance(a, Tensor) else a for a in call[1]]


def overload(function: Any) -> str:
    return f"{function._schema.name}.{function._overloadname}".removeprefix("quantlib::").removesuffix(".default")


@pytest.mark.parametrize("name", EVERY)
def test_a_replay_on_other_inputs(name: str, served: Served) -> None:
    call = moved(EVERY[name], served.device)
    function, arguments = call
    if backends.refuses(served.backend, served.device, overload(function)):
        return  # the table of support says which; test_support holds it
    fresh = other(call)
    want = [t.clone() for t in results(function(*fresh))]
    first = [t.clone() for t in results(function(*arguments))]
    out, given = into(call)
    kept: list[Tensor] = []

    def run() -> None:
        kept[:] = results(function(*arguments))
        out(*arguments, **given)

    if served == Served("composite", "cuda") and overload(function).startswith("grouped"):
        with pytest.raises(RuntimeError, match="pure torch reads offsets on the host, which a CUDA graph cannot"):
            captured(run, served.device)
        return
    graph = captured(run, served.device)
    graph.replay()
    for a, b, c in zip(kept, given.values(), first, strict=True):
        assert_same_bytes(a, c, "captured")
        assert_same_bytes(b, c, "captured, into out")
    for a, b in zip(arguments, fresh, strict=True):
        if isinstance(a, Tensor):
            a.copy_(b)
    for t in given.values():
        t.view(torch.uint8).fill_(77)
    for _ in range(2):
        graph.replay()
    for a, b, c in zip(kept, given.values(), want, strict=True):
        assert_same_bytes(a, c, "replayed")
        assert_same_bytes(b, c, "replayed, into out")


def test_every_op_is_captured() -> None:
    called = {overload(function) for function, _ in EVERY.values()}
    assert called == {name for name in backends.SCHEMAS if not name.endswith("out")}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="there is no CUDA device")
def test_a_model_in_a_graph() -> None:
    """Layers of every product, in the order of preference: what serving captures."""
    from quantlib.nn import QuantLinear

    layers = [torch.nn.Linear(96, 96) for _ in range(4)]
    words = ("int8", "int4:group:32", "int8@int8:row", "float8_e4m3fn")
    model = torch.nn.Sequential(*(QuantLinear.from_float(a, w) for a, w in zip(layers, words, strict=True)))
    model = model.cuda().eval()
    for dtype in (torch.bfloat16, torch.float16):
        for rows in (1, 16, 600):
            x, y = torch.randn(rows, 96, dtype=dtype, device="cuda"), torch.randn(rows, 96, dtype=dtype, device="cuda")
            kept: list[Tensor] = []
            with torch.inference_mode():
                want = model(y).clone()
                graph = captured(lambda x=x, kept=kept: kept.__setitem__(slice(None), [model(x)]), "cuda")
                x.copy_(y)
                graph.replay()
            assert_same_bytes(kept[0], want, f"{dtype} {rows}")
