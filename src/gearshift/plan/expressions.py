"""The closed set of expressions a plan is written in, and the shapes and dtypes they yield. Data, no torch."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from gearshift.plan.initialisers import Constant, Initialiser, LastTap, LogIndex

DTYPE_BYTES: Mapping[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}

_EXACTLY_HELD_BY: Mapping[str, frozenset[str]] = {
    "uint8": frozenset({"int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}),
    "int8": frozenset({"int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"}),
    "int16": frozenset({"int32", "int64", "float32", "float64"}),
    "int32": frozenset({"int64", "float64"}),
    "float8_e4m3fn": frozenset({"float16", "bfloat16", "float32", "float64"}),
    "float8_e5m2": frozenset({"float16", "bfloat16", "float32", "float64"}),
    "float16": frozenset({"float32", "float64"}),
    "bfloat16": frozenset({"float32", "float64"}),
    "float32": frozenset({"float64"}),
}


def widens(dtype: str, to: str) -> bool:
    """Whether every finite value of `dtype` is also a value of `to`, so that casting there and back changes nothing."""
    return to == dtype or to in _EXACTLY_HELD_BY.get(dtype, ())


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor without its values: its shape, and its dtype by torch's name without the prefix ("bfloat16").

    Raises ValueError for a negative size or an unknown dtype.
    """

    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPE_BYTES)}")
        if any(size < 0 for size in self.shape):
            raise ValueError(f"shape {self.shape} has a negative size; write every size out")

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * DTYPE_BYTES[self.dtype]

    def __str__(self) -> str:
        return f"{list(self.shape)} {self.dtype}"


Schema = Mapping[str, TensorInfo]


@dataclass(frozen=True, slots=True)
class Reference:
    """The source tensor of that name, whole."""

    name: str


