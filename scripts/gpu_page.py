"""The results of `make gpu` that are checked in, as the section of docs/gpu.md between its marks: ``gpu_page.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/gpu.md"
BEGIN, END = "<!-- acceptance -->", "<!-- end of acceptance -->"
NOTHING = "**Not yet run on a GPU.** `make gpu ARGS=--save=NAME` on a machine with one fills this section.\n"
FACTS = {
    "gpu": "GPU", "multiprocessors": "multiprocessors", "memory_gib": "memory, GiB", "l2_mib": "L2, MiB",
    "driver_version": "driver", "clocks_max_sm": "largest clock", "clocks_mem": "memory clock",
    "power_limit": "power limit", "torch": "torch", "cuda": "CUDA", "triton": "Triton", "nvcc": "nvcc",
    "python": "Python", "numpy": "NumPy", "sources": "sources", "date": "date",
}  # fmt: skip


def rendered(results: Path = RESULTS) -> str:
    """A section for each summary; where there is none, that."""
    summaries = sorted(results.glob("gpu-*.json"))
    return "\n".join("".join(section(json.loads(path.read_text()))) for path in summaries) or NOTHING


def section(summary: dict[str, Any]) -> Iterator[str]:
    machine, done = summary["machine"], summary["pieces"]
    yield f"### {machine['gpu']}\n\n"
    facts = (f"{word} {machine[key]}" for key, word in FACTS.items() if key != "gpu" and machine.get(key))
    yield ", ".join(facts) + ".\n"
    yield "\n| piece | result | seconds | what it said |\n| :-- | :-- | --: | :-- |\n"
    for name, result in done.items():
        last = str(result["last"]).replace("|", "\\|")
        yield f"| {name} | {result['status']} | {result['seconds']:.0f} | {last} |\n"
    if machine.get("missing"):
        yield "\nNot installed there: " + "; ".join(machine["missing"]) + ".\n"


def with_results(page: str, text: str) -> str:
    """``page`` with ``text`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


def write() -> None:
    PAGE.write_text(with_results(PAGE.read_text(), rendered()))


if __name__ == "__main__":
    write()
