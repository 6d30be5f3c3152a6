"""Settings from YAML, with `key=value` overrides: the one way that recipes and surgeries are read."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

Settings = TypeVar("Settings", bound=BaseModel)


def load_settings(kind: type[Settings], path: str | Path | None, overrides: Iterable[str] = ()) -> Settings:
    """The settings in a YAML file, changed by overrides such as `seed=3` or `stages.0.steps=10` (values are YAML too).

    Args:
        kind: the pydantic model of the settings.
        path: the file; None starts from the defaults.
        overrides: dotted key=value pairs.

    ValueError, in one sentence, if the file or an override cannot be read, or if a key or value does not fit.
    """
    data = {} if path is None else read_yaml(Path(path))
    for override in overrides:
        _apply(data, override)
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        told = sentence(error, data, kind)
        raise ValueError(told if path is None else f"{path}: {told}") from None


def read_again(kind: type[Settings], written: dict[str, Any], where: Path) -> Settings:
    """The settings that an earlier version may have written to the file `where`; what came later is at its default.

    ValueError, in one sentence, if they do not fit any more.
    """
    try:
        return kind.model_validate(written)
    except ValidationError as error:
        told = sentence(error, written, kind)
        raise ValueError(f"{where} does not fit this version of Gearshift: {told}; choose another folder") from None


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, that does not let a key come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for number, key in enumerate(keys):
            if key in keys[:number]:
                raise yaml.YAMLError(f"the key {key!r} comes twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ValueError(f"the file {path} cannot be read: {reason}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path} must be a mapping of keys to values")
    return data


def _apply(data: dict[str, Any], override: str) -> None:
    """Set one dotted key of `data`. Mappings on the way that are not there yet are made."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"{override!r} is not an override: write key=value, as in stages.0.steps=10")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"the value in {override!r} is not valid YAML: {_one_line(error)}") from None
    *way, last = key.strip().split(".")
    here: Any = data
    for part in way:
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[_index(here, part, override)]
    if not isinstance(here, dict | list):
        raise ValueError(f"{override!r} goes too deep: {'.'.join(way)} is {here!r}, which has no parts")
    here[_index(here, last, override)] = value


def _index(container: Any, part: str, override: str) -> Any:
    """`part` as an index into `container`."""
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise ValueError(f"{override!r} goes too deep: {container!r} has no part {part!r}")
    if not part.isdigit() or int(part) >= len(container):
        raise ValueError(f"{override!r}: {part!r} is no index into a list of {len(container)}, counted from 0")
    return int(part)


def sentence(error: ValidationError, data: Any, kind: type[BaseModel]) -> str:
    """The first thing that is wrong, where it is, and what was probably meant."""
    first = error.errors()[0]
    fault, location, context = first["type"], first["loc"], first.get("ctx", {})
    where, tag = _path(location, data), context.get("discriminator", "").strip("'")
    if fault == "extra_forbidden":
        return f"unknown key {where!r}{_hint(location, kind)}"
    if fault == "missing" and isinstance(location[-1], int):
        return f"{_path(location[:-1], data)}: give a longer list, not {_shown(first['input'])}"
    if fault == "missing":
        return f"the key {where!r} is missing"
    if fault == "union_tag_not_found":
        return f"the key '{where}.{tag}' is missing"
    if fault == "union_tag_invalid":
        return f"{where}.{tag}: give one of {context['expected_tags']}, not {context['tag']!r}"
    if fault == "value_error":
        problem = first["msg"].removeprefix("Value error, ")
        return f"{where}: {problem}" if where else problem
    wanted = _WANTED[fault].format_map(context) if fault in _WANTED else first["msg"][:1].lower() + first["msg"][1:]
    return f"{where}: {wanted}, not {_shown(first['input'])}"


_MAPPING = "give a mapping of keys to values"
_WANTED = {
    "tuple_type": "give a list",
    "too_short": "give a list of at least {min_length}",
    "too_long": "give a list of at most {max_length}",
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "model_attributes_type": _MAPPING,
}
"""Kind of fault -> what to do, in place of pydantic's words, which speak of Python's types."""
LONGEST = 100
"""Characters of a value that a sentence shows."""


def _shown(value: Any) -> str:
    """A value as the person may have written it, cut short if it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _path(location: tuple[int | str, ...], data: Any) -> str:
    """Pydantic's location without the tags of the unions that it passed."""
    parts: list[str] = []
    for position, part in enumerate(location):
        here = data
        inside = isinstance(here, dict) and part in here
        if inside or (isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)):
            data = here[part]
        elif position < len(location) - 1:
            continue
        parts.append(str(part))
    return ".".join(parts)


def _hint(location: tuple[int | str, ...], kind: type[BaseModel]) -> str:
    """What was probably meant by the unknown key at a location: that of another type of settings, or a similar one."""
    models = list(_models(kind, set()))
    unions = [_by_type(field.annotation) for model in models for field in model.model_fields.values()]
    for place, tag in reversed(list(enumerate(location[:-1]))):
        types = [members for members in unions if tag in members]
        inside = location[place + 1 :]
        owners = dict.fromkeys(name for members in types for name, model in members.items() if _has(model, inside))
        if owners:
            return f": it belongs to type {' or '.join(owners)}, not {tag}"
    known = dict.fromkeys(name for model in models for name in model.model_fields if name != location[-1])
    near = get_close_matches(str(location[-1]), known)
    return f": did you mean {near[0]}?" if near else ""


def _by_type(annotation: Any) -> dict[Any, type[BaseModel]]:
    """The models that an annotation names, by what each has for its `type`."""
    fields = ((model.model_fields.get("type"), model) for model in _named(annotation))
    return {tag: model for field, model in fields if field for tag in get_args(field.annotation)}


def _has(annotation: Any, keys: tuple[int | str, ...]) -> bool:
    """Whether a model that an annotation names has `keys`, each inside the one before."""
    if not keys:
        return True
    fields = [model.model_fields for model in _named(annotation)]
    return any(keys[0] in own and _has(own[str(keys[0])].annotation, keys[1:]) for own in fields)


def _models(annotation: Any, seen: set[type]) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation names, and those inside them."""
    for model in _named(annotation):
        if model not in seen:
            seen.add(model)
            yield model
            for field in model.model_fields.values():
                yield from _models(field.annotation, seen)


def _named(annotation: Any) -> Iterator[type[BaseModel]]:
    """The pydantic models that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _named(part)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
