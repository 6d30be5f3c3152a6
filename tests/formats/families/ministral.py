from tests.formats.families import COMMON, NULLS, ROPES, SIZES, Family

MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILY = Family(
    config="MinistralConfig",
    model="MinistralForCausalLM",
    sizes={**SIZES, "head_dim": 8},
    full={},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        *({"rope_parameters": rope} for rope in ROPES.values()),
        NULLS,
        {"head_dim": 6},
        {"sliding_window": 7},
        {"layer_types": MIXED, "sliding_window": 5},
        {"layer_types": ["full_attention"] * 3, "sliding_window": 5},
    ),
)
