"""A GGUF file as a checkpoint: what its metadata says in other words than a config, and its tokenizer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gearshift.formats.checkpoint import Checkpoint, build_plan
from gearshift.formats.documents import GENERATION, write_json
from gearshift.formats.gguf import ARCHITECTURE, FORMAT, ROPE, TIED
from gearshift.formats.gguf.source import GGUFSource

ROPE_FACTORS = "rope_freqs.weight"
# What every Llama from 3.1 on has. A file holds only the factors that come of it.
_LOW_FREQUENCY_FACTOR, _HIGH_FREQUENCY_FACTOR, _ORIGINAL_CONTEXT = 1.0, 4.0, 8192


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. ValueError, naming it, if it is damaged or not a model that we can read."""
    source = GGUFSource(path)
    metadata = source.header.metadata
    architecture = metadata.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path} holds a model of the architecture {architecture!r}: of GGUF files, only {ARCHITECTURE!r} is read"
        )
    try:
        native = FORMAT.to_native(_as_config(metadata, source))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [f"de-quantised from {', '.join(source.quantisations)}"] if source.quantisations else []
    native = replace(native, source={**native.source, "name": path.name, "notes": notes})
    plan = build_plan(FORMAT, native, source, path)

    def write_extras(out: Path) -> None:
        _write_tokenizer(path, out)
        write_json(out / GENERATION, {key: native.extras[key] for key in sorted(native.extras)})

    return Checkpoint(path, FORMAT, native, source, plan, source.fingerprint, write_extras)


def _as_config(metadata: Mapping[str, Any], source: GGUFSource) -> dict[str, Any]:
    """The metadata, and under keys of our own what a GGUF file says by having a tensor or not."""
    config = dict(metadata)
    tensors = source.schema
    config[TIED] = "output.weight" not in tensors
    config["qkv_bias"] = "blk.0.attn_q.bias" in tensors
    config["output_bias"] = "blk.0.attn_output.bias" in tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    config.setdefault(
        "llama.vocab_size", tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None
    )
    scaling = f"{ROPE}.scaling"
    if config.get(f"{scaling}.type") == "none":
        config[f"{scaling}.type"] = "default"
    elif f"{scaling}.factor" in config:
        config.setdefault(f"{scaling}.type", "linear")
    if ROPE_FACTORS in tensors:
        config |= {f"{scaling}.{key}": value for key, value in _llama3_scaling(config, source).items()}
    return config


def _llama3_scaling(config: Mapping[str, Any], source: GGUFSource) -> dict[str, Any]:
    """The RoPE parameters that the file's factors come of. ValueError if they are not Llama 3's."""
    from gearshift.mixers.attention import RotarySpec
    from gearshift.mixers.attention.rotary import frequencies

    factors = source.read(ROPE_FACTORS).flatten()
    plain = RotarySpec(theta=config.get(f"{ROPE}.freq_base", 10000.0))
    scaled = plain.model_copy(
        update={
            "type": "llama3",
            "factor": round(float(factors.max()), 3),
            "low_freq_factor": _LOW_FREQUENCY_FACTOR,
            "high_freq_factor": _HIGH_FREQUENCY_FACTOR,
            "original_max_position_embeddings": _ORIGINAL_CONTEXT,
        }
    )
    head_dim, positions = 2 * len(factors), torch.zeros(1)
    wanted, unscaled = (
        frequencies(rotary, head_dim, 2 * _ORIGINAL_CONTEXT, positions)[0] for rotary in (scaled, plain)
    )
    if not torch.allclose(unscaled / wanted, factors, rtol=1e-4):
        raise ValueError(
            f"the tensor {ROPE_FACTORS!r} holds factors that are not Llama 3's: use the original checkpoint"
        )
    return {
        "type": scaled.type,
        "factor": scaled.factor,
        "low_freq_factor": scaled.low_freq_factor,
        "high_freq_factor": scaled.high_freq_factor,
        "original_context_length": scaled.original_max_position_embeddings,
    }


def _write_tokenizer(path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library panics over a bad vocabulary, which is no Exception
        raise ValueError(f"the tokenizer in {path} cannot be converted: {' '.join(str(error).split())}") from error
    tokenizer.save_pretrained(out)
