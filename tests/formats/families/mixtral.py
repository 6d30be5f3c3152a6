from tests.formats.families import COMMON, NULLS, ROPES, SIZES, Family

FAMILY = Family(
    config="MixtralConfig",
    model="MixtralForCausalLM",
    sizes={**SIZES, "num_local_experts": 4},
    full={},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        # Transformers scales no frequencies of heads whose width it is not told.
        *({"rope_parameters": rope, "head_dim": 8} for rope in ROPES.values()),
        NULLS,
        {"head_dim": 6},
        {"sliding_window": 7},
        {"num_local_experts": 5},
        {"num_experts_per_tok": 3},
        {"output_router_logits": True},
        {"router_aux_loss_coef": 0.02},
        {"router_jitter_noise": 0.1},
    ),
)
