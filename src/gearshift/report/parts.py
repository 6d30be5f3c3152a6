"""What sections are made of."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gearshift.report.html import Child, Html, tag


@dataclass(frozen=True)
class Section:
    """A part of the page with a place in the table of contents."""

    anchor: str
    """Its id."""
    title: str
    """Its heading."""
    body: tuple[Child, ...]
    """What stands under the heading."""

    def html(self) -> Html:
        """The section as markup."""
        return tag("section", tag("h2", self.title), self.body, id=self.anchor)


def note(*children: Child) -> Html:
    """A paragraph that explains what is seen."""
    return tag("p", *children, class_="note")


def wide(*children: Child, least: int = 0) -> Html:
    """A box in which what is wider than the screen scrolls by itself.

    Args:
        children: what is in the box.
        least: width in pixels below which it scrolls rather than shrinks.
    """
    inner = tag("div", *children, style=f"min-width:{least}px") if least else children
    return tag("div", inner, class_="wide", tabindex="0")


def table(heads: Sequence[str], rows: Iterable[Sequence[Child]], numeric: Iterable[int] = ()) -> Html:
    """A table in a box of its own.

    Args:
        heads: headings of the columns.
        rows: cells.
        numeric: columns that are aligned at the right.
    """
    right = set(numeric)

    def cells(kind: str, row: Sequence[Child]) -> list[Html]:
        return [tag(kind, cell, class_="num" if place in right else None) for place, cell in enumerate(row)]

    head = tag("thead", tag("tr", cells("th", heads)))
    return wide(tag("table", head, tag("tbody", (tag("tr", cells("td", row)) for row in rows))))


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Names and values, one pair a line; pairs without a value are left out."""
    lines = (tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs if value is not None)
    return tag("dl", lines, class_="facts")


def folded(title: str, *children: Child) -> Html:
    """What only some readers want."""
    return tag("details", tag("summary", title), *children)


def plural(number: int, noun: str) -> str:
    """`1 layer`, `12 layers`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
