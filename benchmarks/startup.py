"""The cost of `import quantlib`: whole processes, beside one that imports torch alone."""

from __future__ import annotations

import functools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quantlib

from .case import LIMIT, OURS, Call, Case, Contender, Tensors

HOME = Path(quantlib.__file__).parent.parent


def cases(quick: bool, **common: Any) -> list[Case]:
    return [Import(**{**common, "shape": (), "least": 3 if quick else 7})]


@dataclass(frozen=True)
class Import(Case):
    least: int = 7

    family = "startup"
    streams = False

    @property
    def op(self) -> str:
        return "import"

    @property
    def conversion(self) -> str:
        return ""

    def inputs(self) -> Tensors:
        return ()

    def outs(self, *inputs: Any) -> Tensors:
        return ()

    def contenders(self) -> list[Contender]:
        def start(statement: str) -> Call:
            return functools.partial(subprocess.run, [sys.executable, "-c", statement], cwd=HOME, check=True)

        return [
            Contender("import torch", lambda *_: start("import torch"), LIMIT, read=lambda _: ()),
            Contender("import quantlib", lambda *_: start("import quantlib"), OURS, read=lambda _: ()),
        ]
