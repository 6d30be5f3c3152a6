"""Which kind of block each layer has, as a family's config says it.

A family whose layers differ names its kinds of block. Each of its layer fates reads one key and says, for every layer,
which kinds that allows. Of what all of them allow, the layer is of the kind that the family names first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Protocol


@dataclass(frozen=True)
class BlockKind:
    """One kind of block that a family has: a mixer and an MLP, by the names of their types."""

    mixer: str
    mlp: str = "gated"


class LayerFate(Protocol):
    """A key that tells layers apart."""

    @property
    def key(self) -> str:
        """The key of the family's config."""
        ...

    def read(self, value: Any, num_layers: int) -> Sequence[tuple[str, ...]]:
        """The kinds that the key allows each layer. ValueError if it does not say it for every layer."""
        ...

    def write(self, kinds: Sequence[str]) -> Any:
        """The key's value for layers of these kinds."""
        ...


@dataclass(frozen=True)
class LayerTypes:
    """A list with a word for every layer."""

    key: str
    types: Mapping[str, tuple[str, ...]]
    """Word -> the kinds that it stands for. Of several words for one kind, the first is written."""
    unsupported: Mapping[str, str] = field(default_factory=dict)
    """Other words that the family has -> what they mean, which no block of ours does."""
    optional: bool = False
    """Whether the key may be absent: then other keys say it."""

    def read(self, value: Any, num_layers: int) -> Sequence[tuple[str, ...]]:
        if value is None and self.optional:
            return [tuple(kind for stands in self.types.values() for kind in stands)] * num_layers
        if not isinstance(value, (list, tuple)) or len(value) != num_layers:
            raise ValueError(f"{self.key!r} must name the type of each of the {num_layers} layers, not {value!r}")
        for word in value:
            if not isinstance(word, str) or word not in {**self.types, **self.unsupported}:
                raise ValueError(f"{self.key!r} has the type {word!r}: known are {', '.join(self.types)}")
            if word in self.unsupported:
                raise ValueError(f"{self.key!r} has the type {word!r}: {self.unsupported[word]} is not supported")
        return [self.types[word] for word in value]

    def write(self, kinds: Sequence[str]) -> Any:
        words = {kind: word for word, stands in reversed(list(self.types.items())) for kind in stands}
        return [words[kind] for kind in kinds]


@dataclass(frozen=True)
class LayerNumbers:
    """A list of the numbers of some layers; null where it is as good as empty."""

    key: str
    listed: tuple[str, ...]
    """The kinds of the layers in the list."""
    others: tuple[str, ...]
    """The kinds of the rest."""
    null: bool = False
    """Whether an empty list is written as null."""

    def read(self, value: Any, num_layers: int) -> Sequence[tuple[str, ...]]:
        numbers = value or []
        if not isinstance(numbers, (list, tuple)) or not all(type(n) is int and 0 <= n < num_layers for n in numbers):
            raise ValueError(f"{self.key!r} must list layers from 0 to {num_layers - 1}, not {value!r}")
        return [self.listed if number in numbers else self.others for number in range(num_layers)]

    def write(self, kinds: Sequence[str]) -> Any:
        numbers = [number for number, kind in enumerate(kinds) if kind in self.listed]
        return None if self.null and not numbers else numbers


@dataclass(frozen=True)
class LayerSwitch:
    """Whether layers of some kinds are allowed."""

    key: str
    switched: tuple[str, ...]
    """The kinds that there are only where it is on."""
    others: tuple[str, ...]
    """The kinds that there may be always."""

    def read(self, value: Any, num_layers: int) -> Sequence[tuple[str, ...]]:
        return [self.others + (self.switched if value else ())] * num_layers

    def write(self, kinds: Sequence[str]) -> Any:
        return any(kind in self.switched for kind in kinds)


@dataclass(frozen=True)
class LayerStep:
    """A number n: every nth layer, from the nth on, may be of other kinds than the rest."""

    key: str
    every: tuple[str, ...]
    """The kinds that every nth layer may have."""
    others: tuple[str, ...]
    """The kinds that the rest may have."""

    def read(self, value: Any, num_layers: int) -> Sequence[tuple[str, ...]]:
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.key!r} must be a number of layers from 1 on, not {value!r}")
        return [self.others if (number + 1) % value else self.every for number in range(num_layers)]

    def write(self, kinds: Sequence[str]) -> Any:
        return 1


def kinds_of(
    fates: Sequence[LayerFate], values: Mapping[str, Any], num_layers: int, blocks: Sequence[str]
) -> list[str]:
    """The kind of every layer, of those in `blocks`. ValueError if the fates do not leave one."""
    allowed = [fate.read(values.get(fate.key), num_layers) for fate in fates]
    kinds: list[str] = []
    for number, choices in enumerate(zip(*allowed, strict=True)):
        left = reduce(lambda one, other: one & other, map(set, choices))
        if not left:
            keys = " and ".join(repr(fate.key) for fate in fates)
            raise ValueError(f"{keys} together mean no kind of block for layer {number}")
        kinds.append(next(kind for kind in blocks if kind in left))
    return kinds
