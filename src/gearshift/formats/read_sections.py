"""A config made of sections as a spec."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gearshift.formats.fates import CARRIED, REQUIRED, Carried, Constant, Fixed, Mapped, WeightDtype
from gearshift.formats.leaves import flatten, set_at
from gearshift.formats.native import hint, sentence
from gearshift.formats.read_config import check_constant
from gearshift.formats.sections import (
    Inner,
    Named,
    Repeated,
    Section,
    SectionFate,
    Stated,
    Values,
    key_of,
    paths_of,
)


@dataclass
class _Here:
    """A section that is being read."""

    section: Section
    raw: Mapping[str, Any]
    given: Mapping[str, Any]
    """Its own keys, flat, by their own names."""
    values: Values
    where: str
    """Its place in the config."""
    path: str
    """Its place in our spec."""
    tree: dict[str, Any] = field(default_factory=dict)
    """What the fates have made of it."""

    def value(self, key: str, default: Any) -> Any:
        """A key's value, or what its absence means."""
        value = self.given.get(key)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"the key {key!r} is missing")
            value = default(self.values) if callable(default) else default
        self.values[key] = value
        return value

    def set(self, fate: SectionFate, value: Any) -> None:
        """Set the leaves that a fate is of."""
        for leaf in paths_of(fate):
            set_at(self.tree, leaf, value)


@dataclass
class SectionReader:
    """Reads one config, and gathers what it says beside the spec."""

    dtype: str | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    """What is carried of the outermost section, under the names of `CARRIED`."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What else is carried, by the path in our spec of what it belongs to."""
    notes: list[str] = field(default_factory=list)
    """What a person should know."""

    def read(self, section: Section, raw: Any, where: str = "", path: str = "", outer: Values | None = None) -> Any:
        """The spec that `raw` describes; `where` is its place in the config, `path` that in our spec.

        ValueError that names the key if there is anything in `raw` that the section cannot say.
        """
        raw = _mapping(raw, where)
        try:
            here = _Here(section, raw, _flat(section, raw, where), (outer or Values()).new_child(), where, path)
            for fate in section.fates:
                self._take(fate, here)
            for fate in section.fates:
                if isinstance(fate, Stated) and (wrong := fate.check(here.values)):
                    raise ValueError(f"{fate.key!r}: {wrong}")
            return section.spec.model_validate(here.tree)
        except ValidationError as error:
            raise PlacedError(_told(section, error, where)) from None
        except PlacedError:
            raise
        except ValueError as error:
            raise PlacedError(f"{where}: {error}" if where else str(error)) from None

    def _take(self, fate: SectionFate, here: _Here) -> None:
        """Do what a fate says with the keys that it is of."""
        match fate:
            case Fixed():
                here.set(fate, fate.value)
            case Inner():
                here.set(fate, self._inner(fate, here))
            case Constant():
                check_constant(here.given.get(fate.key, fate.value), fate)
            case WeightDtype():
                self.dtype = str(here.given.get(fate.key) or "").removeprefix("torch.") or None
            case Carried():
                # Here a null says something other than an absent key.
                value = here.raw.get(fate.key, here.section.defaults.get(fate.key))
                if not here.path and fate.extra in CARRIED and value is not None:
                    self.extras[fate.extra] = value
                elif value is not None and value != here.section.defaults.get(fate.key):
                    self.kept[_below(here.path, fate.extra)] = value
            case Stated():
                here.value(fate.key, fate.default)
                if fate.note and here.given.get(fate.key) is not None:
                    self.notes.append(fate.note)
            case Repeated():
                expected = here.values[fate.of]
                value = here.value(fate.key, expected if fate.default is REQUIRED else fate.default)
                if value != expected:
                    whose = "" if fate.of in here.section.keys and fate.of != fate.key else "the model's "
                    raise ValueError(f"{fate.key!r} is {value!r}, but {whose}{fate.of!r} is {expected!r}")
                here.set(fate, value)
            case Mapped():
                here.set(fate, fate.ours(here.value(fate.key, fate.default)))

    def _inner(self, fate: Inner, here: _Here) -> Any:
        """The spec, or for a `Named` fate the specs by name, that a key holds."""
        path, where = _below(here.path, fate.path), _below(here.where, fate.key)
        if not fate.key:
            chosen, section = _choice(fate, here.raw, where)
            return self.read(section, _part(chosen, section), where, path, here.values) if section else None
        raw = here.value(fate.key, fate.absent)
        if not isinstance(fate, Named):
            chosen, section = _choice(fate, _mapping(raw, where), where)
            return self.read(section, chosen, where, path, here.values) if section else None
        wanted = fate.wanted(here.values)
        specs = {}
        for name, each in _mapping(raw, where).items():
            if wanted is not None and name not in wanted:
                self.notes.append(f"left out {where}.{name}, which no layer uses")
                continue
            inside = f"{where}.{name}"
            chosen, section = _choice(fate, _mapping(each, inside), inside)
            specs[name] = self.read(section, chosen, inside, f"{path}.{name}", here.values) if section else None
        return specs


