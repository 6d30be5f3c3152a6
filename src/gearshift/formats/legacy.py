"""The layouts that came before `decoder: {num_layers, pattern, blocks}`: read with a warning, never written.

(a) One section `transformer` for all attention blocks and one section `ssm` for all others, laid out by
    `hybrid_block_layout`, a letter a layer (Fast-LLM, April to September 2025). It is read as (b).
(b) `blocks` by name, of the kinds `transformer` and `ssm`, laid out by `block_pattern` and `num_layers`.

Either may lie under `model`, or under `model.base_model`. `docs/migrating.md` has each field beside its new one.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from gearshift.formats.legacy_sections import ATTENTION, BLOCK, DECODER, GATED_MLP, MAMBA1, MODEL, PLAIN_MLP
from gearshift.formats.native import hint
from gearshift.formats.read_sections import SectionReader
from gearshift.formats.sections import Section
from gearshift.spec import ModelSpec

_WRAPPERS = ("model", "base_model")
_LAYOUT, _PATTERN = "hybrid_block_layout", "block_pattern"
_LETTERS = {
    "t": {"kind": "transformer"},
    "m": {"kind": "ssm", "variant": "mamba1"},
    "m2": {"kind": "ssm", "variant": "grouped_mamba"},
    "m2d": {"kind": "ssm", "variant": "discrete_mamba2"},
}
_OWN = {"blocks", _PATTERN, _LAYOUT, "transformer", "ssm"}
_MODEL_KEYS = ("num_layers", "hidden_size", "normalization")
"""The keys of `transformer` that say something of the whole model."""
_TRANSFORMER_DEFAULTS = {"num_heads": 8, "num_kv_heads": 1, "gated": False, "add_linear_biases": True}
_PEFT_LAYERS = {"query": "mixer.q_proj", "key": "mixer.k_proj", "value_": "mixer.v_proj", "dense": "mixer.o_proj"}
_NOT_THE_MODEL = re.compile(
    r"init_method_.*|initializer_range|.*lr_scale|.*dropout|.*recompute.*|debug_.*|dpo_.*|enable_dpo|cross_entropy_.*"
    r"|distillation_.*|.*_loss_.*|.*_coefficient|logit_z_loss|teacher_.*|use_megatron_initialization|dropless_.*"
    r"|random_bias_init|moe_jitter_eps|full_precision_residual|parallel_embeddings|sequence_first|default_mtp_type"
    r"|use_flash_attention|use_cache|triton_rotary"
)
"""Keys about how a model is started, trained or run."""


def is_legacy(raw: Any) -> bool:
    """Whether a mapping describes a model in one of the older layouts."""
    for wrapper in (*_WRAPPERS, None):
        if not isinstance(raw, Mapping) or "decoder" in raw:
            return False
        if _OWN & raw.keys():
            return True
        raw = raw.get(wrapper, raw)
    return False


def read_legacy(raw: Mapping[str, Any]) -> ModelSpec:
    """The spec that a mapping in one of the older layouts describes. It warns of that.

    Raises ValueError that names the key for what is wrong with it.
    """
    warnings.warn(
        "this config has an older layout: save it in the new one, `gearshift convert` does (docs/migrating.md)",
        DeprecationWarning,
        stacklevel=3,
    )
    flat = _unwrapped(raw)
    return SectionReader().read(MODEL, _completed(flat if "blocks" in flat else _as_blocks(flat)))


def _unwrapped(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own keys, and those beside the sections that it lies under which are its own all the same."""
    flat = dict(raw)
    for wrapper in _WRAPPERS:
        if isinstance(inner := flat.get(wrapper), Mapping):
            flat = {key: flat[key] for key in flat if key in _first_keys(MODEL, DECODER)} | dict(inner)
    return {key: value for key, value in flat.items() if not _NOT_THE_MODEL.fullmatch(str(key))}


