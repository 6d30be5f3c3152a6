"""Our config as a family's."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from gearshift.formats.base import InexpressibleError
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
from gearshift.formats.layers import kinds_of
from gearshift.formats.leaves import as_written, set_at, value_at
from gearshift.formats.native import NativeConfig
from gearshift.formats.read_config import KEPT
from gearshift.formats.table import FateTable, Leaf
from gearshift.spec import BlockSpec, ModelSpec

_NOWHERE: Any = object()
"""The value of a key that speaks of kinds of blocks that a model does not have."""


class Found(NamedTuple):
    """What a leaf is in a model that is to be written."""

    block: str | None
    """The name of the block; None outside the blocks."""
    path: str
    value: Any

    def __str__(self) -> str:
        where = "" if self.block is None else f"block {self.block!r} has "
        return f"{where}{self.setting}"

    @property
    def setting(self) -> str:
        """The leaf and its value, without the block."""
        return f"{self.path} {as_written(self.value)}"


class Writer(NamedTuple):
    """Writes the configs of one family. InexpressibleError with the first block and field that it cannot say."""

    table: FateTable
    model_type: str | None

    def write(self, native: NativeConfig) -> dict[str, Any]:
        """Every key that the family writes."""
        spec = native.spec
        kinds = self.kinds(spec)
        try:
            self._check_fixed(spec, kinds)
        except InexpressibleError as error:
            error.reached = 1
            raise
        try:
            return self._written(native, kinds)
        except InexpressibleError as error:
            error.reached = 2
            raise

    def _written(self, native: NativeConfig, kinds: Mapping[str, str]) -> dict[str, Any]:
        """The keys of a model whose blocks are of these kinds and have what is fixed."""
        table, spec = self.table, native.spec
        kept = self.kept(native)
        config: dict[str, Any] = {} if self.model_type is None else {"model_type": self.model_type}
        self._write_mapped(config, spec, kinds, kept)
        for derived in table.of(Derived):
            set_at(config, derived.key, self._common(derived.key, table.targets[derived.path], spec, kinds))
        for translated in table.of(Translated):
            try:
                set_at(config, translated.key, translated.write(spec))
            except LookupError as error:
                raise self.refusal(str(error.args[0])) from None
        self._write_layers(config, [kinds[name] for name in spec.decoder.layout], kept)
        for constant in table.of(Constant):
            if constant.write:
                set_at(config, constant.key, copy.copy(constant.value))
        values = {**native.extras, **{name: kept[name] for name in kept if name not in CARRIED}}
        for carried in table.of(Carried):
            if carried.extra in values or (carried.null and table.defaults.get(carried.key) is not None):
                set_at(config, carried.key, values.get(carried.extra))
        return config | {fate.key: native.dtype for fate in table.of(WeightDtype)}

    def kept(self, native: NativeConfig) -> Mapping[str, Any]:
        """The keys that a model of this family came with and nothing in it depends on."""
        kept: Mapping[str, Any] = native.source.get(KEPT, {}) if native.source.get("format") == self.table.name else {}
        return kept

    def kinds(self, spec: ModelSpec) -> dict[str, str]:
        """The kind of each block, by the block's name."""
        return {name: self._kind(name, spec.decoder.blocks[name]) for name in dict.fromkeys(spec.decoder.layout)}

    def _kind(self, name: str, block: BlockSpec) -> str:
        """The first kind whose types and own fixed leaves the block has."""
        types = (block.mixer.type, block.mlp.type)
        alike = [kind for kind, wanted in self.table.blocks.items() if types == (wanted.mixer, wanted.mlp)]
        if not alike:
            part = "mlp" if any(wanted.mixer == types[0] for wanted in self.table.blocks.values()) else "mixer"
            advice = " (export one placement of it)" if types[0] == "stochastic" else ""
            raise self.refusal(f"block {name!r} has {part}.type {getattr(block, part).type!r}{advice}")
        wrong = {kind: self._wrong(kind, name, block) for kind in alike}
        fitting = [kind for kind in alike if wrong[kind] is None]
        if not fitting:
            raise self.refusal(str(wrong[alike[-1]]))
        return fitting[0]

    def _wrong(self, kind: str, name: str, block: BlockSpec) -> Found | None:
        """The first leaf that is fixed for blocks of this kind and that the block has otherwise."""
        for fixed in self.table.own_fixed(kind):
            if fixed.computed:
                continue
            for leaf in self.table.targets[fixed.path]:
                found = _in_block(leaf, name, block)
                if self._contradicts(found, leaf, fixed):
                    return found
        return None

    def _check_fixed(self, spec: ModelSpec, kinds: Mapping[str, str]) -> None:
        for fixed in self.table.of(Fixed):
            if fixed.computed:  # reading what was written tells
                continue
            for leaf in self.table.targets[fixed.path]:
                for found in self._found(leaf, spec, kinds, or_above=True):
                    if self._contradicts(found, leaf, fixed):
                        raise self.refusal(f"{found} ({fixed.why})" if fixed.why else str(found))

    def _contradicts(self, found: Found, leaf: Leaf, fixed: Fixed) -> bool:
        """Whether what was found at a leaf, or null above it, is other than the family can say."""
        if found.path == leaf.path:
            return bool(found.value != fixed.value)
        nullable = [top for fate in self.table.of(Nullable) for top in self.table.targets[fate.path]]
        return Leaf(leaf.kind, found.path) not in nullable

    def _write_mapped(
        self, config: dict[str, Any], spec: ModelSpec, kinds: Mapping[str, str], kept: Mapping[str, Any]
    ) -> None:
        """Every mapped key, and the nulls that stand for what a model does not have."""
        absent: list[Leaf] = []
        for nullable in self.table.of(Nullable):
            leaves = self.table.targets[nullable.path]
            found = [found for leaf in leaves for found in self._found(leaf, spec, kinds)]
            if found and all(one.value is None for one in found):
                config[nullable.key] = None
                absent += leaves
        for fate in self.table.of(Mapped):
            leaves = tuple(self.table.leaves(fate))
            if all(any(leaf.below(top) for top in absent) for leaf in leaves):
                continue
            value = self._common(fate.key, leaves, spec, kinds)
            if value is _NOWHERE:
                default = None if fate.default is REQUIRED else fate.default
                value = kept.get(fate.key, self.table.defaults.get(fate.key, default))
            elif value is not None:
                try:
                    value = fate.theirs(value)
                except LookupError as error:
                    raise self.refusal(str(error.args[0])) from None
            if value is not None or not fate.omit_none:
                set_at(config, fate.key, value)

    def _write_layers(self, config: dict[str, Any], layout: Sequence[str], kept: Mapping[str, Any]) -> None:
        """The keys that tell layers apart: as they came, where together they still say the same."""
        if not self.table.layers:
            return
        written = {fate.key: fate.write(layout) for fate in self.table.layers}
        came = {key: kept.get(key, value) for key, value in written.items()}
        try:
            same = kinds_of(self.table.layers, came, len(layout), list(self.table.blocks)) == list(layout)
        except ValueError:  # there are more or fewer layers now
            same = False
        for key, value in (came if same else written).items():
            set_at(config, key, value)

    def _found(self, leaf: Leaf, spec: ModelSpec, kinds: Mapping[str, str], or_above: bool = False) -> Iterator[Found]:
        """What the leaf is in the model: in each block of its kind, or outside of them.

        Where something above it is null: that, if `or_above`, otherwise InexpressibleError.
        """
        if leaf.kind is None:
            yield Found(None, leaf.path, value_at(spec, leaf.path))
        for name, kind in kinds.items():
            if kind == leaf.kind:
                found = _in_block(leaf, name, spec.decoder.blocks[name])
                if found.path != leaf.path and not or_above:
                    raise self.refusal(f"block {name!r} has no {found.path}")
                yield found

    def _common(self, key: str, leaves: Sequence[Leaf], spec: ModelSpec, kinds: Mapping[str, str]) -> Any:
        """The value that all leaves of a key have; `_NOWHERE` if the model has none of them."""
        found = [found for leaf in leaves for found in self._found(leaf, spec, kinds)]
        if not found:
            return _NOWHERE
        # Compared within one path first: that blocks differ says more than that two of their settings do.
        for path in dict.fromkeys(one.path for one in found):
            first, *rest = [one for one in found if one.path == path]
            for other in rest:
                if other.value != first.value:
                    raise self.refusal(
                        f"{other} where block {first.block!r} has {first.value!r}, and it has one value for both"
                    )
        for other in found:
            if other.value != found[0].value:
                inside, outside = (other, found[0]) if other.block is not None else (found[0], other)
                raise self.refusal(f"{inside} and {outside.setting}, and it has one key, {key!r}, for both")
        return found[0].value

    def refusal(self, what: str) -> InexpressibleError:
        """What is raised where the family cannot say `what`."""
        return InexpressibleError(f"the format {self.table.name!r} cannot express this model: {what}")


def _in_block(leaf: Leaf, name: str, block: BlockSpec) -> Found:
    """What the leaf is in a block; where something above it is null, that."""
    try:
        return Found(name, leaf.path, value_at(block, leaf.path))
    except LookupError as error:
        return Found(name, error.args[0], None)
