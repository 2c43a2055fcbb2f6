"""The results of `make gpu` that are checked in, as the section of docs/gpu.md between its marks: ``gpu_page.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/gpu.md"
BEGIN, END = "<!-- acceptance -->", "<!-- end of acceptance -->"
NOTHING = "**Not yet run as a whole.** `make gpu ARGS=--save=NAME` on a machine with a GPU fills this section.\n"
FACTS = {
    "gpu": "GPU", "multiprocessors": "multiprocessors", "memory_gib": "memory, GiB", "l2_mib": "L2, MiB",
    "driver_version": "driver", "clocks_max_sm": "largest clock", "clocks_mem": "memory clock",
    "power_limit": "power limit", "torch": "torch", "cuda": "CUDA", "triton": "Triton", "nvcc": "nvcc",
    "python": "Python", "numpy": "NumPy", "sources": "sources", "date": "date",
}  # fmt: skip


def rendered(results: Path = RESULTS) -> str:
    """A section for each summary; where there is none, that."""
    summaries = (json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json")))
    return "\n".join("".join(section(one)) for one in summaries if "pieces" in one) or NOTHING


def section(summary: dict[str, Any]) -> Iterator[str]:
    machine, done = summary["machine"], summary["pieces"]
    yield f"### {machine['gpu']}\n\n"
    facts = (f"{word} {machine[key]}" for key, word in FACTS.items() if key != "gpu" and machine.get(key))
    yield ", ".join(facts) + ".\n"
    yield "\n| piece | result | seconds | what it said |\n| :-- | :-- | --: | :-- |\n"
    for name, result in done.items():
        last = str(result["last"]).replace("|", "\\|")
        yield f"| {name} | {result['status']} | {result['seconds']:.0f} | {last} |\n"
    if rows := [row for result in done.values() for row in figures(result)]:
        yield "\n| op | x, weight | backend | us | GB/s | of copy | TFLOP/s | of peak | vs best peer |\n"
        yield "| :-- | :-- | :-- " + "| --: " * 6 + "|\n"
        yield from rows
    if machine.get("missing"):
        yield "\nNot installed there: " + "; ".join(machine["missing"]) + ".\n"


def figures(result: dict[str, Any]) -> Iterator[str]:
    """The rows of quantlib's own that a piece of the benchmarks left; the whole of them is in the JSON."""
    for row in (result.get("results") or {}).get("rows", []):
        if row["role"] == "ours":
            what = " ".join(str(row[key]) for key in ("op", "conversion", "per") if row[key])
            keys = ("gb_per_s", "of_copy", "tflop_per_s", "of_peak", "speedup")
            time = f"{row['min'] * 1e6:.2f}" if row["min"] is not None else row["error"] or "-"
            cells = [time, *(f"{row[key]:.3g}" if row.get(key) is not None else "-" for key in keys)]
            words = [what, "x".join(map(str, row["shape"])), row["backend"], *cells]
            yield "| " + " | ".join(word.replace("|", "\\|") for word in words) + " |\n"


def with_results(page: str, text: str) -> str:
    """``page`` with ``text`` between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


def write() -> None:
    PAGE.write_text(with_results(PAGE.read_text(), rendered()))


if __name__ == "__main__":
    write()
