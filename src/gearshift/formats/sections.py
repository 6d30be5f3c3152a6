"""Configs that name their blocks freely and nest their settings: a table of fates for each section of them.

A section is a mapping in the config and the spec that it describes: the model, a block, a mixer of one kind. Its keys
and the spec's leaves have the fates of `fates`, and those below; each has exactly one, checked when it is built. A key
within a mapping is written with a dot. A null counts as an absent key, but for what is `Carried`. A default may be a
function of `Values`.
"""

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

from gearshift.formats.fates import REQUIRED, Carried, Constant, Fixed, Mapped, WeightDtype, takes_any
from gearshift.formats.leaves import leaves_below
from gearshift.formats.table import once
from gearshift.spec import Spec
from gearshift.spec.placement import MOST_LAYERS

Values = ChainMap[str, Any]
"""The values of a section's keys as far as they are read, and behind them those of the sections around it."""


def whole(values: Values, key: str, most: int = 2**31) -> int:
    """The value of a key that others are made from. ValueError if it is no whole number from 1 to `most`."""
    if type(value := values[key]) is not int or not 1 <= value <= most:
        raise ValueError(f"{key!r} must be a whole number from 1 to {most}, not {value!r}")
    return value


def used_blocks(pattern: str, layers: str, blocks: str) -> Callable[[Values], set[str]]:
    """Which blocks some layer has, by the keys that hold the pattern, the number of layers and all blocks."""

    def used(values: Values) -> set[str]:
        names = values[pattern]
        if not isinstance(names, (list, tuple)) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{pattern!r} must list names of blocks, not {names!r}")
        known = values[blocks]
        if isinstance(known, Mapping) and (strange := [name for name in names if name not in known]):
            there = ", ".join(map(str, known))
            raise ValueError(f"{pattern!r} names a block {strange[0]!r}, but the blocks are {there}")
        return set(islice(cycle(names), whole(values, layers, MOST_LAYERS)))

    return used


@dataclass(frozen=True)
class Repeated:
    """A key that must agree with the key `of`, of this section or of one around it."""

    key: str
    of: str
    path: str | None = None
    """The leaf that has this value, if it is another than that of `of`."""
    default: Any = REQUIRED
    """What its absence means, if not that it agrees."""


@dataclass(frozen=True)
class Stated:
    """A key that no leaf holds, because others say the same: the defaults of keys after it may be made from it."""

    key: str
    default: Any = None
    check: Callable[[Values], str | None] = lambda values: None
    """What is wrong with the section's values, if anything is."""
    write: Callable[[Any], Any] | None = None
    """The value to write for a spec; None if the key is not written."""
    note: str = ""
    """What a person should know where the key is there."""


@dataclass(frozen=True)
class Inner:
    """A key that holds another section, one of several kinds."""

    key: str
    """Empty for a section whose keys lie among those of this one."""
    path: str
    choices: Mapping[Any, "Section | None"]
    """Word -> the section that it stands for; None if the leaf at `path` is null. The first that fits is written."""
    by: str | Callable[[Mapping[str, Any]], Any] | None = "type"
    """The key within that holds the word, or what finds the word from the keys; None where it is always `default`."""
    default: Any = ""
    """The word where that key is absent."""
    absent: Any = REQUIRED
    """What is read where the whole section is absent."""


@dataclass(frozen=True)
class Named(Inner):
    """A key that holds sections by names of the config's own choosing."""

    wanted: Callable[[Values], Iterable[str] | None] = lambda values: None
    """The names of those that are of any use; None for all."""


SectionFate = Mapped | Constant | Carried | WeightDtype | Fixed | Repeated | Stated | Inner


@dataclass(frozen=True)
class Section:
    """Raises ValueError if a key or a leaf of the spec has not exactly one fate."""

    name: str
    spec: type[Spec]
    fates: tuple[SectionFate, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of keys: alias -> key."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What absent keys that are carried mean."""

    def __post_init__(self) -> None:
        leaves = list(leaves_below(self.spec, ""))
        once(f"key of {self.name}", [*self.keys, *self.aliases])
        once(f"leaf of {self.name}", [leaf for fate in self.fates for leaf in _answered(fate, leaves)])
        for path in (path for fate in self.fates for path in paths_of(fate)):
            if not any(_above(path, leaf) or _above(leaf, path) for leaf in leaves):
                raise ValueError(f"{self.name} speaks of a leaf {path!r} that our spec does not have")
        if bare := [leaf for leaf in leaves if not any(leaf in _answered(fate, leaves) for fate in self.fates)]:
            raise ValueError(f"{self.name} gives the leaf {bare[0]!r} of our spec no fate: map or fix it")
        for alias, key in self.aliases.items():
            if key not in self.keys:
                raise ValueError(f"{self.name} translates {alias!r} to {key!r}, which has no fate")

    @property
    def keys(self) -> list[str]:
        """Every key that has a fate."""
        return [key for fate in self.fates if (key := key_of(fate))]

    @property
    def suggestions(self) -> list[str]:
        """The keys and the aliases that a person may have meant: those that may have any value."""
        open_keys = [key for fate in self.fates if (key := key_of(fate)) and takes_any(fate)]
        return open_keys + [alias for alias, key in self.aliases.items() if key in open_keys]

    @property
    def type(self) -> Any:
        """The value of `type` that its specs have; None if any."""
        return next((fate.value for fate in self.fates if isinstance(fate, Fixed) and fate.path == "type"), None)

    @property
    def nested(self) -> frozenset[str]:
        """The keys that hold mappings of keys."""
        parts = [key.split(".") for key in (*self.keys, *self.aliases)]
        return frozenset(".".join(part[:count]) for part in parts for count in range(1, len(part)))


def key_of(fate: SectionFate) -> str:
    """The key that a fate is of; an empty one if there is none."""
    return "" if isinstance(fate, Fixed) else fate.key


def paths_of(fate: SectionFate) -> tuple[str, ...]:
    """The leaves that a fate is of, or what lies above them."""
    if isinstance(fate, Mapped):
        return fate.paths
    path = None if isinstance(fate, Constant | Carried | WeightDtype | Stated) else fate.path
    return () if path is None else (path,)


def _above(path: str, leaf: str) -> bool:
    return leaf == path or leaf.startswith(f"{path}.")


def _answered(fate: SectionFate, leaves: list[str]) -> list[str]:
    """The leaves that a fate answers for. An item of a leaf stands for the whole of it."""
    return [leaf for path in paths_of(fate) for leaf in leaves if _above(path, leaf) or _above(leaf, path)]
