"""GGUF files, in only. Their metadata is the config, under llama.cpp's keys, which carry the architecture's name."""

from collections.abc import Mapping
from typing import Any

from gearshift.formats.base import Format, InexpressibleError
from gearshift.formats.gguf import gemma3, llama, qwen2, qwen3
from gearshift.formats.gguf.common import NAME, Architecture
from gearshift.formats.native import NativeConfig
from gearshift.plan import Plan, Schema
from gearshift.spec import ModelSpec

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": llama.ARCHITECTURE,
    "qwen2": qwen2.ARCHITECTURE,
    "qwen3": qwen3.ARCHITECTURE,
    "gemma3": gemma3.ARCHITECTURE,
}
"""The architectures that are read, by llama.cpp's names. The format of an opened file is its architecture's table."""


def architecture(metadata: Mapping[str, Any]) -> Architecture:
    """The architecture that a file's metadata names. ValueError if we do not read it."""
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"the model is of the architecture {name!r}: of GGUF files, only {known} are read")
    return ARCHITECTURES[name]


class GGUFFormat(Format):
    """What stands for GGUF among the formats, whatever the architecture."""

    name = NAME
    model_type = None
    writable = False

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        return architecture(raw).table.to_native(raw)

    def express(self, native: NativeConfig) -> dict[str, Any]:
        raise InexpressibleError(f"the format {self.name!r} cannot express this model: it is read, never written")

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        raise ValueError("only a GGUF file says which architecture its tensors are of: open it")

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        return self.plan(spec, target)


FORMAT = GGUFFormat()
