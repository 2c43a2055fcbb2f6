"""Python processes that begin where ``import torch`` has ended: forks of one that imported it, two CPU seconds cheaper.

Nothing else has happened in them: ``import quantlib`` and all that it reads from the environment is still to come. What
torch, NumPy and Python themselves read when they start is that of the tests; for another one a whole process starts.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

EARLY = ("ATEN_", "DNNL_", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "NPY_", "OMP_", "ONEDNN_")
EARLY += ("OPENBLAS_", "PYTHON", "TORCH_", "TZ")
LOCK = threading.Lock()


Done = subprocess.CompletedProcess[str]


def run(arguments: list[Any], *, env: Mapping[str, str] | None = None, cwd: Path | str | None = None) -> Done:
    """Return what ``subprocess.run([sys.executable, *arguments], capture_output=True, text=True)`` does.

    ``arguments`` begin with -c, -m or a script. As with ``subprocess.run``, ``env`` is the whole environment.
    """
    words, environment = [str(word) for word in arguments], dict(os.environ if env is None else env)
    server = ready()
    if early(environment) != STARTED or (words[0].startswith("-") and words[0] not in ("-c", "-m")):
        command = [sys.executable, *words]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    with LOCK, tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, "out"), Path(folder, "err")]
        asked = {"words": words, "env": environment, "cwd": str(cwd or os.getcwd()), "said": list(map(str, said))}
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        status = server.stdout.readline()
        assert status, "the process that imported torch has ended"
        texts = [path.read_bytes().decode(errors="replace") for path in said]
    return subprocess.CompletedProcess([sys.executable, *words], int(status), *texts)


def early(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a process reads before the first line of a test's program."""
    return {k: v for k, v in environment.items() if k.startswith(EARLY) and k != "PYTHONPATH"}


SERVERS: list[subprocess.Popen[str]] = []
STARTED: dict[str, str] = {}  # what it read early


def ready() -> subprocess.Popen[str]:
    """The process that has imported torch and waits; it ends with this one."""
    if not SERVERS:
        STARTED.update(early(os.environ))
        command = [sys.executable, __file__]
        SERVERS.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        atexit.register(stop)
    return SERVERS[0]


def stop() -> None:
    while SERVERS:
        SERVERS.pop().communicate()


def serve() -> dict[str, Any]:
    """Fork for each request and answer with the child's exit status; returns in the child alone."""
    requests = os.fdopen(os.dup(0), "r")
    while line := requests.readline():
        asked: dict[str, Any] = json.loads(line)
        child = os.fork()
        if not child:
            requests.close()
            return asked
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    raise SystemExit


def become(words: list[str], env: dict[str, str], cwd: str, said: list[str]) -> None:
    """Do what Python does before the program: streams, environment, arguments and sys.path."""
    for path, flags, to in (
        (os.devnull, os.O_RDONLY, 0),
        *((path, os.O_WRONLY | os.O_CREAT, k + 1) for k, path in enumerate(said)),
    ):
        opened = os.open(path, flags, 0o600)
        os.dup2(opened, to)
        os.close(opened)
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.orig_argv = [sys.executable, *words]
    sys.argv = words if words[0] not in ("-c", "-m") else [words[0], *words[2:]]
    first = {"-c": "", "-m": cwd}.get(words[0], str(Path(words[0]).resolve().parent))
    own = [path for path in sys.path[1:] if path not in before]
    given = [os.path.abspath(path) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *dict.fromkeys([*given, *own])]  # as Python itself leaves out what comes twice


if __name__ == "__main__":
    import torch  # noqa: F401

    gc.freeze()  # what torch made is not looked through again when a fork ends
    request = serve()
    become(**request)
    words = request["words"]
    if words[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")
