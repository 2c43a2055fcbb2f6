"""A fork of the process that has imported torch is what a whole process would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fresh

CODE = """
import os, sys
import torch
print(sys.argv, sys.path, sys.orig_argv[1:], os.getcwd(), os.environ["MARK"], __name__, "quantlib" in sys.modules)
print("said", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


def test_a_fork_is_what_a_process_would_be(tmp_path: Path) -> None:
    settings = os.environ | {"MARK": "here", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = ["-c", CODE, "3"]
    process = subprocess.run(
        [sys.executable, *command], env=settings, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    fork = fresh.run(command, env=settings, cwd=tmp_path)
    assert (fork.returncode, fork.stdout, fork.stderr) == (process.returncode, process.stdout, process.stderr)
    assert process.returncode == 3
    assert "MARK" not in os.environ


def test_what_is_read_at_the_start_gets_a_whole_process() -> None:
    code = "import sys; print('torch' in sys.modules)"
    assert fresh.run(["-c", code]).stdout == "True\n"
    assert fresh.run(["-c", code], env=os.environ | {"OMP_NUM_THREADS": "7"}).stdout == "False\n"
    assert fresh.run(["-S", "-c", code]).stdout == "False\n"
