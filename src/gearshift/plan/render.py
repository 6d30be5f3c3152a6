"""A plan for people: a tree of its targets, what is made alike shown once."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property

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

    Targets are grouped by their dotted names. What is alike but for a number or a name stands together
    (`layers.0-47`, `{q_proj, o_proj}`), that number or name shown as `*` where a source's name repeats it. Of layers
    that are alike in part, what they share stands under all their numbers, and the rest under the numbers it is of.
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
    """The expression with marks for those parts of its references' names that repeat a part of the target's name.

    Mark k stands for the k-th part of the target's name, which `_Group.grow` fills in: with that part, or with a star
    where several targets share the line.
    """
    if not isinstance(expression, Reference):
        return map_sources(expression, lambda source: _with_marks(source, target))
    unused = dict(enumerate(target.split(".")))
    parts = []
    for part in expression.name.split("."):
        mark = next((k for k, repeated in unused.items() if repeated == part), None)
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
        group = self.at(name.split("."))
        group.line = line if group.line is None else f"{group.line}, {line}"

    def at(self, path: Iterable[str]) -> _Group:
        """The group below this one at a path; it is made if it is not there."""
        group = self
        for part in path:
            group = group.children.setdefault(part, _Group())
        return group

    def grow(self, tree: Tree, prefix: str = "", above: tuple[str, ...] = ()) -> None:
        """Add what lies below to `tree`; `above` are the parts of names on the way here, as they are to be shown."""
        for keys, child in self.branches:
            label = prefix + _label(keys)
            within = (*above, keys[0] if len(keys) == 1 else "*")
            if child.line is not None:
                tree.add(Text(f"{label}  {_filled(child.line, within)}"))
            if child.line is None and len(child.branches) == 1:
                child.grow(tree, f"{label}.", within)
            elif child.children:
                child.grow(tree.add(Text(label)), "", within)

    @cached_property
    def branches(self) -> list[tuple[tuple[str, ...], _Group]]:
        """The children, what is alike in several under all their keys: in numbered ones, and in those with equal names
        below them."""
        alike: dict[tuple[Hashable, tuple[str, ...], Hashable], list[tuple[str, _Group]]] = defaultdict(list)
        for key, child in self.children.items():
            kind = None if key.isdecimal() else tuple(child.children)
            for path, part in child.parts():
                alike[kind, path, part.signature].append((key, part))
        branches: dict[tuple[str, ...], _Group] = {}
        for (_, path, _), members in alike.items():
            keys, (part, *_) = zip(*members, strict=True)
            place = branches.setdefault(keys, _Group()).at(path)
            place.line, place.children = part.line, part.children
        return list(branches.items())

    def parts(self) -> Iterator[tuple[tuple[str, ...], _Group]]:
        """What is alike, or not, as a whole, by its path: the first groups on each way down that hold single tensors.

        So the mixers of a layer are compared one by one, and a mixer is not torn apart.
        """
        if self.line is not None:
            yield (), self
            return
        for key, child in self.children.items():
            if child.line is None and all(below.size > 1 for below in child.children.values()):
                yield from (((key, *path), part) for path, part in child.parts())
            else:
                yield (key,), child

    @cached_property
    def size(self) -> int:
        """How many tensors there are here and below."""
        return (self.line is not None) + sum(child.size for child in self.children.values())

    @cached_property
    def signature(self) -> Hashable:
        """What is equal for groups that are alike."""
        return self.line, tuple((key, child.signature) for key, child in self.children.items())


def _label(keys: tuple[str, ...]) -> str:
    """What stands for one key or for several: `q_proj`, `{q_proj, o_proj}`, `0-47`."""
    if len(keys) == 1:
        return keys[0]
    return spans(map(int, keys)) if keys[0].isdecimal() else f"{{{', '.join(keys)}}}"


def _filled(line: str, names: tuple[str, ...]) -> str:
    return _MARKED.sub(lambda mark: names[int(mark[1])], line)


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
