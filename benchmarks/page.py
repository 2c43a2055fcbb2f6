"""The whole run as one HTML page that needs nothing else: no network, no library, light or dark as the reader's."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

from . import graphs, report, roofline, svg
from .case import LIMIT, OURS, PEER, Row
from .targets import Verdict, verdicts

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # it cannot load a thing

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f5f6f8; --text: #1b1f24; --faint: #66707c; --edge: #dfe3e8;
  --ours: #2458b8; --tint: #2458b814; --peer: #c07a1a; --good: #1a7f4b; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2126; --text: #e4e7eb; --faint: #98a2ad;
  --edge: #333a42; --ours: #7aa7ff; --tint: #7aa7ff1c; --peer: #e0a458; --good: #5fc98f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 2rem 1.25rem 4rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .faint { color: var(--faint); } .bad { color: var(--bad); } .good { color: var(--good); }
nav a { margin-right: .9rem; color: var(--ours); text-decoration: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 10px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.15rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.chart { overflow-x: auto; } svg { width: 100%; min-width: 640px; height: auto; }
svg text { font-size: 12px; fill: var(--text); } svg .faint { fill: var(--faint); } svg .strong { font-weight: 600; }
.ours rect { fill: var(--ours); } .peer rect { fill: var(--peer); opacity: .75; }
.limit { stroke: var(--faint); stroke-dasharray: 4 3; } .grid { stroke: var(--edge); }
.roof { stroke: var(--text); stroke-width: 1.6; } .between { stroke: var(--faint); opacity: .5; }
.dot { fill: var(--ours); } .ring { fill: var(--back); stroke: var(--peer); stroke-width: 2; }
.table { overflow-x: auto; border: 1px solid var(--edge); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .5rem; text-align: right; white-space: nowrap; }
th { background: var(--card); position: sticky; top: 0; } .sorts th { cursor: pointer; user-select: none; }
th.left, td.left { text-align: left; } td.wrap { white-space: normal; min-width: 9rem; }
tr.first td { border-top: 1px solid var(--edge); } tr.mine { background: var(--tint); }
tr.mine td.who { font-weight: 600; }
th[aria-sort=ascending]::after { content: " \\25b4"; } th[aria-sort=descending]::after { content: " \\25be"; }
"""

# A click on a column sorts by it, a second one turns it round, a third restores the order of the run.
SCRIPT = """
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], original = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const next = { null: "ascending", ascending: "descending", descending: null }[head.getAttribute("aria-sort")];
    heads.forEach(other => other.removeAttribute("aria-sort"));
    if (next) head.setAttribute("aria-sort", next);
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      return (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y) * (next === "ascending" ? 1 : -1);
    };
    body.append(...(next ? [...original].sort(order) : original));
  }));
}
"""

LIMITS = (
    "The least time that the op's bytes need at the speed of a plain copy, or its FLOPs at the speed of torch's own "
    "products, over the time it took: 1 is the limit. Beside a bar stands how many times faster than the fastest peer "
    "of the case quantlib is."
)
ROOF = (
    "Every op that has FLOPs, under what memory and products of this machine allow, both measured in this run. "
    "Dots are quantlib, rings its fastest peer."
)
ROWS = (
    "A click on a column sorts. <i>differ</i> counts elements whose bytes are not the reference's; quantlib has a time "
    "only where there are none."
)

COLUMNS = ("case", "shape", *report.COLUMNS)


