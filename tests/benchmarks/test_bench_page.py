"""The page of a run: well formed, whole, alone, and safe with whatever a peer's error says."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from benchmarks import page, roofline, svg
from benchmarks.case import LIMIT, OURS, PEER, Row

EVIL = "</td><script>alert('x')</script>&\"<b>"
MACHINE = {
    "device": f"a machine {EVIL}", "instructions": "none", "cores": 2, "threads": 2, "load": 0.5, "python": "3",
    "copy_gb_per_s": 40.0, "peak_tflop_per_s": {"float32": 0.1, "int8": 0.4}, "versions": {"torch": "2"},
    "date": "today", "quantlib": "1",
}  # fmt: skip
ROW = Row("scaled_matmul", "64x64 M=1", "int8 x int8", "row", (1, 64, 64), "quantlib cpp", OURS, runs=3, min=1e-3,
          median=2e-3, spread=0.1, bytes=10**7, gb_per_s=10.0, of_copy=0.25, flops=2 * 10**8, tflop_per_s=0.2,
          of_peak=0.5, speedup=2.0, differing=0, compared=64)  # fmt: skip
ROWS = [
    Row("call", "cast", "", "", (16,), "torch.empty_like", LIMIT, runs=1, min=1e-6, median=1e-6, spread=0.0),
    ROW,
    dataclasses.replace(ROW, backend="a <peer>", role=PEER, min=2e-3, of_peak=0.25, speedup=1.0, differing=64),
    Row("scaled_matmul", "64x64 M=1", "int8 x int8", "row", (1, 64, 64), f"missing {EVIL}", PEER, error=EVIL),
]
VOID = {"meta", "br"}


class Structure(HTMLParser):
    """Fails where a tag is closed that is not the open one; collects what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def text() -> str:
    return page.as_html(MACHINE, ROWS, complete=True)


def test_it_is_well_formed_and_holds_every_row(text: str) -> None:
    found = Structure(text)
    assert found.open == []
    assert [tag for tag, _ in found.tags].count("tr") == len(ROWS) + 2  # and the head of either family's table
    for row in ROWS:
        assert row.backend in found.words
    assert "1.00 ms" in found.words
    assert "2.00x" in found.words
    assert [tag for tag, _ in found.tags].count("script") == 1, "only its own"
    assert EVIL in found.words


def test_it_needs_nothing_else(text: str) -> None:
    found = Structure(text)
    assert not {tag for tag, _ in found.tags} & {"link", "img", "iframe", "object", "base"}
    for _, attributes in found.tags:
        assert not set(attributes) & {"src", "srcset", "style", "onclick", "onload"}
        assert (attributes.get("href") or "#").startswith("#")
    assert not re.search(r"https?:|url\(|@import", text)
    policy = next(a["content"] for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_links_lead_somewhere(text: str) -> None:
    found = Structure(text)
    ids = {attributes.get("id") for _, attributes in found.tags}
    links = {attributes["href"] for tag, attributes in found.tags if tag == "a"}
    assert links == {"#call", "#scaled_matmul"}
    assert {str(link)[1:] for link in links} <= ids


def test_light_and_dark_have_the_same_colours(text: str) -> None:
    light, dark = (set(re.findall(r"--\w+(?=:)", part)) for part in re.findall(r":root \{([^}]*)\}", text))
    assert light == dark
    assert set(re.findall(r"var\((--\w+)\)", text)) == light


def test_numbers_sort_as_numbers(text: str) -> None:
    """A cell is sorted by its figure, not by how it is written: 1 ms before 900 us would be wrong."""
    assert f'data-value="{ROW.min!r}">1.00 ms' in text
    assert f'data-value="{ROW.spread!r}">10%' in text


def test_sizes_have_a_line() -> None:
    rows = [dataclasses.replace(ROW, shape=(n,), bytes=n, min=1e-6 + n / 1e11) for n in (10**6, 10**7, 10**8)]
    found = Structure(page.as_html(MACHINE, rows, complete=True))
    assert found.open == []
    assert "Over all sizes" in found.words


def test_an_interrupted_run_says_so(text: str) -> None:
    assert "was interrupted" not in text
    assert "was interrupted" in page.as_html(MACHINE, ROWS[:1], complete=False)
    assert Structure(page.as_html({**MACHINE, "peak_tflop_per_s": {}}, [], complete=False)).open == []


@pytest.mark.parametrize("chart", [svg.bars(ROWS), svg.roof(MACHINE, ROWS)])
def test_charts_are_xml_within_their_frame(chart: str) -> None:
    root = ElementTree.fromstring(chart)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for shape in root.iter():
        for name, most in (("x", width), ("cx", width), ("x1", width), ("y1", height), ("cy", height)):
            if name in shape.attrib and "transform" not in shape.attrib:
                assert -20 <= float(shape.attrib[name]) <= most


def test_the_roofline_says_what_the_limit_is() -> None:
    roof = roofline.roof(MACHINE)
    assert roof.ridge("int8") == pytest.approx(10)
    (point,) = roofline.points(ROWS)
    assert (point.intensity, point.rate, point.peer_rate) == (20, pytest.approx(2e11), pytest.approx(1e11))
    assert point.peer is not None
    assert point.peer.backend == "a <peer>"
    frame = roofline.frame(roof, [point])
    assert frame.x[0] < roof.ridge("float32") < point.intensity < frame.x[1]
    assert frame.y[0] < point.peer_rate < max(roof.peaks.values()) < frame.y[1]
    assert roofline.decades(0.5, 1234.0) == [1, 10, 100, 1000]
