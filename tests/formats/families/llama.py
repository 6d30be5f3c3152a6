from tests.formats.families import COMMON, NULLS, ROPES, Family

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [3.0, 3.5, 4.0, 4.5],
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

FAMILY = Family(
    config="LlamaConfig",
    model="LlamaForCausalLM",
    full={"attention_bias": True, "mlp_bias": True},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        *({"rope_parameters": rope} for rope in (*ROPES.values(), LONGROPE)),
        NULLS,
        {"head_dim": 6},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"pretraining_tp": 2},
        {"num_key_value_heads": None},
    ),
)
