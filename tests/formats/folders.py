"""Small random checkpoints on disk, made by transformers' own classes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from gearshift.formats import FORMATS, Checkpoint, write_checkpoint

CLASSES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def save(folder: Path, family: str = "llama", dtype: str = "float32", **settings: Any) -> PreTrainedModel:
    """Save a random model of a family to `folder`; the model."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **settings})).to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: fresh ones are all ones and zeros
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of a folder's config.json; those set to `...` are removed."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_tensors(folder: Path, **changes: Any) -> None:
    """Set tensors of a folder's only shard by name, `__` for a dot; those set to None are removed."""
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def convert(checkpoint: Checkpoint, out: Path, **settings: Any) -> None:
    """Write a checkpoint in the native format."""
    native = FORMATS["gearshift"]

    def extras(folder: Path) -> None:
        checkpoint.copy_extras(folder)
        native.write_companions(folder)

    write_checkpoint(
        out,
        plan=checkpoint.plan,
        source=checkpoint.source,
        config=native.to_config(checkpoint.native),
        extras=extras,
        fingerprint=checkpoint.fingerprint,
        **settings,
    )


def export(checkpoint: Checkpoint, out: Path, family: str) -> None:
    """Write a native checkpoint in a family's format."""
    target = FORMATS[family]
    write_checkpoint(
        out,
        plan=checkpoint.plan.compose(target.plan(checkpoint.native.spec, checkpoint.schema).invert()),
        source=checkpoint.source,
        config=target.to_config(checkpoint.native),
        extras=checkpoint.copy_extras,
        fingerprint=checkpoint.fingerprint,
    )


def files(folder: Path) -> dict[str, bytes]:
    """The content of every file of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
