"""The families whose modelling code is Fast-LLM's: checkpoints that it wrote, and the logits that it computed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gearshift import GearshiftForCausalLM, conversion
from gearshift.formats import FORMATS, InexpressibleError, NativeConfig, open_checkpoint
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import RUNTIME_ONLY, Fixed, Mapped, Translated
from gearshift.formats.leaves import set_at
from gearshift.model import schema
from gearshift.spec import ModelSpec
from tests.formats.folders import convert, export

DATA = Path(__file__).parent / "data"
FAMILIES = ("apriel", "diffusion_llama", "dream", "mtp_llama")
IDENTITY = "apriel-identity"
FOLDERS = [path.name for name in FAMILIES for path in sorted(DATA.glob(f"{name}-*")) if path.name != IDENTITY]


def family(folder: str) -> FamilyFormat:
    found = FORMATS[folder.partition("-")[0]]
    assert isinstance(found, FamilyFormat)
    return found


def config_of(folder: str, **changes: Any) -> dict[str, Any]:
    """A folder's config with keys changed, `__` standing for a dot; those set to `...` are removed."""
    config = json.loads((DATA / folder / "config.json").read_text())
    for key, value in changes.items():
        set_at(config, key.replace("__", "."), value)
    return {key: value for key, value in config.items() if value is not ... and key != "transformers_version"}


