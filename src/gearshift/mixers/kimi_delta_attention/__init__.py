"""Kimi Delta Attention (arXiv 2510.26692): a delta rule with a decay a channel."""

from typing import Literal, Self

from pydantic import Field

from gearshift.spec import Kind, MixerSpec, StateTensor


class KimiDeltaAttentionSpec(MixerSpec):
    """Kimi Delta Attention. Its state does not grow with the sequence."""

    type: Literal["kimi_delta_attention"] = "kimi_delta_attention"
    """Always `kimi_delta_attention`."""
    heads: int = Field(ge=1)
    """The number of heads, of queries, keys and values alike."""
    head_dim: int | None = Field(default=None, ge=1)
    """Channels of a query, key or value head; `hidden_size / heads` if left out."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the convolutions over queries, keys and values: the tokens each one sees, the current one included."""
    conv_activation: str = "silu"
    """The activation behind them, by transformers' name."""
    decay_rank: int | None = Field(default=None, ge=1)
    """The rank of the decay's projection; `head_dim` if left out."""
    gate_rank: int | None = Field(default=None, ge=1)
    """The rank of the output gate's projection; `head_dim` if left out."""
    gate_activation: Literal["sigmoid", "silu"] = "sigmoid"
    """The output gate's activation: sigmoid in Kimi Linear, SiLU in Apriel2."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the mean square of an output head before it is divided by its root."""

    def resolved(self, hidden_size: int) -> Self:
        if self.head_dim is None and hidden_size % self.heads:
            raise ValueError(f"a hidden size of {hidden_size} does not divide into {self.heads} heads: set head_dim")
        head_dim = self.head_dim or hidden_size // self.heads
        ranks = {"decay_rank": self.decay_rank or head_dim, "gate_rank": self.gate_rank or head_dim}
        return self.model_copy(update={"head_dim": head_dim, **ranks})

    def splits(self) -> dict[str, int]:
        return {"heads": self.heads}

    def state(self) -> tuple[StateTensor, ...]:
        assert self.head_dim is not None, "state() needs a resolved spec"
        return (
            StateTensor("conv", (3 * self.heads * self.head_dim, self.conv_kernel - 1)),
            StateTensor("recurrent", (self.heads, self.head_dim, self.head_dim), dtype="float32"),
        )


KIND = Kind(
    KimiDeltaAttentionSpec,
    "gearshift.mixers.kimi_delta_attention.module:KimiDeltaAttention",
    transfers={"attention": "gearshift.mixers.kimi_delta_attention.transfer:FROM_ATTENTION"},
    norm_epsilons=("norm_epsilon",),
)
