"""Mamba-2 (arXiv 2405.21060): state space duality, a decay a head."""

from typing import Literal, Self

from pydantic import Field

from gearshift.spec import Kind, MixerSpec, StateTensor


class Mamba2Spec(MixerSpec):
    """A Mamba-2. Its state does not grow with the sequence."""

    type: Literal["mamba2"] = "mamba2"
    """Always `mamba2`."""
    heads: int | None = Field(default=None, ge=1)
    """The number of heads of x; `2 * hidden_size / head_dim` if left out."""
    head_dim: int = Field(default=64, ge=1)
    """Channels of a head."""
    state_size: int = Field(default=128, ge=1)
    """Channels of B and C: numbers of state for each channel of x."""
    groups: int = Field(default=1, ge=1)
    """The number of heads of B and C, a divisor of `heads`. Head h of x reads head h // (heads / groups)."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the convolutions over x, B and C: the tokens each one sees, the current one included."""
    conv_bias: bool = True
    """Whether the convolutions have biases."""
    projection_bias: bool = False
    """Whether the projections from and to the hidden state have biases."""
    activation: str = "silu"
    """The convolutions' activation, by transformers' name. The gate's is SiLU."""
    time_step_limit: tuple[float, float | None] = (0.0, None)
    """The least and the greatest dt, after its softplus; null for no greatest."""
    norm_groups: int | None = Field(default=None, ge=1)
    """Into how many slices of equal size, each with its own mean square, the output norm divides the channels of all
    heads; `groups` if left out."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to that mean square before its root."""
    norm_before_gate: bool = False
    """Whether the output is normalised before it is gated, instead of after."""

    def resolved(self, hidden_size: int) -> Self:
        if self.heads is None and 2 * hidden_size % self.head_dim:
            raise ValueError(
                f"twice a hidden size of {hidden_size} does not divide into heads of {self.head_dim} channels "
                f"(head_dim): set heads"
            )
        heads = self.heads or 2 * hidden_size // self.head_dim
        if heads % self.groups:
            raise ValueError(f"{self.groups} groups cannot be shared among {heads} heads: it does not divide")
        norm_groups = self.norm_groups or self.groups
        if heads * self.head_dim % norm_groups:
            raise ValueError(
                f"{heads * self.head_dim} channels, heads * head_dim, do not divide into {norm_groups} norm_groups"
            )
        low, high = self.time_step_limit
        if low < 0 or (high is not None and high < low):
            raise ValueError(f"time_step_limit is {low} to {high}: give a least that is not negative, then a greatest")
        return self.model_copy(update={"heads": heads, "norm_groups": norm_groups})

    def splits(self) -> dict[str, int]:
        assert self.heads is not None, "splits() needs a resolved spec"
        assert self.norm_groups is not None, "splits() needs a resolved spec"
        return {"heads": self.heads, "groups": self.groups, "norm_groups": self.norm_groups}

    def state(self) -> tuple[StateTensor, ...]:
        assert self.heads is not None, "state() needs a resolved spec"
        channels = self.heads * self.head_dim + 2 * self.groups * self.state_size
        return (
            StateTensor("conv", (channels, self.conv_kernel - 1)),
            StateTensor("recurrent", (self.heads, self.state_size, self.head_dim), dtype="float32"),
        )


KIND = Kind(
    Mamba2Spec,
    "gearshift.mixers.mamba2.module:Mamba2",
    transfers={"attention": "gearshift.mixers.mamba2.transfer:FROM_ATTENTION"},
    norm_epsilons=("norm_epsilon",),
)
