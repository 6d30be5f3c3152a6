"""`config.json` of a Gearshift checkpoint, as data. The HF class `GearshiftConfig` reads and writes the same keys."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from gearshift.formats.fates import CARRIED, RUNTIME_ONLY
from gearshift.model.stub import AUTO_MAP
from gearshift.spec import ModelSpec, Placement
from gearshift.spec.parts import DTYPE_BYTES
from gearshift.spec.placement import NAME

MODEL_TYPE = "gearshift"
ARCHITECTURE = "GearshiftForCausalLM"
_OWN = ("model_type", "architectures", "auto_map", "dtype", "spec", "presets", "default_preset", "source")


@dataclass(frozen=True)
class NativeConfig:
    """What is to be known of a checkpoint beside its tensors.

    Raises ValueError where the presets do not fit the spec, or a key has no place.
    """

    spec: ModelSpec
    """The model."""
    dtype: str = "float32"
    """The dtype of the weights, by torch's name without the prefix."""
    presets: Mapping[str, Placement] = field(default_factory=dict)
    """Placements by name."""
    default_preset: str | None = None
    """The preset that runs where a call names no placement; None for main everywhere."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the weights came from: `format`, and what else a person should know."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Keys of a transformers config that nothing the model computes depends on. Those that are None are left out."""

    def __post_init__(self) -> None:
        for name in ("presets", "source", "extras"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        mixers = {mixer for offered in self.spec.choices for mixer in offered}
        for name, placement in self.presets.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"a preset cannot be called {name!r}: use letters, digits, '_', '-', a letter first")
            if name in mixers or name == "main":
                raise ValueError(f"a preset cannot be called {name!r}: that already means a mixer in every layer")
            try:
                placement.validate(self.spec.choices)
            except ValueError as error:
                raise ValueError(f"preset {name!r}: {error}") from None
        if self.default_preset is not None and self.default_preset not in [*self.presets]:
            known = ", ".join(self.presets) or "none"
            raise ValueError(f"the default preset {self.default_preset!r} is not among the presets ({known})")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")
        if unknown := [key for key in self.extras if key not in CARRIED]:
            raise ValueError(f"unknown key {unknown[0]!r}: {hint(unknown[0], [*_OWN, *CARRIED])}")

    def to_json_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {
            "model_type": MODEL_TYPE,
            "architectures": [ARCHITECTURE],
            "auto_map": dict(AUTO_MAP),
            "dtype": self.dtype,
            "spec": self.spec.model_dump(mode="json"),
            "presets": {name: str(placement) for name, placement in self.presets.items()},
            "default_preset": self.default_preset,
            "source": dict(self.source),
            **{key: self.extras[key] for key in sorted(self.extras)},
        }

    @classmethod
    def from_json_dict(cls, raw: Mapping[str, Any]) -> "NativeConfig":
        """Read the content of a `config.json`. ValueError that names the key if there is anything wrong with it."""
        if raw.get("model_type") != MODEL_TYPE:
            raise ValueError(f"the model_type is {raw.get('model_type')!r}, not {MODEL_TYPE!r}")
        raw = with_spec(raw)
        presets = _mapping(raw, "presets")
        if wrong := [name for name, text in presets.items() if not isinstance(text, str)]:
            raise ValueError(f"preset {wrong[0]!r} is not a placement such as 'attention*3,gdn': {presets[wrong[0]]!r}")
        rest = {key: value for key, value in raw.items() if key not in _OWN and key not in RUNTIME_ONLY}
        return cls(
            spec=parse_spec(raw["spec"]),
            dtype=str(raw.get("dtype") or "float32"),
            presets={name: Placement.parse(text) for name, text in presets.items()},
            default_preset=raw.get("default_preset"),
            source=_mapping(raw, "source"),
            extras={key: value for key, value in rest.items() if value is not None},
        )


def with_spec(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """A `config.json` with the model under `spec`; older layouts have it among the other keys. ValueError without."""
    from gearshift.formats.legacy import is_legacy

    if "spec" in raw:
        return raw
    beside = {key: raw[key] for key in raw if key in _OWN or key in RUNTIME_ONLY or key in CARRIED}
    model = {key: value for key, value in raw.items() if key not in beside}
    if not is_legacy(model):
        raise ValueError("the key 'spec' is missing: it holds the model")
    return {**beside, "spec": model}


def parse_spec(raw: Any) -> ModelSpec:
    """A spec from its dump, or from an older layout. ValueError with the first thing that is wrong, in one sentence."""
    from gearshift.formats.legacy import is_legacy, read_legacy

    if is_legacy(raw):
        return read_legacy(raw)
    if place := _nested_decoder(raw):
        raise ValueError(
            f"'decoder' lies under {place!r}: vocab_size, hidden_size, decoder and all else that describes the model "
            "belong at the top of a spec, under no other key"
        )
    try:
        return ModelSpec.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"spec{sentence(error)}") from None


def _nested_decoder(raw: Any) -> str:
    """The keys above the decoder of a spec that lies deeper than it should; empty if it does not."""
    if not isinstance(raw, Mapping) or "decoder" in raw:
        return ""
    for key, inner in raw.items():
        if isinstance(inner, Mapping) and "decoder" in inner:
            return str(key)
        if below := _nested_decoder(inner):
            return f"{key}.{below}"
    return ""


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong: `.where: what, not value`."""
    first = error.errors(include_url=False)[0]
    # What a kind's own parser finds comes as text of several lines, the place and the message among them.
    lines = [line.strip() for line in first["msg"].removeprefix("Value error, ").splitlines()]
    message = ": ".join(lines[1:3]) if len(lines) > 2 else lines[0]
    where = "".join(f".{part}" for part in first["loc"])
    given = first.get("input")
    shown = "" if isinstance(given, (Mapping, list, tuple)) or len(lines) > 2 else f" (it is {given!r})"
    return f"{where}: {message}{shown}"


def hint(name: str, known: list[str]) -> str:
    """What a person who wrote `name` may have meant."""
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "remove it, or use a version of Gearshift that knows it"


def _mapping(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"the key {key!r} must hold a mapping, not {value!r}")
    return value
