"""A family's config as ours."""

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

from pydantic import ValidationError

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
)
from gearshift.formats.layers import pattern_of
from gearshift.formats.leaves import flatten, set_at, value_at
from gearshift.formats.native import NativeConfig, hint, sentence
from gearshift.formats.table import FateTable, Leaf
from gearshift.spec import MIXERS, MLPS, ModelSpec
from gearshift.spec.placement import MOST_LAYERS

DEFAULT_DTYPE = "float32"
"""The dtype of a config that does not say: it is transformers', until the weights are seen."""
KEPT = "kept"
"""In a native config's `source`: the family's keys that nothing in this model depends on."""
LEGACY_NESTED = frozenset({"type"})
"""Keys within mappings that transformers' config classes translate."""

Trees = Mapping[str | None, dict[str, Any]]
"""What is known of the model (under None) and of each kind of block, as nested dictionaries."""


class Reader(NamedTuple):
    """Reads the configs of one family."""

    table: FateTable
    aliases: Mapping[str, str]
    """Keys of older layouts that the config class translates: alias -> key."""

    def read(self, raw: Mapping[str, Any]) -> NativeConfig:
        """ValueError that names the key if there is anything in `raw` that we cannot say."""
        table = self.table
        self._check_known(raw)
        values = self._resolve(raw)
        for constant in table.of(Constant):
            _check_constant(values.get(constant.key, constant.value), constant)
        trees = self._trees(values)
        kinds = self._layer_kinds(values, trees[None])
        spec = self._spec(trees, kinds)
        for fate in table.of(Translated):
            spec = _with_leaf(spec, fate.path, fate.read(values.get(fate.key, fate.default), spec))
        for derived in table.of(Derived):
            self._check_derived(derived, values.get(derived.key), spec)
        carried = {fate.extra: values[fate.key] for fate in table.of(Carried) if values.get(fate.key) is not None}
        extras = {name: value for name, value in carried.items() if name in CARRIED}
        kept = self._unused(values, kinds) | {name: carried[name] for name in carried if name not in CARRIED}
        dtypes = [str(values[fate.key]) for fate in table.of(WeightDtype) if values.get(fate.key) is not None]
        dtype = dtypes[0].removeprefix("torch.") if dtypes else DEFAULT_DTYPE
        source = {"format": table.name} | ({KEPT: kept} if kept else {})
        return NativeConfig(spec, dtype, source=source, extras=extras)

    def _check_known(self, raw: Mapping[str, Any]) -> None:
        table, aliases = self.table, self.aliases
        nested = {*table.nested, *(alias for alias, key in aliases.items() if key in table.nested)}
        known = [*table.keys, *aliases, *nested, "model_type"]
        for key in flatten(raw, frozenset(nested)):
            outer, _, inner = key.rpartition(".")
            inside = outer in nested
            name = f"{aliases.get(outer, outer)}.{inner}" if inside else key
            legacy = inside and inner in LEGACY_NESTED
            if name not in known and not legacy and not table.ignored(key):
                raise ValueError(f"unknown key {key!r}: {hint(key, known)}")

    def _resolve(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Every key's value as the family's own class understands it: defaults filled in, older layouts translated."""
        table = self.table
        nested = frozenset(table.nested)
        if table.family_class is None:
            return flatten(raw, nested)
        try:
            config = table.family_class(**copy.deepcopy({key: raw[key] for key in raw if not table.ignored(key)}))
        except Exception as error:  # the class checks values with whatever its code runs into
            raise ValueError(f"{table.family_class.__name__} does not accept it: {_flat(error)}") from None
        # What is carried is kept as it was written: the class adds to some of it.
        carried = {fate.key: raw.get(fate.key, table.defaults.get(fate.key)) for fate in table.of(Carried)}
        own = {name: getattr(config, name) for name in table.defaults if hasattr(config, name)}
        return flatten({**raw, **own, **carried}, nested)

    def _trees(self, values: Mapping[str, Any]) -> Trees:
        """What the fates make of the values."""
        table = self.table
        trees: dict[str | None, dict[str, Any]] = {None: {}, **{kind: {} for kind in table.blocks}}
        nulls = [
            leaf for fate in table.of(Nullable) if values.get(fate.key) is None for leaf in table.targets[fate.path]
        ]
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
                value = _look_up(values, fate)
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
        allowed = [fate.read(values.get(fate.key), count) for fate in self.table.layers]
        kinds: list[str] = []
        for number, choices in enumerate(zip(*allowed, strict=True)):
            left = reduce(lambda one, other: one & other, map(set, choices))
            if len(left) != 1:
                keys = " and ".join(repr(fate.key) for fate in self.table.layers)
                raise ValueError(f"{keys} together mean no kind of block for layer {number}")
            kinds += left
        return kinds

    def _unused(self, values: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
        """What the kinds of the layers do not tell: of keys that speak only of kinds that no layer has, the values that
        are not the family's defaults; of keys that tell layers apart, those that we would write otherwise."""
        idle = {}
        for fate in self.table.of(Mapped):
            leaves = self.table.leaves(fate)
            if all(leaf.kind is not None and leaf.kind not in kinds for leaf in leaves) and fate.key in values:
                idle[fate.key] = values[fate.key]
        idle = {key: value for key, value in idle.items() if value != self.table.defaults.get(key)}
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
        tree["decoder"] |= {"pattern": pattern_of(kinds), "blocks": blocks}
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
            # What was just read has its blocks named by their kinds.
            expected = value_at(spec if leaf.kind is None else spec.decoder.blocks[leaf.kind], leaf.path)
            if value != expected:
                raise ValueError(
                    f"{fate.key!r} is {value!r}, but it follows from the other keys that it is {expected!r}"
                )


def _with_leaf(spec: ModelSpec, path: str, value: Any) -> ModelSpec:
    """The spec with a leaf outside the blocks set; it is checked again."""
    tree = spec.model_dump()
    set_at(tree, path, value)
    return ModelSpec.model_validate(tree)


def _look_up(values: Mapping[str, Any], fate: Mapped) -> Any:
    if fate.key in values:
        return values[fate.key]
    if fate.default is REQUIRED:
        raise ValueError(f"the key {fate.key!r} is missing")
    return fate.default


def _check_constant(value: Any, fate: Constant) -> None:
    if value != fate.value and value not in fate.same:
        shown = f" ({fate.why})" if fate.why else ""
        raise ValueError(f"{fate.key!r} is {value!r}, and only {fate.value!r} is supported{shown}")


def _flat(error: Exception) -> str:
    """An error of a config class as one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split())
