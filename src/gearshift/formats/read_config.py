"""A family's config as ours."""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import ValidationError

from gearshift.formats.dialect import Dialect
from gearshift.formats.fates import (
    CARRIED,
    REQUIRED,
    Carried,
    Constant,
    Derived,
    Fixed,
    Mapped,
    Nullable,
    Translated,
    WeightDtype,
    takes_any,
)
from gearshift.formats.layers import kinds_of
from gearshift.formats.leaves import flatten, set_at, value_at
from gearshift.formats.native import NativeConfig, hint, sentence
from gearshift.formats.table import FateTable, Leaf
from gearshift.spec import MIXERS, MLPS, ModelSpec
from gearshift.spec.model import shortest_pattern
from gearshift.spec.placement import MOST_LAYERS

DEFAULT_DTYPE = "float32"
"""The dtype of a config that does not say: it is transformers', until the weights are seen."""
KEPT = "kept"
"""In a native config's `source`: the family's keys that nothing in this model depends on."""
INFINITY = {"__float__": "Infinity"}
"""How transformers writes infinity."""
LEGACY_NESTED = frozenset({"type"})
"""Keys within mappings that transformers' config classes translate."""
_WRONG_TYPE = re.compile(r"Field '([^']+)' (expected .*)")
"""What those classes say of a value of another type than a key's."""

Trees = Mapping[str | None, dict[str, Any]]
"""What is known of the model (under None) and of each kind of block, as nested dictionaries."""


