"""Settings of every test: Triton's interpreter where there is no GPU, one thread a worker, the same random numbers.

Tests run on every device there is. With QUANTLIB_STAND_IN=lazy that is also one which is made up, see stand_in.py: what
would fail on a GPU because of where a tensor lies fails there. It cannot be compiled for; QUANTLIB_STAND_IN=cpu:0 is
the CPU by another name, which can.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from unittest import mock

import pytest

if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    # torch.compile finds a graph that it kept whatever the instruction set was, and then writes vectors of another size
    kept = os.path.join(tempfile.gettempdir(), f"torchinductor-{os.geteuid()}-{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kept)
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when Triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # `make test &` in a script: what tests interrupt inherits it

with contextlib.suppress(ImportError):  # the tests that draw their inputs: as often as it says, however long it takes
    import hypothesis

    slow = [hypothesis.HealthCheck.too_slow]
    hypothesis.settings.register_profile("any machine", deadline=None, derandomize=True, suppress_health_check=slow)
    hypothesis.settings.load_profile("any machine")

import fresh  # noqa: E402
import interpreter  # noqa: E402
import stand_in  # noqa: E402

from quantlib import backends  # noqa: E402

DEVICES = ["cpu", *["cuda"] * GPU, *filter(None, [os.environ.get("QUANTLIB_STAND_IN")])]


@functools.cache
def levels() -> list[str]:
    """Return the values of QUANTLIB_ISA that this machine has, as the error for another one lists them."""
    call = "import torch, quantlib; quantlib.cast(torch.ones(2), 'float16')"
    environment = {**os.environ, "QUANTLIB_ISA": "none", "QUANTLIB_BACKEND": "cpp"}
    done = fresh.run(["-c", call], env=environment)
    listed = re.search(r"QUANTLIB_ISA must be one of (.*) on this machine", done.stderr)
    assert listed is not None, done.stderr
    return listed[1].split(", ")


def needs_level(level: str) -> None:
    """Skip the test where there is no C++ library, or where this machine does not have ``level``."""
    if why := backends.refuses("cpp", "cpu"):
        pytest.skip(f"cpp: {why}")
    if level not in levels():
        pytest.skip(f"{level}: this machine has {', '.join(levels())}")


@dataclass(frozen=True)
class Served:
    """A backend that is forced, and a device whose tensors it runs."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if (self.backend, self.device) in HOME else f"{self.backend} on {self.device}"

    @property
    def interpreted(self) -> bool:
        """Say if everything takes a thousand times as long."""
        return self.backend == "triton" and self.device == "cpu"

    def refusal(self, overload: str | None = None) -> str | None:
        if self.device not in DEVICES:
            return f"there is no {'CUDA' if self.device == 'cuda' else self.device} device"
        return backends.refuses(self.backend, self.device, overload)


KNOWN = tuple(reversed(backends.BACKENDS.values()))
HOME = tuple((b.name, b.devices[0]) for b in KNOWN)
ALL = tuple(Served(*pair) for pair in (*HOME, *((b.name, device) for b in KNOWN for device in b.devices[1:])))
SERVED = tuple(s for s in ALL if s.refusal() is None) + tuple(
    Served("composite", d) for d in DEVICES[1:] if d != "cuda"
)


LEFT_OUT = {str(s): why for s in ALL if (why := s.refusal()) is not None}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the backends that do not serve here: they are no test's parameter."""
    for name, why in LEFT_OUT.items():
        terminalreporter.write_line(f"backend left out: {name}: {why}")


def serving(overload: str) -> tuple[Served, ...]:
    """Return the backends that run ``overload``."""
    return tuple(s for s in SERVED if s.refusal(overload) is None)


MAKERS = (
    *("arange", "as_tensor", "empty", "eye", "from_numpy", "full", "linspace", "ones", "rand", "randint", "randn"),
    *("randperm", "tensor", "zeros"),
)


def maker(make: Callable[..., torch.Tensor], device: str) -> Callable[..., torch.Tensor]:
    """Put the tensors that a test makes on ``device``; tensors of the library lie where the library says.

    Only its constructors, like those of torch, follow the test. The numbers are the same on every device.
    """

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> torch.Tensor:
        chosen = kwargs.get("device") is not None or "out" in kwargs or any(isinstance(a, torch.Tensor) for a in args)
        chosen = chosen or torch.compiler.is_compiling() or torch.get_default_device().type != "cpu"
        if chosen or not of_a_test(sys._getframe(1)):
            return make(*args, **kwargs)
        leaf = kwargs.pop("requires_grad", False)
        return make(*args, **kwargs).to(device).requires_grad_(leaf)

    return made


def of_a_test(caller: FrameType | None) -> bool:
    """Say if ``caller`` is a function of a test, or at work for a constructor."""
    while caller is not None:
        module = str(caller.f_globals.get("__name__"))
        if not module.startswith("quantlib."):
            return module.startswith(("test_", "torch.nn.modules"))
        if caller.f_code.co_name == "__init__":
            return True
        caller = caller.f_back
        if caller is not None and not str(caller.f_globals.get("__name__")).startswith("quantlib."):
            return False
    return False


def read(numpy: Callable[..., Any]) -> Callable[..., Any]:
    """Copy a tensor from the device when a test reads it as an array; one that the library reads has to be here."""

    @functools.wraps(numpy)
    def array(x: torch.Tensor, **kwargs: Any) -> Any:
        return numpy(x.cpu() if of_a_test(sys._getframe(1)) else x, **kwargs)

    return array


