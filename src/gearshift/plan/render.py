"""A plan for people: a tree of its targets, layers that are made alike shown once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, fields

from rich.filesize import decimal
from rich.text import Text
from rich.tree import Tree

from gearshift.plan.expressions import (
    Cast,
    Concatenate,
    Expression,
    Initialise,
    Permute,
    Reference,
    Repeat,
    Reshape,
    Schema,
    Slice,
    Stack,
    map_sources,
)
from gearshift.plan.initialisers import Initialiser
from gearshift.plan.plan import Plan
from gearshift.plan.regions import describe_box

_MARK = "\x00"
_MARKED = re.compile(f"{_MARK}([0-9]+){_MARK}")


def describe(expression: Expression) -> str:
    """An expression in one short line: `repeat(k_proj.weight, dim 0, x3)`, `initialise normal(std 0.02, mean 0.0)`."""
    match expression:
        case Reference(name):
            return name
        case Slice(source, dim, start, stop):
            return f"slice({describe(source)}, dim {dim}, {start}:{stop})"
        case Concatenate(sources, dim):
            return f"concatenate({', '.join(map(describe, sources))}, dim {dim})"
        case Stack(sources, dim):
            return f"stack({', '.join(map(describe, sources))}, dim {dim})"
        case Reshape(source, shape):
            return f"reshape({describe(source)}, {list(shape)})"
        case Permute(source, dims):
            return f"permute({describe(source)}, {list(dims)})"
        case Repeat(source, dim, times):
            return f"repeat({describe(source)}, dim {dim}, x{times})"
        case Cast(source, dtype):
            return f"cast({describe(source)}, {dtype})"
        case Initialise(initialiser):
            return f"initialise {_describe_initialiser(initialiser)}"


def _describe_initialiser(initialiser: Initialiser) -> str:
    words = re.sub(r"(?<!^)(?=[A-Z])", "_", type(initialiser).__name__).lower()
    values = {item.name: getattr(initialiser, item.name) for item in fields(initialiser)}
    if len(values) == 1:
        return f"{words}({values.popitem()[1]})"
    return f"{words}({', '.join(f'{name} {value}' for name, value in values.items())})"


def render(plan: Plan) -> Tree:
    """The plan as a tree to print with rich: each target's shape, dtype and expression, then what is discarded and why.

    Targets are grouped by their dotted names. Groups under numbers that are alike but for the number stand together
    (`layers.0-47`), with that number in the names they reference shown as `*`.
    """
    tree = Tree(Text(f"{_total(plan.source)} → {_total(plan.target)}", style="bold"))
    targets = _Group()
    for name, info in plan.target.items():
        targets.add(name, f"{info} ← {describe(_with_marks(plan.expressions[name], name))}")
    targets.grow(tree)
    if plan.discards:
        discards = _Group()
        for discard in plan.discards:
            where = f"[{describe_box(discard.box)}] " if discard.box is not None else ""
            discards.add(discard.name, f"{where}({discard.reason})")
        discards.grow(tree.add(Text("discarded", style="bold")))
    return tree


def _with_marks(expression: Expression, target: str) -> Expression:
    """The expression with marks for those numbers in its references that repeat a number in the target's name.

    Mark k stands for the target's k-th number, which `_Group.grow` fills in with that number, or with a star where
    several numbers share the line.
    """
    if not isinstance(expression, Reference):
        return map_sources(expression, lambda source: _with_marks(source, target))
    unused = dict(enumerate(part for part in target.split(".") if part.isdecimal()))
    parts = []
    for part in expression.name.split("."):
        mark = next((k for k, number in unused.items() if number == part), None)
        if mark is not None:
            del unused[mark]
        parts.append(part if mark is None else f"{_MARK}{mark}{_MARK}")
    return Reference(".".join(parts))


@dataclass
class _Group:
    """A node in the tree of dotted names: a tensor's line, where a name ends here, and what lies below."""

    line: str | None = None
    children: dict[str, _Group] = field(default_factory=dict)

    def add(self, name: str, line: str) -> None:
        """Put a tensor's line at its place; a second line for the same name joins the first."""
        group = self
        for part in name.split("."):
            group = group.children.setdefault(part, _Group())
        group.line = line if group.line is None else f"{group.line}, {line}"

    def grow(self, tree: Tree, prefix: str = "", numbers: tuple[str, ...] = ()) -> None:
        """Add what lies below to `tree`; `numbers` are those on the way here, as they are to be shown."""
        for keys, child in self._branches():
            label = prefix + (keys[0] if len(keys) == 1 else spans(map(int, keys)))
            within = (*numbers, keys[0] if len(keys) == 1 else "*") if keys[0].isdecimal() else numbers
            if child.line is not None:
                tree.add(Text(f"{label}  {_filled(child.line, within)}"))
            if child.line is None and len(child._branches()) == 1:
                child.grow(tree, f"{label}.", within)
            elif child.children:
                child.grow(tree.add(Text(label)), "", within)

    def _branches(self) -> list[tuple[list[str], _Group]]:
        """The children, numbered ones that are alike together under all their numbers."""
        alike: dict[Hashable, list[str]] = defaultdict(list)
        for key, child in self.children.items():
            alike[child._signature() if key.isdecimal() else key].append(key)
        return [(keys, self.children[keys[0]]) for keys in alike.values()]

    def _signature(self) -> Hashable:
        return self.line, tuple((key, child._signature()) for key, child in self.children.items())


def _filled(line: str, numbers: tuple[str, ...]) -> str:
    return _MARKED.sub(lambda mark: numbers[int(mark[1])], line)


def spans(numbers: Iterable[int]) -> str:
    """Numbers, runs of them shortened: `0-3,5`."""
    there = set(numbers)
    starts = sorted(number for number in there if number - 1 not in there)
    stops = sorted(number for number in there if number + 1 not in there)
    return ",".join(
        f"{start}" if start == stop else f"{start}-{stop}" for start, stop in zip(starts, stops, strict=True)
    )


def _total(schema: Schema) -> str:
    return f"{len(schema)} tensors, {decimal(sum(info.bytes for info in schema.values()))}"
