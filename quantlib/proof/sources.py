"""The sources that are proven: the files of quantlib/reference run on terms, and csrc/*.h read as they stand.

Nothing is transcribed by hand. `Sources` reads the files of this package, or any of them with an edit, which is how a
fault is planted.
"""

from __future__ import annotations

import builtins
import functools
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy

import quantlib.reference  # noqa: F401  a dataclass looks its module up by name, which has to be there
from quantlib.proof import cxx, symbolic

PACKAGE = Path(__file__).resolve().parent.parent
CSRC = next((d for d in (PACKAGE / "_csrc", PACKAGE.parent / "csrc") if d.is_dir()), PACKAGE / "_csrc")


@dataclass(frozen=True)
class Edit:
    """``right`` in ``file`` written as ``wrong``."""

    file: str  # quantlib/reference/numerics.py, csrc/numerics.h
    right: str
    wrong: str


class Sources:
    """The functions of the reference and of the C++ headers, from the files under ``root`` with ``edits`` made.

    Parameters
    ----------
    edits : tuple of Edit
        Made to the text as it is read; text that is not there is a ValueError.
    root : Path, optional
        A checkout to read instead of the one this package is of.
    """

    def __init__(self, edits: tuple[Edit, ...] = (), root: Path | None = None) -> None:
        self.edits, self.root = edits, root

    def text(self, file: str) -> str:
        folder, _, rest = file.partition("/")
        here = CSRC / rest if folder == "csrc" else PACKAGE / rest
        path = here if self.root is None else self.root / file
        text = path.read_text()
        for edit in self.edits:
            if edit.file == file:
                if edit.right not in text:
                    raise ValueError(f"{file} must have the text that is edited, got none of {edit.right!r}")
                text = text.replace(edit.right, edit.wrong)
        return text

    @functools.cached_property
    def reference(self) -> SimpleNamespace:
        """Modules of quantlib/reference whose NumPy is `symbolic`: .numerics, .fake_quantize, .ops."""
        return self._modules(symbolic)

    @functools.cached_property
    def running(self) -> SimpleNamespace:
        """The same files on NumPy itself."""
        return self._modules(numpy)

    def _modules(self, np: ModuleType) -> SimpleNamespace:
        loaded: dict[str, ModuleType] = {}

        def load(name: str) -> ModuleType:
            if name not in loaded:
                full = f"quantlib.reference.{name}"
                module = loaded[name] = ModuleType(full)
                source = compile(self.text(f"quantlib/reference/{name}.py"), f"{full} (proof)", "exec")
                module.__dict__["__builtins__"] = {**vars(builtins), "__import__": importing}
                exec(source, module.__dict__)
            return loaded[name]

        def importing(name: str, globals: Any = None, locals: Any = None, names: Any = (), level: int = 0) -> Any:
            if name == "numpy":
                return np
            if name == "quantlib.reference":
                return SimpleNamespace(**{n: load(n) for n in names})
            if name.startswith("quantlib.reference."):
                return load(name.rpartition(".")[2])
            return builtins.__import__(name, globals, locals, names, level)

        return SimpleNamespace(**{name: load(name) for name in ("numerics", "ops", "fake_quantize")})

    @functools.cached_property
    def header(self) -> cxx.Program:
        """csrc/numerics.h and csrc/fake_quantize.h, with what they include."""
        return cxx.Program(self.text, ("csrc/numerics.h", "csrc/fake_quantize.h"))


@functools.cache
def unedited(root: Path | None = None) -> Sources:
    """The files as they are, read once."""
    return Sources((), root)
