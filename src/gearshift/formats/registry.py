"""Which formats exist. They are found by name and imported when asked for, never before."""

import pkgutil
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points

from gearshift.formats.base import Format
from gearshift.spec.registry import load

GROUP = "gearshift.formats"


class FormatRegistry(Mapping[str, Format]):
    """Every format by name: the folders of this package, and other packages' entry points under `gearshift.formats`.

    A folder offers a `Format` named `FORMAT`; an entry point names one (`my_family = "my_package:FORMAT"`).
    """

    @cached_property
    def _paths(self) -> dict[str, str]:
        folders = (module for module in pkgutil.iter_modules(import_module(GROUP).__path__) if module.ispkg)
        paths = {folder.name: f"{GROUP}.{folder.name}:FORMAT" for folder in folders}
        for entry in entry_points(group=GROUP):
            if entry.name in paths and paths[entry.name] != entry.value:
                raise ValueError(
                    f"two packages offer a format named {entry.name!r}: {entry.value} and {paths[entry.name]}"
                )
            paths[entry.name] = entry.value
        return paths

    def __getitem__(self, name: str) -> Format:
        """The format called `name`. ValueError with the nearest names if there is none."""
        if name not in self._paths:
            raise ValueError(f"unknown format {name!r}: {_hint(name, list(self))}")
        return load(self._paths[name])

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._paths))

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def for_model_type(self, model_type: object) -> Format:
        """The format of a `config.json` with this `model_type`. ValueError if no format reads it."""
        # Most folders are named as their model type: then only the one that is needed is imported.
        for name in sorted(self, key=lambda name: name != model_type):
            if model_type in (found := self[name]).model_types:
                return found
        known = [known for found in self.values() for known in found.model_types]
        raise ValueError(f"no format reads the model type {model_type!r}: {_hint(str(model_type), known)}")


def _hint(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


FORMATS = FormatRegistry()