def as_html(machine: dict[str, Any], rows: Sequence[Row], complete: bool) -> str:
    """The page of a run."""
    families = list(dict.fromkeys(row.family for row in rows))
    found = verdicts(rows, machine)
    links = "".join(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>' for name in families)
    unfinished = "" if complete else '<p class="bad">The run was interrupted: this is what was measured until then.</p>'
    parts = [
        "<h1>quantlib bench</h1>",
        f'<p class="faint">{html.escape(report.headline(machine))}<br>{html.escape(circumstances(machine))}</p>',
        unfinished,
        cards(machine, rows, found),
        f"<nav>{links}</nav>",
        "<h2>How near to the limit</h2>",
        f"<p>{LIMITS}</p>",
        f'<div class="chart">{svg.bars(rows)}</div>',
        "<h2>Roofline</h2>",
        f"<p>{ROOF}</p>",
        f'<div class="chart">{svg.roof(machine, rows)}</div>',
        targets(found),
        sizes(rows),
        "<h2>Every row</h2>",
        f'<p class="faint">{ROWS}</p>',
        *(family(name, [row for row in rows if row.family == name]) for name in families),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>quantlib bench: {html.escape(str(machine['device']))}</title><style>{STYLE}</style></head>\n<body>"
        + "\n".join(filter(None, parts))
        + f"<script>{SCRIPT}</script></body></html>\n"
    )


def circumstances(machine: dict[str, Any]) -> str:
    """Return the other facts that the figures depend on."""
    versions = (f"{name} {version}" for name, version in machine.get("versions", {}).items() if version)
    return ", ".join(
        [f"quantlib {machine.get('quantlib')}", *versions, f"Python {machine.get('python')}", str(machine.get("date"))]
    )


def cards(machine: dict[str, Any], rows: Sequence[Row], found: Sequence[Verdict]) -> str:
    """The run in a few numbers."""
    raced = [best for group in roofline.grouped(rows) if (best := roofline.fastest(group, OURS)) and best.speedup]
    won, peers = (
        sum((row.speedup or 0) >= 1 for row in raced),
        {row.backend for row in rows if row.role == PEER and row.min},
    )
    judged = [v for v in found if v.met is not None]
    content = [
        ("plain copy", f"{machine['copy_gb_per_s']:.1f} GB/s"),
        *(
            (f"{roofline.PEAKS.get(dtype, dtype)} products", f"{report.figures(rate)} TFLOP/s")
            for dtype, rate in machine.get("peak_tflop_per_s", {}).items()
        ),
        ("fastest of all in", f"{won} of {len(raced)} cases"),
        ("peers that ran", str(len(peers))),
        ("targets met", f"{sum(bool(v.met) for v in judged)} of {len(judged)}"),
    ]
    inner = (
        f'<div class="card"><span class="faint">{html.escape(a)}</span><b>{html.escape(b)}</b></div>'
        for a, b in content
    )
    return f'<div class="cards">{"".join(inner)}</div>'


def targets(found: Sequence[Verdict]) -> str:
    if not found:
        return ""
    rows = (
        cell(v.target.case, "left")
        + cell(" ".join(filter(None, (str(v.target), report.peer(v)))), "left wrap")
        + cell(report.figure(v), value=v.measured)
        + cell(v.outcome, {True: "left good", False: "left bad", None: "left faint"}[v.met])
        for v in found
    )
    head = ("case", "target", "measured", "")
    return f"<h2>Targets</h2>{table(head, ('<tr>' + row + '</tr>' for row in rows), {'case', 'target', ''})}"


def sizes(rows: Sequence[Row]) -> str:
    """Slope and intercept of the cases that were timed at several sizes."""
    lines = [
        f"<tr>{cell(line.case, 'left')}{cell(line.backend, 'left')}"
        f"{cell(report.figures(line.gb_per_s), value=line.gb_per_s)}"
        f"{cell(f'{line.microseconds:.2f}', value=line.microseconds)}</tr>"
        for line in graphs.lines(rows)
    ]
    head = ("case", "backend", "GB/s", "us a call")
    return f"<h2>Over all sizes</h2>{table(head, lines, report.LEFT)}" if lines else ""


def family(name: str, rows: Sequence[Row]) -> str:
    """The table of a family, without the columns that nobody fills."""
    shapes = {"x".join(map(str, row.shape)) for row in rows}
    common = ", ".join(shapes) if len(shapes) == 1 else ""
    told = len({row.case for row in rows}) == len({(row.case, row.shape) for row in rows})  # by the shape or the name
    kept = [k for k, name in enumerate(COLUMNS) if not (name == "shape" and told)]
    kept = [k for k in kept if any("></td>" not in cells(row)[k] for row in rows)]
    lines = []
    for group in roofline.grouped(rows):
        for first, row in enumerate(group):
            kind = " ".join(filter(None, ("" if first else "first", "mine" if row.role == OURS else "")))
            lines.append(f'<tr class="{kind}">{"".join(cells(row)[k] for k in kept)}</tr>')
    title = f'<h3 id="{html.escape(name)}">{html.escape(name)} <span class="faint">{html.escape(common)}</span></h3>'
    return title + table([COLUMNS[k] for k in kept], lines, {"case", "shape", *report.LEFT})


def cells(row: Row) -> list[str]:
    """A row in the words of COLUMNS."""
    backend, *figures, note = report.cells(row)
    values = (
        row.min, row.median, row.spread, row.gb_per_s, row.of_copy, row.of_read_write, row.of_read, row.tflop_per_s,
        row.of_peak,
        row.above if row.above is not None else row.speedup, row.differing,
    )  # fmt: skip
    return [
        cell(svg.within(row) or row.case, "left"),
        cell("x".join(map(str, row.shape)), "left"),
        cell(backend, "left who faint" if row.role == LIMIT else "left who"),
        *(cell(text, value=value) for text, value in zip(figures, values, strict=True)),
        cell(note, "left wrap bad" if row.error or "artefact" in note else "left wrap faint"),
    ]


def cell(text: str, kind: str = "", value: float | None = None) -> str:
    """``value`` is what it is sorted by."""
    attributes = (f' class="{kind}"' if kind else "") + (f' data-value="{value!r}"' if value is not None else "")
    return f"<td{attributes}>{html.escape(text)}</td>"


def table(head: Sequence[str], rows: Iterable[str], left: set[str]) -> str:
    titles = "".join(f"<th{' class=left' if name in left else ''}>{html.escape(name)}</th>" for name in head)
    inner = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="table"><table class="sorts">{inner}</table></div>'
