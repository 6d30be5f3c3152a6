"""Apriel 2 (ServiceNow's Fast-LLM): a decoder of named blocks with mixers of several kinds, supernets among them."""

from gearshift.formats.apriel2.sections import model
from gearshift.formats.section_format import MIXER, MixerTensors, SectionFormat
from gearshift.formats.tensors import Fused, Junk, Template, Weight

_OURS, _THEIRS = "model.layers.{layer}", "model.decoder.blocks.{layer}"


def _weight(ours: str, theirs: str = "", *kinds: str) -> Weight:
    return Weight(f"{_OURS}.{ours}", f"{_THEIRS}.{theirs or ours}", kinds=kinds)


def _mixer(kind: str, *names: str) -> tuple[Weight, ...]:
    """Tensors of a mixer, `ours` or `ours=theirs`."""
    pairs = [name.partition("=") for name in names]
    return tuple(_weight(f"{MIXER}.{ours}", f"{MIXER}.{theirs or ours}", kind) for ours, _, theirs in pairs)


def _fused(kind: str, theirs: str, *ours: str) -> Fused:
    return Fused(tuple(f"{_OURS}.{MIXER}.{name}" for name in ours), f"{_THEIRS}.{MIXER}.{theirs}", kinds=(kind,))


_ATTENTION: tuple[Template, ...] = _mixer(
    "attention", *(f"{name}_proj.{part}" for part in ("weight", "bias") for name in "qkvo")
)
_GDN = "gated_delta_net"
_GATED_DELTA_NET: tuple[Template, ...] = (
    _fused(_GDN, "in_proj_qkvz.weight", *(f"{name}_proj.weight" for name in ("q", "k", "v", "gate"))),
    _fused(_GDN, "in_proj_ba.weight", "b_proj.weight", "a_proj.weight"),
    _fused(_GDN, "convolution.weight", *(f"{name}_conv.weight" for name in "qkv")),
    *_mixer(_GDN, "A_log", "dt_bias", "norm.weight", "o_proj.weight=out_proj.weight"),
)
_KIMI_DELTA_ATTENTION: tuple[Template, ...] = _mixer(
    "kimi_delta_attention",
    *(f"{name}_{part}.weight" for part in ("proj", "conv") for name in "qkv"),
    "decay_down_proj.weight=f_a_proj.weight",
    "decay_up_proj.weight=f_b_proj.weight",
    "gate_down_proj.weight=g_a_proj.weight",
    "gate_up_proj.weight=g_b_proj.weight",
    "b_proj.weight=beta_proj.weight",
    "A_log",
    "dt_bias",
    "norm.weight",
    "o_proj.weight",
)
_MAMBA: tuple[Template, ...] = (
    *(
        _fused("mamba", f"in_proj.{part}", *(f"{name}_proj.{part}" for name in ("gate", "x", "b", "c")))
        for part in ("weight", "bias")
    ),
    *_mixer(
        "mamba",
        "conv.weight=conv1d.weight",
        "conv.bias=conv1d.bias",
        "dt_down_proj.weight=dt_in_proj.weight",
        "dt_down_proj.bias=dt_in_proj.bias",
        "dt_up_proj.weight=dt_proj.weight",
        "dt_bias=dt_proj.bias",
        "A_log",
        "D",
        "o_proj.weight=out_proj.weight",
        "o_proj.bias=out_proj.bias",
    ),
)
_MLPS = (
    _weight("mlp.gate_proj.weight", "", "gated"),
    *(_weight(f"mlp.{name}_proj.weight", "", "gated", "plain") for name in ("up", "down")),
    *(_weight(f"mlp.{name}_proj.bias", "", "plain") for name in ("up", "down")),
)
_WEIGHTS: tuple[Template, ...] = (
    Weight("model.embed_tokens.weight", "model.embed_tokens.weight"),
    Weight("model.norm.weight", "model.norm.weight"),
    Weight("lm_head.weight", "lm_head.weight"),
    _weight("mixer_norm.weight", "input_layernorm.weight"),
    _weight("mlp_norm.weight", "post_attention_layernorm.weight"),
    *_ATTENTION,
    *_GATED_DELTA_NET,
    *_KIMI_DELTA_ATTENTION,
    *_MAMBA,
    *_MLPS,
)

FORMAT = SectionFormat(
    name="apriel2",
    model_type="apriel2_text",
    model=model("Apriel2ForCausalLM"),
    tensors=MixerTensors(
        _WEIGHTS,
        (Junk(r"model\.vision_encoder\..*", "it belongs to the vision encoder, and this is the text model alone"),),
    ),
)
