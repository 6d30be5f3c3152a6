"""The HF config: a spec, its presets, and the keys that generation reads."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from gearshift.model.stub import AUTO_MAP
from gearshift.spec import ModelSpec, Placement


class GearshiftConfig(PreTrainedConfig):
    """What `config.json` of a Gearshift checkpoint holds.

    Args:
        spec: the model, a `ModelSpec` or its dump.
        presets: named placements, in run-length form.
        default_preset: the preset that runs when a call names no placement; None for main everywhere.
        source: where the weights came from, for people.
    """

    model_type = "gearshift"

    def __init__(
        self,
        spec: ModelSpec | Mapping[str, Any] | None = None,
        presets: Mapping[str, str] | None = None,
        default_preset: str | None = None,
        source: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        parsed = ModelSpec.model_validate(spec) if isinstance(spec, Mapping) else spec
        self.spec = parsed.model_dump(mode="json") if parsed else None
        self.presets = dict(presets or {})
        self.default_preset = default_preset
        self.source = dict(source or {})
        kwargs["auto_map"] = dict(AUTO_MAP)
        if parsed:
            # What tools expect to find on any config. Derived, so never written.
            kwargs |= {"vocab_size": parsed.vocab_size, "hidden_size": parsed.hidden_size}
            kwargs |= {"num_hidden_layers": parsed.decoder.num_layers, "max_position_embeddings": parsed.max_positions}
            kwargs["tie_word_embeddings"] = parsed.tie_embeddings
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'. Older layouts are formats, so it is that room's reader that turns them into today's."""
        from gearshift.formats.native import parse_spec, with_spec

        config = dict(with_spec(config_dict))
        if isinstance(config.get("spec"), Mapping):
            config["spec"] = parse_spec(config["spec"])
        return super().from_dict(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: a saved folder carries a stub (see `stub.py`), never a copy of this file."""

    @property
    def model_spec(self) -> ModelSpec:
        """The spec, parsed."""
        if self.spec is None:
            raise ValueError("this config has no 'spec': it was not made for a Gearshift model")
        return ModelSpec.model_validate(self.spec)

    def placements(self) -> dict[str, Placement]:
        """The presets, parsed. ValueError if one does not fit the model."""
        choices = self.model_spec.choices
        return {name: Placement.parse(text).validate(choices) for name, text in self.presets.items()}

    def to_dict(self) -> dict[str, Any]:
        """The config without what the spec says already."""
        derived = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "tie_word_embeddings")
        return {key: value for key, value in super().to_dict().items() if key not in derived or self.spec is None}

    def to_json_string(self, use_diff: bool = True) -> str:
        """As transformers', but in our order: mixers are listed main first, and ties go to the one named first."""
        return json.dumps(self.to_diff_dict() if use_diff else self.to_dict(), indent=2) + "\n"
