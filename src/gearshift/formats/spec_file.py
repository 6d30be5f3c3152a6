"""A model as a YAML or JSON file: a spec, in the layout of today or an older one, without weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gearshift.formats.base import Format, InexpressibleError
from gearshift.formats.checkpoint import Checkpoint, build_plan
from gearshift.formats.documents import read_json
from gearshift.formats.native import MODEL_TYPE, NativeConfig, parse_spec
from gearshift.formats.registry import FORMATS
from gearshift.plan import Initialise, Plan, Schema
from gearshift.plan.execute import MappingSource
from gearshift.settings import read_yaml
from gearshift.spec import ModelSpec


class SpecFile(Format):
    """What a person writes, or `gearshift info --resolved` prints. The weights are new ones."""

    name = "spec"
    model_type = None
    writable = False

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        if "spec" in raw:
            return NativeConfig.from_json_dict({"model_type": MODEL_TYPE, **raw})
        if isinstance(raw.get("model_type"), str):
            return FORMATS.for_model_type(raw["model_type"]).to_native(raw)
        return NativeConfig(parse_spec(raw))

    def express(self, native: NativeConfig) -> dict[str, Any]:
        raise InexpressibleError("a spec has no weights: export to another format, and print the config of that")

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        raise InexpressibleError("a spec has no weights")

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        from gearshift.model import initial

        starts = initial(spec)
        made = {name: Initialise(starts[name], info.shape, info.dtype) for name, info in target.items()}
        return Plan(source, target, made)


_FORMAT = SpecFile()


def read_spec(path: str | Path) -> ModelSpec:
    """The model that a YAML or JSON file describes: a spec, a `config.json` of any format, or what
    `gearshift info --resolved` prints. Older layouts are read with a DeprecationWarning.

    Raises ValueError, naming the file and the key, for what is wrong in it.
    """
    return read_native(Path(path)).spec


def open_spec_file(path: Path) -> Checkpoint:
    """The model that a file describes as a checkpoint with new weights. Raises as `read_spec`."""
    native = read_native(path)
    notes = [*native.source.get("notes", []), "its weights were drawn, not trained"]
    native = replace(native, source={"format": _FORMAT.name, "name": path.name, "notes": notes})
    source = MappingSource({})
    plan = build_plan(_FORMAT, native, source, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Checkpoint(path, _FORMAT, native, source, plan, digest, lambda out: None)


def read_native(path: Path) -> NativeConfig:
    """As `read_spec`, with the presets and all else that the file says beside the model."""
    raw = read_json(path) if path.suffix == ".json" else read_yaml(path)
    try:
        return _FORMAT.to_native(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
