from tests.formats.families import COMMON, NULLS, ROPES, Family

MIXED = ["full_attention", "sliding_attention", "sliding_attention"]

FAMILY = Family(
    config="Qwen2Config",
    model="Qwen2ForCausalLM",
    full={},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        *({"rope_parameters": rope} for rope in ROPES.values()),
        NULLS,
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
        {"sliding_window": 5},
        {"max_window_layers": 2},
    ),
    refused={"layer_types": MIXED},
)
