"""Families whose layers differ in mixer and MLP: which layers are which, and what cannot be said."""

import json
from dataclasses import replace
from typing import Any

import pytest

from gearshift.formats import FORMATS, InexpressibleError, NativeConfig
from gearshift.formats.layers import LayerNumbers, LayerStep, kinds_of
from gearshift.spec import ModelSpec
from tests.formats.families import families
from tests.formats.test_published_configs import BAMBA, KIMI_LINEAR, OLMO_HYBRID

FAMILIES = families()


def small(name: str, **settings: Any) -> NativeConfig:
    """A small model of a family."""
    family = FAMILIES[name]
    raw = family.config_class(**{**family.sizes, **settings}).to_json_string()
    return FORMATS[name].to_native(json.loads(raw))


def with_decoder(native: NativeConfig, **changes: Any) -> NativeConfig:
    raw = native.spec.model_dump(mode="json")
    return replace(native, spec=ModelSpec.model_validate({**raw, "decoder": {**raw["decoder"], **changes}}))


def test_every_nth_layer() -> None:
    step = LayerStep("step", every=("sparse", "dense"), others=("dense",))
    listed = LayerNumbers("listed", listed=("dense",), others=("sparse", "dense"))
    kinds = kinds_of((step, listed), {"step": 2, "listed": [3]}, 6, ("sparse", "dense"))
    assert kinds == ["dense", "sparse", "dense", "dense", "dense", "sparse"]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, None, "2"])
def test_a_step_is_a_positive_number(value: Any) -> None:
    with pytest.raises(ValueError, match="'step' must be a number of layers from 1 on"):
        LayerStep("step", every=("sparse",), others=("dense",)).read(value, 4)


def test_keys_of_layers_come_back_only_if_they_still_say_the_same() -> None:
    native = small("qwen3_moe", decoder_sparse_step=2)
    assert native.spec.decoder.layout == ("dense", "sparse", "dense")
    assert FORMATS["qwen3_moe"].to_config(native)["decoder_sparse_step"] == 2
    other = FORMATS["qwen3_moe"].to_config(with_decoder(native, pattern=["sparse", "dense", "sparse"]))
    assert (other["decoder_sparse_step"], other["mlp_only_layers"]) == (1, [1])


def test_a_head_width_that_is_left_out_stays_so() -> None:
    assert FORMATS["mixtral"].to_config(small("mixtral"))["head_dim"] is None
    assert FORMATS["mixtral"].to_config(small("mixtral", head_dim=8))["head_dim"] == 8


def test_positions_in_some_attention_layers_alone_cannot_be_said() -> None:
    native = small("olmo_hybrid", layer_types=["full_attention", "linear_attention", "full_attention"])
    blocks = native.spec.model_dump(mode="json")["decoder"]["blocks"]
    full = blocks["full_attention"]
    blocks["without"] = {**full, "mixer": {**full["mixer"], "rotary": None}}
    mixed = with_decoder(native, blocks=blocks, pattern=["full_attention", "linear_attention", "without"])
    with pytest.raises(InexpressibleError, match=r"block 'without' has no mixer\.rotary"):
        FORMATS["olmo_hybrid"].to_config(mixed)
    del blocks["full_attention"]
    neither = with_decoder(native, blocks=blocks, pattern=["without", "linear_attention"])
    assert FORMATS["olmo_hybrid"].to_config(neither)["rope_parameters"]["rope_theta"] is None


def test_olmo_hybrid_without_a_base_has_the_default_one_only_if_nothing_is_said() -> None:
    base = {key: value for key, value in OLMO_HYBRID.items() if key != "rope_parameters"}
    read = FORMATS["olmo_hybrid"].to_native
    silent = read(base).spec.decoder.blocks["full_attention"].mixer.rotary
    assert silent is not None
    assert silent.theta == 10000.0
    old = (
        read({**base, "rope_parameters": None, "rope_theta": 500.0}).spec.decoder.blocks["full_attention"].mixer.rotary
    )
    assert old is not None
    assert old.theta == 500.0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"first_k_dense_replace": 2, "mlp_layer_types": ["dense"] + ["sparse"] * 26}, "'first_k_dense_replace' is 2"),
        ({"layer_types": ["full_attention"] * 27}, "'linear_attn_config.full_attn_layers' is"),
        ({"num_key_value_heads": 8}, "'num_key_value_heads' is 8"),
        ({"auto_map": {"AutoConfig": "other.Config"}}, "'auto_map' is"),
        ({"mla_use_nope": False}, "'mla_use_nope' is False"),
        ({"num_nextn_predict_layers": 1}, "prediction heads are not read"),
        ({"linear_attn_config": {"gate_lower_bound": -5.0}}, "unknown key 'linear_attn_config.gate_lower_bound'"),
        ({"num_shared_experts": 0}, "'n_shared_experts'"),
        ({"num_shared_experts": 0.5}, "'num_shared_experts' must be a whole number, not 0.5"),
    ],
)
def test_what_kimi_linear_cannot_mean(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FORMATS["kimi_linear"].to_native({**KIMI_LINEAR, **change})


def test_layers_that_the_published_layout_cannot_say_are_said_in_transformers_own() -> None:
    config = FORMATS["kimi_linear"].to_config(small("kimi_linear"))
    assert "first_k_dense_replace" not in config
    assert config["mlp_layer_types"] == ["dense", "sparse", "sparse", "dense"]
    assert config["linear_attn_config"]["kda_layers"] == [1, 3]


def test_shared_experts_are_a_whole_number() -> None:
    native = small("kimi_linear")
    blocks = native.spec.model_dump(mode="json")["decoder"]["blocks"]
    for name in ("linear_sparse", "full_sparse"):
        blocks[name]["mlp"]["shared"]["intermediate_size"] = 25
    with pytest.raises(InexpressibleError, match=r"shared\.intermediate_size 25 is not a multiple of the experts' 24"):
        FORMATS["kimi_linear"].to_config(with_decoder(native, blocks=blocks))


def test_bamba_rotates_what_transformers_rotates() -> None:
    with pytest.raises(ValueError, match=r"'attn_rotary_emb' is 128, but transformers rotates 0\.5 of 128 channels"):
        FORMATS["bamba"].to_native({**BAMBA, "attn_rotary_emb": 128})
    with pytest.raises(ValueError, match=r"'partial_rotary_factor' is 1\.0, and only 0\.5 is supported"):
        FORMATS["bamba"].to_native({**BAMBA, "partial_rotary_factor": 1.0})


def test_bamba_rotates_what_rope_parameters_say() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    written = {**BAMBA, "rope_parameters": rope, "partial_rotary_factor": 0.5, "attn_rotary_emb": 32}
    native = FORMATS["bamba"].to_native(written)
    assert native.spec.decoder.blocks["attention"].mixer.rotary.share == 0.25
    with pytest.raises(ValueError, match="'attn_rotary_emb' is 64, but transformers rotates"):
        FORMATS["bamba"].to_native({**written, "attn_rotary_emb": 64})


def test_bamba_has_channels_by_the_multiple() -> None:
    native = small("bamba")
    blocks = native.spec.model_dump(mode="json")["decoder"]["blocks"]
    blocks["mamba"]["mixer"]["heads"] = 9
    with pytest.raises(InexpressibleError, match="72 channels of Mamba-2 are not a multiple of hidden_size 32"):
        FORMATS["bamba"].to_config(with_decoder(native, blocks=blocks))
