"""Which mixers and MLPs exist. Kinds are found by name and imported when asked for, never before."""

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from gearshift.spec.base import Spec


@dataclass(frozen=True)
class Kind:
    """One kind of mixer or MLP: its spec, and where the code that needs torch lies (`module:attribute`)."""

    spec: type[Spec]
    module: str
    transfers: Mapping[str, str] = field(default_factory=dict)
    """Where weights can come from: source kind -> `module:attribute` of a `Transfer`."""
    norm_epsilons: tuple[str, ...] = ()
    """The settings that are a norm's epsilon. Where a surgery leaves one out, it is that of the block's norms."""

    @property
    def name(self) -> str:
        """The value of `type` that selects this kind."""
        return self.spec.model_fields["type"].default

    def load(self) -> Any:
        """The nn.Module class."""
        return load(self.module)

    def transfer_from(self, source: str) -> Any:
        """The transfer from mixers of kind `source`, or None if there is none."""
        return load(self.transfers[source]) if source in self.transfers else None


def load(path: str) -> Any:
    """The object at `package.module:attribute`."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


class Registry:
    """Every kind of one family: the folders of a package, and other packages' entry points of the same name.

    A folder or an entry point offers a `Kind` named `KIND`. An entry point names it (`my_mixer = "my_package:KIND"`).
    """

    def __init__(self, group: str, what: str):
        self.group = group
        self.what = what

    @cached_property
    def _paths(self) -> dict[str, str]:
        package = importlib.import_module(self.group)
        folders = (m for m in pkgutil.iter_modules(package.__path__) if m.ispkg)
        paths = {folder.name: f"{self.group}.{folder.name}:KIND" for folder in folders}
        for entry in entry_points(group=self.group):
            if entry.name in paths and paths[entry.name] != entry.value:
                raise ValueError(
                    f"two packages offer a {self.what} named {entry.name!r}: {entry.value} and {paths[entry.name]}"
                )
            paths[entry.name] = entry.value
        return paths

    def names(self) -> tuple[str, ...]:
        """The names of all kinds, sorted."""
        return tuple(sorted(self._paths))

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __getitem__(self, name: str) -> Kind:
        """The kind called `name`. ValueError with the nearest names if there is none."""
        if not isinstance(name, str) or name not in self._paths:
            near = get_close_matches(str(name), self.names())
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(self.names())}"
            raise ValueError(f"unknown {self.what} type {name!r}: {hint}")
        kind: Kind = load(self._paths[name])
        if kind.name != name:
            raise ValueError(f"the {self.what} offered as {name!r} calls itself {kind.name!r}: the names must agree")
        return kind

    def parse(self, value: Any) -> Any:
        """The spec that a mapping with a `type` key describes; a spec is returned as it is."""
        if isinstance(value, Spec):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"a {self.what} is a mapping with a 'type', not {value!r}")
        if "type" not in value:
            raise ValueError(f"a {self.what} needs a 'type': one of {', '.join(self.names())}")
        return self[value["type"]].spec.model_validate(dict(value))


MIXERS = Registry("gearshift.mixers", "mixer")
MLPS = Registry("gearshift.mlps", "MLP")