def _as_blocks(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Layout (a) as (b): each letter becomes a block of that name."""
    transformer, ssm = (_section(raw, key) for key in ("transformer", "ssm"))
    everywhere = {key: transformer[key] for key in _MODEL_KEYS if key in transformer}
    for key, value in everywhere.items():
        if raw.get(key, value) != value:
            raise ValueError(f"{key!r} is {raw[key]!r}, but 'transformer.{key}' is {value!r}")
    model = {key: value for key, value in raw.items() if key not in ("transformer", "ssm", _LAYOUT)} | everywhere
    layout = raw.get(_LAYOUT) or ["m2d"]
    if not isinstance(layout, list) or not all(isinstance(letter, str) and letter in _LETTERS for letter in layout):
        raise ValueError(f"{_LAYOUT!r} must list the kinds of layers, each one of {', '.join(_LETTERS)}: {layout!r}")
    count = model.setdefault("num_layers", len(layout))
    if type(count) is int and count % len(layout):
        raise ValueError(f"{_LAYOUT!r} names {len(layout)} layers, which cannot be repeated to 'num_layers' {count}")
    attention, rest = _first_keys(ATTENTION), _first_keys(BLOCK, GATED_MLP, PLAIN_MLP)
    _check_known("transformer", transformer, attention | rest | {*_MODEL_KEYS, "peft"})
    _check_known("ssm", ssm, _first_keys(MAMBA1) | {"activation_type", "normalization"})
    said = {ATTENTION.aliases.get(key, key) for key in transformer}
    settings = {key: value for key, value in _TRANSFORMER_DEFAULTS.items() if key not in said}
    settings |= {key: value for key, value in transformer.items() if key not in _MODEL_KEYS}
    shared = {key: value for key, value in settings.items() if key in rest}
    mamba = {key: value for key, value in ssm.items() if key not in ("activation_type", "normalization")}
    mamba["conv_activation"] = ssm.get("activation_type")
    settings["lora"] = _adapters(settings.pop("peft", None))
    blocks = {
        letter: {**_LETTERS[letter], **(settings if letter == "t" else shared | mamba)}
        for letter in dict.fromkeys(layout)
    }
    return {"tie_word_embeddings": True, **model, _PATTERN: layout, "blocks": blocks}


def _adapters(peft: Any) -> Any:
    """Layout (a)'s adapters, which attention alone had, as (b)'s."""
    if not isinstance(peft, Mapping):
        return peft
    layers = peft.get("layers") or ["query", "value_"]
    if not isinstance(layers, list) or any(layer not in _PEFT_LAYERS for layer in layers):
        raise ValueError(f"'transformer.peft.layers' must list some of {', '.join(_PEFT_LAYERS)}, not {layers!r}")
    adapters = {key: value for key, value in peft.items() if key != "layers"}
    return {"type": "none", **adapters, "targets": [_PEFT_LAYERS[layer] for layer in layers]}


def _completed(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Layout (b) with what the blocks say of the model, and without what is not about it."""
    blocks = _section(raw, "blocks")
    completed = dict(raw)
    kept = {name: _section(blocks, name) for name in blocks}
    completed["blocks"] = kept
    if raw.get(_PATTERN) is None and len(blocks) == 1:
        completed[_PATTERN] = list(blocks)
    if raw.get("num_layers") is None and isinstance(raw.get(_PATTERN), list):
        completed["num_layers"] = len(raw[_PATTERN])
    if raw.get("hidden_size") is None:
        sizes = [block["hidden_size"] for block in kept.values() if block.get("hidden_size") is not None]
        completed["hidden_size"] = sizes[0] if sizes else None
    return completed


def _section(raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key, without what is not about the model; an empty one if there is none."""
    value = raw.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key!r} must hold a mapping, not {value!r}")
    return {name: value[name] for name in value if key == "blocks" or not _NOT_THE_MODEL.fullmatch(str(name))}


def _first_keys(*sections: Section) -> set[str]:
    """The keys of sections; of those within mappings, the mappings' own."""
    return {key.partition(".")[0] for section in sections for key in (*section.keys, *section.aliases)}


def _check_known(where: str, given: Mapping[str, Any], known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown key '{where}.{key}': {hint(str(key), sorted(known))}")
