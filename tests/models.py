"""Small models for tests: sizes that differ from each other, so that a mixed-up dimension shows."""

from typing import Any

import torch

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec

ATTENTION = {"type": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "window": {**ATTENTION, "window": 6},
    "gdn": {"type": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 8},
    "kda": {"type": "kimi_delta_attention", "heads": 4, "head_dim": 8},
}


def supernet_spec(
    layers: int = 4,
    mixers: dict[str, dict[str, Any]] | None = None,
    mlp: dict[str, Any] | None = None,
    **model: Any,
) -> ModelSpec:
    """A supernet with the same mixers in every layer."""
    block = {
        "mixer": {"type": "stochastic", "main": "attention", "mixers": mixers or MIXERS},
        "mlp": mlp or {"type": "gated", "intermediate_size": 40},
    }
    decoder = {"num_layers": layers, "pattern": ["block"], "blocks": {"block": block}}
    return ModelSpec.model_validate(
        {"vocab_size": 61, "hidden_size": 24, "max_positions": 128, "decoder": decoder, **model}
    )


def supernet(seed: int = 0, **settings: Any) -> GearshiftForCausalLM:
    """A randomly started supernet in float32, in evaluation mode, its weights large enough to tell placements apart."""
    torch.manual_seed(seed)
    model = GearshiftForCausalLM(GearshiftConfig(supernet_spec(**settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 0, vocabulary: int = 61) -> torch.Tensor:
    """Random token ids, [batch, length]."""
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))
