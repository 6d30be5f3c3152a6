"""The fates that families of transformers have in common."""

from gearshift.formats.fates import Carried, Constant, Fate, Fixed, Mapped, WeightDtype, implied, mapped, optional
from gearshift.formats.layers import BlockKind, LayerTypes
from gearshift.formats.tensors import Experts, Junk, Template, Weight

ROTARY_NESTED = {"rope_parameters": "transformers.modeling_rope_utils:RopeParameters"}
ALIASES = {
    "original_max_position_embeddings": "rope_parameters.original_max_position_embeddings",
    "rope_scaling": "rope_parameters",
    "rope_theta": "rope_parameters.rope_theta",
    "torch_dtype": "dtype",
}
"""What transformers 4 called the keys of today."""

_REMOTE_CODE = "the checkpoint brings modelling code of its own, which Gearshift does not run"
_QUANTISED = "de-quantise the weights first"


def remote_code(**auto_map: str) -> Carried:
    """Of families without a class in transformers: the classes that a checkpoint's own code has for the Auto classes.

    Gearshift does not run that code, and does not copy it.
    """
    return Carried("auto_map", known=(auto_map,), why=_REMOTE_CODE)


REMOTE_MODEL: tuple[Fate, ...] = (
    WeightDtype("dtype"),
    Constant("quantization_config", None, write=False, why=_QUANTISED),
    Constant("chunk_size_feed_forward", 0, write=False),
    Constant("is_encoder_decoder", False, write=False),
    Carried("bos_token_id", null=True),
    Carried("eos_token_id", null=True),
    Carried("pad_token_id", null=True),
    Carried("id2label"),
    Carried("label2id"),
    Carried("problem_type"),
)
"""What transformers keeps in the config of every model, but for the code that a checkpoint may bring."""

ANY_MODEL: tuple[Fate, ...] = (*REMOTE_MODEL, Constant("auto_map", None, write=False, why=_REMOTE_CODE))
"""The same for models whose code is in transformers."""

DECODER: tuple[Fate, ...] = (
    mapped("vocab_size", "vocab_size"),
    mapped("hidden_size", "hidden_size"),
    mapped("num_hidden_layers", "decoder.num_layers"),
    mapped("max_position_embeddings", "max_positions"),
    mapped("tie_word_embeddings", "tie_embeddings"),
    Carried("initializer_range"),
    Carried("use_cache"),
)
"""A decoder with a head."""

NORM_EPSILONS = ("final_norm.epsilon", "layer.norm.epsilon")
"""What `rms_norm_eps` means where queries and keys have no norm."""

GATED_MLP: tuple[Fate, ...] = (
    mapped("intermediate_size", "layer.mlp.intermediate_size"),
    mapped("hidden_act", "layer.mlp.activation"),
    Fixed("layer.mlp.type", "gated"),
)
"""The same gated MLP in all layers."""

PLAIN_OUTPUT: tuple[Fate, ...] = (
    Fixed("scale_embeddings", False),
    Fixed("logit_softcap", None),
    Fixed("final_norm.type", "rms_norm"),
    Fixed("final_norm.zero_centered", False),
)
"""What few families do to embeddings and logits."""

PLAIN_MODEL: tuple[Fate, ...] = (*PLAIN_OUTPUT, Fixed("prediction_heads", ()))
"""What few families do outside the blocks."""

NO_LORA = Fixed("layer.lora", None, why="merge the adapters into the weights first: export with --merge-lora")
"""No family's weights have adapters beside them."""

PLAIN_BLOCK: tuple[Fate, ...] = (
    Fixed("layer.norm.type", "rms_norm"),
    Fixed("layer.norm.zero_centered", False),
    Fixed("layer.norm_placement", "before"),
    Fixed("layer.shared_weights", False),
    NO_LORA,
)
"""What few families do in a block."""

ROUTER_LOSS: tuple[Fate, ...] = (Carried("output_router_logits"), Carried("router_aux_loss_coef"))
"""What balances experts in training."""

SOFTMAX_ROUTER: tuple[Fate, ...] = (
    *ROUTER_LOSS,
    Fixed("layer.mlp.scoring", "softmax"),
    Fixed("layer.mlp.scaling", 1.0),
    Fixed("layer.mlp.groups", 1),
    Fixed("layer.mlp.groups_per_token", 1),
    Fixed("layer.mlp.correction_bias", False),
    Fixed("layer.mlp.shared", None),
    Fixed("layer.mlp.shared_gate", False),
)
"""A mixture of experts that the highest softmax chooses, with nothing beside them."""

HEAD_DIM = mapped("head_dim", "layer.mixer.head_dim")
"""Of families whose config class has the key."""
IMPLIED_HEAD_DIM = implied("head_dim", "layer.mixer.head_dim")
"""Of families whose models look for the key, but whose config class does not have it."""

PLAIN_ATTENTION: tuple[Fate, ...] = (
    Fixed("layer.mixer.causal", True),
    Fixed("layer.mixer.scale_dim", None),
)
"""What few families do in attention."""

QK_NORM: tuple[Fate, ...] = (
    mapped("rms_norm_eps", *NORM_EPSILONS, "layer.mixer.qk_norm.epsilon"),
    Fixed("layer.mixer.qk_norm.type", "rms_norm"),
    Fixed("layer.mixer.qk_norm_across_heads", False),
)
"""A norm on each head of queries and keys, with the epsilon of all norms."""

NO_QK_NORM: tuple[Fate, ...] = (
    mapped("rms_norm_eps", *NORM_EPSILONS),
    Fixed("layer.mixer.qk_norm", None),
    Fixed("layer.mixer.qk_norm_across_heads", False),
)
"""Queries and keys as they are projected."""

