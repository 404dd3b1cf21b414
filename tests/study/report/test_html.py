"""HTML and charts: text is escaped, pages ask for nothing, lines lie where their values say."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from spt_fast.study.report.charts import COLOURS, Axis, Line, legend, line_chart
from spt_fast.study.report.html import (
    Html,
    Section,
    element,
    facts,
    heat_table,
    markup,
    page,
    paragraph,
    table,
)

EVIL = "<b>&\"'</b>"


class Tags(HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_text_and_attributes_are_escaped():
    built = [
        element("p", EVIL, title=EVIL),
        paragraph([EVIL, [EVIL]]),
        markup(EVIL),
        facts({EVIL: EVIL}),
        table(EVIL, [EVIL, EVIL], [[EVIL, EVIL]]),
        heat_table(EVIL, ([EVIL], [EVIL]), [[0.9]], [[EVIL]], corner=EVIL),
        legend([EVIL], {}),
        line_chart([Line(EVIL, [1, 2], [[1, 2]])], {}, x=Axis(EVIL), y=Axis(EVIL), title=EVIL),
        page(EVIL, Html(), [Section("a", EVIL, paragraph(EVIL))]),
    ]
    for each in built:
        assert "<b>" not in each
        assert "&lt;b&gt;" in each
        Tags(each)


def test_markup_is_left_alone():
    assert element("p", element("i", "a < b"), " c") == "<p><i>a &lt; b</i> c</p>"
    assert element("a", "x", class_="k", aria_label="l", open=True, href=None, hidden=False) == (
        '<a class="k" aria-label="l" open>x</a>'
    )


def test_a_page_asks_for_nothing():
    text = page("t", Html(), [Section("one", "One", paragraph("x")), Section("two", "Two", paragraph("y"))])
    assert 'content="default-src &#x27;none&#x27;; img-src data:' in text
    assert not re.search(r"https?:|@import|url\(|<script|<link|\bsrc=", text)
    assert [*re.findall(r'href="(.*?)"', text)] == ["#one", "#two"]
    assert 'id="one"' in text
    assert "prefers-color-scheme: dark" in text


def test_names_and_numbers_of_a_table():
    text = table("t", ["task", "arm", "n"], [["a", "b", "1"]], names=2)
    assert '<th scope="row" class="name">a</th><td class="name">b</td><td>1</td>' in text
    assert 'class="scroll"' in text


def test_shades_are_shares():
    text = heat_table("t", (["r"], ["a", "b", "c"]), [[0.0, 0.5, 7.0]], [["0", "5", "70"]], corner="")
    assert '<td>0</td><td style="--v:50%">5</td><td style="--v:100%" class="dark">70</td>' in text


def polylines(chart: str) -> list[list[tuple[float, float]]]:
    return [
        [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]
        for points in re.findall(r'<polyline points="(.*?)"', chart)
    ]


def test_lines_lie_where_their_values_are():
    chart = line_chart(
        [Line("a", [1, 2, 3], [[10, 20, 30], [20, 30, 40]]), Line("b", [1, 2, 3], [[0, 0, 0]])],
        {"a": 0, "b": 1},
        x=Axis("epoch"),
        y=Axis("loss", from_zero=True),
        title="t",
    )
    Tags(chart)
    (first, second) = polylines(chart)
    assert [x for x, _ in first] == [x for x, _ in second]
    heights = [y for _, y in first]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.11)
    # 15, 25 and 35 above 0, whose place is that of the second line.
    bottom = second[0][1]
    assert (bottom - heights[2]) / (bottom - heights[0]) == pytest.approx(35 / 15, rel=0.01)
    assert "a: 35 at 3" in chart
    assert "at the right end: a 35, b 0" in chart


def test_powers_are_evenly_apart():
    chart = line_chart(
        [Line("a", [1e-3, 1e-2, 1e-1], [[1, 2, 3]])],
        {},
        x=Axis("rate", logarithmic=True),
        y=Axis("y"),
        title="t",
    )
    ((a, _), (b, _), (c, _)) = polylines(chart)[0]
    assert b - a == pytest.approx(c - b, abs=0.11)
    assert all(f">{label}</text>" in chart for label in ("1e-3", "0.01", "0.1"))


@pytest.mark.parametrize("y", [[5.0], [0.0], [100.0], [3.0, 3.0]])
@pytest.mark.parametrize("axis", [Axis("y"), Axis("y", from_zero=True), Axis("y", limits=(0, 100))])
def test_one_value_is_inside_the_chart(y, axis):
    for logarithmic in (False, True):
        chart = line_chart(
            [Line("a", [*range(1, len(y) + 1)], [y])],
            {},
            x=Axis("x", logarithmic=logarithmic),
            y=axis,
            title="",
        )
        assert all(0 <= x <= 320 and 0 <= height <= 210 for x, height in polylines(chart)[0])


def test_long_lines_are_thinned_to_their_end():
    chart = line_chart([Line("a", [*range(1000)], [[*range(1000)]])], {}, x=Axis("x"), y=Axis("y"), title="")
    assert 60 <= len(polylines(chart)[0]) <= 120
    assert "a: 999 at 999" in chart
    assert len(re.findall("<title>", chart)) <= 15


def test_labels_do_not_overlap():
    rates = [1e-3, 1.1e-3, 1.2e-3, 1.0]
    chart = line_chart(
        [Line("a", rates, [[1, 2, 3, 4]])], {}, x=Axis("x", logarithmic=True), y=Axis("y"), title=""
    )
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="\d+" class="middle"', chart)]
    assert len(places) == 2
    assert places[1] - places[0] > 30


def test_more_names_than_colours_differ_in_more_than_colour():
    looks = {"a": 1, "b": 1 + COLOURS}
    text = legend(["a", "b"], looks)
    assert text.count("var(--c1)") == 2
    assert text.count("stroke-dasharray") == text.count("hollow") == 1


def test_seeds_are_a_band():
    chart = line_chart([Line("a", [1, 2], [[1, 2], [3, 2]])], {}, x=Axis("x"), y=Axis("y"), title="")
    (band,) = re.findall(r'<polygon points="(.*?)" class="band"', chart)
    (low, _, _, high) = [float(pair.split(",")[1]) for pair in band.split()]
    ((_, middle), _) = polylines(chart)[0]
    assert high < middle < low


def test_parts_of_epochs_have_whole_labels():
    chart = line_chart(
        [Line("a", [0.5, 1, 1.5, 2], [[1, 2, 3, 4]])], {}, x=Axis("epoch", whole=True), y=Axis("y"), title=""
    )
    labels = re.findall(r'class="middle">([^<]*)</text>', chart)
    assert labels == ["1", "2"]