@contextlib.contextmanager
def placed(device: str) -> Iterator[None]:
    """Inside, a test is on ``device``."""
    if device != "cpu":
        import torch._dynamo.variables  # keeps for good what it finds in torch: to be what is there without patches
        from torch._dynamo.trace_rules import get_torch_obj_rule_map

        get_torch_obj_rule_map()
    with contextlib.ExitStack() as stack:
        if device == stand_in.NAME:
            stack.enter_context(stand_in.present())
        if device != "cpu":
            for name in MAKERS:
                stack.enter_context(mock.patch.object(torch, name, maker(getattr(torch, name), device)))
            stack.enter_context(mock.patch.object(torch.Tensor, "numpy", read(torch.Tensor.numpy)))
        yield


def forced(served: Served) -> Iterator[Served]:
    """A fixture's body: the backend is forced, and the test is on the device."""
    with backends.use_backend(served.backend), placed(served.device):
        yield served


@pytest.fixture(params=SERVED, ids=str)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend in turn, forced, with a device it serves."""
    yield from forced(request.param)


@pytest.fixture(params=[s for s in SERVED if s.device == "cpu"], ids=str)
def on_cpu(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Each backend that serves the CPU in turn, forced."""
    yield from forced(request.param)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each device in turn, served in the order of preference; a whole module asks for it by usefixtures."""
    where = getattr(request, "param", "cpu")
    with placed(where):
        yield where


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "device" in metafunc.fixturenames and "device" not in own and len(DEVICES) > 1:
        metafunc.parametrize("device", DEVICES, indirect=True)


@pytest.fixture
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from reporting on tiny configurations, and from drawing bars."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(before)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Collect without the garbage collector, which took a third of the time: what is imported lives to the end.

    It leaves that out afterwards too, and looks through what tests have made in an eighth of the time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that run on a GPU, so that ``-m gpu`` selects them; what takes longest comes first."""
    items.sort(
        key=lambda item: next((k for k, part in enumerate(LONGEST) if item.nodeid.startswith(part)), len(LONGEST))
    )
    for item in items:
        values = getattr(item, "callspec", None) and item.callspec.params.values()  # type: ignore[attr-defined]
        if any(getattr(v, "device", v) == "cuda" for v in values or () if isinstance(v, (str, Served))):
            item.add_marker(pytest.mark.gpu)


# ---- which worker of pytest-xdist runs what --------------------------------------------------------------------------

RANKS = "tests/distributed/"  # one fixture starts the processes of all these files
COMPILED = "tests/gpu/test_gpu_static.py"  # one worker has all that asks for the same compilation: none waits
LONGEST = (
    *(COMPILED, RANKS, "tests/test_extending.py", "tests/backends/test_cpu_isa.py", "tests/emulator/"),
    *("tests/testing/test_faults.py", "tests/test_proof.py", "tests/backends/test_triton_matmul.py", "tests/ops/"),
    *("tests/checkpoint/", "tests/test_onnx.py", "tests/nn/"),
)


def compiled_together(nodeid: str) -> str:
    """The language and the architecture that a test of `COMPILED` compiles for, or that it plants faults.

    What asks for kernels of no architecture asks for sm_90.
    """
    asked = re.search(r"(_caught)?\[(triton|cuda)(-80)?", nodeid)
    return " ".join(word or "" for word in asked.groups()) if asked else ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file to one worker, so that what a module's fixtures make is made once; of few files each test by itself.

    --dist=loadgroup and xdist_group do not: pytest 9.2 has no ``_nodeid`` for them to change, and nothing is said.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            if path.startswith(RANKS):
                return RANKS
            if path == COMPILED and not self.few:
                return f"{path} {compiled_together(nodeid)}"
            return nodeid if self.few else path

        @functools.cached_property
        def few(self) -> bool:
            return len({nodeid.partition("::")[0] for nodeid in self.collection}) < 5 * self.numnodes

    config.option.loadscopereorder = False  # they start in the order of the items
    return Files(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """A kernel that breaks its device breaks every later test of this process: another one goes on with those."""
    if GPU and item.get_closest_marker("gpu"):
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:
                os._exit(70)
            pytest.exit(f"{item.nodeid} broke the CUDA context: {error}", returncode=3)


@pytest.fixture(autouse=True)
def interpreted_once() -> None:
    interpreter.patch_once()


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)


# ---- four gloo processes, for tests/distributed ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The result of each case and number of ranks: the processes start once for all files that ask for it."""
    import gloo
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch has no gloo")
    asking = [item for item in request.session.items if "ranks" in getattr(item, "fixturenames", ())]
    modules = dict.fromkeys(item.module for item in asking)  # type: ignore[attr-defined]
    cases = [(module.__name__, case.__name__) for module in modules for case in module.CASES]
    return gloo.run(cases, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(params=[2, 4], ids=lambda world: f"{world} ranks")
def found(request: pytest.FixtureRequest, ranks: Any) -> Callable[[Any], list[Any]]:
    """A function that gives the results of a case on so many ranks, one of each process."""

    def of(case: Any) -> list[Any]:
        values: list[Any] = ranks[case.__name__, request.param]
        for value in values:
            if isinstance(value, AssertionError):
                raise value
        return values

    return of
