"""A plan as a chart of stacked bars, and as a page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

from quantlib.plan.lines import Line, Plan, amount

COLOURS = {
    "codes": "#1f4e8c",
    "weights": "#3b6fb6",
    "scales": "#7fa8d9",
    "zero points": "#b9d0ec",
    "floats": "#6b7a8f",
    "cache": "#4f9d69",
    "gradients": "#c9a66b",
    "optimizer": "#8a6fb0",
    "buckets": "#d08fb0",
    "gathered": "#5bb5b0",
    "activations": "#e0803a",
    "activations and temporaries": "#e0803a",
    "slack": "#b5534a",
}
OTHER = "#999999"  # kinds of layers of a cache
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse;width:100%}
td{padding:.2rem .6rem;border-bottom:1px solid #e5e5e5;vertical-align:top}td.n{text-align:right;white-space:nowrap}
td.f{color:#666;font-size:.85rem}.bar{display:flex;height:1.1rem;background:#f2f2f2}.bar i{display:block}
.key i{display:inline-block;width:.8rem;height:.8rem;margin:0 .3rem 0 1rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}td{border-color:#333}.bar{background:#262626}}"""


def bars_of(plan: Plan) -> Iterator[tuple[str, Line]]:
    """(what it is of, line): the lines of bytes that are sums, except in the rule of thumb's own words."""
    for section in plan.sections:
        for line in section.lines:
            if line.unit == "bytes" and len(line.parts) > 1:
                yield section.title, line


def parts_of(plan: Plan) -> dict[str, str]:
    """The name of each part of a bar -> its colour."""
    names = dict.fromkeys(name for _, line in bars_of(plan) for name in line.parts)
    return {name: COLOURS.get(name, OTHER) for name in names}


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG: a bar for each sum of bytes, in GB, stacked of its parts.

    Raises
    ------
    ImportError
        Where matplotlib is not installed.
    ValueError
        For a plan without a sum of bytes.
    """
    from matplotlib.figure import Figure

    bars, colours = list(bars_of(plan)), parts_of(plan)
    if not bars:
        raise ValueError("plan must have a sum of bytes to draw, got none: a model has, a number of parameters has not")
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for y, (_, line) in enumerate(bars):
        left = 0.0
        for name, size in line.parts.items():
            axes.barh(y, size / 1e9, left=left, color=colours[name], height=0.7)
            left += size / 1e9
        axes.text(left, y, f" {line.value / 1e9:.2f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [f"{title.partition(',')[0]}: {line.name}" for title, line in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("GB")
    axes.set_title(plan.title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    for name, colour in colours.items():
        axes.barh(0, 0, color=colour, label=name)
    axes.legend(fontsize=7, loc="best")
    figure.savefig(path, dpi=150, format="png")


def as_html(plan: Plan) -> str:
    """A page with every table, the formula of every line, and bars; nothing is fetched by it."""
    colours = parts_of(plan)
    largest = max((line.value for _, line in bars_of(plan)), default=1) or 1
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>quantlib plan: {html.escape(plan.title)}</title><style>{STYLE}</style></head><body>"
    )
    key = "".join(f'<i style="background:{colour}"></i>{html.escape(name)}' for name, colour in colours.items())
    out = [
        head,
        f"<h1>{html.escape(plan.title)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in plan.fits),
        f'<p class="key">{key}</p>',
    ]
    for section in plan.sections:
        out.append(f"<h2>{html.escape(section.title)}</h2><table>")
        for line in section.lines:
            bar = "".join(
                f'<i style="width:{100 * size / largest:.2f}%;background:{colours[name]}" '
                f'title="{html.escape(f"{name}: {amount(size, line.unit)}")}"></i>'
                for name, size in line.parts.items()
                if name in colours and len(line.parts) > 1
            )
            out.append(
                f'<tr><td>{html.escape(line.name)}</td><td class="n">{html.escape(amount(line.value, line.unit))}</td>'
                f'<td class="f">{f"<div class=bar>{bar}</div>" if bar else ""}{html.escape(line.formula)}</td></tr>'
            )
        out.append("</table>")
    out += [f"<p>not planned: {html.escape(why)}</p>" for why in plan.missing]
    return "\n".join([*out, "</body></html>\n"])
