"""Which kind of block each layer has, as a family's config says it.

A family whose layers differ names its kinds of block. Each of its layer fates reads one key and says, for every layer,
which kinds that allows; together they must leave one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    def read(self, value: Any, num_layers: int) -> Sequence[tuple[str, ...]]:
        if not isinstance(value, (list, tuple)) or len(value) != num_layers:
            raise ValueError(f"{self.key!r} must name the type of each of the {num_layers} layers, not {value!r}")
        for word in value:
            if word not in self.types:
                raise ValueError(f"{self.key!r} has the type {word!r}: known are {', '.join(self.types)}")
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


def pattern_of(layout: Sequence[str]) -> list[str]:
    """The shortest pattern that repeats to `layout`, its last repeat cut short if need be."""
    for period in range(1, len(layout)):
        if all(name == layout[index % period] for index, name in enumerate(layout)):
            return list(layout[:period])
    return list(layout)
