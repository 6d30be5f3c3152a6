"""Conversion, pruning and export from end to end: equal to transformers' own models, and to each other, bit for bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import gearshift
from gearshift.conversion import convert, export, load, save_presets
from gearshift.spec import Placement
from gearshift.surgery import Surgery, load_surgery
from tests.models import tokens

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
SCALED = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
FAMILIES = {
    "mha": (LlamaConfig, {"num_key_value_heads": 4}),
    "gqa": (LlamaConfig, {"num_key_value_heads": 2}),
    "mqa": (LlamaConfig, {"num_key_value_heads": 1}),
    "head_dim": (LlamaConfig, {"num_key_value_heads": 2, "head_dim": 10}),
    "llama3 rope": (LlamaConfig, {"num_key_value_heads": 2, "head_dim": 8, "rope_parameters": LLAMA3}),
    "yarn rope": (LlamaConfig, {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "yarn", **SCALED}}),
    "linear rope": (LlamaConfig, {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "dynamic rope": (LlamaConfig, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0}}),
    "biases": (LlamaConfig, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "tied": (LlamaConfig, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 9}),
    "mistral without a window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
}
SURGERY = Surgery.model_validate(
    {
        "edits": [
            {"wrap": {"main": "attention"}},
            {"add": {"name": "window", "mixer": {"type": "attention", "window": 6}}},
            {"add": {"name": "gdn", "mixer": {"type": "gated_delta_net"}}},
            {"add": {"name": "kda", "mixer": {"type": "kimi_delta_attention"}}},
        ]
    }
)


def family(folder: Path, name: str = "gqa", seed: int = 0) -> torch.nn.Module:
    """A random checkpoint of a family in `folder`, biases included, and transformers' own model of it."""
    config_class, settings = FAMILIES[name]
    torch.manual_seed(seed)
    model_class = LlamaForCausalLM if config_class is LlamaConfig else MistralForCausalLM
    model = model_class(config_class(**{**SIZES, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def supernet(tmp_path: Path) -> Path:
    family(tmp_path / "source")
    convert(tmp_path / "source", [SURGERY]).write(tmp_path / "supernet")
    return tmp_path / "supernet"


@torch.no_grad()
@pytest.mark.parametrize("name", list(FAMILIES))
@pytest.mark.parametrize("surgeries", [[], [SURGERY]], ids=["plain", "supernet"])
def test_all_main_equals_transformers(tmp_path: Path, name: str, surgeries: list[Surgery]) -> None:
    theirs = family(tmp_path / "source", name)
    convert(tmp_path / "source", surgeries).write(tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    ids = tokens(2, 40)
    expected, actual = theirs(ids).logits, ours(ids).logits
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("name", list(FAMILIES))
def test_all_main_exports_to_the_source_bit_for_bit(tmp_path: Path, name: str) -> None:
    family(tmp_path / "source", name)
    convert(tmp_path / "source", [SURGERY]).write(tmp_path / "supernet")
    back = export(tmp_path / "supernet", "attention")
    assert back.format == ("llama" if FAMILIES[name][0] is LlamaConfig else "mistral")
    back.write(tmp_path / "back")
    source, returned = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "back"))
    assert source.keys() == returned.keys()
    for key, tensor in source.items():
        assert torch.equal(tensor, returned[key]), key
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder).config.to_dict() for folder in ("source", "back")
    )
    for noise in ("_name_or_path", "transformers_version"):
        before.pop(noise), after.pop(noise)
    assert before == after


@torch.no_grad()
@pytest.mark.parametrize("placement", ["gdn*3", "kda*3", "window*3", "attention,gdn,kda", "gdn,window,attention"])
def test_pruning_commutes(supernet: Path, tmp_path: Path, placement: str) -> None:
    export(supernet, placement, "gearshift").write(tmp_path / "pruned")
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    whole = AutoModelForCausalLM.from_pretrained(supernet).eval()
    ids = tokens(2, 33)
    assert torch.equal(pruned(ids).logits, whole(ids, placement=placement).logits)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in whole.parameters())
    assert not pruned.spec.is_supernet


def test_a_second_conversion_gives_the_same_bytes(supernet: Path, tmp_path: Path) -> None:
    convert(tmp_path / "source", [SURGERY]).write(tmp_path / "again")
    assert files(supernet) == files(tmp_path / "again")


def test_a_killed_conversion_goes_on_to_the_same_bytes(supernet: Path, tmp_path: Path) -> None:
    def kill(done: float) -> None:
        nonlocal left
        left -= done
        if left < 0:
            raise KeyboardInterrupt

    conversion = convert(tmp_path / "source", [SURGERY])
    left = conversion.bytes / 2
    with pytest.raises(KeyboardInterrupt):
        conversion.write(tmp_path / "killed", progress=kill)
    assert not (tmp_path / "killed").exists()
    conversion.write(tmp_path / "killed")
    assert files(supernet) == files(tmp_path / "killed")


