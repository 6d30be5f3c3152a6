"""The MLP of the first transformers: down(activation(up(x))) (arXiv 1706.03762, section 3.3)."""

from typing import Literal

from pydantic import Field

from gearshift.spec import Kind, MLPSpec


class PlainMLPSpec(MLPSpec):
    """An MLP without a gate."""

    type: Literal["plain"] = "plain"
    """Always `plain`."""
    intermediate_size: int = Field(ge=1)
    """The width between the two projections."""
    activation: str = "gelu"
    """What stands between them, by transformers' name."""
    up_bias: bool = False
    """Whether the first projection has a bias."""
    down_bias: bool = False
    """Whether the second projection has a bias."""

    def splits(self) -> dict[str, int]:
        return {"intermediate_size": self.intermediate_size}


KIND = Kind(PlainMLPSpec, "gearshift.mlps.plain.module:PlainMLP")
