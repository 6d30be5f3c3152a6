"""Models in the layouts that came before `decoder: {num_layers, pattern, blocks}`, and models as files."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.cli import app
from gearshift.conversion import convert
from gearshift.formats import FORMATS, NativeConfig, open_checkpoint, read_spec
from gearshift.formats.legacy import is_legacy, read_legacy
from gearshift.formats.legacy_sections import ATTENTION, BLOCK, MAMBA1, MODEL
from gearshift.formats.read_sections import SectionReader
from gearshift.formats.sections import Inner, Section, paths_of
from gearshift.model import schema
from tests.formats.mutations import damage_json
from tests.models import tokens

GUIDE = Path(__file__).parents[2] / "docs" / "migrating.md"

BLOCKS = """
model:
  vocab_size: 61
  hidden_size: 64
  max_position_embeddings: 256
  num_layers: 15
  block_pattern: [alice, bob, claire, dave, bob]
  blocks:
    alice:
      kind: transformer
      attention_type: mqa
      num_heads: 16
      hidden_size: 64
      intermediate_size: 96
      use_flash_attention: true
    bob:
      kind: transformer
      attention_type: gqa
      num_heads: 16
      num_kv_heads: 4
      sliding_window: 12
      intermediate_size: 96
      shared_weights: true
    claire:
      kind: ssm
      variant: mamba1
      dt_rank: auto
      intermediate_size: 96
      lora: {rank: 8, alpha: 16}
    dave:
      kind: ssm
      variant: discrete_mamba2
      state_size: 16
      intermediate_size: 96
"""
"""Layout (b): four blocks in a pattern of five, 15 layers."""

_MLP = {"type": "gated", "intermediate_size": 96}
_NORM = {"epsilon": 1e-5}
TODAY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "max_positions": 256,
    "final_norm": _NORM,
    "decoder": {
        "num_layers": 15,
        "pattern": ["alice", "bob", "claire", "dave", "bob"],
        "blocks": {
            "alice": {"mixer": {"type": "attention", "heads": 16, "kv_heads": 1}, "mlp": _MLP, "norm": _NORM},
            "bob": {
                "mixer": {"type": "attention", "heads": 16, "kv_heads": 4, "window": 12},
                "mlp": _MLP,
                "norm": _NORM,
                "shared_weights": True,
            },
            "claire": {
                "mixer": {"type": "mamba", "dt_rank": "auto", "conv_bias": False},
                "mlp": _MLP,
                "norm": _NORM,
                "lora": {"rank": 8, "alpha": 16},
            },
            "dave": {
                "mixer": {
                    "type": "discrete_mamba2",
                    "state_size": 16,
                    "value_heads": 32,
                    "head_dim": 4,
                    "activation": "silu",
                },
                "mlp": _MLP,
                "norm": _NORM,
            },
        },
    },
}
"""The same in the layout of today."""

SECTIONS = """
vocab_size: 61
tie_word_embeddings: false
hybrid_block_layout: [t, m, m2, m2d]
transformer:
  num_layers: 8
  hidden_size: 64
  num_attention_heads: 8
  head_groups: 2
  ffn_hidden_size: 96
  gated: true
  add_linear_biases: false
  window_size: 12
  normalization: {type: rms_norm, epsilon: 2.0e-5}
  rotary: {type: default, theta: 5000, triton: false}
  init_method_std: 0.02
  attention_dropout: 0.0
ssm:
  state_size: 8
  d_inner: 128
  d_xb: 32
  n_qk_heads: 4
  n_v_heads: 8
  dt_rank: 3
  add_bias_linear: true
  chunk_size: 32
