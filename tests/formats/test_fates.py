"""Every field has exactly one fate, and what a family cannot say is refused by name."""

from dataclasses import replace
from typing import Any

import pytest

from gearshift.formats import FORMATS, InexpressibleError, NativeConfig, choose_format
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import Carried, Constant, Derived, Fixed, Mapped, WeightDtype, mapped
from gearshift.formats.gguf import ARCHITECTURES
from gearshift.spec import ModelSpec
from tests.formats.folders import SIZES

TRANSFORMERS = ("llama", "mistral")
TABLES = (*TRANSFORMERS, *(f"gguf {name}" for name in ARCHITECTURES))


def family(name: str) -> FamilyFormat:
    """A format's table; of GGUF files, that of an architecture."""
    found = ARCHITECTURES[name.removeprefix("gguf ")].table if name.startswith("gguf ") else FORMATS[name]
    assert isinstance(found, FamilyFormat)
    return found


def edited(native: NativeConfig, **block: Any) -> NativeConfig:
    """The same model with keys of its block set; `a__b` is b in a."""
    raw = native.spec.model_dump(mode="json")
    for path, value in block.items():
        *above, last = path.split("__")
        tree = raw["decoder"]["blocks"]["layer"]
        for name in above:
            tree = tree[name]
        tree[last] = value
    return replace(native, spec=ModelSpec.model_validate(raw))


@pytest.mark.parametrize("name", TABLES)
def test_no_field_has_two_fates(name: str) -> None:
    whole = family(name)
    for fate in whole.fates:
        with pytest.raises(ValueError, match="two fates"):
            replace(whole, fates=(*whole.fates, fate))


@pytest.mark.parametrize("name", TABLES)
def test_every_leaf_of_the_spec_has_a_fate(name: str) -> None:
    whole = family(name)
    for fate in whole.fates:
        if isinstance(fate, Mapped | Fixed):
            with pytest.raises(ValueError, match=r"leaf .* no fate"):
                replace(whole, fates=tuple(other for other in whole.fates if other is not fate))


def test_a_leaf_that_is_not_there_cannot_be_mapped() -> None:
    whole = family("llama")
    with pytest.raises(ValueError, match=r"leaf 'layer\.mixer\.wings'"):
        replace(whole, fates=(*whole.fates, mapped("wings", "layer.mixer.wings")))


def test_the_kinds_of_fates_are_all_used() -> None:
    kinds = {type(fate) for name in TABLES for fate in family(name).fates}
    assert kinds == {Carried, Constant, Derived, Fixed, Mapped, WeightDtype}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"mixer__window": 16},
            "block 'layer' has mixer.window 16; these formats can: apriel, apriel2, gearshift, ministral, mistral",
        ),
        ({"mixer__rotary": None}, "block 'layer' has mixer.rotary None; these formats can: gearshift"),
        ({"mixer__qkv_bias": True}, "block 'layer' has mixer.output_bias False and mixer.qkv_bias True"),
        ({"norm__epsilon": 0.5}, "block 'layer' has norm.epsilon 0.5 and final_norm.epsilon 1e-06"),
        ({"shared_weights": True}, "block 'layer' has shared_weights True"),
        (
            {"mixer__heads": 5, "mixer__kv_heads": 1},
            "hidden size .32. is not a multiple of the number of attention heads",
        ),
    ],
)
def test_what_llama_cannot_express_is_named(change: dict[str, Any], says: str) -> None:
    native = edited(FORMATS["llama"].to_native(SIZES), **change)
    with pytest.raises(InexpressibleError, match=says):
        FORMATS["llama"].to_config(native)


def test_a_block_unlike_the_others_is_named() -> None:
    native = FORMATS["mistral"].to_native(SIZES)
    raw = native.spec.model_dump(mode="json")
    blocks = raw["decoder"]["blocks"]
    blocks["narrow"] = {**blocks["layer"], "mixer": {**blocks["layer"]["mixer"], "window": 5}}
    raw["decoder"]["pattern"] = ["layer", "narrow"]
    mixed = replace(native, spec=ModelSpec.model_validate(raw))
    with pytest.raises(InexpressibleError, match=r"block 'narrow' has mixer\.window 5 where block 'layer' has 4096"):
        FORMATS["mistral"].to_config(mixed)
    format, why = choose_format(mixed)
    assert format.name == "gearshift"
    assert "block 'narrow'" in why


def test_a_supernet_is_exported_one_placement_at_a_time() -> None:
    native = FORMATS["llama"].to_native(SIZES)
    main = native.spec.decoder.blocks["layer"].mixer.model_dump(mode="json")
    mixer = {"type": "stochastic", "main": "full", "mixers": {"full": main, "narrow": {**main, "window": 4}}}
    with pytest.raises(InexpressibleError, match=r"'stochastic' \(export one placement"):
        FORMATS["llama"].to_config(edited(native, mixer=mixer))


def test_the_family_it_came_from_is_preferred() -> None:
    for name in TRANSFORMERS:
        native = FORMATS[name].to_native({**SIZES, **({"sliding_window": None} if name == "mistral" else {})})
        assert choose_format(native)[0].name == name
    windowed = FORMATS["mistral"].to_native(SIZES)
    assert choose_format(replace(windowed, source={}))[0].name == "mistral"


