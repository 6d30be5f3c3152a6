"""The leaves of a spec, by path: which there are, and reading and setting them.

`layer.` in a path stands for the block of every layer, so `layer.norm.epsilon` is `decoder.blocks.*.norm.epsilon`.
"""

from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from gearshift.spec import MIXERS, MLPS, BlockSpec, DecoderSpec, ModelSpec, Spec

LAYER = "layer."
_LAYOUT = ("pattern", "blocks")
"""What lays blocks out: a family says it by having layers, not by a key."""


def leaves(mixer: str, mlp: str) -> tuple[str, ...]:
    """The paths of all leaves of models whose blocks have a mixer and an MLP of these kinds."""
    model = [path for path in _walk(ModelSpec, "") if not path.startswith("decoder.")]
    decoder = [f"decoder.{name}" for name in DecoderSpec.model_fields if name not in _LAYOUT]
    block = [path for path in _walk(BlockSpec, LAYER) if path not in (f"{LAYER}mixer", f"{LAYER}mlp")]
    parts = [*_walk(MIXERS[mixer].spec, f"{LAYER}mixer."), *_walk(MLPS[mlp].spec, f"{LAYER}mlp.")]
    return (*model, *decoder, *block, *parts)


def _walk(spec: type[Spec], prefix: str) -> Iterator[str]:
    for name, field in spec.model_fields.items():
        below = _spec_in(field.annotation)
        # A mixer and an MLP are annotated by their base class: what they hold depends on their kind.
        if below is None or f"{prefix}{name}" in (f"{LAYER}mixer", f"{LAYER}mlp"):
            yield f"{prefix}{name}"
        else:
            yield from _walk(below, f"{prefix}{name}.")


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


def flatten(tree: Mapping[str, Any], nested: frozenset[str]) -> dict[str, Any]:
    """`tree` with the dictionaries under the keys `nested` spread out: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if key in nested and isinstance(value, Mapping):
            flat |= {f"{key}.{name}": below for name, below in value.items()}
        else:
            flat[key] = value
    return flat
