"""Where tensors are read from, and reading them once, checked, while a plan runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from gearshift.plan.expressions import Expression, Reference, Schema, Slice, TensorInfo, sources
from gearshift.plan.regions import Box, peel

_CHECKED_AT_ONCE = 1 << 22


class Source(Protocol):
    """Named tensors that are read when asked for, whole or in part."""

    @property
    def schema(self) -> Schema:
        """Every tensor's shape and dtype, known without reading one."""
        ...

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """The tensor `name` on the CPU, or the elements `box` of it: contiguous or a view, never to be written to."""
        ...


class Extent(NamedTuple):
    """The bytes of some elements, in order and little-endian, as they lie in a file."""

    path: Path
    offset: int
    bytes: int


@runtime_checkable
class FileSource(Source, Protocol):
    """A source whose tensors can be copied from file to file."""

    def extent(self, name: str, box: Box | None = None) -> Extent | None:
        """Where the tensor `name`, or the elements `box` of it, lies; None if it does not lie in one piece."""
        ...


class MappingSource:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.schema: Schema = {name: info_of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return tensor if box is None else tensor[tuple(slice(*interval) for interval in box)]


class CheckedSource:
    """A source for one run over `expressions`: it refuses non-finite values, and keeps what will be read again.

    At most `kept_bytes` are kept, the oldest tensor making way for the newest.
    """

    def __init__(self, source: Source, expressions: Iterable[Expression], kept_bytes: int) -> None:
        self._source = source
        self.schema: Schema = source.schema
        self._left = Counter(read for expression in expressions for read in _reads(expression, self.schema))
        self._checked: set[tuple[str, Box | None]] = set()
        self._kept: dict[tuple[str, Box | None], torch.Tensor] = {}
        self._room = kept_bytes

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """As `Source.read`; ValueError, with the tensor's name and how many, for values that are not finite."""
        key = (name, box)
        self._left[key] -= 1
        if key in self._kept:
            return self._kept[key] if self._left[key] > 0 else self._drop(key)
        tensor = self._source.read(name, box)
        if key not in self._checked:
            if count := count_nonfinite(tensor):
                raise ValueError(
                    f"source tensor {name!r} holds {count} non-finite value{'s' if count > 1 else ''} "
                    f"among {tensor.numel()}; the checkpoint is damaged or its training diverged: use another one"
                )
            self._checked.add(key)
        if self._left[key] > 0:
            self._keep(key, tensor)
        return tensor

    def _keep(self, key: tuple[str, Box | None], tensor: torch.Tensor) -> None:
        while self._kept and self._room < tensor.nbytes:
            self._drop(next(iter(self._kept)))
        if tensor.nbytes <= self._room:
            self._kept[key] = tensor
            self._room -= tensor.nbytes

    def _drop(self, key: tuple[str, Box | None]) -> torch.Tensor:
        tensor = self._kept.pop(key)
        self._room += tensor.nbytes
        return tensor


def region_read(expression: Expression, schema: Schema) -> tuple[str, Box | None] | None:
    """The name and box that one read answers an expression with: a reference, or slices of one. None for all others."""
    if isinstance(expression, Reference):
        return expression.name, None
    if isinstance(expression, Slice):
        base, box = peel(expression, schema)
        if isinstance(base, Reference):
            return base.name, box
    return None


def _reads(expression: Expression, schema: Schema) -> Iterable[tuple[str, Box | None]]:
    """The reads that evaluating an expression makes, in order."""
    read = region_read(expression, schema)
    if read is not None:
        yield read
    else:
        for source in sources(expression):
            yield from _reads(source, schema)


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """A tensor's shape and dtype."""
    return TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def count_nonfinite(tensor: torch.Tensor) -> int:
    """How many values of a tensor are infinite or not a number.

    A sum runs at memory speed and is finite only if every term is; the slower count is for when it is not, which
    finite terms that overflow also cause.
    """
    if not tensor.is_floating_point():
        return 0
    # torch neither sums nor tests eight-bit floats; float16 holds them all.
    narrow = tensor.element_size() == 1
    if not narrow and tensor.sum().isfinite():
        return 0
    chunks = tensor.reshape(-1).split(_CHECKED_AT_ONCE)
    return sum(int((~(chunk.half() if narrow else chunk).isfinite()).sum()) for chunk in chunks)