def test_the_quickstart_surgery_names_no_sizes(tmp_path: Path) -> None:
    for name in ("mha", "gqa", "mqa", "head_dim", "tied", "biases", "mistral"):
        family(tmp_path / name, name)
        surgery = load_surgery(Path(__file__).parents[1] / "recipes" / "quickstart" / "surgery.yaml")
        spec = convert(tmp_path / name, [surgery]).native.spec
        assert spec.choices == (("attention", "window", "gdn", "kda"),) * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_kept_or_changed(tmp_path: Path, dtype: str) -> None:
    family(tmp_path / "source").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    kept = convert(tmp_path / "half", [SURGERY])
    assert {info.dtype for info in kept.plan.target.values()} == {"bfloat16"}
    changed = convert(tmp_path / "half", [SURGERY], dtype)
    changed.write(tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        convert(tmp_path / "half", [], "int4")


def test_presets_are_named_in_the_config(supernet: Path) -> None:
    save_presets(supernet, {"fast": Placement.parse("gdn*3")}, default="fast")
    save_presets(supernet, {"slow": Placement.parse("attention*3")})
    model = gearshift.GearshiftForCausalLM.from_pretrained(supernet)
    assert model.presets == {"fast": Placement(["gdn"] * 3), "slow": Placement(["attention"] * 3)}
    assert model.placement() == model.presets["fast"]
    with pytest.raises(ValueError, match="layer 0 has no mixer 'mamba'"):
        save_presets(supernet, {"bad": Placement(["mamba"] * 3)})
    assert export(supernet, "fast").native.presets == {}


def test_a_placement_is_asked_for_where_there_is_a_choice(supernet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name a --placement"):
        export(supernet)
    with pytest.raises(ValueError, match="placement"):
        export(supernet, "")
    assert export(tmp_path / "source").format == "llama"
    with pytest.raises(ValueError, match="unknown format 'lama'"):
        export(supernet, "gdn", "lama")
    with pytest.raises(ValueError, match=r"block 'gdn'|mixer"):
        export(supernet, "gdn", "llama")
    assert export(supernet, "gdn").format == "gearshift"
    assert export(supernet, "window").format == "mistral"
    assert export(supernet, "attention").format == "llama"


@torch.no_grad()
def test_load_takes_any_format(tmp_path: Path) -> None:
    theirs = family(tmp_path / "source")
    ids = tokens(1, 20)
    with pytest.raises(ValueError, match="no tokenizer"):
        load(tmp_path / "source")
    from gearshift.tiny import write_tiny_model

    write_tiny_model(tmp_path / "tiny", "some text to make a tokenizer from " * 20)
    model, tokenizer = load(tmp_path / "tiny")
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    assert torch.allclose(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.decode(tokenizer("some text")["input_ids"]) == "some text"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "model.layers.1.mlp.up_proj.weight"),
        ("extra", "surplus"),
        ("shape", "model.norm.weight"),
        ("non-finite", "model.layers.1.mlp.up_proj.weight"),
        ("truncated", "model.safetensors"),
        ("header", "model.safetensors"),
        ("config", "config.json"),
        ("key", "hiden_size"),
        ("family", "gtp2"),
    ],
)
def test_damage_is_named_and_nothing_is_written(tmp_path: Path, damage: str, message: str) -> None:
    family(tmp_path / "source")
    weights, config = tmp_path / "source" / "model.safetensors", tmp_path / "source" / "config.json"
    tensors = load_file(weights)
    if damage == "missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
    elif damage == "extra":
        tensors["surplus"] = torch.zeros(2)
    elif damage == "shape":
        tensors["model.norm.weight"] = torch.ones(25)
    elif damage == "non-finite":
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "header":
        weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])
    elif damage == "config":
        config.write_text("{")
    elif damage in ("key", "family"):
        raw = json.loads(config.read_text())
        raw |= {"hiden_size": 3} if damage == "key" else {"model_type": "gtp2"}
        config.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", [SURGERY]).write(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize("out", ["supernet", "supernet/inside", "."])
def test_a_checkpoint_is_never_written_over_what_it_is_made_from(supernet: Path, tmp_path: Path, out: str) -> None:
    before = files(supernet)
    with pytest.raises(ValueError, match="checkpoint it would be made from"):
        export(supernet, "gdn").write(tmp_path / out, overwrite=True)
    assert files(supernet) == before


def test_save_pretrained_writes_the_stub(supernet: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(supernet, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM;"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True); print(type(m).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "saved"], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "GearshiftForCausalLM"
    assert sorted(path.name for path in (tmp_path / "saved").glob("*.py")) == ["modeling_gearshift.py"]


def test_presets_never_hide_a_mixer(supernet: Path) -> None:
    for name in ("attention", "main", "a b"):
        with pytest.raises(ValueError, match="a preset cannot be called"):
            save_presets(supernet, {name: Placement(["gdn"] * 3)})


def test_weights_have_a_dtype_of_weights(tmp_path: Path) -> None:
    family(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    save_file({**load_file(file), "model.norm.weight": torch.ones(24, dtype=torch.int64)}, file)
    with pytest.raises(ValueError, match=r"'model\.norm\.weight' is int64"):
        convert(tmp_path / "source")


def test_absurd_numbers_are_refused_at_once(tmp_path: Path) -> None:
    family(tmp_path / "source")
    with pytest.raises(ValueError, match="more than 4,096 layers"):
        Placement.parse("gdn*99999999999")
    config = tmp_path / "source" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**9}))
    with pytest.raises(ValueError, match="num_hidden_layers"):
        convert(tmp_path / "source")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    surgery = Surgery.model_validate({"edits": [{"wrap": {"main": "train"}}]})
    with pytest.raises(ValueError, match="PyTorch keeps this name"):
        convert(tmp_path / "source", [surgery])
