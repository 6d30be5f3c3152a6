"""Discrete Mamba-2 (MOHAWK, arXiv 2408.10189; Llamba, arXiv 2502.14458): Mamba-2 without its discretisation."""

from typing import Literal, Self

from pydantic import Field

from gearshift.spec import Kind, MixerSpec, StateTensor


class DiscreteMamba2Spec(MixerSpec):
    """A discrete Mamba-2. Its state does not grow with the sequence."""

    type: Literal["discrete_mamba2"] = "discrete_mamba2"
    """Always `discrete_mamba2`."""
    value_heads: int = Field(default=32, ge=1)
    """The number of heads of x."""
    key_heads: int | None = Field(default=None, ge=1)
    """The number of heads of B and C, a divisor of `value_heads`, which it equals if left out. Head h of x reads head
    h // (value_heads / key_heads)."""
    head_dim: int | None = Field(default=None, ge=1)
    """Channels of a head of x; `hidden_size / value_heads` if left out."""
    state_size: int = Field(default=64, ge=1)
    """Channels of a head of B or C: numbers of state for each channel of x."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the convolutions over x, B and C: the tokens each one sees, the current one included."""
    conv_bias: bool = True
    """Whether the convolutions have biases."""
    projection_bias: bool = False
    """Whether all projections from and to the hidden state have biases. That of the gate has one in any case."""
    activation: str = "linear"
    """The convolutions' activation, by transformers' name; `linear` is none. The gate's is SiLU."""

    def resolved(self, hidden_size: int) -> Self:
        key_heads = self.key_heads or self.value_heads
        if self.value_heads % key_heads:
            raise ValueError(
                f"{key_heads} key_heads cannot be shared among {self.value_heads} value_heads: it does not divide"
            )
        if self.head_dim is None and hidden_size % self.value_heads:
            raise ValueError(
                f"a hidden size of {hidden_size} does not divide into {self.value_heads} value_heads: set head_dim"
            )
        head_dim = self.head_dim or hidden_size // self.value_heads
        return self.model_copy(update={"key_heads": key_heads, "head_dim": head_dim})

    def splits(self) -> dict[str, int]:
        assert self.key_heads is not None, "splits() needs a resolved spec"
        return {"key_heads": self.key_heads, "value_heads": self.value_heads}

    def state(self) -> tuple[StateTensor, ...]:
        assert self.key_heads is not None, "state() needs a resolved spec"
        assert self.head_dim is not None, "state() needs a resolved spec"
        channels = self.value_heads * self.head_dim + 2 * self.key_heads * self.state_size
        return (
            StateTensor("conv", (channels, self.conv_kernel - 1)),
            StateTensor("recurrent", (self.value_heads, self.state_size, self.head_dim), dtype="float32"),
        )


KIND = Kind(
    DiscreteMamba2Spec,
    "gearshift.mixers.discrete_mamba2.module:DiscreteMamba2",
    transfers={"attention": "gearshift.mixers.discrete_mamba2.transfer:FROM_ATTENTION"},
)
