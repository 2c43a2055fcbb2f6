"""Safetensors files with damaged headers: each gives one clear error, or is read; nothing else ever happens.

A fixed seed mutates the header and the bytes of real files: of floats, of quantlib's codes, of other libraries'. Every
file goes through ``quantize``, ``convert``, ``inspect`` and ``check``. ``make fuzz-headers`` takes 10^5 of them.
"""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from quantlib.checkpoint import check_checkpoint, convert_file, inspect_checkpoint, quantize_file

COUNT = int(os.environ.get("QUANTLIB_FUZZED_HEADERS", "300"))
SEED = int(os.environ.get("QUANTLIB_FUZZ_SEED", "0"))
NUMBERS = [0, -1, 1, 7, 2**31, 2**53, 2**63 - 1, 2**63, 10**30, 1.5, 1e999, None, True, "8", [], {}]
WORDS = ["", ".", "..", "../../etc/passwd", "/etc/passwd", "a\0b", "é", "weight", "__metadata__", "x" * 5000]
DTYPES = ["F32", "BF16", "F16", "F64", "I8", "U8", "I32", "I64", "F8_E4M3", "BOOL", "F4", "", "f32"]


def nf4_of() -> dict[str, torch.Tensor]:
    """A weight of bitsandbytes, with double quantization."""
    told = {"quant_type": "nf4", "blocksize": 16, "dtype": "float16", "shape": [8, 16], "nested_blocksize": 4}
    text = json.dumps({**told, "nested_dtype": "float32", "nested_offset": 0.5})
    return {
        "l.weight": torch.zeros(64, 1, dtype=torch.uint8),
        "l.weight.absmax": torch.zeros(8, dtype=torch.uint8),
        "l.weight.quant_map": torch.linspace(-1, 1, 16),
        "l.weight.nested_absmax": torch.ones(2),
        "l.weight.nested_quant_map": torch.ones(256),
        "l.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text.encode()), dtype=torch.uint8),
    }


def seeds() -> list[tuple[dict[str, Any], bytes]]:
    """(header, data) of files in use."""
    torch.manual_seed(0)
    w, q = torch.randn(8, 16), torch.randint(-8, 8, (8, 16), dtype=torch.int8)
    entry = {"version": 1, "weights": {"l.weight": {"spec": "int8:row", "shape": [8, 16]}}, "tied": {}}
    torchao = {"_type": "Int8Tensor", "_data": {"block_size": [1, 16]}, "_tensor_data_names": ["qdata", "scale"]}
    states: list[tuple[dict[str, torch.Tensor], dict[str, str] | None]] = [
        ({"l.weight": w, "m.weight": w.bfloat16(), "l.bias": w[0].clone()}, {"format": "pt"}),
        ({"l.weight": q[..., None], "l.weight_scale": torch.ones(8, 1)}, {"quantlib": json.dumps(entry)}),
        ({"l.weight": q, "l.weight_scale": torch.ones(8, 1)}, None),
        ({"l.weight": w.to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(1, 1)}, None),
        (
            {
                "l.qweight": torch.zeros(2, 8).int(),
                "l.qzeros": torch.zeros(1, 1).int(),
                "l.scales": torch.ones(1, 8),
                "l.g_idx": torch.zeros(16).int(),
            },
            None,
        ),
        (
            {
                "l.weight_packed": torch.zeros(8, 2).int(),
                "l.weight_scale": torch.ones(8, 1),
                "l.weight_shape": torch.tensor([8, 16]),
            },
            None,
        ),
        ({"l.weight": q, "l.SCB": torch.ones(8)}, None),
        (nf4_of(), None),
        (
            {
                "l.W_q": torch.zeros(8, 8, dtype=torch.uint8),
                "l.scale": torch.ones(16, 1),
                "l.zero": torch.ones(16, 1),
                "l.nbits": torch.tensor(4),
                "l.axis": torch.tensor(1),
                "l.shape": torch.tensor([8, 16]),
            },
            None,
        ),
        ({"l._weight_qdata": q, "l._weight_scale": torch.ones(8, 1)}, {"l.weight": json.dumps(torchao)}),
        (
            {
                "l.qweight": torch.zeros(16, 1).int(),
                "l.qzeros": torch.zeros(1, 1).int(),
                "l.scales": torch.ones(1, 8),
            },
            None,
        ),
    ]
    found = []
    for state, metadata in states:
        data = save(state, metadata)
        size = int.from_bytes(data[:8], "little")
        found.append((json.loads(data[8 : 8 + size]), data[8 + size :]))
    return found


