"""`apriel2` checkpoints against the logits that the original code gave for them: in, out, cut down to a placement."""

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gearshift import GearshiftForCausalLM
from gearshift.conversion import convert as plan_conversion
from gearshift.conversion import export as plan_export
from gearshift.formats import FORMATS, InexpressibleError, NativeConfig, choose_format, open_checkpoint
from gearshift.formats.fates import mapped
from gearshift.formats.read_sections import SectionReader
from gearshift.formats.section_format import SectionFormat
from gearshift.formats.sections import Inner, Section, paths_of
from gearshift.model import schema
from gearshift.spec import ModelSpec
from gearshift.surgery import Surgery
from tests.formats.folders import convert, export
from tests.formats.mutations import damage_json

DATA = Path(__file__).parent / "data"
FOLDERS = sorted(path.name for path in DATA.glob("apriel2-*"))
NOT_WRITTEN = {"auto_map", "transformers_version", "vision_encoder", "image_token_index", "architectures", "model_type"}
DEFAULTS = {"add_linear_biases": False, "sampling_strategy": "uniform"}
"""Values of keys that change nothing where they are."""


def family(name: str = "apriel2") -> SectionFormat:
    found = FORMATS[name]
    assert isinstance(found, SectionFormat)
    return found


def config(folder: str) -> dict[str, Any]:
    return json.loads((DATA / folder / "config.json").read_text())


def edited(folder: str, path: str, value: Any) -> dict[str, Any]:
    """A folder's config with one key set; `...` removes it."""
    tree = config(folder)
    *above, last = path.split(".")
    inner = tree
    for name in above:
        inner = inner.setdefault(name, {})
    inner[last] = value
    if value is ...:
        del inner[last]
    return tree


def agree(model: GearshiftForCausalLM, expected: dict[str, torch.Tensor], name: str, placement: str | None) -> None:
    with torch.no_grad():
        logits = model(expected["input_ids"], placement=placement).logits
    assert (logits - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_logits_are_the_original_codes(tmp_path: Path, folder: str) -> None:
    convert(open_checkpoint(DATA / folder), tmp_path / "native")
    model = GearshiftForCausalLM.from_pretrained(tmp_path / "native").eval()
    expected = load_file(DATA / folder / "expected.safetensors")
    for name in expected.keys() - {"input_ids"}:
        agree(model, expected, name, name.partition(".")[2] or None)


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_and_back(tmp_path: Path, folder: str) -> None:
    convert(open_checkpoint(DATA / folder), tmp_path / "native")
    export(open_checkpoint(tmp_path / "native"), tmp_path / "back", "apriel2")
    before, after = (load_file(path / "model.safetensors") for path in (DATA / folder, tmp_path / "back"))
    before = {name: tensor for name, tensor in before.items() if not name.startswith("model.vision_encoder.")}
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)

    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["model_type"] == "apriel2_text"
    theirs, ours = (
        leaves({key: tree[key] for key in tree if key not in NOT_WRITTEN}) for tree in (config(folder), written)
    )
    for path, value in theirs.items():
        if path.endswith("dt_rank") and value == "auto":
            value = 2
        assert ours.get(path, DEFAULTS.get(path.rpartition(".")[2])) == value, path
    again = [
        family(name).to_native(tree) for name, tree in (("apriel2", written), (registered(folder), config(folder)))
    ]
    assert again[0].spec == again[1].spec
    assert again[0].extras == again[1].extras
    assert again[0].source.get("kept") == again[1].source.get("kept")


def registered(folder: str) -> str:
    return "apriel2_images" if config(folder)["model_type"] == "apriel2" else "apriel2"


