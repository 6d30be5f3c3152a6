"""Checkpoints of a family whose tensors have other names or pieces than the published ones are read the same."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gearshift import GearshiftForCausalLM
from gearshift.conversion import convert
from gearshift.formats import open_checkpoint
from gearshift.plan.execute import materialise
from tests.formats.families import Family, families

FAMILIES = families()


def as_saved(name: str, folder: Path, **settings: object) -> None:
    """Save what the family's `save` does, but as transformers leaves it."""
    Family.save(FAMILIES[name], folder, **settings)


def stack_experts(folder: Path, gate: str, up: str, down: str, moe: str = "mlp") -> None:
    """Rewrite a folder's tensors as transformers 5 has them in memory."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    prefixes = {name.partition(f"{moe}.experts.")[0] for name in tensors if f"{moe}.experts." in name}
    for prefix in prefixes:
        count = sum(name.startswith(f"{prefix}{moe}.experts.") and name.endswith(f"{down}.weight") for name in tensors)
        each = [
            [tensors.pop(f"{prefix}{moe}.experts.{n}.{part}.weight") for part in (gate, up, down)] for n in range(count)
        ]
        tensors[f"{prefix}mlp.experts.gate_up_proj"] = torch.stack([torch.cat(parts[:2]) for parts in each])
        tensors[f"{prefix}mlp.experts.down_proj"] = torch.stack([parts[2] for parts in each])
        tensors[f"{prefix}mlp.gate.weight"] = tensors.pop(f"{prefix}{moe}.gate.weight")
    save_file(tensors, path, {"format": "pt"})


def assert_same(one: Path, other: Path, but_for: str = "nothing") -> None:
    """The same models, but for tensors with `but_for` in their names."""
    ours, theirs = (open_checkpoint(folder) for folder in (one, other))
    assert ours.native.spec == theirs.native.spec
    first, second = (dict(materialise(opened.plan, opened.source)) for opened in (ours, theirs))
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first if but_for not in name)


@pytest.mark.parametrize(
    ("name", "parts", "moe"),
    [
        ("mixtral", ("w1", "w3", "w2"), "block_sparse_moe"),
        ("qwen3_moe", ("gate_proj", "up_proj", "down_proj"), "mlp"),
    ],
)
def test_stacked_experts(tmp_path: Path, name: str, parts: tuple[str, str, str], moe: str) -> None:
    for folder in ("published", "stacked"):
        FAMILIES[name].save(tmp_path / folder)
    stack_experts(tmp_path / "stacked", *parts, moe)
    assert not any(".experts.0." in tensor for tensor in load_file(tmp_path / "stacked" / "model.safetensors"))
    assert_same(tmp_path / "published", tmp_path / "stacked")


@pytest.mark.parametrize("name", ["olmo_hybrid", "kimi_linear"])
def test_what_transformers_saves(tmp_path: Path, name: str) -> None:
    FAMILIES[name].save(tmp_path / "published")
    as_saved(name, tmp_path / "saved")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("published", "saved"))
    assert {key: one[key].shape for key in one} != {key: other[key].shape for key in other}
    assert_same(tmp_path / "published", tmp_path / "saved", but_for="correction_bias")


def test_a_stack_that_is_incomplete_is_refused(tmp_path: Path) -> None:
    FAMILIES["mixtral"].save(tmp_path / "stacked")
    stack_experts(tmp_path / "stacked", "w1", "w3", "w2", "block_sparse_moe")
    path = tmp_path / "stacked" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.experts.down_proj"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the tensor 'model\.layers\.1\.block_sparse_moe\.experts\.0\.w2"):
        open_checkpoint(tmp_path / "stacked")


def test_original_positions_beside_the_rotary_settings(tmp_path: Path) -> None:
    """As Phi-3's configs have them; the models of transformers look there first."""
    rotary = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    FAMILIES["llama"].save(tmp_path / "theirs", max_position_embeddings=64, head_dim=8)
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 500.0, "rope_scaling": rotary, "original_max_position_embeddings": 16}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "theirs").write(tmp_path / "ours")
    theirs, ours = (
        model.eval()
        for model in (
            AutoModelForCausalLM.from_pretrained(tmp_path / "theirs"),
            GearshiftForCausalLM.from_pretrained(tmp_path / "ours"),
        )
    )
    for length in (12, 40):
        ids = torch.arange(3, 3 + length)[None]
        with torch.no_grad():
            expected = theirs(ids).logits
            assert (ours(ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
