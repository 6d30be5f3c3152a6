"""Softmax attention (arXiv 1706.03762) with grouped heads (2305.13245), rotary positions (2104.09864) and windows."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gearshift.spec import Kind, MixerSpec, NormSpec, Spec, StateTensor
from gearshift.spec.parts import TOKENS


class RotarySpec(Spec):
    """Rotary position embeddings. The types and their parameters are those of transformers' `rope_parameters`."""

    type: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"] = "default"
    """How the frequencies are scaled to longer contexts."""
    theta: float = Field(default=10000.0, gt=0)
    """The base of the frequencies."""
    share: float = Field(default=1.0, gt=0, le=1)
    """The share of a head's channels, the first ones, that are rotated."""
    factor: float | None = None
    """All but `default`: how many times longer the context has become."""
    original_max_position_embeddings: int | None = None
    """`yarn`, `longrope`, `llama3`: the context length in tokens before the scaling."""
    attention_factor: float | None = None
    """`yarn`, `longrope`: multiplies the tables; computed from `factor` if left out."""
    beta_fast: float | None = None
    """`yarn`: rotations over the original context above which a frequency is kept."""
    beta_slow: float | None = None
    """`yarn`: rotations over the original context below which a frequency is interpolated."""
    mscale: float | None = None
    """`yarn`: weight of the attention scale, with `mscale_all_dim`."""
    mscale_all_dim: float | None = None
    """`yarn`: see `mscale`."""
    truncate: bool | None = None
    """`yarn`: whether the bounds of the ramp are rounded to whole channels."""
    low_freq_factor: float | None = None
    """`llama3`: wavelengths beyond the original context over this are scaled by `factor`."""
    high_freq_factor: float | None = None
    """`llama3`: wavelengths below the original context over this are kept."""
    short_factor: tuple[float, ...] | None = None
    """`longrope`: divisors of the frequencies up to the original context."""
    long_factor: tuple[float, ...] | None = None
    """`longrope`: divisors of the frequencies beyond the original context."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        needed = {
            "default": (),
            "linear": ("factor",),
            "dynamic": ("factor",),
            "yarn": ("factor", "original_max_position_embeddings"),
            "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
            "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        }
        missing = [name for name in needed[self.type] if getattr(self, name) is None]
        if missing:
            raise ValueError(f"rotary positions of type {self.type!r} need {', '.join(missing)}")
        return self


class AttentionSpec(MixerSpec):
    """Multi-head (`kv_heads == heads`), grouped-query or multi-query (`kv_heads == 1`) attention."""

    type: Literal["attention"] = "attention"
    """Always `attention`."""
    heads: int = Field(ge=1)
    """The number of query heads."""
    kv_heads: int | None = Field(default=None, ge=1)
    """The number of key and value heads, a divisor of `heads`. Query head h reads head h // (heads / kv_heads)."""
    head_dim: int | None = Field(default=None, ge=1)
    """Channels of a head; `hidden_size / heads` if left out."""
    window: int | None = Field(default=None, ge=1)
    """How many tokens a token sees, itself included. None: all before it."""
    causal: bool = True
    """Whether a token sees only itself and what precedes it; otherwise its window reaches both ways."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases."""
    output_bias: bool = False
    """Whether the output projection has a bias."""
    qk_norm: NormSpec | None = None
    """A norm on queries and keys, before they are rotated; null for none."""
    qk_norm_across_heads: bool = False
    """Whether that norm runs over the channels of all heads together, instead of one head's."""
    scale_dim: float | None = Field(default=None, gt=0)
    """Scores are divided by the square root of this; by that of `head_dim` if left out."""
    rotary: RotarySpec | None = RotarySpec()
    """Rotary positions; null for none."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of attention weights that are dropped at random where it learns; never where it only runs."""

    def resolved(self, hidden_size: int) -> Self:
        kv_heads = self.kv_heads or self.heads
        if self.heads % kv_heads:
            raise ValueError(f"{self.heads} heads cannot be shared among {kv_heads} kv_heads: it does not divide")
        if self.head_dim is None and hidden_size % self.heads:
            raise ValueError(f"a hidden size of {hidden_size} does not divide into {self.heads} heads: set head_dim")
        head_dim = self.head_dim or hidden_size // self.heads
        if self.rotary is not None and (rotated := int(head_dim * self.rotary.share)) % 2:
            raise ValueError(f"rotary positions need an even number of channels, not {rotated} of {head_dim}")
        return self.model_copy(update={"kv_heads": kv_heads, "head_dim": head_dim})

    def splits(self) -> dict[str, int]:
        assert self.kv_heads is not None, "splits() needs a resolved spec"
        if self.qk_norm is not None and self.qk_norm_across_heads:
            raise ValueError("qk_norm_across_heads needs all heads in one place")
        return {"heads": self.heads, "kv_heads": self.kv_heads}

    def state(self) -> tuple[StateTensor, ...]:
        assert self.kv_heads is not None, "state() needs a resolved spec"
        assert self.head_dim is not None, "state() needs a resolved spec"
        shape = (self.kv_heads, TOKENS, self.head_dim)
        kept = None if self.window is None else self.window - 1
        return StateTensor("key", shape, max_tokens=kept), StateTensor("value", shape, max_tokens=kept)


KIND = Kind(
    AttentionSpec,
    "gearshift.mixers.attention.module:Attention",
    transfers={"attention": "gearshift.mixers.attention.transfer:FROM_ATTENTION"},
)