def test_blocks_that_are_alike_need_not_be_one() -> None:
    native = FORMATS["llama"].to_native(SIZES)
    raw = native.spec.model_dump(mode="json")
    raw["decoder"]["blocks"]["twin"] = raw["decoder"]["blocks"]["layer"]
    raw["decoder"]["pattern"] = ["layer", "twin"]
    twins = replace(native, spec=ModelSpec.model_validate(raw))
    assert FORMATS["llama"].to_config(twins) == FORMATS["llama"].to_config(native)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"hiden_size": 3}, "unknown key 'hiden_size': did you mean 'hidden_size'"),
        ({"sliding_window": 3}, "unknown key 'sliding_window'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "fctor": 1}}, r"unknown key 'rope_scaling\.fctor'"),
        ({"rope_parameters": {"full_attention": {}}}, r"unknown key 'rope_parameters\.full_attention'"),
        ({"rope_scaling": {"type": "linear"}}, "Missing required keys.*factor"),
        ({"rope_scaling": {"type": "axial"}}, r"'rope_parameters\.rope_type': .*'axial'"),
        ({"rope_scaling": [1]}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor.* is 0.5"),
        ({"rope_theta": -5}, r"'rope_parameters\.rope_theta': .*greater than 0"),
        ({"hidden_size": "x"}, "^'hidden_size': LlamaConfig expected int, got str"),
        ({"rms_norm_eps": -1}, r"^'rms_norm_eps': .*greater than 0 \(it is -1\.0\)"),
        ({"partial_rotary_factor": 0.5}, "unknown key 'partial_rotary_factor': remove it"),
        ({"auto_mapp": {}}, "unknown key 'auto_mapp': remove it"),
        ({"original_max_position_embeddings": 64}, "is 64, but nothing here has a 'original_max_position_embeddings'"),
        ({"num_key_value_heads": 3}, "4 heads cannot be shared among 3 kv_heads"),
        ({"num_attention_heads": 0}, "does not accept it"),
        ({"vocab_size": 0}, "'vocab_size': .*greater than or equal to 1"),
        ({"rms_norm_eps": 0.0}, "'rms_norm_eps': .*greater than 0"),
        ({"dtype": "int3"}, "int3"),
        ({"attention_dropout": 1.0}, "'attention_dropout': .*less than 1"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'architectures' is .*Classification"),
        ({"is_encoder_decoder": True}, "'is_encoder_decoder' is True"),
        ({"chunk_size_feed_forward": 4}, "'chunk_size_feed_forward' is 4"),
        ({"rope_interleaved": True}, "'rope_interleaved' is True"),
        ({"quantization_config": {"bits": 4}}, "de-quantise the weights first"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "modelling code of its own"),
    ],
)
def test_configs_that_cannot_be_read(raw: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        FORMATS["llama"].to_native({**SIZES, **raw})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"spce": 1}, "unknown key 'spce': did you mean 'spec'"),
        ({"default_preset": "fast"}, "default preset 'fast' is not among the presets"),
        ({"presets": {"fast": "attention*2"}}, "preset 'fast': the placement attention.2 names 2 layers"),
        ({"presets": {"fast": 3}}, "preset 'fast' is not a placement"),
        ({"presets": [1]}, "'presets' must hold a mapping"),
        ({"dtype": "int3"}, "unknown dtype 'int3'"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"spec": {"vocab_size": 3}}, "spec.hidden_size: Field required"),
        ({"spec": None}, "spec"),
    ],
)
def test_native_configs_that_cannot_be_read(change: dict[str, Any], says: str) -> None:
    good = FORMATS["llama"].to_native(SIZES).to_json_dict()
    with pytest.raises(ValueError, match=says) as caught:
        NativeConfig.from_json_dict({**good, **change})
    assert "\n" not in str(caught.value)


def test_unknown_names_come_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown format 'lama': did you mean llama"):
        FORMATS["lama"]
    with pytest.raises(ValueError, match="no format reads the model type 'mistal': did you mean mistral"):
        FORMATS.for_model_type("mistal")
    with pytest.raises(ValueError, match="no format reads the model type None"):
        FORMATS.for_model_type(None)


def test_a_whole_number_is_a_float_where_the_family_wants_one() -> None:
    read = FORMATS["llama"].to_native
    assert read({**SIZES, "rms_norm_eps": 1}) == read({**SIZES, "rms_norm_eps": 1.0})


@pytest.mark.parametrize("name", ["llama", "apriel2"])
def test_what_cannot_be_expressed_is_named_as_it_is_written(name: str) -> None:
    native = FORMATS["llama"].to_native(SIZES)
    raw = native.spec.model_dump(mode="json")
    raw["decoder"]["blocks"]["layer"]["lora"] = {"rank": 8, "alpha": 16, "targets": ["mlp.*"]}
    adapted = replace(native, spec=ModelSpec.model_validate(raw))
    with pytest.raises(
        ValueError, match=r"block 'layer' has lora \{rank: 8, alpha: 16\.0, targets: \[mlp\.\*\]\} \(merge"
    ):
        FORMATS[name].to_config(adapted)
