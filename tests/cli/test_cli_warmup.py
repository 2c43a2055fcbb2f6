"""``quantlib warmup``: what it compiles, that a second run finds it compiled, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import fresh
import pytest
import torch
from safetensors.torch import save_file

from quantlib.cli import main, warmup

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


def test_what_a_model_multiplies(tmp_path: Path) -> None:
    """Its quantized matrices, each with its spec, its shape, and whether there is a bias."""
    floats, codes = tmp_path / "model.safetensors", tmp_path / "codes.safetensors"
    save_file({"a.weight": torch.randn(64, 128), "a.bias": torch.randn(64), "b.weight": torch.randn(32, 64)}, floats)
    assert main(["quantize", str(floats), str(codes), "--to", "int4:group:64"]) == 0
    found = {(p.spec, p.shape, p.dtype, p.bias) for p in warmup.of_model(str(codes), "float16")}
    assert found == {("int4:group:64", (64, 128), "float16", True), ("int4:group:64", (32, 64), "float16", False)}


COMPILE = """
import sys
from quantlib.backends.triton import launch, warmup
from quantlib.cli.warmup import product_of
warmup.start(launch.Planned(int(sys.argv[1]), "some device", 101376))
for spec, rows in (("int8", (2, 3)), ("int8", (1,)), ("int8@int8", (2,)), ("int8@int8:tensor:static", (2,))):
    print(warmup.compile_rows(product_of(spec, (32, 64)), rows))
"""


def test_every_kernel_of_a_class_is_compiled_once_and_without_a_gpu(tmp_path: Path) -> None:
    """Two rows and three are one class, one row is another; W8A8 quantizes, then multiplies."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "QUANTLIB_BUILD": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    kept = []
    for _ in range(2):
        done = fresh.run(["-c", COMPILE, "80"], env=environment)
        assert done.stdout.split() == ["1", "1", "2", "2"], done.stderr
        kept.append(sorted((path.name, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.cubin")))
    assert len(kept[0]) == 6
    assert kept[1] == kept[0]  # nothing was compiled again


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "needs MODEL or --shape, got neither"),
        (["model", "--shape", "1", "2"], "needs MODEL or --shape, got both"),
        (["--shape", "0", "2"], "--shape must be a number >= 1, got '0'"),
        (["--shape", "1", "2", "--arch", "75"], "--arch must be a compute capability from 80 on, such as 90, got '75'"),
    ],
)
def test_what_is_refused(given: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(["warmup", *given])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert says in capsys.readouterr().err


def test_a_machine_without_a_gpu_must_name_one(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["warmup", "--shape", "1", "2"]) != 0
    assert "needs a CUDA device, or --arch" in capsys.readouterr().err
