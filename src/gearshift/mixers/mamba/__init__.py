"""Mamba (arXiv 2312.00752), and its form with grouped heads (MambaInLlama, arXiv 2408.15237)."""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator

from gearshift.spec import Kind, MixerSpec, NormSpec, StateTensor


class MambaSpec(MixerSpec):
    """A Mamba. Its state does not grow with the sequence."""

    type: Literal["mamba"] = "mamba"
    """Always `mamba`."""
    projection: Literal["classic", "grouped"] = "classic"
    """Where B, C and dt come from: from the convolved x, shared by all channels (`classic`: Mamba, Jamba), or from the
    hidden state, in heads of `state_size` channels as in grouped-query attention (`grouped`: MambaInLlama, Apriel)."""
    state_size: int = Field(default=16, ge=1)
    """Numbers of state a channel; in a grouped projection also the channels of a head."""
    inner_size: int | None = Field(default=None, ge=1)
    """Channels of the recurrence; `2 * hidden_size` if left out."""
    xb_size: int | None = Field(default=None, ge=1)
    """Channels of x, and of B, before they are shared: `state_size` for each head of theirs; `hidden_size` if left out.
    Head h of C reads head h // (inner_size / xb_size). Only in a grouped projection."""
    repeat_kv_before_conv: bool = True
    """Whether x is repeated for the heads that share it before the convolution, which then has `inner_size` channels
    instead of `xb_size`. False only in a grouped projection."""
    dt_rank: int | Literal["auto"] = "auto"
    """The rank of the projection of dt; `auto` is `hidden_size / 16`, rounded up."""
    conv_kernel: int = Field(default=4, ge=2)
    """Taps of the convolution over x: the tokens it sees, the current one included."""
    conv_bias: bool = True
    """Whether the convolution has a bias."""
    projection_bias: bool = False
    """Whether the projections from and to the hidden state have biases."""
    dt_bias: bool = True
    """Whether dt has a bias before its softplus."""
    doubled_dt_bias: bool = False
    """Whether that bias is added twice, as MambaInLlama and the models made with it do."""
    norm: NormSpec | None = None
    """A norm on each of dt, B and C, as Jamba has; null for none. Only in a classic projection."""
    activation: str = "silu"
    """The convolution's activation, by transformers' name. The gate's is SiLU."""

    @field_validator("dt_rank", mode="before")
    @classmethod
    def _check_rank(cls, rank: Any) -> Any:
        if rank != "auto" and (type(rank) is not int or rank < 1):
            raise ValueError("give `auto` or a whole number from 1 on")
        return rank

    def resolved(self, hidden_size: int) -> Self:
        rank = math.ceil(hidden_size / 16) if self.dt_rank == "auto" else self.dt_rank
        inner = self.inner_size or 2 * hidden_size
        resolved = self.model_copy(update={"inner_size": inner, "dt_rank": rank})
        if self.projection == "classic":
            if self.xb_size is not None or not self.repeat_kv_before_conv:
                raise ValueError("xb_size and repeat_kv_before_conv belong to a grouped mamba: set projection: grouped")
            return resolved
        if self.norm is not None:
            raise ValueError("a grouped mamba has no norm on dt, B and C: leave norm out or set projection: classic")
        xb = self.xb_size or hidden_size
        if xb % self.state_size or inner % xb:
            raise ValueError(
                f"xb_size {xb} must be a multiple of state_size {self.state_size}, the channels of a head, and "
                f"inner_size {inner} a multiple of xb_size"
            )
        return resolved.model_copy(update={"xb_size": xb})

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution. Needs a resolved spec."""
        assert self.inner_size is not None, "conv_channels needs a resolved spec"
        if self.repeat_kv_before_conv:
            return self.inner_size
        assert self.xb_size is not None, "conv_channels needs a resolved spec"
        return self.xb_size

    def splits(self) -> dict[str, int]:
        assert self.inner_size is not None, "splits() needs a resolved spec"
        if self.projection == "classic":
            return {"inner_size": self.inner_size}
        assert self.xb_size is not None, "splits() needs a resolved spec"
        return {f"{name} / state_size": getattr(self, name) // self.state_size for name in ("inner_size", "xb_size")}

    def state(self) -> tuple[StateTensor, ...]:
        assert self.inner_size is not None, "state() needs a resolved spec"
        return (
            StateTensor("conv", (self.conv_channels, self.conv_kernel - 1)),
            StateTensor("recurrent", (self.inner_size, self.state_size), dtype="float32"),
        )


KIND = Kind(
    MambaSpec,
    "gearshift.mixers.mamba.module:Mamba",
    transfers={"attention": "gearshift.mixers.mamba.transfer:FROM_ATTENTION"},
)
