"""Boxes of elements, and which boxes of its source tensors an expression reads: exactly, and by arithmetic alone."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import pairwise, product

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
)

Interval = tuple[int, int]
Box = tuple[Interval, ...]
"""(start, stop) for each dimension, stop not included."""


def whole(shape: tuple[int, ...]) -> Box:
    """The box that holds every element of a tensor."""
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    """How many elements a box holds."""
    return math.prod(stop - start for start, stop in box)


def describe_box(box: Box) -> str:
    """A box as it would be written in an index: `0:4, 2:8`."""
    return ", ".join(f"{start}:{stop}" for start, stop in box)


def intersect(left: Box, right: Box) -> Box | None:
    """The elements of both boxes, None where there are none."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return common if all(start < stop for start, stop in common) else None


def coalesce(boxes: Iterable[Box]) -> list[Box]:
    """The same elements in fewer boxes, sorted: boxes that differ in one dimension only, and meet there, are joined."""
    joined = set(boxes)
    rank = len(next(iter(joined), ()))
    count = len(joined) + 1
    while len(joined) < count:
        count = len(joined)
        for dim in range(rank):
            lanes = defaultdict(list)
            for box in joined:
                lanes[box[:dim], box[dim + 1 :]].append(box[dim])
            joined = {
                (*before, interval, *after)
                for (before, after), intervals in lanes.items()
                for interval in _join(intervals)
            }
    return sorted(joined)


def _join(intervals: list[Interval]) -> Iterator[Interval]:
    intervals.sort()
    start, stop = intervals[0]
    for next_start, next_stop in intervals[1:]:
        if next_start > stop:
            yield start, stop
            start = next_start
        stop = max(stop, next_stop)
    yield start, stop


def subtract(box: Box, others: Iterable[Box]) -> list[Box]:
    """The elements of `box` that no box of `others` holds, as sorted disjoint boxes."""
    if volume(box) == 0:
        return []
    inside = coalesce(common for other in others if (common := intersect(box, other)) is not None)
    return coalesce(_gaps(box, inside))


def _gaps(box: Box, inside: list[Box]) -> Iterator[Box]:
    """What sorted boxes within `box` leave of it: sweep the first dimension, recurse into the rest."""
    if not inside:
        yield box
        return
    if not box:
        return
    cuts = sorted({*box[0], *(edge for other in inside for edge in other[0])})
    active: list[Box] = []
    waiting = iter(inside)
    upcoming = next(waiting, None)
    for start, stop in pairwise(cuts):
        active = [other for other in active if other[0][1] > start]
        while upcoming is not None and upcoming[0][0] <= start:
            active.append(upcoming)
            upcoming = next(waiting, None)
        for gap in _gaps(box[1:], sorted(other[1:] for other in active)):
            yield ((start, stop), *gap)


def reads(expression: Expression, box: Box, schema: Schema) -> Iterator[tuple[str, Box]]:
    """Which elements of which tensors the elements `box` of `expression` are made of, boxes possibly overlapping."""
    match expression:
        case Reference(name):
            yield name, box
        case Initialise():
            return
        case Slice(source, dim, start, _):
            yield from reads(source, _moved(box, dim, start), schema)
        case Concatenate(sources, dim):
            yield from _reads_of_parts(sources, dim, box, schema)
        case Stack(sources, dim):
            for source in sources[slice(*box[dim])]:
                yield from reads(source, (*box[:dim], *box[dim + 1 :]), schema)
        case Reshape(source, shape):
            for part in reshaped(box, shape, infer(source, schema).shape):
                yield from reads(source, part, schema)
        case Permute(source, dims):
            intervals = dict(zip(dims, box, strict=True))
            yield from reads(source, tuple(intervals[dim] for dim in range(len(dims))), schema)
        case Repeat(source, dim, times):
            start, stop = box[dim]
            floors = (start // times, -(-stop // times))
            yield from reads(source, (*box[:dim], floors, *box[dim + 1 :]), schema)
        case Cast(source):
            yield from reads(source, box, schema)


def _reads_of_parts(sources: tuple[Expression, ...], dim: int, box: Box, schema: Schema) -> Iterator[tuple[str, Box]]:
    offset = 0
    for source in sources:
        shape = infer(source, schema).shape
        common = intersect(_moved(box, dim, -offset), whole(shape))
        if common is not None:
            yield from reads(source, common, schema)
        offset += shape[dim]


def peel(expression: Expression, schema: Schema) -> tuple[Expression, Box]:
    """The expression below a chain of slices, and the box of it that they cut out (all of it without a slice)."""
    if not isinstance(expression, Slice):
        return expression, whole(infer(expression, schema).shape)
    base, box = peel(expression.source, schema)
    origin = box[expression.dim][0]
    cut = (origin + expression.start, origin + expression.stop)
    return base, (*box[: expression.dim], cut, *box[expression.dim + 1 :])


def _moved(box: Box, dim: int, by: int) -> Box:
    start, stop = box[dim]
    return (*box[:dim], (start + by, stop + by), *box[dim + 1 :])


def reshaped(box: Box, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes of a tensor of `source_shape` that become `box` when it is reshaped to `shape`.

    Dimensions are matched in groups of equal products, and only within a group that is partly covered, and split or
    merged, does a box become several.
    """
    if volume(box) == 0:
        return
    groups = [_regrouped(box[new], shape[new], source_shape[old]) for new, old in _groups(shape, source_shape)]
    for parts in product(*groups):
        yield tuple(interval for part in parts for interval in part)


def _groups(left: tuple[int, ...], right: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """The shortest runs of dimensions of both shapes, in step, that hold equally many elements."""
    i = j = 0
    while i < len(left) or j < len(right):
        first_i, first_j = i, j
        i, j = min(i + 1, len(left)), min(j + 1, len(right))
        while (in_left := math.prod(left[first_i:i])) != (in_right := math.prod(right[first_j:j])):
            i, j = (i + 1, j) if in_left < in_right else (i, j + 1)
        yield slice(first_i, i), slice(first_j, j)


@lru_cache(maxsize=64)  # The layers of a model ask for the same few.
def _regrouped(box: Box, shape: tuple[int, ...], source_shape: tuple[int, ...]) -> tuple[Box, ...]:
    if box == whole(shape):
        return (whole(source_shape),)
    ranges = _flat_ranges(box, shape)
    return tuple(coalesce(part for start, stop in ranges for part in _boxes_of_range(start, stop, source_shape)))


def _flat_ranges(box: Box, shape: tuple[int, ...]) -> Iterator[Interval]:
    """The runs of row-major positions that a box, not the whole, covers."""
    last = max(dim for dim, interval in enumerate(box) if interval != (0, shape[dim]))
    run = math.prod(shape[last + 1 :])
    start, stop = box[last]
    for index in product(*(range(*interval) for interval in box[:last])):
        row = 0
        for position, size in zip(index, shape, strict=False):
            row = row * size + position
        row *= shape[last]
        yield (row + start) * run, (row + stop) * run


def _boxes_of_range(start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """A run of row-major positions as boxes: a partial first row, the full rows, a partial last row."""
    if not shape:
        yield ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:
        edges = [(last, start, stop)]
    else:
        edges = [(first - 1, start, first * row), (last, last * row, stop)]
    if first < last:
        yield ((first, last), *whole(shape[1:]))
    for index, begin, end in edges:
        if begin < end:
            for box in _boxes_of_range(begin - index * row, end - index * row, shape[1:]):
                yield ((index, index + 1), *box)
