"""Small GGUF files, written by the gguf package as llama.cpp's converter lays them out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import PreTrainedModel

Quantise = Callable[[str, np.ndarray], gguf.GGMLQuantizationType | None]
"""(transformers' name of a tensor, what the file is to hold) -> the type that it is quantised as, None for float32."""
More = Callable[[gguf.GGUFWriter], None]
"""Adds something else to a file."""


def paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k in Llama, as its converter makes it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def names(architecture: str, layers: int) -> gguf.TensorNameMap:
    """llama.cpp's names of an architecture's tensors, by those of transformers."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(kind, layers)


def stored(architecture: str, name: str, tensor: torch.Tensor, config: Any) -> np.ndarray:
    """What a file holds of transformers' tensor `name`."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if architecture == "llama" and heads:
        tensor = paired(tensor, heads)
    if architecture == "gemma3" and name.endswith("norm.weight"):
        tensor = tensor + 1
    return tensor.numpy()


def write(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    quantise: Quantise = lambda name, value: None,
    more: More = lambda writer: None,
) -> None:
    """Write transformers' model to a file."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    _add_config(writer, config)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    characters = [chr(ord("!") + token) for token in range(config.vocab_size - 3)]
    writer.add_token_list(["<|endoftext|>", *characters, "AB", "CD"])
    writer.add_token_types([1] * config.vocab_size)
    more(writer)
    if "tokenizer.ggml.merges" not in writer.kv_data[0]:
        writer.add_token_merges(["A B", "C D"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    theirs = names(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        value = stored(architecture, name, tensor, config)
        kind = quantise(name, value)
        gguf_name = theirs.get_name(name, (".weight", ".bias"))
        assert gguf_name is not None, name
        if kind is None:
            writer.add_tensor(gguf_name, value)
        else:
            writer.add_tensor(gguf_name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(rope["rope_theta"])
    if writer.arch == "llama":
        writer.add_vocab_size(config.vocab_size)
    if writer.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    if writer.arch == "gemma3" or head_dim != config.hidden_size // config.num_attention_heads:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
