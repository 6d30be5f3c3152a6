"""Merged adapters: as PEFT merges them, and as good as beside the weights, in transformers' own classes too."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.models import tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging
from typer.testing import CliRunner

from gearshift.cli import app
from gearshift.conversion import convert, export
from gearshift.formats import InexpressibleError
from gearshift.model import GearshiftForCausalLM
from gearshift.model.adapter_names import is_adapter
from gearshift.surgery import Surgery

logging.disable_progress_bar()
LORA = {"change": {"lora": {"rank": 3, "alpha": 6}}}
SUPERNET = {"wrap": {"main": "attention"}}, {"add": {"name": "gdn", "mixer": {"type": "gated_delta_net"}}}


def folder_with_adapters(folder: Path, *edits: dict, dtype: str = "float32") -> Path:
    """A Llama model with adapters that have learnt something."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    surgery = Surgery.model_validate({"edits": [*edits, LORA]})
    convert(folder / "llama", [surgery], dtype).write(folder / "adapted")
    model = GearshiftForCausalLM.from_pretrained(folder / "adapted", dtype="auto")
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder / "adapted")
    return folder / "adapted"


def test_a_merged_export_to_llama_is_the_adapted_model(tmp_path: Path) -> None:
    folder, batch = folder_with_adapters(tmp_path), tokens(2, 11)
    expected = AutoModelForCausalLM.from_pretrained(folder)(batch).logits
    conversion = export(folder, merge_lora=True)
    assert (conversion.format, conversion.native.spec.has_lora) == ("llama", False)
    conversion.write(tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(batch).logits, expected, rtol=1e-5, atol=1e-5)
    before = LlamaForCausalLM.from_pretrained(tmp_path / "llama")
    assert not torch.allclose(before(batch).logits, expected, atol=0.1)
    untouched = "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"
    assert all(torch.equal(before.state_dict()[name], merged.state_dict()[name]) for name in untouched)


def test_merged_weights_are_pefts(tmp_path: Path) -> None:
    folder = folder_with_adapters(tmp_path, *SUPERNET)
    export(folder, "gdn", "gearshift", merge_lora=True).write(tmp_path / "merged")
    model = GearshiftForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if hasattr(module, "get_delta_weight"):
            module.merge(safe_merge=True)
    theirs = {name: tensor for name, tensor in model.state_dict().items() if not is_adapter(name)}
    ours = load_file(tmp_path / "merged" / "model.safetensors")
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name.replace(".mixer.", ".mixer.mixers.gdn.")], rtol=1e-6, atol=1e-7)
    assert len(ours) == sum(".attention." not in name for name in theirs)


def test_merging_rounds_once(tmp_path: Path) -> None:
    folder = folder_with_adapters(tmp_path, dtype="bfloat16")
    export(folder, format="llama", merge_lora=True).write(tmp_path / "merged")
    source, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj"
    a, b = (source[f"{name}.lora_{part}.default.weight"].float() for part in "AB")
    expected = (source[f"{name}.weight"].float() + 2.0 * (b @ a)).bfloat16()
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"], expected)


def test_a_second_merge_writes_the_same_bytes(tmp_path: Path) -> None:
    folder = folder_with_adapters(tmp_path)
    for out in ("one", "two"):
        export(folder, merge_lora=True).write(tmp_path / out)
    one, two = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "two"))
    assert one == two


def test_no_family_takes_adapters(tmp_path: Path) -> None:
    folder = folder_with_adapters(tmp_path)
    message = r"block 'layer' has lora \{rank: 3, .*\(merge the adapters into the weights first: export with --merge"
    for family in ("llama", "mistral"):
        with pytest.raises(InexpressibleError, match=message):
            export(folder, format=family)
    conversion = export(folder)
    assert (conversion.format, conversion.native.spec.has_lora) == ("gearshift", True)
    assert "merge the adapters" in conversion.reason
    with pytest.raises(ValueError, match="llama has no LoRA adapters to merge: leave out --merge-lora"):
        export(tmp_path / "llama", merge_lora=True)


def run(*args: object) -> str:
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return f"{result.exit_code} {result.output}"


def test_the_command_line(tmp_path: Path) -> None:
    folder = folder_with_adapters(tmp_path, *SUPERNET)
    assert run("export", folder, tmp_path / "merged", "--placement", "attention", "--merge-lora").startswith("0 ")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "llama"
    assert "the adapters alone, format peft" in run("export", folder, tmp_path / "adapters", "--adapters")
    model = GearshiftForCausalLM.from_pretrained(folder)
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    own = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    assert len(stored) == len(own)
    for name, tensor in own.items():
        assert torch.equal(stored[f"base_model.model.{name.replace('.default.', '.')}"], tensor)
    assert "exists already" in run("export", folder, tmp_path / "adapters", "--adapters")
    assert run("export", folder, tmp_path / "adapters", "--adapters", "--overwrite").startswith("0 ")
    assert "leave out --merge-lora" in run("export", folder, tmp_path / "other", "--adapters", "--merge-lora")
    assert "has no LoRA adapters" in run("export", tmp_path / "llama", tmp_path / "other", "--adapters")
    assert not (tmp_path / "other").exists()
