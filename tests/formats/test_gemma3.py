"""Gemma 3 beyond its sweep: older layouts, what it cannot say, and the model that reads images too."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from gearshift import GearshiftForCausalLM
from gearshift.formats import FORMATS, InexpressibleError, choose_format, open_checkpoint
from gearshift.spec import ModelSpec
from tests.formats.families.gemma3 import FAMILY
from tests.formats.folders import SIZES, convert, edit_config, export
from tests.models import tokens

SMALL = {**FAMILY.sizes, "query_pre_attn_scalar": 8}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def with_images(folder: Path) -> Gemma3ForConditionalGeneration:
    """Save a small random model that reads images too; the model."""
    torch.manual_seed(0)
    text = {**SMALL, "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}}}
    config = Gemma3Config(
        text_config=text,
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=58,
        eoi_token_index=59,
        eos_token_id=[1, 5],
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    return model


def rename(folder: Path, *renames: tuple[str, str]) -> None:
    """Rename the tensors of a folder by what their names begin with."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for old, new in renames:
        tensors = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("layout", ["published", "newer"])
def test_of_a_model_with_images_the_text_model_is_read(tmp_path: Path, layout: str) -> None:
    theirs = with_images(tmp_path / "source")
    names = load_file(tmp_path / "source" / "model.safetensors")
    published = any(name.startswith("language_model.model.") for name in names)
    if layout == "newer" and published:
        rename(
            tmp_path / "source",
            ("language_model.model.", "model.language_model."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        )
    if layout == "published" and not published:
        rename(
            tmp_path / "source",
            ("model.language_model.", "language_model.model."),
            ("model.vision_tower.", "vision_tower."),
            ("model.multi_modal_projector.", "multi_modal_projector."),
        )
    convert(open_checkpoint(tmp_path / "source"), tmp_path / "native")
    native = open_checkpoint(tmp_path / "native")
    assert native.native.source["notes"] == ["the vision tower was left out: this is the text model alone"]
    assert native.native.extras["eos_token_id"] == [1, 5]
    ids = tokens(2, 40, vocabulary=57)
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        actual = GearshiftForCausalLM.from_pretrained(tmp_path / "native").eval()(ids).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()

    assert choose_format(native.native)[0] is FORMATS["gemma3"]
    export(native, tmp_path / "text", "gemma3")
    again = FAMILY.config_class.from_pretrained(tmp_path / "text")
    assert again.rope_parameters["full_attention"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"text_config": None}, "'text_config' must hold the config of the text model, not None"),
        ({"architectures": ["Gemma3ForSequenceClassification"]}, "'architectures' is .*Classification"),
        ({"wings": 2}, "unknown key 'wings'"),
        ({"quantization_config": {"bits": 4}}, "de-quantise the weights first"),
        (
            {"text_config": {**SMALL, "use_bidirectional_attention": True}},
            "'use_bidirectional_attention' is True, which only a text model by itself follows",
        ),
    ],
)
def test_models_with_images_that_cannot_be_read(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with_images(tmp_path / "source")
    edit_config(tmp_path / "source", **changes)
    with pytest.raises(ValueError, match=rf"config\.json: .*{says}"):
        open_checkpoint(tmp_path / "source")


def test_a_model_with_images_is_not_written() -> None:
    images = FORMATS["gemma3_images"]
    with pytest.raises(InexpressibleError, match="read, never written"):
        images.express(FORMATS["gemma3"].to_native(SMALL))


def test_older_layouts_of_rope_are_read() -> None:
    scaled = {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    new = {**SMALL, "rope_parameters": {"full_attention": scaled, "sliding_attention": {"rope_theta": 300.0}}}
    scaling = {"rope_type": "linear", "factor": 8.0}
    older = {**SMALL, "rope_theta": 2e6, "rope_local_base_freq": 300.0, "rope_scaling": scaling}
    assert FORMATS["gemma3"].to_native(older) == FORMATS["gemma3"].to_native(new)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_bidirectional_attention": "no"}, "use_bidirectional_attention"),
        ({"rope_parameters": {"rope_type": "default"}}, r"unknown key 'rope_parameters\.rope_type'"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "wings": 2}}},
            r"unknown key 'rope_parameters\.full_attention\.wings'",
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {
                        "rope_type": "yarn",
                        "factor": 2.0,
                        "original_max_position_embeddings": 32,
                        "truncate": False,
                    }
                }
            },
            r"'rope_parameters\.sliding_attention\.truncate' is False",
        ),
        ({"hidden_act": "gelu"}, "unknown key 'hidden_act'"),
    ],
)
def test_configs_that_cannot_be_read(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        FORMATS["gemma3"].to_native({**SMALL, **changes})


@pytest.mark.parametrize(
    ("family", "says"),
    [("llama", r"block 'layer' has mixer\.qk_norm None"), ("qwen3", "scale_embeddings False")],
)
def test_other_families_cannot_be_written_as_gemma3(family: str, says: str) -> None:
    with pytest.raises(InexpressibleError, match=says):
        FORMATS["gemma3"].express(FORMATS[family].to_native(SIZES))


def test_a_window_both_ways_counts_from_end_to_end() -> None:
    both = {**SMALL, "use_bidirectional_attention": True, "sliding_window": 513}
    native = FORMATS["gemma3"].to_native(both)
    assert {block.mixer.window for block in native.spec.decoder.layers} == {None, 257}
    assert FORMATS["gemma3"].express(native)["sliding_window"] == 512
    assert FORMATS["gemma3"].to_native({**both, "sliding_window": 512}).spec == native.spec


def test_layers_that_see_one_way_and_both_cannot_be_written() -> None:
    native = FORMATS["gemma3"].to_native(SMALL)
    raw = native.spec.model_dump(mode="json")
    raw["decoder"]["blocks"]["full_attention"]["mixer"]["causal"] = False
    with pytest.raises(InexpressibleError, match=r"mixer\.causal"):
        FORMATS["gemma3"].express(replace(native, spec=ModelSpec.model_validate(raw)))


def test_beside_images_what_transformers_makes_of_both_ways_depends_on_its_attention(tmp_path: Path) -> None:
    """Why that is refused."""
    config = with_images(tmp_path / "source").config
    config.text_config.use_bidirectional_attention = True
    ids = tokens(1, 20, vocabulary=57)
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 57], dim=1)
    sees_ahead = {}
    for name in ("eager", "sdpa"):
        model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation=name).eval()
        with torch.no_grad():
            before, after = (model(input_ids=given).logits[:, :-1] for given in (ids, changed))
        sees_ahead[name] = not torch.equal(before, after)
    assert sees_ahead == {"eager": False, "sdpa": True}


def test_a_scale_with_a_fraction_cannot_be_written() -> None:
    native = FORMATS["gemma3"].to_native(SMALL)
    raw = native.spec.model_dump(mode="json")
    for block in raw["decoder"]["blocks"].values():
        block["mixer"]["scale_dim"] = 7.5
    with pytest.raises(InexpressibleError, match="query_pre_attn_scalar"):
        FORMATS["gemma3"].express(replace(native, spec=ModelSpec.model_validate(raw)))
