from tests.formats.families import COMMON, NULLS, ROPES, Family

FAMILY = Family(
    config="MistralConfig",
    model="MistralForCausalLM",
    full={},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        *({"rope_parameters": rope} for rope in ROPES.values()),
        NULLS,
        {"head_dim": 6},
        {"sliding_window": 7},
        {"sliding_window": None},
    ),
)