@dataclass(frozen=True, slots=True)
class Slice:
    """Indices `start` up to, not including, `stop` along `dim`. Never empty."""

    source: Expression
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Concatenate:
    """The sources one after another along `dim`; they agree in dtype and in all other dimensions."""

    sources: tuple[Expression, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Stack:
    """The sources, equal in shape and dtype, along a new dimension `dim`."""

    sources: tuple[Expression, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Reshape:
    """The same elements in row-major order under another shape, every size written out."""

    source: Expression
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Permute:
    """Dimension i of the result is dimension `dims[i]` of the source."""

    source: Expression
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """Each index along `dim` repeated `times` in place: index i of the result is index i // times of the source."""

    source: Expression
    dim: int
    times: int


@dataclass(frozen=True, slots=True)
class Cast:
    """The values rounded to `dtype`."""

    source: Expression
    dtype: str


@dataclass(frozen=True, slots=True)
class Initialise:
    """Fresh values, drawn under (seed, `name`).

    Without a name the target's own is used; composition writes the name out, so that a tensor drawn in the first of
    two plans has the same values when both run as one.
    """

    initialiser: Initialiser
    shape: tuple[int, ...]
    dtype: str
    name: str | None = None


Expression = Reference | Slice | Concatenate | Stack | Reshape | Permute | Repeat | Cast | Initialise


def sources(expression: Expression) -> tuple[Expression, ...]:
    """The expressions directly below this one."""
    match expression:
        case Reference() | Initialise():
            return ()
        case Concatenate() | Stack():
            return expression.sources
        case _:
            return (expression.source,)


def map_sources(expression: Expression, function: Callable[[Expression], Expression]) -> Expression:
    """The same expression over `function` of each expression directly below it."""
    match expression:
        case Reference() | Initialise():
            return expression
        case Concatenate() | Stack():
            return replace(expression, sources=tuple(function(source) for source in expression.sources))
        case _:
            return replace(expression, source=function(expression.source))


def prevailing_dtype(schema: Schema) -> str:
    """The dtype of most elements."""
    sizes: dict[str, int] = {}
    for info in schema.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.elements
    return max(sizes, key=lambda dtype: sizes[dtype])


def references(expression: Expression) -> Iterator[str]:
    """The names of the tensors that an expression reads, left to right, repeated where they are read repeatedly."""
    if isinstance(expression, Reference):
        yield expression.name
    for source in sources(expression):
        yield from references(source)


def infer(expression: Expression, schema: Schema) -> TensorInfo:
    """The shape and dtype that `expression` yields over the tensors of `schema`.

    Raises ValueError, saying what does not fit, when there is no such tensor.
    """
    match expression:
        case Reference(name):
            return lookup(name, schema)
        case Initialise():
            return _infer_initialise(expression)
        case Slice(source, dim, start, stop):
            return _infer_slice(infer(source, schema), dim, start, stop)
        case Concatenate(parts, dim):
            return _infer_concatenate([infer(part, schema) for part in parts], dim)
        case Stack(parts, dim):
            return _infer_stack([infer(part, schema) for part in parts], dim)
        case Reshape(source, shape):
            return _infer_reshape(infer(source, schema), shape)
        case Permute(source, dims):
            info = infer(source, schema)
            if sorted(dims) != list(range(len(info.shape))):
                raise ValueError(f"permute: {dims} does not name each dimension of {info} once")
            return TensorInfo(tuple(info.shape[dim] for dim in dims), info.dtype)
        case Repeat(source, dim, times):
            info = infer(source, schema)
            _check_dim("repeat", dim, info)
            if times < 1:
                raise ValueError(f"repeat: times is {times}; it must be at least 1")
            return _resized(info, dim, info.shape[dim] * times)
        case Cast(source, dtype):
            return TensorInfo(infer(source, schema).shape, dtype)


def lookup(name: str, schema: Schema) -> TensorInfo:
    """What `schema` says of tensor `name`; ValueError with the nearest names where it knows none."""
    info = schema.get(name)
    if info is None:
        nearest = difflib.get_close_matches(name, schema, n=3)
        advice = f"the nearest names are {', '.join(map(repr, nearest))}" if nearest else "no name is near it"
        raise ValueError(f"there is no source tensor {name!r}; {advice}")
    return info


def _infer_initialise(expression: Initialise) -> TensorInfo:
    info = TensorInfo(expression.shape, expression.dtype)
    if not isinstance(expression.initialiser, Constant) and "float" not in info.dtype:
        raise ValueError(f"initialise: {expression.initialiser} draws fractions, which {info.dtype} cannot hold")
    if isinstance(expression.initialiser, LastTap | LogIndex) and not info.shape:
        kind = type(expression.initialiser).__name__
        raise ValueError(f"initialise: {kind} needs at least one dimension, the last of which it runs along")
    return info


def _infer_slice(info: TensorInfo, dim: int, start: int, stop: int) -> TensorInfo:
    _check_dim("slice", dim, info)
    if not 0 <= start < stop <= info.shape[dim]:
        raise ValueError(f"slice: {start}:{stop} is empty or outside dimension {dim} of {info}")
    return _resized(info, dim, stop - start)


def _infer_concatenate(parts: list[TensorInfo], dim: int) -> TensorInfo:
    if not parts:
        raise ValueError("concatenate: no sources; give at least one")
    first = parts[0]
    _check_dim("concatenate", dim, first)
    for part in parts[1:]:
        if len(part.shape) != len(first.shape) or _resized(part, dim, first.shape[dim]) != first:
            raise ValueError(f"concatenate: {part} does not continue {first} along dimension {dim}")
    return _resized(first, dim, sum(part.shape[dim] for part in parts))


def _infer_stack(parts: list[TensorInfo], dim: int) -> TensorInfo:
    if not parts:
        raise ValueError("stack: no sources; give at least one")
    first = parts[0]
    if not 0 <= dim <= len(first.shape):
        raise ValueError(f"stack: dimension {dim} is not one of 0 to {len(first.shape)}")
    for part in parts[1:]:
        if part != first:
            raise ValueError(f"stack: {part} differs from the first source, {first}")
    return TensorInfo((*first.shape[:dim], len(parts), *first.shape[dim:]), first.dtype)


def _infer_reshape(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    result = TensorInfo(shape, info.dtype)
    if result.elements != info.elements:
        raise ValueError(f"reshape: {info} has {info.elements} elements, {list(shape)} has {result.elements}")
    return result


def _resized(info: TensorInfo, dim: int, size: int) -> TensorInfo:
    return TensorInfo((*info.shape[:dim], size, *info.shape[dim + 1 :]), info.dtype)


def _check_dim(operation: str, dim: int, info: TensorInfo) -> None:
    if not 0 <= dim < len(info.shape):
        raise ValueError(f"{operation}: {info} has no dimension {dim}; dimensions count from 0")
