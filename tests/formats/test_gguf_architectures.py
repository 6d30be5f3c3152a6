"""Each architecture of GGUF files: the model that is read computes what transformers' does."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from gearshift import GearshiftConfig, GearshiftForCausalLM
from gearshift.formats import FORMATS, Checkpoint, InexpressibleError, open_checkpoint
from gearshift.formats.gguf import ARCHITECTURES
from gearshift.formats.tensors import Tensors
from gearshift.model import schema
from gearshift.plan.execute import MappingSource, materialise
from gearshift.spec import ModelSpec
from tests.formats.families import families
from tests.formats.gguf_files import write
from tests.models import tokens

FAMILIES = families()
KINDS = gguf.GGMLQuantizationType
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA3 = {
    "num_hidden_layers": 7,
    "layer_types": None,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": LOCAL},
}
SCALED = {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("qwen3", {}),
    ("qwen3", {"head_dim": 12, "tie_word_embeddings": True, "attention_bias": True}),
    ("gemma3", GEMMA3),
    ("gemma3", {**GEMMA3, "head_dim": 12, "query_pre_attn_scalar": 12, "tie_word_embeddings": False}),
    ("gemma3", {**GEMMA3, "final_logit_softcapping": 3.0}),
]


def make(folder: Path, architecture: str, **settings: Any) -> PreTrainedModel:
    """Transformers' model of an architecture, with random weights."""
    return FAMILIES[architecture].save(folder, **settings)


def load(checkpoint: Checkpoint) -> GearshiftForCausalLM:
    """Our model with the weights of a checkpoint."""
    model = GearshiftForCausalLM(GearshiftConfig(checkpoint.native.spec))
    weights = materialise(checkpoint.plan, checkpoint.source)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def check_logits(theirs: PreTrainedModel, path: Path) -> None:
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, actual = theirs(ids).logits, load(open_checkpoint(path))(ids).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("architecture", "settings"), CASES)
def test_logits_are_those_of_transformers(tmp_path: Path, architecture: str, settings: dict[str, Any]) -> None:
    theirs = make(tmp_path / "source", architecture, **settings)
    write(tmp_path / "model.gguf", theirs, architecture)
    check_logits(theirs, tmp_path / "model.gguf")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_tensors_are_those_that_transformers_reads(tmp_path: Path, architecture: str) -> None:
    made = make(tmp_path / "source", architecture, **(GEMMA3 if architecture == "gemma3" else {}))
    write(tmp_path / "model.gguf", made, architecture)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32).state_dict()
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    names = FORMATS[architecture].plan(checkpoint.native.spec, checkpoint.schema).invert()
    found = materialise(names, MappingSource(materialise(checkpoint.plan, checkpoint.source)))
    assert found.keys() == theirs.keys() - ({"lm_head.weight"} if architecture == "gemma3" else set())
    for name, tensor in found.items():
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor - 1
        assert tensor.equal(theirs[name]), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_spec_is_that_of_the_original(tmp_path: Path, architecture: str) -> None:
    theirs = make(tmp_path / "source", architecture)
    write(tmp_path / "model.gguf", theirs, architecture)
    ours, original = (open_checkpoint(tmp_path / name).native.spec.decoder for name in ("model.gguf", "source"))
    assert ours.layers == original.layers


def test_what_differs_from_the_original_gemma3(tmp_path: Path) -> None:
    """Only where the one of (1 + weight) is, and that the scale of attention is not said."""
    write(tmp_path / "model.gguf", make(tmp_path / "source", "gemma3", **GEMMA3), "gemma3")
    ours, original = (open_checkpoint(tmp_path / name).native.spec for name in ("model.gguf", "source"))
    raw = original.model_dump()
    raw["final_norm"]["zero_centered"] = False
    for block in raw["decoder"]["blocks"].values():
        block["norm"]["zero_centered"] = block["mixer"]["qk_norm"]["zero_centered"] = False
        block["mixer"]["scale_dim"] = None
    assert ours.model_dump() == raw
    assert ours.decoder.layout == ("sliding_attention",) * 5 + ("full_attention", "sliding_attention")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantised_files_are_de_quantised(tmp_path: Path, architecture: str) -> None:
    settings = {"hidden_size": 64, "intermediate_size": 96, **(GEMMA3 if architecture == "gemma3" else {})}
    if architecture == "qwen3":
        settings["head_dim"] = 16
    theirs = make(tmp_path / "source", architecture, **settings)

    def quantise(name: str, value: np.ndarray) -> gguf.GGMLQuantizationType | None:
        by_name = {"embed_tokens": KINDS.Q8_0, "v_proj": KINDS.BF16, "o_proj": KINDS.Q5_0, "down_proj": KINDS.Q4_0}
        return None if value.ndim == 1 else by_name.get(name.split(".")[-2], KINDS.Q4_1)

    write(tmp_path / "model.gguf", theirs, architecture, quantise)
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            # Blocks lie within rows, so that the order of the rows changes nothing.
            if kind := quantise(name, tensor.numpy()):
                rounded = gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind)
                tensor.copy_(torch.from_numpy(rounded))
    check_logits(theirs, tmp_path / "model.gguf")
    notes = open_checkpoint(tmp_path / "model.gguf").native.source["notes"]
    assert notes == ["de-quantised from Q4_0, Q4_1, Q5_0, Q8_0"]


