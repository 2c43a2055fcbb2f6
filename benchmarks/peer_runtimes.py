"""Products with quantized weights outside torch: the operators of onnxruntime, and those of ggml in llama.cpp.

Both take x in float32 and give float32. A weight is one operator in a graph of its own; the graphs take turns, as the
weights of every contender do.

- MatMulNBits of onnxruntime gets the codes and scales of quantlib. Its accuracy level 0 multiplies in float32; 4
  quantizes x to int8, in blocks. DynamicQuantizeMatMul is what its own quantizer makes of a layer: x and weight in 8
  bits, a scale for all of x.
- ggml quantizes the values itself, to blocks of 32 with a scale in float16, and x to q8_0 in every call. The weight
  lies where llama.cpp would put it, reordered for the processor if ggml knows how. The package that has it for Python
  and comes compiled is xllamacpp; llama-cpp-python comes as source alone.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quantlib

from .case import Call, Contender, Tensors
from .formulas import load
from .matmul import W4A8, W4A16, W8A8, W8A16, Product, rotation, turns
from .peers import MissingError, package

BLOCK = 128  # of weights that MatMulNBits has a scale for
FLOAT32 = "float32 in and out"


def of(case: Product) -> list[Contender]:
    """List the peers that have this product on a CPU."""
    if case.device != "cpu":
        return []
    four = case.spec.row.packed
    nbits = [Contender(f"onnxruntime MatMulNBits {level}", functools.partial(mat_mul_n_bits, case, level),
                       read=functools.partial(narrowed, case), note=FLOAT32)
             for level in LEVELS[case.spec]]  # fmt: skip
    dynamic = [] if case.spec != W8A8 else [
        Contender("onnxruntime dynamic", functools.partial(dynamic_quantize_mat_mul, case),
                  read=functools.partial(narrowed, case), note=FLOAT32)
    ]  # fmt: skip
    name = "q4_0" if four else "q8_0"
    note = f"{FLOAT32}; codes of its own, x in q8_0"
    return [
        *nbits,
        *dynamic,
        Contender(f"ggml {name}", functools.partial(ggml, case, name), read=lambda _: (), note=note),
    ]


LEVELS = {W8A16: (0,), W4A16: (0, 4), W8A8: (4,), W4A8: (4,)}


def narrowed(case: Product, y: Tensor) -> Tensors:
    """Return float32 results in the dtype of the case."""
    return (quantlib.cast(y, case.dtype),)


# ---- onnxruntime ----------------------------------------------------------------------------------------------------


def mat_mul_n_bits(case: Product, level: int, inputs: Tensors, outs: Tensors) -> Call:
    """y = x @ dequantize(codes).T: codes [N, K / bk, bk * bits / 8] above a zero point in the middle, the low first."""
    x, codes, scale = inputs
    _, N, K = case.shape
    bits = case.spec.row.bits
    block = min(BLOCK, 1 << (K.bit_length() - 1)) if case.block[1] >= K else case.block[1]
    q = (load(codes, K, case.spec.row).int() + (1 << (bits - 1))).to(torch.uint8)
    if bits == 4:
        q = q[:, ::2] | q[:, 1::2] << 4
    scales = scale.repeat_interleave(-(-K // block) // scale.shape[1], 1).contiguous()
    attributes = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": level}
    constants = {"codes": q.view(N, K // block, -1), "scale": scales}
    return in_sessions("MatMulNBits", constants, attributes, x, N, case)


def dynamic_quantize_mat_mul(case: Product, inputs: Tensors, outs: Tensors) -> Call:
    """y = (codes of x @ codes.T) * x_scale * scale[n]"""
    x, codes, scale = inputs
    constants = {"codes": codes.t().contiguous(), "scale": scale[:, 0].contiguous()}
    return in_sessions("DynamicQuantizeMatMul", constants, {}, x, case.shape[1], case)


def in_sessions(
    op: str, constants: dict[str, Tensor], attributes: dict[str, int], x: Tensor, N: int, case: Product
) -> Call:
    """Sessions of one operator each, which take turns and write into one y."""
    onnx, runtime = package("onnx"), package("onnxruntime")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(op, ["x", *constants], ["y"], domain="com.microsoft", **attributes)
    ends = [helper.make_tensor_value_info(name, float32, ["M", size]) for name, size in (("x", x.shape[1]), ("y", N))]
    weights = [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()]
    graph = helper.make_graph([node], op, ends[:1], ends[1:], weights)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads wait in others' turns
    x, y = x.float().contiguous(), torch.empty(len(x), N)
    calls = []
    for _ in range(rotation(case.nbytes, case.device)):
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        binding = session.io_binding()
        for bind, t, name in ((binding.bind_input, x, "x"), (binding.bind_output, y, "y")):
            bind(name, "cpu", 0, float32, tuple(t.shape), t.data_ptr())
        calls.append(functools.partial(ran, session, binding, x, y))
    return turns(calls)


def ran(session: Any, binding: Any, x: Tensor, y: Tensor) -> Tensor:
    """y of a session that reads x, which it keeps alive."""
    session.run_with_iobinding(binding)
    return y


# ---- ggml -----------------------------------------------------------------------------------------------------------

TYPES = {"float32": 0, "q4_0": 2, "q8_0": 8}  # of `enum ggml_type`


class Parameters(ctypes.Structure):
    """`struct ggml_init_params`"""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def ggml(case: Product, name: str, inputs: Tensors, outs: Tensors) -> Call:
    """mul_mat(weight [N, K] of a ggml type, x [M, K] float32), a graph for each copy of the weight."""
    x, codes, scale = inputs
    M, N, K = case.shape
    api, w, x = library(), case.values(codes, scale).float().contiguous(), x.float().contiguous()
    quantized = ctypes.create_string_buffer(api.ggml_row_size(TYPES[name], K) * N)
    api.ggml_quantize_chunk(TYPES[name], w.data_ptr(), quantized, 0, N, K, None)
    backend = api.ggml_backend_cpu_init()
    api.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())

    def graph(kind: int) -> Call | None:
        """None where the processor does not multiply by a weight in memory of this kind."""
        weight_in, others_in = context(api), context(api)
        weight = api.ggml_new_tensor_2d(weight_in, TYPES[name], K, N)
        x_in = api.ggml_new_tensor_2d(others_in, TYPES["float32"], K, M)
        y = api.ggml_mul_mat(others_in, weight, x_in)
        buffer = api.ggml_backend_alloc_ctx_tensors_from_buft(weight_in, kind)
        if not buffer or not api.ggml_backend_dev_supports_op(api.ggml_backend_get_device(backend), y):
            return None
        api.ggml_backend_tensor_set(weight, quantized, 0, len(quantized))
        api.ggml_backend_alloc_ctx_tensors_from_buft(others_in, api.ggml_backend_cpu_buffer_type())
        api.ggml_backend_tensor_set(x_in, x.data_ptr(), 0, x.nbytes)
        nodes = api.ggml_new_graph(others_in)
        api.ggml_build_forward_expand(nodes, y)
        return functools.partial(computed, api, backend, nodes)

    first, kind = next((call, kind) for kind in kinds_of_memory(api, backend) if (call := graph(kind)) is not None)
    others = (graph(kind) for _ in range(rotation(case.nbytes, case.device) - 1))
    return turns([first, *filter(None, others)])


def computed(api: Any, backend: int, nodes: int) -> None:
    if status := api.ggml_backend_graph_compute(backend, nodes):
        raise RuntimeError(f"ggml_backend_graph_compute gave {status}")


def context(api: Any) -> int:
    """Room for what describes a few tensors and a graph."""
    size = 8 * api.ggml_tensor_overhead() + api.ggml_graph_overhead()
    made: int = api.ggml_init(Parameters(size, None, True))
    return made


def kinds_of_memory(api: Any, backend: int) -> Iterator[int]:
    """Yield kinds that reorder a weight, in llama.cpp's order, then plain memory, which takes every type."""
    device = api.ggml_backend_get_device(backend)
    registry = api.ggml_backend_dev_backend_reg(device)
    address = api.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    if address:
        listed = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)(address)(device)
        yield from itertools.takewhile(lambda kind: kind is not None, listed)
    yield api.ggml_backend_cpu_buffer_type()


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def silent(level: int, said: bytes, data: int) -> None:
    """Drop what ggml logs."""


