"""A forward pass in eager mode never holds the weight in floating point: the peak memory of a process says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantlib import backends

ROOT = Path(__file__).parents[2]
PEAK = Path("/proc/self/clear_refs")  # a 5 written to it makes the peak what is held now
MIB = 1 << 20
M, N, K = 64, 6144, 4096  # 96 MiB in FP32, 48 in BF16

SCRIPT = f"""
import json, sys, torch
from quantlib.nn import QuantLinear

def kib(what):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(what))

def growth(module, x):
    "Bytes by which the peak of the process exceeds what it held before the call."
    with torch.no_grad():
        module.weight_codes.view(torch.uint8).random_(0, 100)
        if module.weight_scale is not None:
            module.weight_scale.fill_(0.01)
        open("{PEAK}", "w").write("5")
        held = kib("VmRSS")
        y = module(x)
        return (kib("VmHWM") - held) * 1024 - y.nbytes

torch.set_num_threads(2)
found = {{}}
dtypes, *specs = sys.argv[1:]
for spec in specs:
    QuantLinear(256, 64, spec=spec)(torch.randn({M}, 256))  # libraries, and threads with their stacks
    for dtype in dtypes.split():
        dtype = getattr(torch, dtype)
        layer = QuantLinear({K}, {N}, bias=False, spec=spec)
        found[f"{{spec}} {{dtype}}"] = growth(layer, torch.randn({M}, {K}, dtype=dtype))
        del layer
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PEAK.exists(), reason=f"needs {PEAK}")
@pytest.mark.parametrize(("backend", "dtypes"), [("cpp", "float32 bfloat16"), ("composite", "float32")])
def test_no_float_weight_is_allocated(backend: str, dtypes: str) -> None:
    if why := backends.refuses(backend, "cpu", "dequant_matmul"):
        pytest.skip(f"{backend} {why}")
    environment = {
        **os.environ,
        "QUANTLIB_BACKEND": backend,
        "PYTHONPATH": str(ROOT),
    }
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, dtypes, "W8A16", "W4A16", "W8A8"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not run.returncode, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 3 * len(dtypes.split())
    assert all(size <= 32 * MIB for size in found.values()), {
        name: f"{size / MIB:.0f} MiB" for name, size in found.items()
    }