def edited(folder: str, **changes: Any) -> NativeConfig:
    """A folder's model with leaves of its spec changed, `__` standing for a dot."""
    native = family(folder).to_native(config_of(folder))
    tree = native.spec.model_dump()
    for path, value in changes.items():
        set_at(tree, path.replace("__", "."), value)
    return replace(native, spec=ModelSpec.model_validate(tree))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_and_back(tmp_path: Path, folder: str) -> None:
    convert(open_checkpoint(DATA / folder), tmp_path / "native")
    model = GearshiftForCausalLM.from_pretrained(tmp_path / "native").eval()
    expected = load_file(DATA / folder / "expected.safetensors")
    heads = [expected[name] for name in sorted(expected) if name.startswith("logits.head_")][1:]
    with torch.no_grad():
        output = model(expected["input_ids"], prediction_heads=True)
    assert_close(output.logits, expected["logits"])
    for actual, logits in zip(output.prediction_logits, heads, strict=True):
        assert_close(actual, logits)

    export(open_checkpoint(tmp_path / "native"), tmp_path / "back", family(folder).name)
    before, after = (load_file(path / "model.safetensors") for path in (DATA / folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].equal(after[tensor]), tensor
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config_of(folder)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        (IDENTITY, {}, "'hybrid_block_layout' has the type 'i': a layer that does nothing"),
        (
            "apriel-mixed",
            {"hybrid_block_layout": ["t", "m2", "m2d", "gdn"], "layer_types": ...},
            "'linear_attn_config.gdn_num_key_heads': Input should be a valid integer",
        ),
        ("apriel-mixed", {"hybrid_block_layout": ["t", "m2", "m2d", "kl"]}, "the type 'kl': Kimi Delta Attention"),
        ("apriel-mixed", {"hybrid_block_layout": ["t", "m2", "m2d", "swa"]}, "the type 'swa': attention with a window"),
        ("apriel-mixed", {"hybrid_block_layout": ["t", "m2", "m2d", ["t"]]}, r"the type \['t'\]: known are t, m2, m2d"),
        ("apriel-mixed", {"hybrid_block_layout": ["t", "m2"]}, "the type of each of the 4 layers"),
        ("apriel-mixed", {"layer_types": ["full_attention"] * 4}, "together mean no kind of block for layer 1"),
        ("apriel-mixed", {"ssm_cfg__dt_proj_bias": False}, "'ssm_cfg.dt_proj_bias' is False"),
        ("apriel-mixed", {"ssm_cfg__activation": "gelu"}, "'ssm_cfg.activation' is 'gelu': known are 'identity'"),
        ("apriel-mixed", {"ssm_cfg__d_inner": 0}, "'ssm_cfg.d_inner' and 'ssm_cfg.expand' must be whole numbers"),
        ("apriel-mixed", {"ssm_cfg__n_v_heads": 7}, "'ssm_cfg.n_v_heads' is 7, which does not divide"),
        ("apriel-mixed", {"ssm_cfg": 7}, "'ssm_cfg' must hold a mapping, not 7"),
        ("apriel-mixed", {"ssm_cfg__state": 7}, "unknown key 'ssm_cfg.state'"),
        ("mtp_llama-one-head", {"prediction_heads": 0}, "'prediction_heads' counts the heads"),
        ("mtp_llama-one-head", {"prediction_heads": "2"}, "'prediction_heads' counts the heads"),
        (
            "diffusion_llama-plain",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "known are 'default', 'yarn'",
        ),
        ("diffusion_llama-plain", {"rope_scaling": YARN | {"mscale": 2.0}}, "'rope_parameters.mscale' is 2.0"),
        ("dream-plain", {"head_dim": 12}, "unknown key 'head_dim'"),
        ("dream-plain", {"auto_map": {"AutoModel": "mine.Model"}}, "'auto_map' is .* code of its own"),
    ],
)
def test_configs_that_we_cannot_say_are_refused(folder: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family(folder).to_native(config_of(folder, **changes))


@pytest.mark.parametrize(
    ("folder", "changes", "message"),
    [
        ("dream-plain", {"decoder__blocks__layer__mixer__causal": True}, "mixer.causal True"),
        ("dream-plain", {"decoder__blocks__layer__mixer__head_dim": 12}, "mixer.head_dim would be read back otherwise"),
        (
            "diffusion_llama-plain",
            {"decoder__blocks__layer__mixer__rotary": {"type": "linear", "factor": 2.0}},
            "'rope_parameters.rope_type' cannot be 'linear'",
        ),
        ("mtp_llama-three-heads", {"final_norm__epsilon": 1e-3}, "final_norm.epsilon"),
        ("apriel-mixed", {"decoder__blocks__mamba__mixer__doubled_dt_bias": False}, "mixer.doubled_dt_bias False"),
        ("apriel-mixed", {"decoder__blocks__mamba__mixer__inner_size": 32}, "has 64 channels .* where mamba has 32"),
        ("apriel-mixed", {"decoder__blocks__mamba__mixer__state_size": 16}, "state_size 8 where block 'mamba' has 16"),
        ("apriel-mixed", {"decoder__blocks__discrete__mixer__activation": "gelu"}, "cannot be 'gelu'"),
    ],
)
def test_models_that_a_family_cannot_say_are_refused(folder: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InexpressibleError, match=message):
        family(folder).express(edited(folder, **changes))


def test_a_head_unlike_the_last_layer_is_refused() -> None:
    native = edited("mtp_llama-three-heads")
    heads = native.spec.model_dump()["prediction_heads"]
    heads[1]["block"]["mlp"]["activation"] = "gelu"
    with pytest.raises(InexpressibleError, match="prediction head 1 has another block than the last layer"):
        family("mtp_llama-three-heads").express(edited("mtp_llama-three-heads", prediction_heads=heads))


@pytest.mark.parametrize(
    ("folder", "changes"),
    [
        ("apriel-mixed", {"ssm_cfg__d_inner": None, "ssm_cfg__expand": 2}),
        ("apriel-mixed", {"ssm_cfg__d_xb": None, "ssm_cfg__activation": "swish", "ssm_cfg__dt_rank": 2}),
        ("apriel-mixed", {"layer_types": ..., "linear_attn_config": ...}),
        ("apriel-m2-conv-first", {"sliding_window": 9, "ssm_cfg__n_v_heads": 5}),
        ("dream-plain", {"sliding_window": 5, "bos_token_id": 3, "use_cache": True}),
        ("diffusion_llama-plain", {"auto_map": ..., "mask_token_id": 131072}),
    ],
)
def test_values_are_written_as_they_came(folder: str, changes: dict[str, Any]) -> None:
    config = config_of(folder, **changes)
    assert family(folder).express(family(folder).to_native(config)) == config


def test_gated_delta_net_beside_attention(tmp_path: Path) -> None:
    convert(open_checkpoint(DATA / "apriel2-supernet"), tmp_path / "native")
    conversion.export(tmp_path / "native", "attention,gdn", "apriel").write(tmp_path / "apriel")
    written = json.loads((tmp_path / "apriel" / "config.json").read_text())
    assert written["hybrid_block_layout"] == ["t", "gdn"]
    assert written["linear_attn_config"] == config_of("apriel-gdn")["linear_attn_config"]
    convert(open_checkpoint(tmp_path / "apriel"), tmp_path / "again")
    ids = load_file(DATA / "apriel-gdn" / "expected.safetensors")["input_ids"]
    supernet, pruned = (GearshiftForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("native", "again"))
    with torch.no_grad():
        assert torch.equal(pruned(ids).logits, supernet(ids, placement="attention,gdn").logits)


def test_a_width_that_no_longer_holds_is_written_out() -> None:
    folder = "apriel-m2-conv-first"
    native = family(folder).to_native(config_of(folder, ssm_cfg__d_inner=None, ssm_cfg__expand=2))
    tree = native.spec.model_dump()
    mixer = tree["decoder"]["blocks"]["mamba"]["mixer"]
    assert mixer["inner_size"] == 64
    mixer["inner_size"] = 96
    changed = family(folder).express(replace(native, spec=ModelSpec.model_validate(tree)))
    assert changed["ssm_cfg"]["d_inner"] == 96


def test_rotary_positions_are_written_in_the_old_layout() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 64}
    changes = {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": rope}
    written = family("dream-plain").express(family("dream-plain").to_native(config_of("dream-plain", **changes)))
    assert written["rope_theta"] == 700.0
    assert written["rope_scaling"] == YARN
    assert "rope_parameters" not in written


@pytest.mark.parametrize("name", ["diffusion_llama", "dream"])
def test_a_file_that_the_code_needs_is_written_once(tmp_path: Path, name: str) -> None:
    FORMATS[name].write_companions(tmp_path)
    path = tmp_path / "generation_config.json"
    assert path.read_text() == "{}\n"
    path.write_text('{"top_p": 0.5}')
    FORMATS[name].write_companions(tmp_path)
    assert path.read_text() == '{"top_p": 0.5}'


def test_transformers_has_none_of_them() -> None:
    assert [name for name in FAMILIES if family(name).in_transformers] == []
    assert family("mistral").in_transformers


@pytest.mark.parametrize("name", FAMILIES)
def test_every_fate_is_needed(name: str) -> None:
    whole = family(name)
    config = config_of(next(folder for folder in FOLDERS if folder.startswith(f"{name}-")))
    known = set(whole._table.class_keys()) - RUNTIME_ONLY
    for fate in (*whole.fates, *whole.layers):
        rest = tuple(other for other in whole.fates if other is not fate)
        layers = tuple(other for other in whole.layers if other is not fate)
        if not isinstance(fate, Fixed) and fate.key == "model_type":  # it says which names the family has
            assert replace(whole, fates=rest).model_types != whole.model_types
        elif isinstance(fate, Mapped | Fixed | Translated) or fate.key in known:
            with pytest.raises(ValueError, match="no fate"):
                replace(whole, fates=rest, layers=layers)
        else:
            changed = json.loads(json.dumps(config))
            set_at(changed, fate.key, None)
            with pytest.raises(ValueError, match=f"unknown key '{fate.key}'"):
                replace(whole, fates=rest, layers=layers).to_native(changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_template_is_needed(name: str) -> None:
    whole = family(name)
    specs = [family(folder).to_native(config_of(folder)).spec for folder in FOLDERS if folder.startswith(f"{name}-")]
    weights = whole.tensors.weights
    for index in range(len(weights)):
        tensors = replace(whole.tensors, weights=(*weights[:index], *weights[index + 1 :]))
        fewer = replace(whole, tensors=tensors)
        assert not all(has_all_tensors(fewer, spec) for spec in specs), weights[index]


def has_all_tensors(format: FamilyFormat, spec: ModelSpec) -> bool:
    try:
        format.plan(spec, schema(spec, "float32"))
    except ValueError as error:
        return "a template for it is missing" not in str(error)
    return True