def leaves(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= leaves(value, f"{above}{key}.")
        else:
            flat[f"{above}{key}"] = value
    return flat


def test_the_vision_encoder_is_left_out_with_a_reason() -> None:
    checkpoint = open_checkpoint(DATA / "apriel2-with-images")
    assert checkpoint.format.name == "apriel2"
    assert "text model alone" in checkpoint.native.source["notes"][0]
    assert checkpoint.plan.discards
    assert all("vision encoder" in discard.reason for discard in checkpoint.plan.discards)
    with pytest.raises(InexpressibleError, match="read, never written"):
        family("apriel2_images").to_config(checkpoint.native)


def test_a_supernet_is_searched_changed_pruned_and_written(tmp_path: Path) -> None:
    """Add a mixer, cut down to one of the original ones, and write that in the format it came from."""
    kda = {"type": "kimi_delta_attention", "heads": 4, "head_dim": 8, "gate_activation": "silu"}
    added = {"edits": [{"add": {"name": "late", "mixer": kda, "init": "transfer"}}]}
    source = DATA / "apriel2-supernet"
    plan_conversion(source, [Surgery.model_validate(added)]).write(tmp_path / "native")
    grown = open_checkpoint(tmp_path / "native").native
    assert grown.spec.choices[0] == ("attention", "gdn", "kda", "sliding_window", "late")
    assert set(family().to_config(grown)["decoder"]["block"]["mixer"]["mixers"]) == set(grown.spec.choices[0])

    expected = load_file(source / "expected.safetensors")
    for mixer in ("gdn", "kda", "sliding_window", "attention"):
        out = tmp_path / mixer
        plan_export(tmp_path / "native", mixer, "apriel2").write(out)
        assert json.loads((out / "config.json").read_text())["decoder"]["num_blocks"] == 2
        convert(open_checkpoint(out), tmp_path / f"{mixer}-native")
        model = GearshiftForCausalLM.from_pretrained(tmp_path / f"{mixer}-native").eval()
        agree(model, expected, f"logits.{mixer}", None)


def test_a_whole_supernet_is_written_where_the_format_has_supernets(tmp_path: Path) -> None:
    source = DATA / "apriel2-supernet"
    plan_conversion(source).write(tmp_path / "native")
    plan_export(tmp_path / "native", format="apriel2").write(tmp_path / "back")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    for format in ("auto", "gearshift", "llama"):
        with pytest.raises(ValueError, match="name a --placement"):
            plan_export(tmp_path / "native", format=format)


def test_nobody_is_given_a_class_that_transformers_lacks() -> None:
    """A placement that only its own code could run goes to the native format unless a person asks for it."""
    assert plan_export(DATA / "apriel2-supernet", "gdn").format == "gearshift"
    assert plan_export(DATA / "apriel2-supernet", "attention").format == "llama"
    native = open_checkpoint(DATA / "apriel2-mixers").native
    assert choose_format(native)[0].name == "gearshift"


def sections(section: Section) -> Iterator[Section]:
    """A section and all those within it, each once."""
    seen = [section]
    for one in seen:
        yield one
        for fate in one.fates:
            if isinstance(fate, Inner):
                seen += [inner for inner in fate.choices.values() if inner is not None and inner not in seen]


ALL_SECTIONS = [*sections(family().model), *sections(family("apriel2_images").model)]


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=lambda section: section.name)
def test_every_fate_is_needed(section: Section) -> None:
    for fate in section.fates:
        rest = tuple(other for other in section.fates if other is not fate)
        if paths_of(fate):
            with pytest.raises(ValueError, match="no fate"):
                replace(section, fates=rest)
        else:
            outer, _, inner = fate.key.partition(".")
            fewer = replace(section, fates=rest, aliases={})
            with pytest.raises(ValueError, match=f"unknown key '({fate.key}|{outer})'"):
                SectionReader().read(fewer, {outer: {inner: 1} if inner else 1})
        with pytest.raises(ValueError, match="two fates"):
            replace(section, fates=(*section.fates, fate))


def test_a_leaf_that_is_not_there_cannot_be_mapped() -> None:
    section = family().model
    with pytest.raises(ValueError, match=r"a leaf 'wings' that our spec does not have"):
        replace(section, fates=(*section.fates, mapped("wings", "wings")))
    with pytest.raises(ValueError, match="translates 'wing' to 'wings', which has no fate"):
        replace(section, aliases={"wing": "wings"})


def everything() -> ModelSpec:
    """A model with which every template has a tensor."""
    blocks = {}
    for folder in ("apriel2-all-biases", "apriel2-mixer-options", "apriel2-stochastic-pattern", "apriel2-ungated-mlp"):
        for name, block in open_checkpoint(DATA / folder).native.spec.decoder.blocks.items():
            blocks[f"{folder}-{name}"] = block.model_dump(mode="json")
    blocks["biased"] = copy.deepcopy(blocks["apriel2-ungated-mlp-block"])
    blocks["biased"]["mlp"] |= {"up_bias": True, "down_bias": True}
    decoder = {"num_layers": len(blocks), "pattern": list(blocks), "blocks": blocks}
    return ModelSpec.model_validate({"vocab_size": 64, "hidden_size": 32, "max_positions": 64, "decoder": decoder})


def test_every_template_is_needed() -> None:
    spec, whole = everything(), family()
    target = schema(spec, "float32")
    assert whole.plan(spec, target).target == target
    weights = whole.tensors.weights
    for index, weight in enumerate(weights):
        fewer = replace(whole.tensors, weights=(*weights[:index], *weights[index + 1 :]))
        with pytest.raises(ValueError, match="a template for it is missing"):
            replace(whole, tensors=fewer).plan(spec, target)
        with pytest.raises(ValueError, match="two tensor templates"):
            replace(whole.tensors, weights=(*weights, weight))


