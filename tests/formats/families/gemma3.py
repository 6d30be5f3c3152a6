from typing import Any

from tests.formats.families import COMMON, NULLS, ROPES, SIZES, Family

MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
GLOBAL, LOCAL = ({"rope_type": "default", "rope_theta": theta} for theta in (1000.0, 100.0))
_OTHERWISE = ("hidden_act", "num_hidden_layers", "tie_word_embeddings")
_COMMON = {key: value for key, value in COMMON.items() if key not in _OTHERWISE}


def _ropes() -> tuple[dict[str, Any], ...]:
    """Each kind of scaling in the layers of one kind, the other kind's as they are."""
    scaled = [{key: value for key, value in rope.items() if key != "truncate"} for rope in ROPES.values()]
    return (
        *({"rope_parameters": {"full_attention": rope, "sliding_attention": LOCAL}} for rope in scaled),
        *({"rope_parameters": {"full_attention": GLOBAL, "sliding_attention": rope}} for rope in scaled),
    )


FAMILY = Family(
    config="Gemma3TextConfig",
    model="Gemma3ForCausalLM",
    sizes={**SIZES, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6, "layer_types": MIXED},
    full={"attention_bias": True, "tie_word_embeddings": False},
    sweep=(
        *({key: value} for key, value in _COMMON.items()),
        {"num_hidden_layers": 2, "layer_types": MIXED[1:]},
        {"tie_word_embeddings": False},
        {"hidden_activation": "silu"},
        *_ropes(),
        NULLS,
        {"head_dim": 6},
        {"attention_bias": True},
        {"query_pre_attn_scalar": 3},
        {"sliding_window": 9},
        {"layer_types": ["full_attention"] * 3},
        {"layer_types": ["sliding_attention"] * 3},
        {"layer_types": None},
        {"layer_types": None, "sliding_window_pattern": 2},
        {"final_logit_softcapping": 2.0},
        {"attn_logit_softcapping": 1.5},
        {"use_bidirectional_attention": True},
        {"use_bidirectional_attention": True, "sliding_window": 9},
        {"use_bidirectional_attention": True, "sliding_window": 1},
        {"use_bidirectional_attention": True, "layer_types": ["full_attention"] * 3},
        {"use_bidirectional_attention": None},
    ),
)
