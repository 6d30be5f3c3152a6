"""Inverting expressions: every source tensor written as an expression over the targets that it went into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

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
    infer,
    sources,
    widens,
)
from gearshift.plan.regions import Box, Interval, intersect, peel, subtract, volume, whole
from gearshift.plan.rewrite import simplify


@dataclass(frozen=True, slots=True)
class _Piece:
    """The elements `box` of some tensor, as an expression over the targets, and the target they are found in."""

    box: Box
    value: Expression
    target: str


def inverse_expressions(source: Schema, target: Schema, expressions: Mapping[str, Expression]) -> dict[str, Expression]:
    """For every tensor of `source` an expression over `target`; ValueError, with the target and why, if there is none.

    Each target's expression is undone from the outside in, down to the references and to whatever is sliced. There
    the pieces that all targets hold are collected, and put together once they are complete.
    """
    collected = _Collector(source)
    for name, expression in expressions.items():
        collected.undo(expression, Reference(name), name)
    inverse = collected.assemble()
    return {name: simplify(inverse[Reference(name)], target) for name in source}


class _Collector:
    """Pieces of the references, and of the sliced expressions, that the targets hold."""

    def __init__(self, schema: Schema) -> None:
        self._schema = schema
        self._pieces: dict[int, dict[Expression, list[_Piece]]] = defaultdict(lambda: defaultdict(list))

    def undo(self, expression: Expression, value: Expression, target: str) -> None:
        """Take it that `value`, over the targets, equals `expression`, over the sources."""
        match expression:
            case Reference() | Slice():
                base, box = peel(expression, self._schema)
                self._pieces[_depth(base)][base].append(_Piece(box, value, target))
            case Reshape(source):
                self.undo(source, Reshape(value, infer(source, self._schema).shape), target)
            case Permute(source, dims):
                self.undo(source, Permute(value, tuple(dims.index(dim) for dim in range(len(dims)))), target)
            case Concatenate(parts, dim):
                start = 0
                for part in parts:
                    stop = start + infer(part, self._schema).shape[dim]
                    self.undo(part, Slice(value, dim, start, stop), target)
                    start = stop
            case Stack(parts, dim):
                for index, part in enumerate(parts):
                    shape = infer(part, self._schema).shape
                    self.undo(part, Reshape(Slice(value, dim, index, index + 1), shape), target)
            case Cast(source, dtype):
                original = infer(source, self._schema).dtype
                if not widens(original, dtype):
                    raise _not_invertible(target, f"the cast from {original} to {dtype} rounds")
                self.undo(source, Cast(value, original), target)
            case Repeat():
                raise _not_invertible(target, "it repeats elements")
            case Initialise():
                raise _not_invertible(target, "it is initialised, so no source holds its values")

    def assemble(self) -> dict[Expression, Expression]:
        """Each reference with its value over the targets.

        What is sliced holds its own parts, so the deepest expressions are put together first: once they are undone in
        turn, the pieces of all shallower ones are complete.
        """
        while deep := max(self._pieces, default=0):
            for base, pieces in self._pieces.pop(deep).items():
                self.undo(base, _whole_of(base, pieces, self._schema), pieces[0].target)
        return {base: _whole_of(base, pieces, self._schema) for base, pieces in self._pieces[0].items()}


def _depth(expression: Expression) -> int:
    return max((1 + _depth(source) for source in sources(expression)), default=0)


def _not_invertible(target: str, why: str) -> ValueError:
    return ValueError(f"the plan cannot be inverted at target {target!r}: {why}")


def _whole_of(base: Expression, pieces: list[_Piece], schema: Schema) -> Expression:
    """The value of `base` from pieces that must partition it."""
    everything = whole(infer(base, schema).shape)
    if len(pieces) == 1 and pieces[0].box == everything:
        return pieces[0].value
    what = f"{base.name!r}" if isinstance(base, Reference) else "what it slices"
    if sum(volume(piece.box) for piece in pieces) > volume(everything):
        first, second = next((a, b) for a, b in combinations(pieces, 2) if intersect(a.box, b.box) is not None)
        raise _not_invertible(second.target, f"it uses elements of {what} that {first.target!r} uses too")
    if subtract(everything, (piece.box for piece in pieces)):
        raise _not_invertible(pieces[0].target, f"its slices, with those of other targets, leave out part of {what}")
    return _joined(pieces)


def _joined(pieces: list[_Piece]) -> Expression:
    """The pieces of a partition concatenated: cut straight through where no piece is in the way, then recurse."""
    if len(pieces) == 1:
        return pieces[0].value
    for dim in range(len(pieces[0].box)):
        cuts = _cuts([piece.box[dim] for piece in pieces])
        if len(cuts) > 2:
            between = [[p for p in pieces if start <= p.box[dim][0] < stop] for start, stop in pairwise(cuts)]
            return Concatenate(tuple(_joined(part) for part in between), dim)
    raise _not_invertible(pieces[0].target, "its slices and those of other targets interlock, with no straight cut")


def _cuts(intervals: Iterable[Interval]) -> list[int]:
    """The first start, the last stop, and every position between that no interval straddles."""
    ordered = sorted(intervals)
    cuts, reached = [ordered[0][0]], ordered[0][1]
    for start, stop in ordered[1:]:
        if start >= reached:
            cuts.append(start)
        reached = max(reached, stop)
    return [*cuts, reached]
