"""What differs between two checkpoints, for people: settings, tensors that one lacks, values, layers put together."""

import json
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gearshift.diff import Change, Diff, Missing, TensorDifference
from gearshift.plan import Schema
from gearshift.plan.render import spans

T = TypeVar("T")
_MOST_ROWS = 20
_MOST_CHARACTERS = 100
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def render(diff: Diff, everything: bool = False) -> RenderableType:
    """A diff as text: one section for each kind of difference, then how many tensors are equal and how many differ.

    Unless `everything` is asked for, long lists are cut: layers whose tensors differ alike stand together first, their
    largest differences shown, and then so many rows are left.
    """
    parts: list[RenderableType] = []
    if diff.config:
        lines = [_change(change, everything) for change in diff.config]
        parts += [_title("config, A -> B"), *_cut(lines, everything), Text()]
    for side, schema in (("A", diff.only_a), ("B", diff.only_b)):
        if schema:
            parts += [_title(f"tensors only in {side}"), *_cut(_names(schema, everything), everything), Text()]
    if diff.tensors:
        parts += [_title("tensors that differ"), *_tensors(diff.tensors, everything), Text()]
    return Group(*parts, Text(_counts(diff)))


def _counts(diff: Diff) -> str:
    more = [f"{len(schema)} only in {side}" for side, schema in (("A", diff.only_a), ("B", diff.only_b)) if schema]
    more += ["the configs differ"] if diff.config else []
    return ", ".join([f"{diff.equal_tensors} tensors equal, {len(diff.tensors)} differ", *more])


def _title(text: str) -> Text:
    return Text(text, style="bold")


def _cut(lines: Sequence[Text], everything: bool) -> list[Text]:
    if everything or len(lines) <= _MOST_ROWS:
        return list(lines)
    return [*lines[:_MOST_ROWS], _more(len(lines) - _MOST_ROWS)]


def _more(count: int) -> Text:
    return Text(f"  and {count} more, which --all shows", style="dim")


def _change(change: Change, everything: bool) -> Text:
    a, b = (_value(value, everything) for value in (change.a, change.b))
    if change.a is Missing.MISSING:
        return Text(f"  {change.path}: only in B, {b}")
    if change.b is Missing.MISSING:
        return Text(f"  {change.path}: only in A, {a}")
    return Text(f"  {change.path}: {a} -> {b}")


def _value(value: Any, everything: bool) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if everything or len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _names(schema: Schema, everything: bool) -> list[Text]:
    if everything:
        return [Text(f"  {name}  {info}") for name, info in schema.items()]
    return [
        Text(f"  {label}  {schema[names[0]]}")
        for label, names in _by_layers((name, name, info) for name, info in schema.items())
    ]


def _tensors(tensors: Sequence[TensorDifference], everything: bool) -> Iterator[RenderableType]:
    groups: list[tuple[str, list[TensorDifference]]] = [(tensor.name, [tensor]) for tensor in tensors]
    if not everything and len(groups) > _MOST_ROWS:
        groups = list(_by_layers((t.name, t, (t.a, t.b)) for t in tensors))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for header in ("  max |a-b|\n  / max |a|", "\nmax |a-b|", "elements\nthat differ"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("\ntensor", overflow="fold")
    shown = groups if everything else groups[:_MOST_ROWS]
    for label, alike in shown:
        table.add_row(*_measured(alike), Text(f"{label}  {_infos(alike[0])}"))
    yield table
    if len(shown) < len(groups):
        yield _more(len(groups) - len(shown))


def _measured(tensors: list[TensorDifference]) -> tuple[str, str, str]:
    """The largest differences of some tensors, and how many of their elements differ."""
    values = [tensor.values for tensor in tensors if tensor.values]
    if not values:
        return "", "", "" if tensors[0].a.shape != tensors[0].b.shape else "0"
    nan = sum(value.nan for value in values)
    elements = f"{sum(value.elements for value in values):,}" + (f" ({nan:,} NaN)" if nan else "")
    return f"{max(v.relative for v in values):.2e}", f"{max(v.absolute for v in values):.2e}", elements


def _infos(tensor: TensorDifference) -> str:
    a, b = tensor.a, tensor.b
    if a.shape != b.shape:
        return f"{a} -> {b}"
    return f"{list(a.shape)} {a.dtype}" + (f" -> {b.dtype}" if a.dtype != b.dtype else "")


def _by_layers(items: Iterable[tuple[str, T, Hashable]]) -> Iterator[tuple[str, list[T]]]:
    """Items, each with a name and what it has to share, grouped where names differ in the layer's number only.

    Yields each group's name, such as `model.layers.0-3,5.mlp.up_proj.weight`, and its items.
    """
    groups: dict[Hashable, list[tuple[int, T]]] = defaultdict(list)
    for name, item, shared in items:
        layer = _LAYER.search(name)
        groups[_LAYER.sub("{}", name, count=1), shared].append((int(layer[0]) if layer else -1, item))
    for key, members in groups.items():
        assert isinstance(key, tuple)
        yield key[0].replace("{}", spans({number for number, _ in members})), [item for _, item in members]