@pytest.mark.parametrize(
    ("folder", "path", "value", "says"),
    [
        ("attention", "decoder.block.normalization.type", "layer_norm", "'normalization.type' is 'layer_norm'"),
        (
            "attention",
            "decoder.block.normalization.epsilon",
            1e-3,
            "'normalization.epsilon' is 0.001, but the model's 'head",
        ),
        (
            "attention",
            "decoder.block.mixer.head_grups",
            3,
            "'decoder.block.mixer.head_grups': did you mean 'head_groups'",
        ),
        (
            "attention",
            "decoder.block.mixer.type",
            "axial",
            "'decoder.block.mixer.type' is 'axial': known are 'attention'",
        ),
        ("attention", "decoder.block.mixer.rotary.type", "pixtral_2d", "rotary.type' is 'pixtral_2d': known are"),
        ("attention", "decoder.block.mixer.rotary", ..., "decoder.block.mixer: the key 'rotary' is missing"),
        ("attention", "decoder.block.mixer.heads", ..., "decoder.block.mixer: the key 'heads' is missing"),
        ("attention", "decoder.block.mixer.heads", 0, "'decoder.block.mixer.heads': .*greater than or equal to 1"),
        ("attention", "decoder.block.mixer.head_groups", 3, "4 heads cannot be shared among 3 kv_heads"),
        ("attention", "decoder.block", 3, "'decoder.block' must hold a mapping, not 3"),
        ("attention", "decoder.block.shape", {"a": 1}, "unknown key 'decoder.block.shape'"),
        ("attention", "quantization_config", {"bits": 4}, "de-quantise the weights first"),
        ("attention", "vocab_sise", 3, "unknown key 'vocab_sise': did you mean 'vocab_size'"),
        ("biases", "decoder.block.mixer.value_layer", {}, "'value_layer.bias.enabled' is False, but 'query_layer"),
        (
            "mixers",
            "decoder.blocks.kda.mixer.convolution_layer.activation",
            "gelu",
            "'convolution_layer.activation' is",
        ),
        ("mixers", "decoder.blocks.mamba.mixer.conv_bias", ..., "decoder.blocks.mamba.mixer: the key 'conv_bias'"),
        ("mixers", "decoder.blocks.mamba.mixer.d_xb", 12, "xb_size 12 must be a multiple of state_size 8"),
        ("mixers", "decoder.pattern", "attn", "decoder: 'pattern' must list names of blocks"),
        ("mixers", "decoder.num_blocks", 10**9, "'num_blocks' must be a whole number from 1"),
        ("mixers", "decoder.pattern", ["attn", "gnd"], "'gnd'"),
        ("supernet", "decoder.block.mixer.main_mixer_name", "nobody", "main mixer 'nobody' is not among the mixers"),
        ("supernet", "decoder.block.mixer.mixers.gdn.type", "stochastic", "'stochastic': known are"),
    ],
)
def test_what_cannot_be_read_is_named(folder: str, path: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        family().to_native(edited(f"apriel2-{folder}", path, value))
    assert "\n" not in str(caught.value)


def test_absent_keys_mean_what_the_original_code_takes_them_for() -> None:
    block = {
        "mixer": {"head_size": 8, "heads": 4, "rotary": {"type": "default"}},
        "mlp": {"intermediate_size": 40},
        "normalization": {},
    }
    fixed = family().to_native({"decoder": {"num_blocks": 3, "block": block}, "hidden_size": 32})
    mixer = fixed.spec.decoder.blocks["block"].mixer
    assert (mixer.type, mixer.kv_heads, mixer.window, mixer.causal, mixer.qkv_bias) == (
        "attention",
        4,
        None,
        True,
        False,
    )
    assert fixed.spec.decoder.blocks["block"].mlp.model_dump() == {
        "type": "plain",
        "intermediate_size": 40,
        "activation": "silu",
        "up_bias": False,
        "down_bias": False,
    }
    assert (fixed.spec.vocab_size, fixed.spec.max_positions, fixed.spec.final_norm.epsilon) == (32000, 2048, 1e-5)
    assert fixed.extras == {"bos_token_id": 1, "eos_token_id": 2, "use_cache": True}

    nothing = {"decoder": {"num_blocks": 3, "block": block}, "hidden_size": 32, "eos_token_id": None}
    assert family().to_native(nothing).extras == {"bos_token_id": 1, "use_cache": True}
    assert family().to_config(family().to_native(nothing))["eos_token_id"] is None

    mamba = {"type": "mamba", "conv_bias": True, "dt_proj_bias": True}
    block = {**block, "mixer": {"type": "stochastic", "mixers": {"b": mamba, "a": {"type": "kda", "head_dim": 1}}}}
    mixer = (
        family()
        .to_native({"decoder": {"num_blocks": 1, "block": block}, "hidden_size": 32})
        .spec.decoder.blocks["block"]
    )
    assert mixer.main == "b"
    assert mixer.mixers["b"].model_dump(include={"inner_size", "xb_size", "dt_rank"}) == {
        "inner_size": 64,
        "xb_size": 32,
        "dt_rank": 2,
    }
    assert (mixer.mixers["a"].gate_activation, mixer.mixers["a"].heads) == ("silu", 32)


def test_blocks_that_no_layer_has_are_left_out_with_a_note() -> None:
    raw = edited("apriel2-mixers", "decoder.pattern", ["attn", "kda"])
    native = family().to_native(raw)
    assert tuple(native.spec.decoder.blocks) == ("attn", "kda")
    assert native.source["notes"] == [
        f"left out decoder.blocks.{name}, which no layer uses" for name in ("gdn", "mamba")
    ]


@pytest.mark.parametrize(
    ("type", "settings"),
    [
        ("llama3", {"scale_factor": 4.0, "original_context_length": 32}),
        ("yarn", {"scale_factor": 4.0, "original_context_length": 32, "beta_fast": 24.0}),
    ],
)
def test_rotary_types_of_its_trainer(type: str, settings: dict[str, Any]) -> None:
    raw = edited("apriel2-attention", "decoder.block.mixer.rotary", {"type": type, "theta": 700.0, **settings})
    native = family().to_native(raw)
    rotary = native.spec.decoder.blocks["block"].mixer.rotary
    assert (rotary.type, rotary.theta, rotary.factor, rotary.original_max_position_embeddings) == (type, 700.0, 4.0, 32)
    written = family().to_config(native)["decoder"]["block"]["mixer"]["rotary"]
    assert {key: written[key] for key in settings} == settings
    assert family().to_native(family().to_config(native)).spec == native.spec


def changed(folder: str, block: str, **settings: Any) -> NativeConfig:
    """A folder's model with settings of a block changed; `a__b` is b in a."""
    native = open_checkpoint(DATA / folder).native
    raw = native.spec.model_dump(mode="json")
    for path, value in settings.items():
        *above, last = path.split("__")
        tree = raw["decoder"]["blocks"][block]
        for name in above:
            tree = tree[name]
        tree[last] = value
    return replace(native, spec=ModelSpec.model_validate(raw))


@pytest.mark.parametrize(
    ("folder", "block", "change", "says"),
    [
        ("attention", "block", {"norm__epsilon": 0.5}, "block 'block' has norm.epsilon 0.5"),
        ("attention", "block", {"shared_weights": True}, "block 'block' has shared_weights True"),
        ("attention", "block", {"lora": {"rank": 2, "alpha": 4}}, "block 'block' has lora .*merge the adapters"),
        ("attention", "block", {"norm_placement": "after"}, "block 'block' has norm_placement 'after'"),
        ("attention", "block", {"mixer__rotary": None}, "block 'block' has mixer.rotary None"),
        ("attention", "block", {"mixer__qk_norm": {}}, "block 'block' has mixer.qk_norm"),
        ("attention", "block", {"mlp__bias": True}, "block 'block' has mlp.bias True"),
        ("mixers", "kda", {"mixer__decay_rank": 3}, "block 'kda' has mixer.decay_rank 3"),
        ("mixers", "mamba", {"mixer": {"type": "mamba"}}, "block 'mamba' has mixer.projection 'classic'"),
        ("mixers", "mamba", {"mixer": {"type": "mamba2", "head_dim": 8}}, "block 'mamba' has mixer.type 'mamba2'"),
        ("supernet", "block", {"mixer__mixers__gdn__activation": "gelu"}, "'block' has mixer.mixers.gdn.activation"),
    ],
)
def test_what_it_cannot_express_is_named(folder: str, block: str, change: dict[str, Any], says: str) -> None:
    with pytest.raises(InexpressibleError, match=f"'apriel2' cannot express this model: .*{says}.*these formats can"):
        family().to_config(changed(f"apriel2-{folder}", block, **change))


@pytest.mark.parametrize("folder", ["apriel2-mixers", "apriel2-supernet", "apriel2-biases"])
def test_damaged_configs_give_clear_errors(folder: str) -> None:
    text = json.dumps(config(folder)).encode()
    refused = 0
    for seed in range(300):
        try:
            raw = json.loads(damage_json(text, random.Random(seed)))
        except (ValueError, RecursionError):
            continue
        if isinstance(raw, dict):
            try:
                family().to_native(raw)
            except ValueError:
                refused += 1
    assert refused > 100
