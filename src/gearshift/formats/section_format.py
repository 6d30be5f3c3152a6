"""The format of families whose configs are made of sections, and whose layers hold mixers of any kind and name."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gearshift.formats.base import Format
from gearshift.formats.fates import RUNTIME_ONLY
from gearshift.formats.leaves import difference
from gearshift.formats.native import NativeConfig
from gearshift.formats.read_config import DEFAULT_DTYPE, KEPT
from gearshift.formats.read_sections import SectionReader
from gearshift.formats.sections import Section
from gearshift.formats.tensors import KEY, Place, Tensors
from gearshift.formats.write_sections import SectionWriter
from gearshift.plan import Plan, Schema
from gearshift.spec import ModelSpec, StochasticMixerSpec

MIXER = "{mixer}"
"""In a template, the mixer of a layer: `mixer`, or in a stochastic one `mixer.mixers.<name>`. Theirs as ours."""


class MixerTensors(Tensors):
    """The kinds of a layer's template are those of its MLP, or, where it has a `{mixer}`, those of that mixer."""

    def places(self, spec: ModelSpec, kinds: Mapping[str, str]) -> Iterator[Place]:
        """Outside the layers; each layer; each mixer of each layer."""
        yield Place()
        for layer, block in enumerate(spec.decoder.layers):
            yield Place(KEY, {KEY: str(layer)}, block, block.mlp.type)
            stochastic = isinstance(block.mixer, StochasticMixerSpec)
            for name, mixer in block.mixers.items():
                prefix = f"mixer.mixers.{name}" if stochastic else "mixer"
                yield Place(KEY, {KEY: str(layer), MIXER: prefix}, block, mixer.type)


@dataclass(frozen=True)
class SectionFormat(Format):
    """A family whose config is the section `model`: each was checked when it was built."""

    name: str
    model_type: str | None
    model: Section
    tensors: MixerTensors
    writable: bool = True
    notes: tuple[str, ...] = ()
    """What a person should know who reads a checkpoint of it."""

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        reader = SectionReader()
        known = {key: value for key, value in raw.items() if key != "model_type" and key not in RUNTIME_ONLY}
        spec = reader.read(self.model, known)
        beside = {KEPT: reader.kept, "notes": [*self.notes, *reader.notes]}
        source = {"format": self.name, **{key: value for key, value in beside.items() if value}}
        return NativeConfig(spec, reader.dtype or DEFAULT_DTYPE, source=source, extras=reader.extras)

    def express(self, native: NativeConfig) -> dict[str, Any]:
        kept = native.source.get(KEPT, {}) if native.source.get("format") == self.name else {}
        writer = SectionWriter(self.name, native.dtype, native.extras, kept)
        if not self.writable:
            raise writer.refusal("it is read, never written")
        config = {"model_type": self.model_type, **writer.write(self.model, native.spec)}
        try:
            again = self.to_native(config).spec
        except ValueError as error:
            raise writer.refusal(str(error)) from None
        if path := difference(native.spec.model_dump(), again.model_dump()):
            raise writer.refusal(f"{path} would be read back otherwise than it is")
        return dict(sorted(config.items()))

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        return self.tensors.plan(spec, target, {})

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        return self.tensors.import_plan(spec, target, source, {})

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        return self.tensors.tied_copy(spec, source)
