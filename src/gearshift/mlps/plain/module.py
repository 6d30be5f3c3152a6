"""The MLP without a gate as a module."""

from typing import ClassVar

from torch import Tensor, nn

from gearshift.mixers.activations import activation
from gearshift.mixers.base import Sharding
from gearshift.mlps.plain import PlainMLPSpec
from gearshift.plan import Constant, Initialiser, Normal


class PlainMLP(nn.Module):
    """down_proj(activation(up_proj(x))), [..., hidden] -> [..., hidden]."""

    sharding: ClassVar[dict[str, Sharding]] = {
        "up_proj.weight": "column",
        "up_proj.bias": "column",
        "down_proj.weight": "row",
        "down_proj.bias": "replicated",
    }

    def __init__(self, spec: PlainMLPSpec, hidden_size: int):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, spec.intermediate_size, bias=spec.up_bias)
        self.down_proj = nn.Linear(spec.intermediate_size, hidden_size, bias=spec.down_bias)
        self.activation = activation(spec.activation)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(hidden)))

    @classmethod
    def initialisers(cls, spec: PlainMLPSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Normal weights of standard deviation 0.02, zero biases."""
        weights: dict[str, Initialiser] = {f"{name}.weight": Normal(std=0.02) for name in ("up_proj", "down_proj")}
        biases = {"up_proj": spec.up_bias, "down_proj": spec.down_bias}
        return weights | {f"{name}.bias": Constant(0.0) for name, there in biases.items() if there}
