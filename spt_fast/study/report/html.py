"""HTML from Python: elements that escape their text, tables, notes, and a page that loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import TypeAlias

# The page may use what it holds, and nothing else: no scripts, no files, no network.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_EMPTY_ELEMENTS = {
    "br",
    "col",
    "image",
    "img",
    "meta",
    "rect",
    "line",
    "polyline",
    "polygon",
    "circle",
    "path",
}


class Html(str):
    """Markup. Any other string is text, whose <, & and quotes are escaped where it becomes part of a page."""

    __slots__ = ()


Content: TypeAlias = "str | Iterable[Content]"


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        anchor: unique in the page, of letters, digits and hyphens.
        title: its heading, and its line in the table of contents.
        body: what follows the heading.
    """

    anchor: str
    title: str
    body: Html


def markup(*parts: Content) -> Html:
    """The parts one after the other, text among them escaped."""
    return Html("".join(_escaped(part) for part in _flat(parts)))


def element(tag: str, *parts: Content, **attributes: object) -> Html:
    """`<tag attributes>parts</tag>`.

    Args:
        parts: markup, text, or iterables of both.
        attributes: an underscore at the end is dropped (`class_`), others become hyphens (`aria_label`). None
            and False leave an attribute out, True is one without a value.
    """
    given = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _EMPTY_ELEMENTS and not parts:
        return Html(f"<{tag}{given}/>")
    return Html(f"<{tag}{given}>{markup(*parts)}</{tag}>")


def paragraph(*parts: Content, **attributes: object) -> Html:
    """A paragraph."""
    return element("p", *parts, **attributes)


def note(*parts: Content) -> Html:
    """A paragraph about what cannot be shown, and why."""
    return paragraph(*parts, class_="note")


def folded(summary: str, *parts: Content, is_open: bool = False) -> Html:
    """What a reader may open."""
    return element("details", element("summary", summary), *parts, open=is_open)


def facts(values: Mapping[str, str]) -> Html:
    """Names and what they are, in lines that break where they are long."""
    return element("dl", [(element("dt", name), element("dd", value)) for name, value in values.items()])


def grid(items: Iterable[str], kind: str = "charts") -> Html:
    """Items side by side, as many as there is room for; `kind` is a class of the style sheet."""
    return element("div", items, class_=f"grid {kind}")


def figure(caption: Content, *parts: Content) -> Html:
    """What is shown, below its caption."""
    return element("figure", element("figcaption", caption), *parts)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, names: int = 1) -> Html:
    """A table that scrolls sideways by itself where it is wider than the screen.

    Args:
        names: columns from the left that name a row, flush left; all others are numbers, flush right.
    """
    head = element(
        "tr", [element("th", cell, scope="col", class_=_side(i, names)) for i, cell in enumerate(header)]
    )
    body = [element("tr", [_cell(i, cell, names) for i, cell in enumerate(row)]) for row in rows]
    whole = element("table", element("thead", head), element("tbody", body))
    # With a tabindex it can be scrolled by keyboard.
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def heat_table(
    caption: str,
    names: tuple[Sequence[str], Sequence[str]],
    shades: Sequence[Sequence[float]],
    labels: Sequence[Sequence[str]],
    *,
    corner: str,
) -> Html:
    """Values as shades of one colour, which a screen reader reads as a table.

    Args:
        names: of rows and columns.
        shades: [R][C] in [0, 1]; others are cut to that.
        labels: [R][C] what a cell says; may be "".
        corner: what rows and columns are.
    """
    head = [element("th", corner, scope="col"), *(element("th", name, scope="col") for name in names[1])]
    body = [
        element("tr", element("th", name, scope="row"), [_shade(*each) for each in zip(*row, strict=True)])
        for name, *row in zip(names[0], shades, labels, strict=True)
    ]
    whole = element("table", element("thead", element("tr", head)), element("tbody", body), class_="heat")
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def page(title: str, lead: Html, sections: Sequence[Section]) -> str:
    """A whole document with a table of contents; it holds its style and asks for nothing."""
    links = [element("li", element("a", section.title, href=f"#{section.anchor}")) for section in sections]
    contents = element("nav", element("p", "Contents"), element("ul", links), aria_label="Contents")
    parts = [
        element("section", element("h2", section.title), section.body, id=section.anchor)
        for section in sections
    ]
    head = markup(
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Html(_style())),
    )
    body = markup(contents, element("main", element("header", element("h1", title), lead), parts))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _style() -> str:
    return (files("spt_fast") / "study" / "report" / "report.css").read_text(encoding="utf-8")


def _flat(parts: Iterable[Content]) -> Iterable[str]:
    for part in parts:
        if isinstance(part, str):
            yield part
        else:
            yield from _flat(part)


def _escaped(part: str) -> str:
    return part if isinstance(part, Html) else escape(part)


def _attribute(name: str, value: object) -> str:
    name = name.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def _side(column: int, names: int) -> str | None:
    return "name" if column < names else None


def _cell(column: int, cell: str, names: int) -> Html:
    if column == 0:
        return element("th", cell, scope="row", class_="name")
    return element("td", cell, class_=_side(column, names))


def _shade(value: float, label: str) -> Html:
    value = min(max(value, 0.0), 1.0)
    if value < 0.005:
        return element("td", label)
    return element("td", label, style=f"--v:{100 * value:.0f}%", class_="dark" if value > 0.55 else None)