WINDOWED_BLOCKS = {"full_attention": BlockKind("attention"), "sliding_attention": BlockKind("attention")}
"""The kinds of block of families with windows in some layers."""

WINDOWS: tuple[Fate, ...] = (
    Fixed("full_attention.mixer.window", None),
    mapped("sliding_window", "sliding_attention.mixer.window"),
)
"""One window, for the layers that have one."""

LAYER_TYPES = LayerTypes("layer_types", {kind: (kind,) for kind in WINDOWED_BLOCKS})
"""The key that says which layers have the window."""

ATTENTION_DROPOUT = Mapped("attention_dropout", ("layer.mixer.dropout",), null=0.0, spelled=True)
"""What attention drops in training."""

HEADS: tuple[Fate, ...] = (
    mapped("num_attention_heads", "layer.mixer.heads"),
    mapped("num_key_value_heads", "layer.mixer.kv_heads"),
    ATTENTION_DROPOUT,
)
"""Grouped heads of attention."""

ATTENTION: tuple[Fate, ...] = (*HEADS, Fixed("layer.mixer.type", "attention"))
"""Attention with grouped heads, in all layers."""


def rotary(key: str, kind: str = "layer", partial: bool = False) -> tuple[Fate, ...]:
    """Rotary positions of one kind of block or of all, under the keys within `key`.

    They are on all channels of a head, or on the first ones if `partial`. What becomes of yarn's `truncate` is the
    family's to say.
    """
    leaf = f"{kind}.mixer.rotary"
    share = f"{key}.partial_rotary_factor"
    whole = (Constant(share, 1.0, same=(None,), write=False), Fixed(f"{leaf}.share", 1.0))
    return (
        optional(f"{key}.rope_type", f"{leaf}.type"),
        optional(f"{key}.rope_theta", f"{leaf}.theta"),
        *(
            optional(f"{key}.{name}", f"{leaf}.{name}")
            for name in (
                "factor",
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "low_freq_factor",
                "high_freq_factor",
                "short_factor",
                "long_factor",
            )
        ),
        *((mapped(share, f"{leaf}.share"),) if partial else whole),
        Constant(f"{key}.mrope_section", None, write=False),
    )


ROTARY: tuple[Fate, ...] = (
    *rotary("rope_parameters"),
    optional("rope_parameters.truncate", "layer.mixer.rotary.truncate"),
)
"""The same rotary positions in all layers."""

_LAYER = "model.layers.{layer}"

QK_NORMS = tuple(
    Weight(f"{_LAYER}.mixer.{name}_norm.weight", f"{_LAYER}.self_attn.{name}_norm.weight") for name in "qk"
)
"""The norms of queries and keys."""

QKV_BIASES = tuple(Weight(f"{_LAYER}.mixer.{name}_proj.bias", f"{_LAYER}.self_attn.{name}_proj.bias") for name in "qkv")
OUTPUT_BIAS = (Weight(f"{_LAYER}.mixer.o_proj.bias", f"{_LAYER}.self_attn.o_proj.bias"),)
MLP_BIASES = tuple(
    Weight(f"{_LAYER}.mlp.{name}_proj.bias", f"{_LAYER}.mlp.{name}_proj.bias") for name in ("gate", "up", "down")
)

OUTER_WEIGHTS = (
    Weight("model.embed_tokens.weight", "model.embed_tokens.weight"),
    Weight("model.norm.weight", "model.norm.weight"),
    Weight("lm_head.weight", "lm_head.weight"),
)
"""What lies outside the layers."""
NORM_WEIGHTS = (
    Weight(f"{_LAYER}.mixer_norm.weight", f"{_LAYER}.input_layernorm.weight"),
    Weight(f"{_LAYER}.mlp_norm.weight", f"{_LAYER}.post_attention_layernorm.weight"),
)
ATTENTION_WEIGHTS = tuple(
    Weight(f"{_LAYER}.mixer.{name}_proj.weight", f"{_LAYER}.self_attn.{name}_proj.weight") for name in "qkvo"
)
MLP_WEIGHTS = tuple(
    Weight(f"{_LAYER}.mlp.{name}_proj.weight", f"{_LAYER}.mlp.{name}_proj.weight") for name in ("gate", "up", "down")
)
LLAMA_WEIGHTS = (*OUTER_WEIGHTS, *NORM_WEIGHTS, *ATTENTION_WEIGHTS, *MLP_WEIGHTS)
"""The names of Llama's weights, which most of its relatives kept. Biases and norms of heads come beside them."""


def expert_weights(theirs: str, gate: str, up: str, down: str) -> tuple[Template, ...]:
    """A router, and experts of three matrices each, under `theirs` in a layer."""
    each = f"{_LAYER}.{theirs}.experts.{{expert}}"
    return (
        Weight(f"{_LAYER}.mlp.router.weight", f"{_LAYER}.{theirs}.gate.weight"),
        Experts(f"{_LAYER}.mlp.experts.gate_up_proj", (f"{each}.{gate}.weight", f"{each}.{up}.weight")),
        Experts(f"{_LAYER}.mlp.experts.down_proj", (f"{each}.{down}.weight",)),
    )


STACKED_EXPERTS: tuple[Template, ...] = tuple(
    Weight(f"{_LAYER}.mlp.experts.{name}_proj", f"{_LAYER}.mlp.experts.{name}_proj") for name in ("gate_up", "down")
)
"""Experts as transformers 5 has them in memory: a checkpoint that was written from there has them in one tensor."""

JUNK = (
    Junk(r"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "rotary frequencies follow from the config"),
    Junk(r"model\.rotary_emb\.inv_freq", "rotary frequencies follow from the config"),
)
"""What older checkpoints hold beside the weights."""
