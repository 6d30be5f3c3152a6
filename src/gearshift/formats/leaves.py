"""The leaves of a spec, by path: which there are, and reading and setting them.

A path into a block has no prefix here (`mixer.heads`, `norm.epsilon`); fates put the kind of block before it.
"""

import math
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml

from gearshift.formats.layers import BlockKind
from gearshift.spec import MIXERS, MLPS, BlockSpec, DecoderSpec, ModelSpec, Spec

_LAYOUT = ("pattern", "blocks")
"""What lays blocks out: a family says it by its layers, not by a key."""
_PARTS = ("mixer", "mlp")


def model_leaves() -> tuple[str, ...]:
    """The paths of all leaves outside the blocks."""
    model = [path for path in leaves_below(ModelSpec, "") if not path.startswith("decoder.")]
    return (*model, *(f"decoder.{name}" for name in DecoderSpec.model_fields if name not in _LAYOUT))


def block_leaves(kind: BlockKind) -> tuple[str, ...]:
    """The paths of all leaves of a block of this kind."""
    block = [path for path in leaves_below(BlockSpec, "") if path not in _PARTS]
    return (*block, *leaves_below(MIXERS[kind.mixer].spec, "mixer."), *leaves_below(MLPS[kind.mlp].spec, "mlp."))


def leaves_below(spec: type[Spec], prefix: str) -> Iterator[str]:
    """The paths of all leaves of a kind of spec, each behind `prefix`."""
    for name, field in spec.model_fields.items():
        below = _spec_in(field.annotation)
        # A mixer and an MLP are annotated by their base class: what they hold depends on their kind.
        if below is None or f"{prefix}{name}" in _PARTS:
            yield f"{prefix}{name}"
        else:
            yield from leaves_below(below, f"{prefix}{name}.")


def _spec_in(annotation: Any) -> type[Spec] | None:
    """The spec that a field holds: `S`, `S | None` or an annotated one."""
    if get_origin(annotation) is Annotated:
        return _spec_in(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return next((spec for part in get_args(annotation) if (spec := _spec_in(part))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Spec) else None


def value_at(spec: Spec, path: str) -> Any:
    """The value of a leaf below `spec`. LookupError, with the path that ends there, if something above it is null."""
    value: Any = spec
    done: list[str] = []
    for name in path.split("."):
        if value is None:
            raise LookupError(".".join(done))
        value = getattr(value, name)
        done.append(name)
    return value


def set_at(tree: dict[str, Any], path: str, value: Any) -> None:
    """Set a leaf in nested dictionaries, making those that are not there."""
    *above, last = path.split(".")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = value


def as_written(value: Any) -> str:
    """A value as a person would write it: of a part with settings of its own, those that are not at their defaults."""
    if isinstance(value, tuple) and any(isinstance(item, Spec) for item in value):
        return f"[{', '.join(map(as_written, value))}]"
    if not isinstance(value, Spec):
        return repr(value)
    settings = value.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(settings, default_flow_style=True, sort_keys=False, width=math.inf).strip()


def difference(one: Any, other: Any, path: str = "") -> str | None:
    """The path of the first leaf in which two dumped specs differ, None if they are equal."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return None if one == other else path
    for name in dict.fromkeys((*one, *other)):
        below = f"{path}.{name}".removeprefix(".")
        if found := difference(one.get(name), other.get(name), below):
            return found
    return None


def flatten(tree: Mapping[str, Any], nested: frozenset[str]) -> dict[str, Any]:
    """`tree` with the dictionaries under the keys `nested` spread out: {"a": {"b": 1}} -> {"a.b": 1}.

    Keys may be nested in nested ones (`a.b`).
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in nested and isinstance(value, Mapping):
            inner = frozenset(name.removeprefix(f"{key}.") for name in nested if name.startswith(f"{key}."))
            flat |= {f"{key}.{name}": below for name, below in flatten(value, inner).items()}
        else:
            flat[key] = value
    return flat
