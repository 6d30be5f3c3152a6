"""Gearshift's own format: everything a spec can say, and the only one that holds supernets and presets."""

from collections.abc import Mapping
from typing import Any, ClassVar

from gearshift.formats.base import Format
from gearshift.formats.native import MODEL_TYPE, NativeConfig
from gearshift.formats.tensors import check_present
from gearshift.model.stub import STUB, STUB_CODE
from gearshift.plan import Plan, Reference, Schema, TensorInfo
from gearshift.spec import ModelSpec


class NativeFormat(Format):
    """The config is a `NativeConfig`, and the tensors are named as in the model."""

    name = "gearshift"
    model_type = MODEL_TYPE
    companions: ClassVar[Mapping[str, str]] = {STUB: STUB_CODE}

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        return NativeConfig.from_json_dict(raw)

    def express(self, native: NativeConfig) -> dict[str, Any]:
        return native.to_json_dict()

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        return Plan(target, target, {name: Reference(name) for name in target})

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        check_present(target, source)
        if extra := [name for name in source if name not in target]:
            raise ValueError(f"the checkpoint holds a tensor {extra[0]!r} that its config has no place for")
        kept = {name: TensorInfo(info.shape, source[name].dtype) for name, info in target.items()}
        return Plan(source, kept, {name: Reference(name) for name in kept})


FORMAT = NativeFormat()
