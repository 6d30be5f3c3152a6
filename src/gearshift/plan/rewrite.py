"""Rewriting expressions: substitution, the simplifications that change no value, and fixed names for initialisers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate, count

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
    map_sources,
    widens,
)


def bind(expression: Expression, name: str) -> Expression:
    """Write out the names under which unnamed initialisers of target `name` are drawn.

    The first takes the target's name; further ones take it with `#1`, `#2`, ..., so that no two draw the same values.
    """
    if isinstance(expression, Reference):
        return expression
    numbers = count()

    def visit(part: Expression) -> Expression:
        if isinstance(part, Initialise) and part.name is None:
            number = next(numbers)
            return replace(part, name=f"{name}#{number}" if number else name)
        return map_sources(part, visit)

    return visit(expression)


def substitute(expression: Expression, definitions: Mapping[str, Expression]) -> Expression:
    """The expression with every reference replaced by its definition."""
    if isinstance(expression, Reference):
        return definitions[expression.name]
    return map_sources(expression, lambda source: substitute(source, definitions))


def simplify(expression: Expression, schema: Schema) -> Expression:
    """An expression of the same value with the operations that cancel or do nothing taken out."""
    if isinstance(expression, Reference):
        return expression
    expression = map_sources(expression, lambda source: simplify(source, schema))
    while (reduced := _reduce(expression, schema)) is not None:
        expression = reduced
    return expression


def _reduce(expression: Expression, schema: Schema) -> Expression | None:
    """One step at the top of an expression whose sources are simple; None where there is nothing to do."""
    match expression:
        case Slice():
            return _reduce_slice(expression, schema)
        case Concatenate():
            return _reduce_concatenate(expression)
        case Reshape(Reshape(source) | Stack((source,)), shape):
            return Reshape(source, shape)
        case Permute(Permute(source, inner), outer):
            return Permute(source, tuple(inner[dim] for dim in outer))
        case Permute(source, dims) if dims == tuple(range(len(dims))):
            return source
        case Repeat(source, _, 1):
            return source
        case Cast(Cast(source, wide), dtype) if widens(infer(source, schema).dtype, wide):
            return Cast(source, dtype)
        case Reshape(source) | Cast(source) if infer(expression, schema) == infer(source, schema):
            return source
    return None


def _reduce_slice(expression: Slice, schema: Schema) -> Expression | None:
    source, dim, start, stop = expression.source, expression.dim, expression.start, expression.stop
    if (start, stop) == (0, infer(source, schema).shape[dim]):
        return source
    match source:
        case Slice(inner, inner_dim, origin) if inner_dim == dim:
            return Slice(inner, dim, origin + start, origin + stop)
        case Stack(parts, stacked) if stacked == dim:
            return Stack(parts[start:stop], dim)
        case Concatenate(parts, joined) if joined == dim:
            edges = [0, *accumulate(infer(part, schema).shape[dim] for part in parts)]
            if start in edges and stop in edges:
                return Concatenate(parts[edges.index(start) : edges.index(stop)], dim)
    return None


def _reduce_concatenate(expression: Concatenate) -> Expression | None:
    """A single part is itself, and neighbouring slices of one tensor are one slice."""
    dim, parts = expression.dim, list(expression.sources[:1])
    for part in expression.sources[1:]:
        match parts[-1], part:
            case Slice(left, dim_left, start, middle), Slice(right, dim_right, begin, stop) if (
                dim_left == dim_right == dim and middle == begin and left == right
            ):
                parts[-1] = Slice(left, dim, start, stop)
            case _:
                parts.append(part)
    if len(parts) == 1:
        return parts[0]
    return Concatenate(tuple(parts), dim) if len(parts) < len(expression.sources) else None
