"""The gated MLP of Llama and its relatives: down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

from typing import Literal

from pydantic import Field

from gearshift.spec import Kind, MLPSpec


class GatedMLPSpec(MLPSpec):
    """A gated MLP."""

    type: Literal["gated"] = "gated"
    """Always `gated`."""
    intermediate_size: int = Field(ge=1)
    """The width of the gate and of what it gates."""
    activation: str = "silu"
    """The gate's activation, by transformers' name."""
    bias: bool = False
    """Whether the three projections have biases."""

    def splits(self) -> dict[str, int]:
        return {"intermediate_size": self.intermediate_size}


KIND = Kind(GatedMLPSpec, "gearshift.mlps.gated.module:GatedMLP")
