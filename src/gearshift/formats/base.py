"""What a format is, and the one that most families are: a table of fates and a table of tensors."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

from pydantic import ValidationError

from gearshift.formats.fates import REQUIRED, RUNTIME_ONLY, Carried, Constant, Derived, Fate, Fixed, Mapped, WeightDtype
from gearshift.formats.leaves import LAYER, flatten, leaves, set_at, value_at
from gearshift.formats.native import NativeConfig, hint, sentence
from gearshift.formats.tensors import Tensors
from gearshift.plan import Plan, Schema
from gearshift.spec import MIXERS, MLPS, BlockSpec, ModelSpec
from gearshift.spec.registry import load

F = TypeVar("F")

DEFAULT_DTYPE = "float32"
"""The dtype of a config that does not say: it is transformers', until the weights are seen."""

BLOCK = "layer"
"""The name of the block that all layers of an imported model have."""


class InexpressibleError(ValueError):
    """A model has something that a format cannot say."""


class Format(ABC):
    """A family of checkpoints: its config as our native one, and its tensors as ours."""

    name: str
    model_type: str | None
    """The `model_type` of its `config.json`; None if it has none."""
    writable: bool = True
    """Whether Gearshift exports to it."""
    companions: ClassVar[Mapping[str, str]] = {}
    """Files that a folder of this format needs to be loaded, by name. Most need none."""

    @abstractmethod
    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        """Read a config. ValueError that names the key if there is anything in it that we cannot say."""

    @abstractmethod
    def express(self, native: NativeConfig) -> dict[str, Any]:
        """Write a config. InexpressibleError with the first block and field that the family cannot say."""

    def to_config(self, native: NativeConfig) -> dict[str, Any]:
        """As `express`; the error names the formats that could."""
        try:
            return self.express(native)
        except InexpressibleError as error:
            from gearshift.formats.registry import FORMATS

            able = ", ".join(name for name, other in FORMATS.items() if other.can_express(native))
            raise InexpressibleError(f"{error}; these formats can: {able}") from None

    def can_express(self, native: NativeConfig) -> bool:
        """Whether Gearshift can export the model to this format."""
        try:
            self.express(native)
        except InexpressibleError:
            return False
        return True

    @abstractmethod
    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        """The bijection from the family's tensors to `target`, the native schema of `spec`. Its inverse exports."""

    @abstractmethod
    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        """The plan from a checkpoint with the tensors `source`; dtypes are kept, what is not needed is discarded.

        Raises ValueError for a missing, a misshapen or an extra tensor.
        """

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        """The names, in a checkpoint, of the embeddings and of a head that must be their copy; None without one."""
        return None

    def write_companions(self, folder: Path) -> None:
        """Write what else a folder of this format needs to be loaded."""
        for name, text in self.companions.items():
            (folder / name).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class FamilyFormat(Format):
    """A family in which all layers have the same kind of block.

    Building one checks that every key of the family's config class and every leaf of our spec has exactly one fate;
    ValueError with the first that has none, or two.
    """

    name: str
    mixer: str
    """The kind of mixer in its blocks."""
    mlp: str
    """The kind of MLP in its blocks."""
    fates: tuple[Fate, ...]
    tensors: Tensors
    model_type: str | None = None
    config_class: str | None = None
    """The family's transformers config class, `module:attribute`: it says which keys there are, and their defaults."""
    nested: Mapping[str, str | None] | None = None
    """Keys that hold mappings of keys: key -> the TypedDict, `module:attribute`, that says which, or None."""
    aliases: Mapping[str, str] | None = None
    """Keys of older layouts that the config class translates: alias -> key."""
    writable: bool = True
    ignored: Callable[[str], bool] = RUNTIME_ONLY.__contains__
    """Whether a key says nothing of the model."""

    LEGACY_NESTED: ClassVar[frozenset[str]] = frozenset({"type"})
    """Keys within mappings that the config class translates."""

    def __post_init__(self) -> None:
        _once(f"key of the format {self.name!r}", [fate.key for fate in self.fates if not isinstance(fate, Fixed)])
        stated = [path for fate in self._of(Mapped) for path in fate.paths] + [fate.path for fate in self._of(Fixed)]
        _once(f"leaf in the format {self.name!r}", stated)
        reachable = leaves(self.mixer, self.mlp)
        for path in reachable:
            if path not in stated:
                raise ValueError(f"the format {self.name!r} gives the leaf {path!r} of our spec no fate: map or fix it")
        for path in stated:
            if path not in reachable:
                raise ValueError(f"the format {self.name!r} speaks of a leaf {path!r} that our spec does not have")
        for key in self._class_keys():
            if key not in self._keys and not self.ignored(key):
                raise ValueError(f"the format {self.name!r} gives the key {key!r} of {self.config_class} no fate")

    def _of(self, kind: type[F]) -> list[F]:
        """The fates of one kind."""
        return [fate for fate in self.fates if isinstance(fate, kind)]

    @cached_property
    def _keys(self) -> dict[str, Fate]:
        return {fate.key: fate for fate in self.fates if not isinstance(fate, Fixed)}

    @cached_property
    def _class(self) -> Any:
        return None if self.config_class is None else load(self.config_class)

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        """The family's default of every key that its config class has."""
        return {} if self._class is None else {field.name: field.default for field in fields(self._class)}

    def _class_keys(self) -> list[str]:
        """Every key that the family's own definition knows, nested ones with a dot."""
        if self._class is None:
            return []
        nested = {key: get_type_hints(load(path)) for key, path in (self.nested or {}).items() if path}
        spread = {
            key: [f"{key}.{inner}" for inner in nested[key]] if key in nested else [key] for key in self._defaults
        }
        return [name for names in spread.values() for name in names]

    # Reading.

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        self._check_known(raw)
        values = self._resolve(raw)
        for constant in self._of(Constant):
            _check_constant(values.get(constant.key, constant.value), constant)
        tree: dict[str, Any] = {}
        for fixed in self._of(Fixed):
            set_at(tree, fixed.path, fixed.value)
        for fate in self._of(Mapped):
            value = _look_up(values, fate)
            for path in fate.paths:
                set_at(tree, path, value)
        spec = self._spec(tree)
        for derived in self._of(Derived):
            if values.get(derived.key) is not None:
                self._check_derived(derived, values[derived.key], spec)
        extras = {fate.extra: values[fate.key] for fate in self._of(Carried) if values.get(fate.key) is not None}
        dtypes = [str(values[fate.key]) for fate in self._of(WeightDtype) if values.get(fate.key) is not None]
        dtype = dtypes[0].removeprefix("torch.") if dtypes else DEFAULT_DTYPE
        return NativeConfig(spec, dtype, source={"format": self.name}, extras=extras)

    def _check_known(self, raw: Mapping[str, Any]) -> None:
        aliases = self.aliases or {}
        nested = {*(self.nested or ()), *(alias for alias, key in aliases.items() if key in (self.nested or ()))}
        known = [*self._keys, *aliases, "model_type"]
        for key in flatten(raw, frozenset(nested)):
            outer, _, inner = key.partition(".")
            inside = outer in nested and bool(inner)
            name = f"{aliases.get(outer, outer)}.{inner}" if inside else key
            legacy = (inside and inner in self.LEGACY_NESTED) or key in nested
            if name not in known and not legacy and not self.ignored(key):
                raise ValueError(f"unknown key {key!r}: {hint(key, known)}")

    def _resolve(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Every key's value as the family's own class understands it: defaults filled in, older layouts translated."""
        if self._class is None:
            return dict(raw)
        try:
            config = self._class(**copy.deepcopy({key: raw[key] for key in raw if not self.ignored(key)}))
        except Exception as error:  # the class checks values with whatever its code runs into
            raise ValueError(f"{self._class.__name__} does not accept it: {_flat(error)}") from None
        # What is carried is kept as it was written: the class adds to some of it.
        carried = {fate.key: raw.get(fate.key, self._defaults.get(fate.key)) for fate in self._of(Carried)}
        own = {name: getattr(config, name) for name in self._defaults}
        return flatten({**raw, **own, **carried}, frozenset(self.nested or ()))

    def _spec(self, tree: dict[str, Any]) -> ModelSpec:
        layer = tree.pop(LAYER[:-1])
        for part, registry, kind in (("mixer", MIXERS, self.mixer), ("mlp", MLPS, self.mlp)):
            try:
                layer[part] = registry.parse({**layer[part], "type": kind})
            except ValidationError as error:
                raise ValueError(self._where(f"{LAYER}{part}", error)) from None
        tree["decoder"] |= {"pattern": [BLOCK], "blocks": {BLOCK: layer}}
        try:
            return ModelSpec.model_validate(tree)
        except ValidationError as error:
            raise ValueError(self._where("", error)) from None

    def _where(self, prefix: str, error: ValidationError) -> str:
        """A validation error in the words of the family's config."""
        location = ".".join(filter(None, [prefix, *map(str, error.errors()[0]["loc"])]))
        location = location.replace(f"decoder.blocks.{BLOCK}.", LAYER)
        for fate in self.fates:
            if isinstance(fate, Mapped) and location in fate.paths:
                return f"{fate.key!r}: {sentence(error).partition(': ')[2]}"
        return f"{location or 'config'}: {sentence(error).partition(': ')[2]}"

    def _check_derived(self, fate: Derived, value: Any, spec: ModelSpec) -> None:
        expected = self._leaf(spec, fate.path)
        if value != expected:
            raise ValueError(f"{fate.key!r} is {value!r}, but it follows from the other keys that it is {expected!r}")

    # Writing.

    def express(self, native: NativeConfig) -> dict[str, Any]:
        if not self.writable:
            raise self._inexpressible("it is read, never written")
        self._check_expressible(native.spec)
        config: dict[str, Any] = {} if self.model_type is None else {"model_type": self.model_type}
        for fate in self._of(Mapped):
            value = self._leaf(native.spec, fate.paths[0])
            if value is not None or not fate.omit_none:
                set_at(config, fate.key, list(value) if isinstance(value, tuple) else value)
        for derived in self._of(Derived):
            set_at(config, derived.key, self._leaf(native.spec, derived.path))
        config |= {fate.key: copy.copy(fate.value) for fate in self._of(Constant) if fate.write}
        for carried in self._of(Carried):
            if carried.extra in native.extras or (carried.null and self._defaults.get(carried.key) is not None):
                config[carried.key] = native.extras.get(carried.extra)
        config |= {fate.key: native.dtype for fate in self._of(WeightDtype)}
        self._check_read_back(config, native.spec)
        return dict(sorted(config.items()))

    def _check_expressible(self, spec: ModelSpec) -> None:
        """InexpressibleError with the first block and field that this family cannot say."""
        for fixed in self._of(Fixed):
            if not fixed.path.startswith(LAYER) and value_at(spec, fixed.path) != fixed.value:
                raise self._inexpressible(f"{fixed.path} is {value_at(spec, fixed.path)!r}")
        names = list(dict.fromkeys(spec.decoder.layout))
        for name in names:
            self._check_block(name, spec.decoder.blocks[name])
            self._check_alike(names[0], name, spec)
        for fate in self._of(Mapped):
            for path in fate.paths[1:]:
                if self._leaf(spec, path) != self._leaf(spec, fate.paths[0]):
                    raise self._inexpressible(
                        f"block {names[0]!r} has {_short(path)} {self._leaf(spec, path)!r} and {_short(fate.paths[0])} "
                        f"{self._leaf(spec, fate.paths[0])!r}, and it has one key, {fate.key!r}, for both"
                    )

    def _check_block(self, name: str, block: BlockSpec) -> None:
        for part, kind in (("mixer", self.mixer), ("mlp", self.mlp)):
            found = getattr(block, part).type
            if found != kind:
                advice = " (export one placement of it)" if found == "stochastic" else ""
                raise self._inexpressible(f"block {name!r} has {part}.type {found!r}{advice}")
        for path in (path for fate in self._of(Mapped) for path in fate.paths if path.startswith(LAYER)):
            try:
                _block_leaf(block, path)
            except LookupError as error:
                raise self._inexpressible(f"block {name!r} has no {error.args[0]}") from None
        for fixed in self._of(Fixed):
            if fixed.path.startswith(LAYER) and (value := _block_leaf(block, fixed.path)) != fixed.value:
                raise self._inexpressible(f"block {name!r} has {_short(fixed.path)} {value!r}")

    def _check_alike(self, first: str, name: str, spec: ModelSpec) -> None:
        for path in (path for fate in self._of(Mapped) for path in fate.paths if path.startswith(LAYER)):
            one, other = (_block_leaf(spec.decoder.blocks[block], path) for block in (first, name))
            if one != other:
                raise self._inexpressible(
                    f"block {name!r} has {_short(path)} {other!r} where block {first!r} has {one!r}, and it has one "
                    "value for all layers"
                )

    def _inexpressible(self, what: str) -> InexpressibleError:
        return InexpressibleError(f"the format {self.name!r} cannot express this model: {what}")

    def _leaf(self, spec: ModelSpec, path: str) -> Any:
        """The value of a leaf; of a layer's leaf, that of the first layer."""
        return _block_leaf(spec.decoder.layers[0], path) if path.startswith(LAYER) else value_at(spec, path)

    def _check_read_back(self, config: dict[str, Any], spec: ModelSpec) -> None:
        """What we wrote must be read as what we had: the family's class may have rules of its own."""
        try:
            again = self.to_native(config).spec
        except ValueError as error:
            raise self._inexpressible(str(error)) from None
        for path in (path for fate in self._of(Mapped) for path in fate.paths):
            if self._leaf(again, path) != self._leaf(spec, path):
                raise self._inexpressible(
                    f"{path} {self._leaf(spec, path)!r} would be read back as {self._leaf(again, path)!r}"
                )

    # Tensors.

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        return self.tensors.plan(spec, target)

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        return self.tensors.import_plan(spec, target, source)

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        return self.tensors.tied_copy(spec, source)


def _short(path: str) -> str:
    """A leaf's path as it reads within a block."""
    return path.removeprefix(LAYER)


def _block_leaf(block: BlockSpec, path: str) -> Any:
    return value_at(block, path.removeprefix(LAYER))


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


def _once(what: str, names: list[str]) -> None:
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two fates for one {what}: {twice[0]!r}")


def _flat(error: Exception) -> str:
    """An error of a config class as one line."""
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(str(text).split())