def test_a_scaled_gemma3(tmp_path: Path) -> None:
    """From 4B on, the rotary positions of its global layers are interpolated; those of the others are not."""
    parameters = {"full_attention": SCALED, "sliding_attention": LOCAL}
    theirs = make(tmp_path / "source", "gemma3", **{**GEMMA3, "rope_parameters": parameters})

    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    write(tmp_path / "model.gguf", theirs, "gemma3", more=scale)
    check_logits(theirs, tmp_path / "model.gguf")


@pytest.mark.parametrize("period", [2, 0])
def test_gemma3_files_may_say_which_layers_have_the_window(tmp_path: Path, period: int) -> None:
    local = {**LOCAL, "rope_theta": 300.0}
    rope = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": local}
    settings = {"num_hidden_layers": 5, "layer_types": None, "sliding_window_pattern": period or 9}
    theirs = make(tmp_path / "source", "gemma3", **settings, rope_parameters=rope)

    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window_pattern(period)
        writer.add_rope_freq_base_swa(300.0)

    write(tmp_path / "model.gguf", theirs, "gemma3", more=more)
    check_logits(theirs, tmp_path / "model.gguf")


def test_the_scale_of_the_largest_gemma3(tmp_path: Path) -> None:
    """Of the model with 62 layers, llama.cpp divides the scores by the root of hidden size over heads."""
    settings = {**GEMMA3, "num_hidden_layers": 62, "head_dim": 4, "query_pre_attn_scalar": 8}
    theirs = make(tmp_path / "source", "gemma3", **settings)
    write(tmp_path / "model.gguf", theirs, "gemma3")
    mixer = open_checkpoint(tmp_path / "model.gguf").native.spec.decoder.layers[0].mixer
    assert (mixer.head_dim, mixer.scale_dim) == (4, 8)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (lambda writer: writer.add_float32("gemma3.attn_logit_softcapping", 50.0), "attn_logit_softcapping' is 50"),
        (
            lambda writer: writer.add_string("gemma3.attention.sliding_window_pattern", "x"),
            "a number of layers, not 'x'",
        ),
        (lambda writer: writer.add_rope_dimension_count_swa(4), "unknown key 'gemma3.rope.dimension_count_swa'"),
        (lambda writer: writer.add_tensor("v.patch_embd.weight", np.ones(3, np.float32)), "'v.patch_embd.weight'"),
    ],
)
def test_what_we_cannot_say_of_gemma3_is_refused(tmp_path: Path, more: Any, says: str) -> None:
    write(tmp_path / "model.gguf", make(tmp_path / "source", "gemma3", **GEMMA3), "gemma3", more=more)
    with pytest.raises(ValueError, match=rf"model\.gguf: .*{says}"):
        open_checkpoint(tmp_path / "model.gguf")


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_tokenizer_is_written(tmp_path: Path, architecture: str) -> None:
    write(tmp_path / "model.gguf", make(tmp_path / "source", architecture), architecture)
    (tmp_path / "out").mkdir()
    open_checkpoint(tmp_path / "model.gguf").copy_extras(tmp_path / "out")
    # Transformers may add special tokens that the family always has.
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("%ABCD").input_ids[-3:] == [5, 59, 60]


def all_tensors(architecture: str) -> ModelSpec:
    """A model with every tensor that files of the architecture can have."""
    family = FAMILIES[architecture]
    config = json.loads(family.config_class(**{**family.sizes, **family.full}).to_json_string())
    raw = FORMATS[architecture].to_native(config).spec.model_dump(mode="json")
    for block in raw["decoder"]["blocks"].values():
        block["mixer"] |= {"qkv_bias": True, "output_bias": True}
        block["mlp"]["bias"] = True
    return ModelSpec.model_validate(raw)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tensor_template_is_needed(architecture: str) -> None:
    whole = ARCHITECTURES[architecture].table
    spec = all_tensors(architecture)
    target = schema(spec, "float32")
    assert whole.plan(spec, target).target == target
    weights = whole.tensors.weights
    for index, weight in enumerate(weights):
        fewer = Tensors((*weights[:index], *weights[index + 1 :]), whole.tensors.junk)
        with pytest.raises(ValueError, match="a template for it is missing"):
            replace(whole, tensors=fewer).plan(spec, target)
        with pytest.raises(ValueError, match="two tensor templates"):
            Tensors((*weights, weight))


def test_gguf_is_never_written() -> None:
    native = FORMATS["llama"].to_native({"num_hidden_layers": 2})
    with pytest.raises(InexpressibleError, match=r"'gguf' .*: it is read, never written; these formats can: .*llama"):
        FORMATS["gguf"].to_config(native)
    for architecture in ARCHITECTURES.values():
        with pytest.raises(InexpressibleError, match="it is read, never written"):
            architecture.table.express(native)
    with pytest.raises(ValueError, match="only a GGUF file says which architecture"):
        FORMATS["gguf"].plan(native.spec, {})
