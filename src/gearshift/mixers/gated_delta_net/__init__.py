"""Gated DeltaNet (arXiv 2412.06464): a delta rule with a decay a head."""

from typing import Literal, Self

from pydantic import Field

from gearshift.spec import Kind, MixerSpec, StateTensor


class GatedDeltaNetSpec(MixerSpec):
    """A Gated DeltaNet. Its state does not grow with the sequence."""

    type: Literal["gated_delta_net"] = "gated_delta_net"
    """Always `gated_delta_net`."""
    key_heads: int = Field(ge=1)
    """The number of query and key heads."""
    value_heads: int | None = Field(default=None, ge=1)
    """The number of value heads, a multiple of `key_heads`, which it equals if left out. Value head h reads key head
    h // (value_heads / key_heads)."""
    key_dim: int | None = Field(default=None, ge=1)
    """Channels of a query or key head; `hidden_size / key_heads` if left out."""
    value_dim: int | None = Field(default=None, ge=1)
    """Channels of a value head; `key_dim` if left out."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the convolutions over queries, keys and values: the tokens each one sees, the current one included."""
    conv_activation: str = "silu"
    """The activation behind them, by transformers' name."""
    negative_eigenvalues: bool = False
    """Whether beta goes up to 2 instead of 1, so that a write can flip what it overwrites (arXiv 2411.12537)."""
    activation: str = "silu"
    """The output gate's activation, by transformers' name."""
    norm_epsilon: float = Field(default=1e-5, gt=0)
    """Added to the mean square of an output head before it is divided by its root."""

    def resolved(self, hidden_size: int) -> Self:
        value_heads = self.value_heads or self.key_heads
        if value_heads % self.key_heads:
            raise ValueError(
                f"{self.key_heads} key_heads cannot be shared among {value_heads} value_heads: it does not divide"
            )
        if self.key_dim is None and hidden_size % self.key_heads:
            raise ValueError(
                f"a hidden size of {hidden_size} does not divide into {self.key_heads} key_heads: set key_dim"
            )
        key_dim = self.key_dim or hidden_size // self.key_heads
        value_dim = self.value_dim or key_dim
        return self.model_copy(update={"value_heads": value_heads, "key_dim": key_dim, "value_dim": value_dim})

    def splits(self) -> dict[str, int]:
        assert self.value_heads is not None, "splits() needs a resolved spec"
        return {"key_heads": self.key_heads, "value_heads": self.value_heads}

    def state(self) -> tuple[StateTensor, ...]:
        assert self.value_heads is not None, "state() needs a resolved spec"
        assert self.key_dim is not None, "state() needs a resolved spec"
        assert self.value_dim is not None, "state() needs a resolved spec"
        channels = 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim
        return (
            StateTensor("conv", (channels, self.conv_kernel - 1)),
            StateTensor("recurrent", (self.value_heads, self.key_dim, self.value_dim), dtype="float32"),
        )


KIND = Kind(
    GatedDeltaNetSpec,
    "gearshift.mixers.gated_delta_net.module:GatedDeltaNet",
    transfers={"attention": "gearshift.mixers.gated_delta_net.transfer:FROM_ATTENTION"},
    norm_epsilons=("norm_epsilon",),
)