def _choice(fate: Inner, raw: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], Section | None]:
    """The section that the word in `raw` stands for, and the keys beside the word."""
    if isinstance(fate.by, str):
        word = raw.get(fate.by, fate.default)
        where = _below(where, fate.by)
        raw = {key: value for key, value in raw.items() if key != fate.by}
    else:
        word = fate.default if fate.by is None else fate.by(raw)
    if not isinstance(word, Hashable) or word not in fate.choices:
        raise PlacedError(f"{where!r} is {word!r}: known are {', '.join(map(repr, fate.choices))}")
    return raw, fate.choices[word]


class PlacedError(ValueError):
    """An error that says where in the config it is."""


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise PlacedError(f"{where or 'the config'!r} must hold a mapping, not {raw!r}")
    return raw


def _flat(section: Section, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The section's keys that are there, by their own names. ValueError for one that is not known."""
    guests = [
        guest
        for fate in section.fates
        if isinstance(fate, Inner) and not fate.key and (guest := _choice(fate, raw, where)[1])
    ]
    theirs = {key for guest in guests for key in _part(raw, guest)} - set(_part(raw, section))
    own = {key: value for key, value in raw.items() if key not in theirs}
    known = [*section.keys, *section.aliases]
    flat: dict[str, Any] = {}
    for key, value in flatten(own, section.nested).items():
        if key not in known and not (value is None and key in section.nested):
            likely = [name for one in (section, *guests) for name in one.suggestions]
            raise PlacedError(f"unknown key {_below(where, str(key))!r}: {hint(str(key), likely)}")
        name = section.aliases.get(key, key)
        if value is not None and name in flat and flat[name] != value:
            raise PlacedError(f"{_below(where, key)!r} is {value!r}, but it is said to be {flat[name]!r} elsewhere")
        if value is not None:
            flat[name] = value
    return flat


def _part(raw: Mapping[str, Any], section: Section) -> dict[str, Any]:
    """Of several sections' keys in one mapping, those of `section`."""
    first = {key.partition(".")[0] for key in (*section.keys, *section.aliases)}
    return {key: value for key, value in raw.items() if key in first}


def _below(above: str, name: str) -> str:
    return ".".join(filter(None, (above, name)))


def _told(section: Section, error: ValidationError, where: str) -> str:
    """A validation error in the words of the config."""
    path = ".".join(map(str, error.errors()[0]["loc"]))
    message = sentence(error).partition(": ")[2]
    for fate in section.fates:
        if path in paths_of(fate) and (key := key_of(fate)):
            return f"{_below(where, key)!r}: {message}"
    return f"{where or 'config'}: {message}" if path == "" else f"{where or 'config'}: {path}: {message}"
