"""The house: imports flow one way, and there is one stem on every floor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from quantlib import backends, formats

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "quantlib"

FLOORS = [
    {"formats", "_build"},
    {"spec"},
    {"reference"},
    {"backends"},
    {"ops"},
    {"testing", "proof"},
    {"nn", "optim"},
    {"record", "report"},
    {"measure"},
    {"api"},
    {"qat"},
    {"checkpoint"},
    {"distributed", "hf", "onnx", "plan"},
    {"calibration"},
    {"evaluation"},
    {"cli", "examples"},
    {"__main__"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
TESTERS = {"testing", "cli", "examples"}  # who may import quantlib.testing


def imported(tree: ast.AST) -> Iterator[str]:
    """The top-level names below quantlib that a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import hides its floor"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "quantlib" else [module]
        else:
            continue
        for name in names:
            if name.startswith("quantlib."):
                yield name.split(".")[1]


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert here in FLOOR, f"{here} has no floor: give it one"
    for there in imported(ast.parse(path.read_text())):
        if there not in FLOOR:  # a public name of quantlib/__init__.py
            assert FLOOR[here] > FLOOR["api"], f"{here} imports {there} from the front door"
            continue
        assert FLOOR[there] < FLOOR[here] or there == here, f"{here} imports {there}, which is not below it"
        assert there != "testing" or here in TESTERS, f"{here} imports what only proves it"


def test_the_test_bites() -> None:
    source = "from quantlib.ops.cast import cast\nimport quantlib.nn\nfrom quantlib import api"
    assert list(imported(ast.parse(source))) == [
        "ops",
        "nn",
        "api",
    ]


def test_an_op_has_one_stem_on_every_floor() -> None:
    stems = {overload.partition(".")[0] for overload in backends.SCHEMAS}
    for op in stems:
        for folder in ("quantlib/ops", "quantlib/backends/composite"):
            assert (ROOT / folder / f"{op}.py").exists(), f"{folder} has no {op}.py"


def test_an_op_is_declared_once_with_its_out_form() -> None:
    for overload, schema in backends.SCHEMAS.items():
        op, _, kind = overload.partition(".")
        if not kind.endswith("out"):
            assert f"{op}.{kind + '_' if kind else ''}out" in backends.SCHEMAS
        else:
            assert schema.endswith("-> ()")


def test_nobody_types_what_the_table_derives() -> None:
    """Outside of the table no kernel spells a format's largest value or its codes."""
    derived = {str(f.max) for f in formats.TABLE if f.is_float and f.max > 100} | {"448", "57344", "65504"}
    folders = ("quantlib/ops", "quantlib/backends", "quantlib/reference", "quantlib/nn")
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        numbers = (n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant))
        typed = {str(n) for n in numbers if type(n) in (int, float)} & derived
        assert not typed, f"{path.relative_to(ROOT)} types {typed}"
