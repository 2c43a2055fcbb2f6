"""The code of README.md and docs/ runs: Python blocks in order, examples of docstrings, and marked commands verbatim.

``<!-- checked -->`` above a ```console block: the output of its ``$ quantlib`` commands must be exactly what is shown.
``<!-- not run: REASON -->`` above a ```python block leaves it out.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import fresh
import pytest

import quantlib

ROOT = Path(__file__).parent.parent
PAGES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*) -->\s*\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    mark: str
    line: int  # of its first line of text


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(m["language"], m["text"], m["mark"] or "", text[: m.start("text")].count("\n") + 1)
        for m in FENCE.finditer(text)
    ]


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if any(block.language == language for block in blocks(page))]


def transcript(block: Block) -> list[tuple[list[str], str]]:
    """The commands of a console block and what each prints."""
    commands: list[tuple[list[str], str]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            commands.append((shlex.split(line[2:], comments=True), ""))
        elif commands:
            commands[-1] = (commands[-1][0], f"{commands[-1][1]}{line}\n")
    return commands


@pytest.mark.parametrize("page", with_blocks("python"), ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page):
        if block.language == "python" and not block.mark.startswith("not run:"):
            code = "\n" * (block.line - 1) + block.text  # so that a traceback shows the page's line
            exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", with_blocks("console"), ids=lambda page: page.name)
def test_checked_commands_print_what_is_shown(page: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    for block in blocks(page):
        if block.language != "console" or block.mark != "checked":
            continue
        for words, shown in transcript(block):
            assert words[0] == "quantlib" or words[:3] == ["python", "-m", "quantlib"], f"cannot check {words}"
            command = ["-m", "quantlib", *words[1 if words[0] == "quantlib" else 3 :]]
            done = fresh.run(command, env=environment, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert done.stdout.rstrip() == shown.rstrip(), f"{page.name}:{block.line}: {shlex.join(words)}"


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)} links to {target}"


EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "quantlib").rglob("*.py"))
    if re.search(r"^\s*>>> ", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), extraglobs={"quantlib": quantlib})
    assert result.attempted
    assert not result.failed


def test_blocks_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\n<!-- checked -->\n```console\n$ quantlib bits 1  # one\nout\n```\n")
    python, console = blocks(page)
    assert (python.language, python.text, python.line) == ("python", "x = 1\n", 3)
    assert console.mark == "checked"
    assert transcript(console) == [(["quantlib", "bits", "1"], "out\n")]
