"""The format that most families are: a table of fates for the config, and one of templates for the tensors."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from gearshift.formats.base import Format, InexpressibleError
from gearshift.formats.dialect import Dialect
from gearshift.formats.fates import RUNTIME_ONLY, Carried, Fate, Mapped
from gearshift.formats.layers import BlockKind, LayerFate
from gearshift.formats.leaves import difference, set_at
from gearshift.formats.native import NativeConfig
from gearshift.formats.read_config import Reader
from gearshift.formats.table import FateTable
from gearshift.formats.tensors import Tensors
from gearshift.formats.write_config import Writer
from gearshift.plan import Plan, Schema
from gearshift.spec import ModelSpec


@dataclass(frozen=True)
class FamilyFormat(Format):
    """A family whose layers each have one of a few kinds of block.

    Building one checks that every key of the family's config class and every leaf of our spec has exactly one fate;
    ValueError with the first that has none, or two.
    """

    name: str
    blocks: Mapping[str, BlockKind]
    """The kinds of block by name. A block is of the first kind whose types and own `Fixed` leaves it has."""
    fates: tuple[Fate, ...]
    tensors: Tensors
    layers: tuple[LayerFate, ...] = ()
    """The keys that say which kind each layer has; none where there is one kind."""
    model_type: str | None = None
    config_class: str | None = None
    """The family's transformers config class, `module:attribute`: it says which keys there are, and their defaults."""
    own_defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of keys that `config_class` does not have, or has another default of."""
    nested: Mapping[str, str | None] = field(default_factory=dict)
    """Keys that hold mappings of keys: key -> the TypedDict, `module:attribute`, that says which, or None."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Keys of older layouts that the config class translates: alias -> key."""
    dialect: Dialect = field(default_factory=Dialect)
    """What its code makes of its config beyond what the fates say."""
    needed: Mapping[str, str] = field(default_factory=dict)
    """Files that its code does not load a folder without: name -> what to write where there is none."""
    writable: bool = True
    ignored: Callable[[str], bool] = RUNTIME_ONLY.__contains__
    """Whether a key says nothing of the model."""

    def __post_init__(self) -> None:
        assert self._table  # building it checks the fates
        object.__setattr__(self, "kinds", len(self.blocks))

    @cached_property
    def _table(self) -> FateTable:
        return FateTable(
            self.name,
            self.blocks,
            self.fates,
            self.layers,
            self.config_class,
            self.nested,
            self.ignored,
            self.own_defaults,
        )

    @property
    def model_types(self) -> tuple[str, ...]:
        # A family that has several names for itself carries the key.
        others = [value for fate in self._table.of(Carried) if fate.key == "model_type" for value in fate.known]
        return tuple(dict.fromkeys((*super().model_types, *others)))

    @property
    def in_transformers(self) -> bool:
        known = self._table.family_class
        return known is not None and known.model_type == self.model_type

    @property
    def _writer(self) -> Writer:
        return Writer(self._table, self.model_type)

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        return Reader(self._table, self.aliases, self.dialect).read(raw)

    def express(self, native: NativeConfig) -> dict[str, Any]:
        if not self.writable:
            raise self._writer.refusal("it is read, never written")
        config = self._writer.write(native)
        try:
            config = self.dialect.write(config, native.spec)
        except ValueError as error:
            raise self._writer.refusal(str(error)) from None
        kept = self._writer.kept(native)
        for fate in self._table.of(Mapped):
            if fate.omit_implied:
                without = {key: value for key, value in config.items() if key != fate.key}
                config = without if self._says_as_much(without, native.spec) else config
            if fate.spelled and fate.key in kept:
                as_it_came = copy.deepcopy(config)
                set_at(as_it_came, fate.key, kept[fate.key])
                config = as_it_came if self._says_as_much(as_it_came, native.spec) else config
        self._check_read_back(config, native.spec)
        return dict(sorted(config.items()))

    def _says_as_much(self, config: Mapping[str, Any], spec: ModelSpec) -> bool:
        try:
            self._check_read_back(config, spec)
        except InexpressibleError:
            return False
        return True

    def _check_read_back(self, config: Mapping[str, Any], spec: ModelSpec) -> None:
        """What we wrote must be read as what we had: the family's class may have rules of its own."""
        try:
            again = self.to_native(config).spec
        except ValueError as error:
            raise self._writer.refusal(str(error)) from None
        outside = {"decoder": {"blocks", "pattern"}}
        pairs = [(spec.model_dump(exclude=outside), again.model_dump(exclude=outside))]
        layers = zip(spec.decoder.layers, again.decoder.layers, strict=False)
        pairs += [(ours.model_dump(), theirs.model_dump()) for ours, theirs in layers]
        for ours, theirs in pairs:
            if path := difference(ours, theirs):
                raise self._writer.refusal(f"{path} would be read back otherwise than it is")

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        return self.tensors.plan(spec, target, self._writer.kinds(spec))

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        return self.tensors.import_plan(spec, target, source, self._writer.kinds(spec))

    def write_companions(self, folder: Path) -> None:
        for name, text in self.needed.items():
            if not (folder / name).exists():
                (folder / name).write_text(text, encoding="utf-8")

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        return self.tensors.tied_copy(spec, source)
