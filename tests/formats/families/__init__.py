"""Each family's sweep: every key of its config class set to something else than its default, one at a time.

A module here is a family, named as its format, with a `FAMILY`. `tests/formats/test_families.py` runs them all.
"""

import copy
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 700.0, "factor": 4.0, "original_max_position_embeddings": 32}
YARN_EXTRAS = {"beta_fast": 24.0, "beta_slow": 2.0, "mscale": 0.8, "mscale_all_dim": 0.5, "truncate": False}
ROPES: dict[str, dict[str, Any]] = {
    "theta": {"rope_type": "default", "rope_theta": 123.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0},
    "yarn": YARN,
    "yarn, all set": YARN | YARN_EXTRAS | {"attention_factor": 1.25},
    "llama3": LLAMA3,
}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_act": "gelu",
    "max_position_embeddings": 99,
    "initializer_range": 0.01,
    "rms_norm_eps": 1e-3,
    "use_cache": False,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": [5, 6],
    "tie_word_embeddings": True,
    "attention_dropout": 0.25,
    "dtype": "bfloat16",
    "id2label": {0: "no", 1: "yes", 2: "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "problem_type": "regression",
}
"""Settings that most families have."""
NULLS = {"bos_token_id": None, "eos_token_id": None}
SET_BY_NOBODY = frozenset(
    {
        "architectures",
        "chunk_size_feed_forward",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "transformers_version",
    }
)
"""Keys with one value that we can read, or that say nothing of the model."""


@dataclass(frozen=True)
class Family:
    """How to make small checkpoints of a family with transformers' own classes."""

    config: str
    """The name of the config class in transformers."""
    model: str
    """The name of the class of causal language models."""
    full: Mapping[str, Any]
    """Settings, beside the sizes, with which every template of the format has a tensor."""
    sweep: tuple[Mapping[str, Any], ...]
    """Settings, each tried alone, that together set every key."""
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    refused: Mapping[str, Any] = field(default_factory=dict)
    """Keys that have one value that we can read -> another one, which must be refused with the key's name."""
    std: float = 0.3
    """The standard deviation of the random weights."""

    @property
    def config_class(self) -> Any:
        return getattr(transformers, self.config)

    def save(self, folder: Path, **settings: Any) -> PreTrainedModel:
        """Save a random model to `folder`; the model."""
        torch.manual_seed(0)
        # Copied, for some classes add to the mappings that they are given.
        config = self.config_class(**copy.deepcopy({**self.sizes, **settings}))
        model = getattr(transformers, self.model)(config)
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases too: fresh ones are all ones and zeros
                parameter.normal_(std=self.std)
        model = model.to(config.dtype or torch.float32).eval()
        model.save_pretrained(folder)
        return model

    def runs_otherwise(self, model: PreTrainedModel) -> str | None:
        """What the installed transformers lacks to run `model` as its checkpoint means, if anything."""
        return None


def families() -> dict[str, Family]:
    """Every family by the name of its format."""
    names = [module.name for module in pkgutil.iter_modules(__path__)]
    return {name: importlib.import_module(f"{__name__}.{name}").FAMILY for name in names}