def mutate(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """``value`` with something of it changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        changed = dict(value)
        kind = rng.random()
        if kind < 0.1:
            del changed[key]
        elif kind < 0.2:
            changed[rng.choice(WORDS)] = changed.pop(key)
        elif kind < 0.25:
            changed[rng.choice(WORDS)] = value[key]
        else:
            changed[key] = mutate(rng, value[key], depth + 1)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        k = rng.randrange(len(value))
        return [*value[:k], mutate(rng, value[k], depth + 1), *value[k + 1 :]]
    if isinstance(value, str) and rng.random() < 0.7:
        if value.startswith("{") and rng.random() < 0.8:  # an entry of metadata
            return json.dumps(mutate(rng, json.loads(value), depth + 1))
        return rng.choice(DTYPES if value in DTYPES else WORDS)
    if type(value) is int and rng.random() < 0.6:
        return value + rng.choice([-1, 1, 8, -8, 2**32])
    return rng.choice([*NUMBERS, *WORDS])


def file_of(rng: random.Random, header: dict[str, Any], data: bytes) -> bytes:
    """A file with a damaged header, or with damage to its bytes."""
    for _ in range(rng.randint(0, 3)):
        header = mutate(rng, header)
        if not isinstance(header, dict):
            break
    text = json.dumps(header).encode(errors="surrogatepass")
    size = len(text)
    kind = rng.random()
    if kind < 0.1:
        size = rng.choice([0, 1, size - 1, size + 1, 2**32, 2**63, 2**64 - 1])
    raw = bytearray(size.to_bytes(8, "little") + text + data)
    if 0.1 < kind < 0.3:
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(8 if kind < 0.2 else 8 + len(text), len(raw))] = rng.randrange(256)
    if 0.3 < kind < 0.35:
        del raw[rng.randrange(len(raw)) :]
    if 0.35 < kind < 0.4:
        raw += bytes(rng.randrange(1, 9))
    return bytes(raw)


def test_damaged_headers(tmp_path: Path) -> None:
    out, path = tmp_path / "out.safetensors", tmp_path / "in.safetensors"
    calls: list[Callable[[], Any]] = [
        lambda: quantize_file(path, out, "int8"),
        lambda: convert_file(path, out, "quantlib"),
        lambda: convert_file(path, out, "bfloat16"),
        lambda: convert_file(path, out, "compressed-tensors"),
        lambda: inspect_checkpoint(path),
    ]
    real = seeds()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read = refused = longest = 0
    for number in range(COUNT):
        rng = random.Random(SEED + number)
        data = file_of(rng, *rng.choice(real))
        path.write_bytes(data)
        for call in [rng.choice(calls), lambda: check_checkpoint(path)] if COUNT < 10**4 else [rng.choice(calls)]:
            try:
                call()
                read += 1
            except ValueError as error:
                refused += 1
                longest = max(longest, len(str(error)))
            except Exception as error:
                raise AssertionError(f"file {SEED + number}: {type(error).__name__}: {error}") from error
            assert path.read_bytes() == data, number
            names = {entry.name for entry in tmp_path.iterdir()}
            assert names <= {"in.safetensors", "out.safetensors"}, number
            out.unlink(missing_ok=True)
    assert read > COUNT / 20
    assert longest < 12_000  # names of 5000 characters come in it twice
    assert refused > COUNT / 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB
