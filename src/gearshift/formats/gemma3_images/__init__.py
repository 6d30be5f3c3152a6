"""Gemma 3 from 4B on, which reads images too: of it the text model is read. It is written as `gemma3`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gearshift.formats.base import Format, InexpressibleError
from gearshift.formats.gemma3 import BIDIRECTIONAL
from gearshift.formats.gemma3 import FORMAT as TEXT
from gearshift.formats.native import NativeConfig
from gearshift.formats.tensors import Junk, Tensors, Weight
from gearshift.plan import Plan, Schema
from gearshift.spec import ModelSpec

NOTE = "the vision tower was left out: this is the text model alone"
_ARCHITECTURE = "Gemma3ForConditionalGeneration"
_NOT_OF_THE_TEXT = frozenset(
    {
        "model_type",
        "architectures",
        "text_config",
        "vision_config",
        "mm_tokens_per_image",
        "boi_token_index",
        "eoi_token_index",
        "image_token_index",
        "boi_token_id",
        "eoi_token_id",
        "image_token_id",
    }
)


def _tensors(model: str, head: str) -> Tensors:
    """The text model's tensors where `model.` is called `model`, and the head `head`."""
    names, weights = {"model.": model, "lm_head.": head}, []
    for weight in TEXT.tensors.weights:
        assert isinstance(weight, Weight)
        start = next(start for start in names if weight.theirs.startswith(start))
        weights.append(replace(weight, theirs=names[start] + weight.theirs.removeprefix(start)))
    return Tensors(tuple(weights), (Junk(r"(model\.)?(vision_tower|multi_modal_projector)\..*", NOTE),))


_PUBLISHED = _tensors("language_model.model.", "language_model.lm_head.")
_NEWER = _tensors("model.language_model.", "lm_head.")


def _as_in(source: Schema) -> Tensors:
    """The tensors by the names that a checkpoint has for them: both kinds are about."""
    return _NEWER if any(name.startswith("model.language_model.") for name in source) else _PUBLISHED


class Gemma3Images(Format):
    """What lies beside `text_config` is about images, or about the whole model and so about its text."""

    name = TEXT.name
    model_type = "gemma3"
    writable = False
    kinds = TEXT.kinds

    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            raise ValueError(f"the key 'text_config' must hold the config of the text model, not {text!r}")
        if (found := raw.get("architectures")) not in (None, [_ARCHITECTURE]):
            raise ValueError(f"'architectures' is {found!r}, and only {[_ARCHITECTURE]!r} is supported")
        config = {**text, **{key: raw[key] for key in raw if key not in _NOT_OF_THE_TEXT}}
        if config.get(BIDIRECTIONAL):
            raise ValueError(
                f"{BIDIRECTIONAL!r} is {config[BIDIRECTIONAL]!r}, which only a text model by itself follows: in one "
                "that reads images too, it depends on transformers' attention implementation what it means"
            )
        native = TEXT.to_native(config)
        return replace(native, source={**native.source, "notes": [NOTE]})

    def express(self, native: NativeConfig) -> dict[str, Any]:
        raise InexpressibleError("the format of Gemma 3 with images is read, never written")

    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        return replace(TEXT, tensors=_PUBLISHED).plan(spec, target)

    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        return replace(TEXT, tensors=_as_in(source)).import_plan(spec, target, source)

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        return _as_in(source).tied_copy(spec, source)


FORMAT = Gemma3Images()
