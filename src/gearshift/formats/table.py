"""A family's fates as a table: what each path means, and that every key and every leaf has exactly one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, get_type_hints

from gearshift.formats.fates import Derived, Fate, Fixed, Mapped, Nullable, Translated
from gearshift.formats.layers import BlockKind, LayerFate
from gearshift.formats.leaves import block_leaves, model_leaves
from gearshift.spec.registry import load

F = TypeVar("F")

LAYER = "layer"
"""In a path, any kind of block; the name of the block where a family has one kind."""


class Leaf(NamedTuple):
    """One leaf of a spec that a family's config can hold, or what lies above some."""

    kind: str | None
    """The kind of block it lies in; None outside the blocks."""
    path: str
    """Its path, in the block if it lies in one."""

    def __str__(self) -> str:
        return self.path if self.kind is None else f"{self.kind}.{self.path}"

    def below(self, other: "Leaf") -> bool:
        """Whether it lies below `other`."""
        return self.kind == other.kind and self.path.startswith(f"{other.path}.")


@dataclass(frozen=True)
class FateTable:
    """Raises ValueError, with the first that has none, or two, if a key of the class or a leaf has not one fate."""

    name: str
    blocks: Mapping[str, BlockKind]
    fates: tuple[Fate, ...]
    layers: tuple[LayerFate, ...]
    config_class: str | None
    nested: Mapping[str, str | None]
    ignored: Callable[[str], bool]
    own_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The family's defaults of keys that `config_class` does not have, or has another default of."""

    def __post_init__(self) -> None:
        once(f"key of the format {self.name!r}", self.keys)
        answering: list[Mapped | Fixed | Translated] = [*self.of(Mapped), *self.of(Fixed), *self.of(Translated)]
        stated = [leaf for fate in answering for leaf in self.answers(fate)]
        once(f"leaf in the format {self.name!r}", [str(leaf) for leaf in stated])
        for leaf in self._reachable:
            if leaf not in stated:
                raise ValueError(f"the format {self.name!r} gives the leaf '{leaf}' of our spec no fate: map or fix it")
        for key in self.class_keys():
            if key not in self.keys and not self.ignored(key):
                raise ValueError(f"the format {self.name!r} gives the key {key!r} of {self.config_class} no fate")

    def of(self, kind: type[F]) -> list[F]:
        """The fates of one kind."""
        return [fate for fate in self.fates if isinstance(fate, kind)]

    @cached_property
    def keys(self) -> list[str]:
        """Every key that has a fate."""
        return [fate.key for fate in self.fates if not isinstance(fate, Fixed)] + [fate.key for fate in self.layers]

    @cached_property
    def _reachable(self) -> list[Leaf]:
        """Every leaf of the models whose blocks are of these kinds."""
        inside = [Leaf(name, path) for name, kind in self.blocks.items() for path in block_leaves(kind)]
        return [*(Leaf(None, path) for path in model_leaves()), *inside]

    @cached_property
    def targets(self) -> Mapping[str, tuple[Leaf, ...]]:
        """What each path that a fate speaks of means."""
        mapped = [path for fate in self.of(Mapped) for path in fate.paths]
        kinds: tuple[type[Any], ...] = (Fixed, Nullable, Derived, Translated)
        single = [fate.path for kind in kinds for fate in self.of(kind)]
        return {path: self._expand(path) for path in (*mapped, *single)}

    def _expand(self, path: str) -> tuple[Leaf, ...]:
        """`layer.` stands for every kind of block that has the rest. ValueError if there is nothing at the path."""
        head, _, rest = path.partition(".")
        kinds = list(self.blocks) if head == LAYER else [head]
        wanted = [Leaf(kind, rest) for kind in kinds if kind in self.blocks] or [Leaf(None, path)]
        found = [leaf for leaf in wanted if any(other == leaf or other.below(leaf) for other in self._reachable)]
        if not found:
            raise ValueError(f"the format {self.name!r} speaks of a leaf {path!r} that our spec does not have")
        return tuple(found)

    def leaves(self, fate: Mapped) -> list[Leaf]:
        """The leaves that a key maps to."""
        return [leaf for path in fate.paths for leaf in self.targets[path]]

    def answers(self, fate: Mapped | Fixed | Translated) -> list[Leaf]:
        """The leaves that a fate answers for: of one fixed to null, all that would lie below it."""
        stated = self.leaves(fate) if isinstance(fate, Mapped) else self.targets[fate.path]
        return [leaf for leaf in self._reachable for top in stated if leaf == top or leaf.below(top)]

    def own_fixed(self, kind: str) -> list[Fixed]:
        """What is fixed for blocks of this kind alone."""
        return [fixed for fixed in self.of(Fixed) if fixed.path.startswith(f"{kind}.") and kind != LAYER]

    @cached_property
    def family_class(self) -> Any:
        """The family's config class, None if it has none."""
        return None if self.config_class is None else load(self.config_class)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The family's default of every key that has one, but for those that fates know."""
        known = {} if self.family_class is None else {key.name: key.default for key in fields(self.family_class)}
        return {**known, **self.own_defaults}

    @cached_property
    def floats(self) -> frozenset[str]:
        """The keys that the family's class takes floats for."""
        known = () if self.family_class is None else fields(self.family_class)
        return frozenset(key.name for key in known if key.type in (float, float | None))

    def class_keys(self) -> list[str]:
        """Every key that the family's own definition knows, nested ones with a dot."""
        typed = {key: get_type_hints(load(path)) for key, path in self.nested.items() if path}
        keys = [key for key in self.defaults if key not in self.nested]
        return keys + [f"{key}.{inner}" for key, hints in typed.items() for inner in hints]


def once(what: str, names: list[str]) -> None:
    """ValueError, with the first, if a name is there twice."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two fates for one {what}: {twice[0]!r}")
