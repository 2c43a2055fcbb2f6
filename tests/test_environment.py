"""The environment that `make` sets up: what it asks for, and what it never moves."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
if not SCRIPTS.is_dir():
    pytest.skip("not a checkout", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

import environment  # noqa: E402


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({}, ["numpy<2.4", "triton==3.6.0"]),
        ({"torch": "2.13.0+cpu", "numpy": "2.3.5"}, ["torch==2.13.0+cpu", "numpy==2.3.5", "triton==3.6.0"]),
        (
            {"torch": "2.12.1+cu130", "numpy": "2.4.0", "triton": "3.5.1"},
            ["torch==2.12.1+cu130", "numpy<2.4", "triton==3.5.1"],
        ),
    ],
)
def test_no_package_moves_what_is_there(
    there: dict[str, str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert environment.pinned() == expected


def test_the_tests_ask_for_what_they_import() -> None:
    names = {environment.requirement(line).name for line in environment.requirements(["test"])}
    assert {"pytest", "hypothesis", "ml_dtypes", "transformers", "accelerate", "peft", "psutil"} <= names
