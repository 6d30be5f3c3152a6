"""Multi-head latent attention (arXiv 2405.04434): keys and values of all heads are made from one small latent."""

import math
from typing import Literal, Self

from pydantic import Field

from gearshift.mixers.attention import RotarySpec
from gearshift.spec import Kind, MixerSpec, NormSpec, StateTensor
from gearshift.spec.parts import TOKENS


class MultiHeadLatentAttentionSpec(MixerSpec):
    """Causal attention that keeps one latent and one rotated key a token, whatever the number of heads."""

    type: Literal["multi_head_latent_attention"] = "multi_head_latent_attention"
    """Always `multi_head_latent_attention`."""
    heads: int = Field(ge=1)
    """The number of heads, of queries as of keys and values."""
    kv_lora_rank: int = Field(ge=1)
    """Channels of the latent that keys and values are made from."""
    q_lora_rank: int | None = Field(default=None, ge=1)
    """Channels of the latent that queries are made from; null if they come straight from the hidden state."""
    qk_nope_head_dim: int = Field(ge=1)
    """Channels of a query or key head that carry no position and come from the latent."""
    qk_rope_head_dim: int = Field(ge=1)
    """Channels of a query or key head that may be rotated. All heads share one such part of the key."""
    v_head_dim: int = Field(ge=1)
    """Channels of a value head."""
    bias: bool = False
    """Whether the projections to the latents and the output projection have biases."""
    norm: NormSpec = NormSpec()
    """The norms of the latents."""
    rotary: RotarySpec | None = RotarySpec()
    """Rotary positions of the `qk_rope_head_dim` channels; null for none."""
    interleaved: bool = False
    """Whether channels 2i and 2i + 1 are rotated together, in place of i and i + qk_rope_head_dim / 2."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of attention weights that are dropped at random where it learns; never where it only runs."""

    def resolved(self, hidden_size: int) -> Self:
        if self.rotary is None:
            return self
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"rotary positions need an even qk_rope_head_dim, not {self.qk_rope_head_dim}")
        if self.rotary.share != 1:
            raise ValueError(
                f"latent attention rotates all of qk_rope_head_dim: leave out the rotary share of {self.rotary.share}"
            )
        return self

    @property
    def scale(self) -> float:
        """The factor on the logits: 1 / sqrt(channels of a key head), and yarn's `mscale_all_dim` twice if it is set.

        Yarn's attention scale multiplies rotated channels only, where latent attention wants it on all (DeepSeek-V3).
        """
        scale = (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5
        rotary = self.rotary
        if rotary is None or rotary.type == "default" or not rotary.mscale_all_dim or not rotary.factor:
            return scale
        return scale * (0.1 * rotary.mscale_all_dim * math.log(max(rotary.factor, 1.0)) + 1.0) ** 2

    def splits(self) -> dict[str, int]:
        return {"heads": self.heads}

    def state(self) -> tuple[StateTensor, ...]:
        return (
            StateTensor("latent", (TOKENS, self.kv_lora_rank)),
            StateTensor("rope_key", (TOKENS, self.qk_rope_head_dim)),
        )


KIND = Kind(
    MultiHeadLatentAttentionSpec,
    "gearshift.mixers.multi_head_latent_attention.module:MultiHeadLatentAttention",
)
