from tests.formats.families import COMMON, NULLS, ROPES, SIZES, Family

FAMILY = Family(
    config="Qwen3MoeConfig",
    model="Qwen3MoeForCausalLM",
    sizes={**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    full={"attention_bias": True, "mlp_only_layers": [1]},
    sweep=(
        *({key: value} for key, value in COMMON.items()),
        *({"rope_parameters": rope} for rope in ROPES.values()),
        NULLS,
        {"head_dim": 6},
        {"attention_bias": True},
        {"use_sliding_window": True, "sliding_window": 5},
        {"use_sliding_window": True, "sliding_window": None},
        {"sliding_window": 5},
        {"decoder_sparse_step": 2},
        {"decoder_sparse_step": 2, "mlp_only_layers": [0, 1]},
        {"mlp_only_layers": [0, 2]},
        {"mlp_only_layers": [0, 1, 2]},
        {"moe_intermediate_size": 20},
        {"num_experts_per_tok": 3},
        {"num_experts": 5},
        {"norm_topk_prob": True},
        {"output_router_logits": True},
        {"router_aux_loss_coef": 0.02},
    ),
)
