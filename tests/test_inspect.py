"""What `info` prints: at a glance, complete on request, and true."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.cli import app
from gearshift.formats import open_checkpoint
from gearshift.inspect import active_parameters, describe_settings, pattern, summary
from gearshift.spec import Placement
from gearshift.tiny import write_tiny_model
from tests.models import ATTENTION, MIXERS

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 50
MLP = {"type": "gated", "intermediate_size": 40}


def gearshift(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def choice(*names: str) -> dict[str, Any]:
    return {"type": "stochastic", "main": "attention", "mixers": {name: MIXERS[name] for name in names}}


def five_blocks() -> ModelSpec:
    blocks = {
        "local": {"mixer": choice(*MIXERS), "mlp": MLP},
        "global": {"mixer": choice("attention", "gdn"), "mlp": MLP},
        "shared": {"mixer": choice("attention", "window"), "mlp": MLP, "shared_weights": True},
        "linear": {"mixer": MIXERS["gdn"], "mlp": {**MLP, "intermediate_size": 48}},
        "wide": {"mixer": {**ATTENTION, "heads": 8}, "mlp": MLP},
    }
    layers = ["local"] * 5 + ["global"] + ["local"] * 5 + ["shared"] + ["linear"] * 3 + ["wide"]
    return ModelSpec.model_validate(
        {
            "vocab_size": 61,
            "hidden_size": 24,
            "max_positions": 128,
            "decoder": {"num_layers": 48, "pattern": layers, "blocks": blocks},
        }
    )


def save(spec: ModelSpec, folder: Path, **config: Any) -> GearshiftForCausalLM:
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(spec, **config))
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers saves it, and a model of five kinds of blocks."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_model(folder / "llama", TEXT)
    spec = five_blocks()
    fast = Placement("gdn" if "gdn" in offered else offered[-1] for offered in spec.choices)
    save(spec, folder / "five", presets={"fast": str(fast)}, default_preset="fast")
    return folder


def shown(folder: Path, width: int) -> list[str]:
    file = StringIO()
    Console(width=width, file=file).print(summary(open_checkpoint(folder)))
    return file.getvalue().splitlines()


def row(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


@pytest.mark.parametrize("width", [80, 100, 160])
def test_five_blocks_in_48_layers_fit_a_screen(work: Path, width: int) -> None:
    lines = shown(work / "five", width)
    assert len(lines) <= 40
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "48: 3 x (local x 5, global, local x 5, shared, linear x 3, wide)" in text
    assert "…" not in text
    assert "one set of weights" in " ".join(text.split())
    for block in ("local", "global", "shared", "linear", "wide"):
        row(lines, f"{block} ")
    for mixer in MIXERS:
        row(lines, f"  {mixer}")


@pytest.mark.parametrize("width", [100, 160])
def test_blocks_without_a_mixer_in_common_fit_a_screen_too(tmp_path: Path, width: int) -> None:
    names = ("alice", "bob", "claire", "dave", "erin")
    blocks = {}
    for number, name in enumerate(names, 1):
        attention = {**ATTENTION, "heads": 4 * number, "qk_norm": {"epsilon": 1e-5}, "rotary": {"theta": 1e6}}
        mixers = {
            "attention": attention,
            "window": {**attention, "window": 16 * number},
            "gdn": {**MIXERS["gdn"], "value_heads": 2 * number},
            "kda": {**MIXERS["kda"], "head_dim": 8 * number},
        }
        mixer = {"type": "stochastic", "main": "attention", "mixers": mixers}
        blocks[name] = {"mixer": mixer, "mlp": {**MLP, "intermediate_size": 40 + number}, "norm": {"epsilon": 1e-5}}
    decoder = {"num_layers": 48, "pattern": names, "blocks": blocks}
    spec = {"vocab_size": 61, "hidden_size": 24, "max_positions": 128, "decoder": decoder}
    presets = {preset: f"{mixer}*48" for preset, mixer in (("fast", "gdn"), ("balanced", "window"), ("good", "kda"))}
    save(ModelSpec.model_validate(spec), tmp_path / "model", presets=presets, source={"format": "llama"})
    lines = shown(tmp_path / "model", width)
    assert len(lines) <= 40
    assert row(lines, "every block").split("  ")[1:2] == ["norm (epsilon 1e-05)"]
    text = " ".join(" ".join(lines).split())
    assert text.count("as attention of alice, but heads") == 4
    assert "as kda of alice, but head_dim 40 " in text  # the ranks follow from it


def test_info_counts_parameters_and_states(work: Path, tmp_path: Path) -> None:
    lines = shown(work / "five", 160)
    model = GearshiftForCausalLM.from_pretrained(work / "five")
    total = sum(parameter.numel() for parameter in model.parameters())  # shared layers are one module
    exported = gearshift("export", work / "five", tmp_path / "fast", "--placement", "fast", "--format", "gearshift")
    assert exported.exit_code == 0, exported.output
    active = {
        "fast": sum(tensor.numel() for tensor in load_file(tmp_path / "fast" / "model.safetensors").values()),
        "main": active_parameters(model.spec, model.spec.main),
    }
    assert f"{total:,} in all, {active['main']:,} under main" in row(lines, "parameters")
    assert f"{active['fast'] / 1000:.3g} K" in row(lines, "fast (default)")
    assert "gdn 33, gated_delta_net 9, window 3, attention 3" in row(lines, "fast (default)")
    # In float32: keys and values of 2 heads of 8 channels; of a window of 6, at most 5 tokens; 42 recurrent layers
    # keep a matrix of 4 x 8 x 8 and 3 inputs of the convolutions over 16 + 16 + 32 channels.
    assert row(lines, "  attention (main)").split()[3:6] == ["128", "B", "0"]
    assert row(lines, "  window").split()[2:5] == ["0", "640", "B"]
    assert "as attention, but window 6" in row(lines, "  window")
    assert row(lines, "fast (default)").split()[4:6] == ["384", "B"]
    assert f"{(42 * 4 * (4 * 64 + 3 * 64) + 3 * 640) / 1000:.3g} KB" in row(lines, "fast (default)")


def test_info_counts_what_a_token_reads_of_a_mixture_of_experts(tmp_path: Path) -> None:
    mlp = {"type": "mixture_of_experts", "experts": 8, "experts_per_token": 2, "intermediate_size": 16}
    decoder = {"num_layers": 3, "pattern": ["block"], "blocks": {"block": {"mixer": ATTENTION, "mlp": mlp}}}
    spec = {"vocab_size": 61, "hidden_size": 24, "max_positions": 128, "decoder": decoder}
    model = save(ModelSpec.model_validate(spec), tmp_path / "model")
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [parameter for name, parameter in model.named_parameters() if parameter.ndim == 3]
    read = total - sum(parameter.numel() for parameter in experts) * 6 // 8
    assert row(shown(tmp_path / "model", 100), "parameters").split("  ")[1].strip() == (
        f"{total:,}, of which a token reads {read:,}"
    )


def test_info_is_plain_text_when_piped(work: Path) -> None:
    output = gearshift("info", work / "five").output
    assert "\x1b" not in output
    assert "placement" in output
    assert 80 < max(map(len, output.splitlines())) <= 100


def test_resolved_is_the_complete_config_as_yaml(work: Path) -> None:
    config = json.loads((work / "five" / "config.json").read_text())
    del config["transformers_version"]  # who wrote it, no part of the model
    assert yaml.safe_load(gearshift("info", work / "five", "--resolved").output) == config
    foreign = yaml.safe_load(gearshift("info", work / "llama", "--resolved").output)
    assert foreign["spec"]["decoder"]["blocks"]["layer"]["mixer"]["head_dim"] == 16


@pytest.mark.parametrize(
    ("layers", "names", "text"),
    [
        (4, ["a"], "a x 4"),
        (1, ["a"], "a"),
        (26, ["a", "a", "b"], "8 x (a x 2, b), a x 2"),
        (7, ["a", "a", "a", "b", "a", "a", "a"], "a x 3, b, a x 3"),
        (4, ["a", "b", "a", "b"], "2 x (a, b)"),
    ],
)
def test_patterns_are_run_length_encoded(layers: int, names: list[str], text: str) -> None:
    blocks = {name: {"mixer": ATTENTION, "mlp": MLP} for name in names}
    decoder = {"num_layers": layers, "pattern": names, "blocks": blocks}
    spec = ModelSpec.model_validate({"vocab_size": 61, "hidden_size": 24, "max_positions": 9, "decoder": decoder})
    assert pattern(spec) == text


def test_settings_are_those_that_are_not_at_their_defaults() -> None:
    spec = five_blocks().decoder.blocks["wide"].mixer
    settings = {"causal": False, "rotary": {"theta": 500.0}, "qk_norm": {}, "qkv_bias": True, "window": 3}
    changed = type(spec).model_validate({**ATTENTION, **settings})
    text = "heads 4, kv_heads 2, head_dim 8, window 3, no causal, qkv_bias, qk_norm, rotary (theta 500)"
    assert describe_settings(changed) == f"attention: {text}"
    longrope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    changed = type(spec).model_validate(
        {**ATTENTION, "rotary": {**longrope, "original_max_position_embeddings": 4}, "qk_norm": None}
    )
    assert "rotary (longrope, original_max_position_embeddings 4, short_factor (8 values)" in describe_settings(changed)