class Reader(NamedTuple):
    """Reads the configs of one family."""

    table: FateTable
    aliases: Mapping[str, str]
    """Keys of older layouts that the config class translates: alias -> key."""
    dialect: Dialect

    def read(self, raw: Mapping[str, Any]) -> NativeConfig:
        """ValueError that names the key if there is anything in `raw` that we cannot say."""
        table = self.table
        self._check_known(raw)
        given = self._resolve(raw)
        self._check_moved(raw, given)
        values = self.dialect.read(given)
        for constant in table.of(Constant):
            check_constant(values.get(constant.key, constant.value), constant)
        trees = self._trees(values)
        kinds = self._layer_kinds(values, trees[None])
        spec = self._spec(trees, kinds)
        for fate in table.of(Translated):
            spec = _with_leaf(spec, fate.path, fate.read(values.get(fate.key, fate.default), spec))
        for derived in table.of(Derived):
            self._check_derived(derived, values.get(derived.key), spec)
        for known in table.of(Carried):
            _check_known_value(values.get(known.key), known)
        carried = {fate.extra: values[fate.key] for fate in table.of(Carried) if values.get(fate.key) is not None}
        extras = {name: value for name, value in carried.items() if name in CARRIED}
        kept = self._unused(given, kinds, spec) | {name: carried[name] for name in carried if name not in CARRIED}
        dtypes = [str(values[fate.key]) for fate in table.of(WeightDtype) if values.get(fate.key) is not None]
        dtype = dtypes[0].removeprefix("torch.") if dtypes else DEFAULT_DTYPE
        source = {"format": table.name} | ({KEPT: kept} if kept else {})
        return NativeConfig(spec, dtype, source=source, extras=extras)

    def _check_known(self, raw: Mapping[str, Any]) -> None:
        table, aliases = self.table, self.aliases
        nested = {*table.nested, *(alias for alias, key in aliases.items() if key in table.nested)}
        known = [*table.keys, *aliases, *nested, "model_type"]
        closed = {fate.key for fate in table.fates if not isinstance(fate, Fixed) and not takes_any(fate)}
        likely = [name for name in known if aliases.get(name, name) not in closed]
        for key in flatten(raw, frozenset(nested)):
            outer, _, inner = key.rpartition(".")
            inside = outer in nested
            name = f"{aliases.get(outer, outer)}.{inner}" if inside else key
            legacy = inside and inner in LEGACY_NESTED
            if name not in known and not legacy and not table.ignored(key):
                raise ValueError(f"unknown key {key!r}: {hint(key, likely)}")

    def _check_moved(self, raw: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        """ValueError for a key of an older layout that the family's own class had no use for."""
        for alias, key in self.aliases.items():
            inner = key.rpartition(".")[2]
            there = [value for name, value in given.items() if name.endswith(f".{inner}")]
            moved = "." in key and key not in self.table.nested
            if moved and raw.get(alias) is not None and raw[alias] not in there:
                said = f"{key!r} is {given[key]!r}" if key in given else f"nothing here has a {inner!r}"
                raise ValueError(f"{alias!r} is {raw[alias]!r}, but {said}: remove the one that is wrong")

    def _resolve(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Every key's value as the family's own class understands it: defaults filled in, older layouts translated."""
        table = self.table
        nested = frozenset(table.nested)
        if table.family_class is None:
            return flatten(raw, nested)
        mine = self.dialect.for_class({key: raw[key] for key in raw if not table.ignored(key)})
        try:
            # JSON does not tell whole floats from whole numbers; the classes do.
            mine = {key: _as_float(value) if key in table.floats else value for key, value in mine.items()}
            config = table.family_class(**copy.deepcopy(_untagged({**table.own_defaults, **mine})))
            if getattr(config, "rope_parameters", None):
                config.standardize_rope_params()  # as the family's model does: it looks at keys beside them once more
        except Exception as error:  # the class checks values with whatever its code runs into
            raise ValueError(_refused(table.family_class.__name__, error)) from None
        # What is carried is kept as it was written: the class adds to some of it.
        flat = flatten(raw, nested)
        carried = {fate.key: flat.get(fate.key, table.defaults.get(fate.key)) for fate in table.of(Carried)}
        own = {name: getattr(config, name) for name in table.defaults if hasattr(config, name)}
        return flatten({**raw, **own, **carried}, nested)

    def _trees(self, values: Mapping[str, Any]) -> Trees:
        """What the fates make of the values."""
        table = self.table
        trees: dict[str | None, dict[str, Any]] = {None: {}, **{kind: {} for kind in table.blocks}}
        nulls = [leaf for fate in table.of(Nullable) if _is_null(fate.key, values) for leaf in table.targets[fate.path]]
        for leaf in nulls:
            set_at(trees[leaf.kind], leaf.path, None)

        def put(leaf: Leaf, value: Any) -> None:
            if not any(leaf.below(null) for null in nulls):
                set_at(trees[leaf.kind], leaf.path, value)

        for fixed in table.of(Fixed):
            for leaf in table.targets[fixed.path]:
                put(leaf, fixed.value)
        for fate in table.of(Mapped):
            leaves = table.leaves(fate)
            if not all(any(leaf.below(null) for null in nulls) for leaf in leaves):
                value = fate.ours(_look_up(values, fate))
                for leaf in leaves:
                    put(leaf, value)
        return trees

    def _layer_kinds(self, values: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
        """The kind of every layer's block. ValueError if the layer fates do not leave one."""
        count = model["decoder"]["num_layers"]
        if not self.table.layers:
            # Where it is no number, the spec says so.
            return [next(iter(self.table.blocks))] * (count if type(count) is int and 0 < count <= MOST_LAYERS else 1)
        if type(count) is not int or not 0 < count <= MOST_LAYERS:
            raise ValueError(f"the number of layers must be from 1 to {MOST_LAYERS}, not {count!r}")
        return kinds_of(self.table.layers, values, count, list(self.table.blocks))

    def _unused(self, values: Mapping[str, Any], kinds: Sequence[str], spec: ModelSpec) -> dict[str, Any]:
        """What the kinds of the layers do not tell: of keys that speak only of kinds that no layer has, the values that
        are not the family's defaults; of keys that tell layers apart or have other words for values of ours, those that
        we would write otherwise."""
        idle = {}
        for fate in self.table.of(Mapped):
            if fate.key not in values:
                continue
            used = [leaf for leaf in self.table.leaves(fate) if leaf.kind is None or leaf.kind in kinds]
            value = values[fate.key]
            if not used:
                differs = fate.key not in self.table.defaults or value != self.table.defaults[fate.key]
            else:
                differs = fate.spelled and value != fate.theirs(_leaf_value(used[0], spec))
            if differs:
                idle[fate.key] = value
        said = {fate.key: (values.get(fate.key), fate.write(kinds)) for fate in self.table.layers}
        return idle | {key: value for key, (value, written) in said.items() if value != written}

    def _spec(self, trees: Trees, kinds: Sequence[str]) -> ModelSpec:
        blocks = {}
        for kind in dict.fromkeys(kinds):
            types = self.table.blocks[kind]
            block = dict(trees[kind])
            for part, registry, name in (("mixer", MIXERS, types.mixer), ("mlp", MLPS, types.mlp)):
                try:
                    block[part] = registry.parse({**block[part], "type": name})
                except ValidationError as error:
                    raise ValueError(self._where(kind, part, error)) from None
            blocks[kind] = block
        tree = trees[None]
        tree["decoder"] |= {"pattern": shortest_pattern(kinds), "blocks": blocks}
        try:
            return ModelSpec.model_validate(tree)
        except ValidationError as error:
            raise ValueError(self._where(None, "", error)) from None

    def _where(self, kind: str | None, prefix: str, error: ValidationError) -> str:
        """A validation error in the words of the family's config."""
        parts = [*filter(None, [prefix]), *map(str, error.errors()[0]["loc"])]
        if parts[:2] == ["decoder", "blocks"]:
            kind, parts = parts[2], parts[3:]
        leaf = Leaf(kind, ".".join(parts))
        message = sentence(error).partition(": ")[2]
        for fate in self.table.of(Mapped):
            if leaf in self.table.leaves(fate):
                return f"{fate.key!r}: {message}"
        return f"{leaf if leaf.path else 'config'}: {message}"

    def _check_derived(self, fate: Derived, value: Any, spec: ModelSpec) -> None:
        if value is None:
            return
        for leaf in self.table.targets[fate.path]:
            if leaf.kind is not None and leaf.kind not in spec.decoder.blocks:
                continue
            expected = _leaf_value(leaf, spec)
            if value != expected:
                raise ValueError(
                    f"{fate.key!r} is {value!r}, but it follows from the other keys that it is {expected!r}"
                )


def _leaf_value(leaf: Leaf, spec: ModelSpec) -> Any:
    """The value of a leaf in a spec that was just read, whose blocks are named by their kinds."""
    return value_at(spec if leaf.kind is None else spec.decoder.blocks[leaf.kind], leaf.path)


def _with_leaf(spec: ModelSpec, path: str, value: Any) -> ModelSpec:
    """The spec with a leaf outside the blocks set; it is checked again."""
    tree = spec.model_dump()
    set_at(tree, path, value)
    return ModelSpec.model_validate(tree)


def _untagged(value: Any) -> Any:
    """A value of a config with infinity in place of how transformers writes it, which JSON has no word for."""
    if isinstance(value, Mapping):
        return math.inf if value == INFINITY else {key: _untagged(inner) for key, inner in value.items()}
    return [_untagged(inner) for inner in value] if isinstance(value, list) else value


def _is_null(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a key holds nothing, not even keys within it."""
    return values.get(key) is None and not any(name.startswith(f"{key}.") for name in values)


def _look_up(values: Mapping[str, Any], fate: Mapped) -> Any:
    if fate.key in values:
        return values[fate.key]
    if fate.default is REQUIRED:
        raise ValueError(f"the key {fate.key!r} is missing")
    return fate.default


def check_constant(value: Any, fate: Constant) -> None:
    if value != fate.value and value not in fate.same:
        shown = f" ({fate.why})" if fate.why else ""
        raise ValueError(f"{fate.key!r} is {value!r}, and only {fate.value!r} is supported{shown}")


def _check_known_value(value: Any, fate: Carried) -> None:
    if fate.known and value is not None and value not in fate.known:
        shown = f" ({fate.why})" if fate.why else ""
        raise ValueError(f"{fate.key!r} is {value!r}, and only {fate.known[0]!r} is supported{shown}")


def _as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


def _refused(name: str, error: Exception) -> str:
    """An error of the config class `name` as one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    line = " ".join(str(text).split())
    wrong = _WRONG_TYPE.search(line)
    return f"{wrong[1]!r}: {name} {wrong[2]}" if wrong else f"{name} does not accept it: {line}"
