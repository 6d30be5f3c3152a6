"""Markup that escapes by default: text becomes markup in one place only."""

import re
from collections.abc import Iterable
from html import escape
from typing import TypeAlias

VOID = frozenset({"br", "col", "hr", "meta", "wbr"})
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
"""What neither HTML nor UTF-8 can hold."""


class Html(str):
    """Text that is markup already. Any other text is escaped on its way into a tag."""


Child: TypeAlias = "str | Iterable[Child] | None"
"""What a tag may hold: text, markup, nothing, or any of these one after another."""


def markup(child: Child) -> Html:
    """Markup of a child: Html as it is, text escaped, the parts of an iterable joined, None as nothing."""
    if child is None:
        return Html()
    if isinstance(child, Html):
        return child
    if isinstance(child, str):
        return Html(escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", child)))
    return Html("".join(markup(item) for item in child))


def tag(name: str, /, *children: Child, **attributes: str | bool | None) -> Html:
    """An element. `class_` stands for `class`, `aria_label` for `aria-label`; None and False leave an attribute out."""
    written = "".join(_attribute(key, value) for key, value in attributes.items() if value not in (None, False))
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{markup(children)}</{name}>")


def _attribute(key: str, value: str | bool | None) -> str:
    key = key.rstrip("_").replace("_", "-")
    return f" {key}" if value is True else f' {key}="{markup(str(value))}"'