@functools.cache
def library() -> Any:
    """The functions of ggml that are called here.

    Raises
    ------
    MissingError
        Where xllamacpp is not installed.
    """
    found = importlib.util.find_spec("xllamacpp")
    folder = Path(found.origin).parent if found and found.origin else None
    files = sorted(folder.glob("xllamacpp*.so")) if folder else []
    if not files:
        raise MissingError("not installed: No module named 'xllamacpp'")
    api = ctypes.CDLL(str(files[0]))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    signatures: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "ggml_init": (pointer, (Parameters,)),
        "ggml_tensor_overhead": (size, ()),
        "ggml_graph_overhead": (size, ()),
        "ggml_row_size": (size, (ctypes.c_int, ctypes.c_int64)),
        "ggml_quantize_chunk": (size, (ctypes.c_int, pointer, pointer, *(ctypes.c_int64,) * 3, pointer)),
        "ggml_new_tensor_2d": (pointer, (pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)),
        "ggml_mul_mat": (pointer, (pointer,) * 3),
        "ggml_new_graph": (pointer, (pointer,)),
        "ggml_build_forward_expand": (None, (pointer, pointer)),
        "ggml_backend_cpu_init": (pointer, ()),
        "ggml_backend_cpu_set_n_threads": (None, (pointer, ctypes.c_int)),
        "ggml_backend_cpu_buffer_type": (pointer, ()),
        "ggml_backend_get_device": (pointer, (pointer,)),
        "ggml_backend_dev_backend_reg": (pointer, (pointer,)),
        "ggml_backend_reg_get_proc_address": (pointer, (pointer, ctypes.c_char_p)),
        "ggml_backend_dev_supports_op": (ctypes.c_bool, (pointer, pointer)),
        "ggml_backend_alloc_ctx_tensors_from_buft": (pointer, (pointer, pointer)),
        "ggml_backend_tensor_set": (None, (pointer, pointer, size, size)),
        "ggml_backend_graph_compute": (ctypes.c_int, (pointer, pointer)),
    }
    for name, (result, arguments) in signatures.items():
        function: Callable[..., Any] = getattr(api, name)
        function.restype, function.argtypes = result, arguments  # type: ignore[attr-defined]
    api.ggml_log_set(silent, None)
    return api
