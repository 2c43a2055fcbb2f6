"""Triton's interpreter, a quarter faster: it patches triton.language at every launch, and again at every call of a
function from a kernel, when all that the function sees is patched already. Here it does so once a launch.
"""

from __future__ import annotations

import functools
import sys
from typing import Any


class Once:
    """Replace the interpreter's ``_patch_lang``: a launch restores what it and its functions have patched."""

    def __init__(self, patch: Any) -> None:
        self.patch, self.scopes, self.patched = patch, [], set[str]()

    def __call__(self, function: Any) -> Once:
        seen = languages(function)
        if not seen <= self.patched:
            self.scopes.append(self.patch(function))
            self.patched |= seen
        return self

    def restore(self) -> None:
        while self.scopes:
            self.scopes.pop().restore()
        self.patched.clear()


@functools.cache
def languages(function: Any) -> set[str]:
    """The modules that the interpreter patches for a function: those of Triton's language that it sees."""
    import triton.language as tl

    return {module.__name__ for module in (tl, tl.core) if any(v is module for v in function.__globals__.values())}


def patch_once() -> None:
    """Patch the interpreter, if Triton's interpreter has been imported."""
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter and not isinstance(interpreter._patch_lang, Once):
        interpreter._patch_lang = Once(interpreter._patch_lang)
