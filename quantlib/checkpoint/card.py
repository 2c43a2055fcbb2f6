"""The model card of a checkpoint, ``README.md`` in the format of the Hugging Face Hub.

Front matter and words of the base model's own card are passed on, its license above all. Nothing in it depends on the
place or the time of the work, so that the same work gives the same card.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantlib import __version__
from quantlib.report import LayerReport

NAME = "README.md"
FRONT = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
PASSED_ON = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name", "datasets")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MOST_ROWS = 200  # of the table of layers: the worst
OURS = "quantlib"  # the tag of our own cards


@dataclass
class Card:
    """The facts that a model card states.

    Attributes
    ----------
    spec : str
        The format of the weights; empty for a model of floats.
    command : str
        The command that makes the same checkpoint.
    layers : list of LayerReport
        The reports of the weights that were quantized.
    quantized, floats : int
        Parameters.
    bytes_before, bytes_after : int
        The sizes of the tensors of the model.
    skipped : dict
        Name of a float tensor of two or more axes -> why it is not quantized.
    notes : list of str
        Further remarks, such as values that could not be held exactly.
    base : dict
        The front matter of the card of the base model.
    base_text : str
        The rest of it.
    base_model : str
        Its name on the hub; empty where that is not known.
    """

    spec: str
    command: str
    layers: Sequence[LayerReport] = ()
    quantized: int = 0
    floats: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    skipped: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    base_text: str = ""
    base_model: str = ""
    transformers: bool = False  # True if config.json is that of a model of transformers
    load: str = ""  # lines of Python instead of the usual ones

    def front(self) -> dict[str, Any]:
        """The metadata."""
        found: dict[str, Any] = {key: self.base[key] for key in PASSED_ON if self.base.get(key)}
        if self.transformers:
            found.setdefault("library_name", "transformers")
        if self.base_model:
            found["base_model"] = self.base_model
            found["base_model_relation"] = "quantized" if self.spec else "finetune"
        if not self.spec:
            found.pop("base_model_relation", None)
        tags = self.base.get("tags")
        given = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
        ours = [OURS, *sorted({layer.spec.partition(":")[0] for layer in self.layers})]
        found["tags"] = [*given, *(tag for tag in ours if tag not in given)]
        return found

    def __str__(self) -> str:
        title = self.base_model.rpartition("/")[2] or "Model"
        lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in self.front().items())]
        lines += ["---", "", f"# {title}{f', {self.spec}' if self.spec else ', floats'}", ""]
        base = f"[{self.base_model}](https://huggingface.co/{self.base_model})" if self.base_model else "a model"
        made = f"quantized to `{self.spec}`" if self.spec else "turned into floats"
        lines += [f"This is {base}, {made} with quantlib {__version__}.", ""]
        lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in self.facts())]
        lines += ["", "## How it was made", "", "```console", f"$ {self.command}", "```", ""]
        lines += ["## How to load it", "", "```python", *self.loading(), "```", ""]
        lines += ["## Limits", "", *(f"- {line}" for line in self.limits()), ""]
        if self.layers:
            lines += [*self.table(), ""]
        if self.skipped:
            names = sorted(self.skipped)
            lines += ["## What stays a float", "", "| tensor | because |", "|---|---|"]
            lines += [f"| {cell(name)} | {cell(self.skipped[name])} |" for name in names[:MOST_ROWS]]
            lines += [f"| {len(names) - MOST_ROWS} more | |"] * (len(names) > MOST_ROWS) + [""]
        if self.base_text.strip():
            lines += ["## Card of the base model", "", self.base_text.strip(), ""]
        return "\n".join(lines)

    def facts(self) -> list[tuple[str, str]]:
        total = self.quantized + self.floats
        facts = [("format of the weights", f"`{self.spec}`" if self.spec else "floats")]
        if total:
            facts.append(
                ("parameters that are quantized", f"{self.quantized:,} of {total:,}, {self.quantized / total:.1%}")
            )
        if self.bytes_before:
            ratio = f"{self.bytes_before / self.bytes_after:.2f} x smaller" if self.bytes_after else ""
            facts.append(("bytes of the tensors", f"{self.bytes_before:,} before, {self.bytes_after:,} after, {ratio}"))
        ratios = sorted(layer.snr_db for layer in self.layers if not math.isnan(layer.snr_db))
        if ratios:
            worst = f"{ratios[0]:.1f} dB" if ratios[0] < math.inf else "no error"
            facts.append(("least signal-to-noise ratio of a layer", worst))
        license = self.base.get("license_name") or self.base.get("license")
        facts.append(("license", cell(str(license)) if license else "that of the base model, whose card names none"))
        facts.append(("made with", f"quantlib {__version__}"))
        return facts

    def loading(self) -> list[str]:
        if self.load:
            return self.load.splitlines()
        if not self.spec:
            return [
                "from transformers import AutoModel",
                "",
                'model = AutoModel.from_pretrained("PATH OR NAME OF THIS")',
            ]
        if self.transformers:
            return [
                "import quantlib.hf  # pip install quantlib-torch",
                "from transformers import AutoModel  # or AutoModelForCausalLM, and so on",
                "",
                'model = AutoModel.from_pretrained("PATH OR NAME OF THIS")',
            ]
        return [
            "from quantlib.checkpoint import load_quantized  # pip install quantlib-torch",
            "",
            'model = load_quantized(model, "PATH OF THIS")  # into a model of the same architecture',
        ]

    def limits(self) -> list[str]:
        lines = list(self.notes)
        if self.layers:
            lines.append(
                "The ratios below are of weights, not of outputs: measure the quality of answers on your own task."
            )
            lines.append("No calibration data were used: each scale follows from the weights that share it.")
        lines.append("What the base model is not fit for, this one is not fit for either.")
        return lines

    def table(self) -> list[str]:
        """The layers in their order; where there are many, the worst of them."""
        layers = list(self.layers)
        lines = ["## Error of each layer", ""]
        if len(layers) > MOST_ROWS:
            worst = sorted(layers, key=lambda layer: -math.inf if math.isnan(layer.snr_db) else layer.snr_db)[
                :MOST_ROWS
            ]
            chosen = {id(layer) for layer in worst}
            lines += [f"The {MOST_ROWS} layers with the largest error, of {len(layers):,}.", ""]
            layers = [layer for layer in layers if id(layer) in chosen]
        lines += ["SNR is 10 log10 of the sum of squares of the weights over that of their errors.", ""]
        lines += ["| layer | shape | format | bytes | SNR dB |", "|---|---|---|--:|--:|"]
        for layer in layers:
            shape = " x ".join(map(str, layer.shape))
            ratio = "-" if math.isnan(layer.snr_db) else f"{layer.snr_db:.1f}"
            lines.append(f"| {cell(layer.name)} | {shape} | {layer.spec} | {layer.bytes_after:,} | {ratio} |")
        return lines


def cell(text: str) -> str:
    """``text`` in a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def base_of(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read the card of a model folder: front matter, text and name on the hub, for `Card`."""
    front, text = read_card(path / NAME)
    tags = front.get("tags")
    ours = isinstance(tags, list) and OURS in tags
    named = front.get("base_model") if ours else config.get("_name_or_path")
    snapshot = re.search(r"models--([\w.-]+?)--([\w.-]+?)(/|$)", str(path.resolve()))
    name = f"{snapshot[1]}/{snapshot[2]}" if snapshot else named
    if not isinstance(name, str) or not HUB_ID.fullmatch(name):
        name = ""
    return {
        "base": front,
        "base_text": text.partition("## Card of the base model")[2] if ours else text,
        "base_model": name,
        "transformers": "model_type" in config or "architectures" in config,
    }


def read_card(path: Path) -> tuple[dict[str, Any], str]:
    """Front matter and text of a card; empty where there is none, or none that can be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError):
        return {}, ""
    match = FRONT.match(text)
    if match is None:
        return {}, text
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        pairs = re.findall(r"^(\w+): *['\"]?([^'\"#\n\[{]+?)['\"]? *$", match[1], re.MULTILINE)
        return dict(pairs), text[match.end() :]
    try:
        front = yaml.safe_load(match[1])
        json.dumps(front)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):  # no YAML, or values that JSON does not have
        front = {}
    return front if isinstance(front, dict) else {}, text[match.end() :]
