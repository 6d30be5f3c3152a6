from dataclasses import replace

from tests.formats.families import qwen2

FAMILY = replace(
    qwen2.FAMILY,
    config="Qwen3Config",
    model="Qwen3ForCausalLM",
    full={"attention_bias": True},
    sweep=(*qwen2.FAMILY.sweep, {"head_dim": 6}, {"attention_bias": True}),
)