"""
"""Layout (a)."""


def legacy(text: str = BLOCKS, **changes: Any) -> dict[str, Any]:
    """A config with keys set: `a__b` is b in a, and `...` removes it."""
    tree = yaml.safe_load(text)
    for path, value in changes.items():
        *above, last = path.split("__")
        inner = tree
        for name in above:
            inner = inner.setdefault(name, {})
        inner[last] = value
        if value is ...:
            del inner[last]
    return tree


def read(raw: dict[str, Any]) -> ModelSpec:
    with pytest.warns(DeprecationWarning, match="older layout"):
        return read_legacy(raw)


@pytest.fixture
def blocks_file(tmp_path: Path) -> Path:
    path = tmp_path / "legacy.yaml"
    path.write_text(BLOCKS)
    return path


def test_blocks_are_read_as_they_are_written_today(blocks_file: Path) -> None:
    with pytest.warns(DeprecationWarning, match=r"older layout.*docs/migrating\.md"):
        spec = read_spec(blocks_file)
    assert spec == ModelSpec.model_validate(TODAY)
    assert spec.decoder.layout.count("bob") == 6


def test_shared_weights_are_counted_once() -> None:
    spec = read(legacy())
    hidden, inner, mlp, norms = 64, 128, 3 * 64 * 96, 2 * 64
    alice = hidden * (16 + 1 + 1 + 16) * 4 + mlp + norms
    bob = hidden * (16 + 4 + 4 + 16) * 4 + mlp + norms
    dt_rank, state = 4, 16
    selection = inner * (dt_rank + 2 * state) + dt_rank * inner + inner
    mamba = hidden * 2 * inner + selection + 4 * inner + inner * state + inner + inner * hidden
    # Rank 8 of each linear layer: its inputs and outputs times eight.
    sides = 4 * (hidden + inner) + (inner + dt_rank + 2 * state) + (dt_rank + inner) - (hidden + inner)
    claire = mamba + mlp + norms + 8 * (sides + 3 * (hidden + 96))
    heads, shared = 32, 32 * 16
    projections = hidden * (2 * inner + 2 * shared + heads) + inner
    dave = projections + (inner + 2 * shared) * 5 + heads + inner * hidden + mlp + norms
    expected = 2 * 61 * hidden + hidden + 3 * alice + bob + 3 * claire + 3 * dave
    assert sum(info.elements for info in schema(spec, "float32").values()) == expected
    apart = read(legacy(model__blocks__bob__shared_weights=False))
    assert sum(info.elements for info in schema(apart, "float32").values()) == expected + 5 * bob


def test_a_model_trains_a_step_and_is_saved_in_the_new_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(read(legacy())))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = tokens(2, 20)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimiser.step()
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert "model.layers.bob.mixer.q_proj.weight" in moved
    assert any("lora" in name for name in moved)
    assert model(ids, labels=ids).loss < loss

    model.eval().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["spec"]["decoder"]["pattern"] == ["alice", "bob", "claire", "dave", "bob"]
    again = GearshiftForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert again(ids).logits.equal(model(ids).logits)
    names = load_file(tmp_path / "model.safetensors")
    assert len([name for name in names if name.endswith("mixer.q_proj.weight")]) == 4


def test_global_sections_are_read() -> None:
    spec = read(legacy(SECTIONS))
    assert spec.decoder.pattern == ("t", "m", "m2", "m2d")
    assert spec.decoder.num_layers == 8
    assert spec.final_norm.epsilon == 2e-5
    blocks = spec.decoder.blocks
    assert all(block.mlp.intermediate_size == 96 and block.norm.epsilon == 2e-5 for block in blocks.values())
    attention = blocks["t"].mixer
    assert (attention.heads, attention.kv_heads, attention.window, attention.rotary.theta) == (8, 2, 12, 5000.0)
    classic, grouped, discrete = (blocks[letter].mixer for letter in ("m", "m2", "m2d"))
    assert (classic.projection, classic.inner_size, classic.dt_rank, classic.projection_bias) == (
        "classic",
        128,
        3,
        True,
    )
    assert (grouped.projection, grouped.xb_size, grouped.doubled_dt_bias, grouped.conv_bias) == (
        "grouped",
        32,
        True,
        True,
    )
    assert (discrete.value_heads, discrete.key_heads, discrete.head_dim, discrete.state_size) == (8, 4, 16, 8)
    assert discrete.activation == "silu"
    with torch.no_grad():
        model = GearshiftForCausalLM(GearshiftConfig(spec)).eval()
        assert model(tokens(1, 9)).logits.isfinite().all()


def test_what_is_left_out_means_what_it_meant() -> None:
    spec = read({"transformer": {"hidden_size": 64}, "hybrid_block_layout": ["t", "m2d"]})
    attention, mlp = spec.decoder.blocks["t"].mixer, spec.decoder.blocks["t"].mlp
    assert (spec.vocab_size, spec.tie_embeddings, spec.decoder.num_layers) == (49152, True, 2)
    assert (attention.heads, attention.kv_heads, attention.qkv_bias, attention.output_bias) == (8, 1, True, True)
    assert (mlp.type, mlp.intermediate_size, mlp.activation, mlp.up_bias) == ("plain", 256, "gelu_pytorch_tanh", True)
    assert spec.decoder.blocks["m2d"].mlp == mlp
    mixer = spec.decoder.blocks["m2d"].mixer
    assert (mixer.value_heads, mixer.key_heads, mixer.state_size, mixer.conv_bias) == (32, 32, 16, True)


def test_blocks_may_be_laid_out_by_the_older_key() -> None:
    raw = legacy(model__block_pattern=..., model__hybrid_block_layout=["alice", "bob", "claire", "dave", "bob"])
    assert read(raw) == ModelSpec.model_validate(TODAY)
    by_another_name = read(legacy(SECTIONS, transformer__head_groups=..., transformer__num_kv_heads=4))
    assert by_another_name.decoder.blocks["t"].mixer.kv_heads == 4


def test_adapters_of_the_global_layout_are_attentions_alone() -> None:
    adapted = legacy(
        SECTIONS, transformer__peft={"type": "lora", "rank": 2, "alpha": 4.0, "layers": ["query", "value_"]}
    )
    blocks = read(adapted).decoder.blocks
    assert blocks["t"].lora.model_dump() == {
        "rank": 2,
        "alpha": 4.0,
        "dropout": 0.0,
        "targets": ("mixer.q_proj", "mixer.v_proj"),
    }
    assert blocks["m2d"].lora is None
    assert read(legacy(SECTIONS, transformer__peft={"type": "none"})).decoder.blocks["t"].lora is None


@pytest.mark.parametrize(
    ("said", "qkv", "output", "mlp"),
    [
        (False, False, False, False),
        ("nowhere", False, False, False),
        ("only_attn_qkv", True, False, False),
        ("everywhere", True, True, True),
        (True, True, True, True),
    ],
)
def test_biases_by_a_word(said: Any, qkv: bool, output: bool, mlp: bool) -> None:
    block = read(legacy(SECTIONS, transformer__add_linear_biases=said)).decoder.blocks["t"]
    assert (block.mixer.qkv_bias, block.mixer.output_bias, block.mlp.bias) == (qkv, output, mlp)


@pytest.mark.parametrize("wrap", [
    lambda raw: raw,
    lambda raw: raw["model"],
    lambda raw: {"model": {"base_model": raw["model"], "multi_stage": {"stage": 1}}, "training": {"iterations": 3}},
    lambda raw: {"vocab_size": 61, "hidden_size": 64, **legacy(model__vocab_size=..., model__hidden_size=...)},
])  # fmt: skip
def test_a_model_may_lie_under_other_sections(wrap: Any) -> None:
    assert read(wrap(legacy())) == ModelSpec.model_validate(TODAY)


def test_blocks_may_say_what_the_model_does_not() -> None:
    raw = legacy(model__hidden_size=..., model__num_layers=...)
    spec = read(raw)
    assert (spec.hidden_size, spec.decoder.num_layers) == (64, 5)
    alone = {"blocks": {"only": {"kind": "transformer", "num_heads": 2, "hidden_size": 8}}, "num_layers": 3}
    assert read(alone).decoder.layout == ("only", "only", "only")


@pytest.mark.parametrize("name", ["num_kv_heads", "kv_heads", "num_key_value_heads", "head_groups"])
def test_key_and_value_heads_go_by_several_names(name: str) -> None:
    raw = legacy(model__blocks__bob__num_kv_heads=...)
    raw["model"]["blocks"]["bob"][name] = 2
    assert read(raw).decoder.blocks["bob"].mixer.kv_heads == 2


@pytest.mark.parametrize(("kind", "kv_heads"), [("mha", 16), ("mqa", 1), (None, 16)])
def test_attention_types(kind: str | None, kv_heads: int) -> None:
    spec = read(legacy(model__blocks__bob__attention_type=kind, model__blocks__bob__num_kv_heads=...))
    assert spec.decoder.blocks["bob"].mixer.kv_heads == kv_heads


@pytest.mark.parametrize("variant", ["mamba1", "mamba2", "discrete_mamba2"])
def test_variants(variant: str) -> None:
    settings = {"kind": "ssm", "variant": variant, "state_size": 8, "expansion_factor": 3, "head_dim": 4}
    settings |= {"n_v_heads": 48} if variant == "discrete_mamba2" else {}
    mixer = read(legacy(model__blocks__dave=settings)).decoder.blocks["dave"].mixer
    assert mixer.type == variant.removesuffix("1")
    assert mixer.state_size == 8
    inner = mixer.inner_size if variant == "mamba1" else mixer.head_dim * getattr(mixer, "heads", 48)
    assert inner == 3 * 64


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model__blocks__alice__num_kv_heads": 4}, "'mqa' has 1 key and value heads, but 'num_kv_heads' is 4"),
        ({"model__blocks__alice__attention_type": "mha", "model__blocks__alice__kv_heads": 4}, "'mha' has 16 key and"),
        ({"model__blocks__bob__num_kv_heads": ...}, "attention_type 'gqa' needs the number of key and value heads"),
        ({"model__blocks__bob__head_groups": 2}, "'blocks.bob.head_groups' is 2, but it is said to be 4 elsewhere"),
        ({"model__blocks__bob__attention_type": "mla"}, "'mla' is no type of attention"),
        ({"model__blocks__bob__num_kv_heads": 5}, "16 heads cannot be shared among 5 kv_heads"),
        (
            {"model__blocks__alice__hidden_size": 128},
            "'hidden_size' is 128, but the model's 'hidden_size' is 64",
        ),
        ({"model__blocks__alice__variant": "mamba1"}, "alice: a block of the kind 'transformer' has no variant"),
        ({"model__blocks__dave__variant": "mamba3"}, "'blocks.dave' is 'mamba3': known are 'transformer', 'mamba1'"),
        (
            {"model__blocks__dave__variant": ...},
            "blocks.dave: a block of the kind 'ssm' needs a variant: one of mamba1",
        ),
        ({"model__blocks__dave__num_heads": 4}, "unknown key 'blocks.dave.num_heads'"),
        ({"model__blocks__alice__slidng_window": 4}, "'blocks.alice.slidng_window': did you mean 'sliding_window'"),
        ({"model__blocks__alice__normalization": {"type": "layer_norm"}}, "'normalization.type' is 'layer_norm'"),
        ({"model__blocks__claire__expansion_factor": "x"}, "'expansion_factor' must be a whole number"),
        ({"model__blocks__dave__n_v_heads": 24}, "128 channels do not divide into 24 heads"),
        (
            {"model__block_pattern": ["alice", "eve"]},
            "'block_pattern' names a block 'eve', but the blocks are alice, bob, claire, dave",
        ),
        ({"model__blocks__claire__dt_rank": "big"}, "'blocks.claire.dt_rank': give `auto` or a whole number .*'big'"),
        ({"model__blocks__claire__dt_rank": 0}, "'blocks.claire.dt_rank': give `auto` or a whole number from 1"),
        ({"model__block_pattern": ...}, "the key 'block_pattern' is missing"),
        ({"model__blocks": [1]}, "'blocks' must hold a mapping"),
        ({"model__blocks__alice": None}, "num_heads"),
        ({"model__use_position_embeddings": True}, "there are rotary positions only"),
        ({"model__prediction_heads": 2}, "'prediction_heads' is 2"),
        ({"model__blocks__dave__gated": "yes"}, "'blocks.dave' is 'yes': known are True, False"),
        ({"model__num_layrs": 2}, "unknown key 'num_layrs': did you mean 'num_layers'"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught, pytest.warns(DeprecationWarning, match="older"):
        read_legacy(legacy(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hybrid_block_layout": ["t", "x"]}, "each one of t, m, m2, m2d"),
        ({"hybrid_block_layout": ["t", "m", "t"]}, "3 layers, which cannot be repeated to 'num_layers' 8"),
        ({"transformer__hiden_size": 3}, r"unknown key 'transformer\.hiden_size': did you mean 'hidden_size'"),
        ({"ssm__state_sise": 3}, r"unknown key 'ssm\.state_sise': did you mean 'state_size'"),
        ({"transformer__max_window_layers": 2}, "'max_window_layers' is 2"),
        ({"transformer__num_experts": 4}, "'num_experts' is 4"),
        ({"transformer__add_linear_biases": "some"}, "'add_linear_biases' is 'some': known are"),
        ({"transformer__peft": {"type": "lora", "layers": ["up"]}}, r"'transformer\.peft\.layers' must list"),
        ({"hidden_size": 3}, r"'hidden_size' is 3, but 'transformer\.hidden_size' is 64"),
        ({"transformer": 3}, "'transformer' must hold a mapping"),
        ({"logits_scale_factor": 2.0}, "'logits_scale_factor' is 2.0"),
    ],
)
def test_contradictions_of_global_sections_are_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says), pytest.warns(DeprecationWarning, match="older"):
        read_legacy(legacy(SECTIONS, **changes))


def test_a_file_becomes_a_model_with_new_weights(blocks_file: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["info", str(blocks_file)], catch_exceptions=False)
    assert "15: 3 x (alice, bob, claire, dave, bob)" in shown.output
    for out in ("one", "two"):
        result = runner.invoke(app, ["convert", str(blocks_file), str(tmp_path / out)], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    one, two = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two"))
    assert all(one[name].equal(two[name]) for name in one)
    assert one["model.embed_tokens.weight"].std() > 0.01
    model = GearshiftForCausalLM.from_pretrained(tmp_path / "one")
    assert model.spec == ModelSpec.model_validate(TODAY)

    # What the new model's config is printed as is such a file too.
    resolved = runner.invoke(app, ["info", str(tmp_path / "one"), "--resolved"], catch_exceptions=False)
    (tmp_path / "resolved.yaml").write_text(resolved.output)
    assert read_spec(tmp_path / "resolved.yaml") == model.spec
    (tmp_path / "today.json").write_text(json.dumps(TODAY))
    convert(tmp_path / "today.json").write(tmp_path / "three")
    three = load_file(tmp_path / "three" / "model.safetensors")
    assert all(one[name].equal(three[name]) for name in one)


def test_a_config_of_a_family_is_such_a_file(tmp_path: Path) -> None:
    data = Path(__file__).parent / "data" / "apriel2-mixers" / "config.json"
    path = tmp_path / "mixers.json"
    path.write_text(data.read_text())
    assert read_spec(path) == open_checkpoint(data.parent).native.spec
    assert "drawn, not trained" in str(open_checkpoint(path).native.source)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "decoder: [", "not valid YAML"),
        ("a.json", "{", "not valid JSON"),
        ("a.yaml", "decoder: {}", "a.yaml: spec"),
        ("a.yaml", "spec: {decoder: {}}", "a.yaml: spec"),
        ("a.yaml", "model_type: lama", "no format reads the model type 'lama'"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        read_spec(tmp_path / name)
    with pytest.raises(ValueError, match=says):
        open_checkpoint(tmp_path / name)


def in_spec(raw: dict[str, Any]) -> dict[str, Any]:
    return {"spec": raw["model"]}


def in_model(raw: dict[str, Any]) -> dict[str, Any]:
    return raw


@pytest.mark.parametrize("lay", [in_spec, in_model])
def test_a_checkpoint_with_an_older_config(tmp_path: Path, lay: Any) -> None:
    """Its tensors have the names of today; `config.json` alone is older."""
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(TODAY))).eval()
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "spec"}
    path.write_text(json.dumps(config | lay(legacy())))

    with pytest.warns(DeprecationWarning, match="older layout"):
        checkpoint = open_checkpoint(tmp_path / "old")
    assert checkpoint.native.spec == model.spec
    with pytest.warns(DeprecationWarning, match="older layout"):
        convert(tmp_path / "old").write(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert ModelSpec.model_validate(written["spec"]) == model.spec
    assert "model" not in written
    with pytest.warns(DeprecationWarning, match="older layout"):
        straight = GearshiftForCausalLM.from_pretrained(tmp_path / "old").eval()
    again = GearshiftForCausalLM.from_pretrained(tmp_path / "new").eval()
    ids = tokens(1, 9)
    with torch.no_grad():
        assert again(ids).logits.equal(model(ids).logits)
        assert straight(ids).logits.equal(model(ids).logits)


def test_a_checkpoint_of_global_sections() -> None:
    native = {"model_type": "gearshift", "dtype": "bfloat16", "eos_token_id": 3, **legacy(SECTIONS)}
    with pytest.warns(DeprecationWarning, match="older layout"):
        read_native = FORMATS["gearshift"].to_native(native)
    assert read_native == NativeConfig(read(legacy(SECTIONS)), "bfloat16", extras={"eos_token_id": 3})


def test_what_is_legacy() -> None:
    assert is_legacy(legacy())
    assert is_legacy(legacy(SECTIONS))
    assert is_legacy({"hybrid_block_layout": ["t"]})
    assert not is_legacy(TODAY)
    assert not is_legacy({"model": 3})
    assert not is_legacy([1])


def sections(section: Section) -> Iterator[Section]:
    """A section and all those within it, each once."""
    seen = [section]
    for one in seen:
        yield one
        for fate in one.fates:
            if isinstance(fate, Inner):
                seen += [inner for inner in fate.choices.values() if inner is not None and inner not in seen]


@pytest.mark.parametrize("section", list(sections(MODEL)), ids=lambda section: section.name)
def test_every_fate_is_needed(section: Section) -> None:
    for fate in section.fates:
        rest = tuple(other for other in section.fates if other is not fate)
        if paths_of(fate):
            with pytest.raises(ValueError, match="no fate"):
                replace(section, fates=rest, aliases={})
        else:
            outer, _, inner = fate.key.partition(".")
            value = {"type": "transformer", "kind": "transformer", "variant": "mamba1"}.get(outer, 1)
            fewer = replace(section, fates=rest, aliases={})
            with pytest.raises(ValueError, match=f"unknown key '({fate.key}|{outer})'"):
                SectionReader().read(fewer, {outer: {inner: 1} if inner else value})
        with pytest.raises(ValueError, match="two fates"):
            replace(section, fates=(*section.fates, fate))


@pytest.mark.parametrize("text", [BLOCKS, SECTIONS])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_damaged_configs_give_clear_errors(text: str) -> None:
    source = json.dumps(yaml.safe_load(text)).encode()
    refused = 0
    for seed in range(300):
        try:
            raw = json.loads(damage_json(source, random.Random(seed)))
        except (ValueError, RecursionError):
            continue
        if is_legacy(raw):
            try:
                read_legacy(raw)
            except ValueError:
                refused += 1
    assert refused > 100


def test_the_guide_names_every_field() -> None:
    guide = GUIDE.read_text()
    for section in (MODEL, BLOCK, ATTENTION, MAMBA1):
        for key in section.keys:
            assert f"`{key.partition('.')[0]}" in guide, key


@pytest.mark.parametrize(("above", "place"), [(["model"], "model"), (["model", "base_model"], "model.base_model")])
def test_todays_layout_has_nothing_above_it(tmp_path: Path, above: list[str], place: str) -> None:
    raw: dict[str, Any] = TODAY
    for key in reversed(above):
        raw = {key: raw}
    (tmp_path / "nested.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=f"nested.json: 'decoder' lies under '{place}': .* belong at the top"):
        read_spec(tmp_path / "nested.json")
