"""The gated MLP as a module."""

from typing import ClassVar

from torch import Tensor, nn

from gearshift.mixers.activations import activation
from gearshift.mixers.base import Sharding
from gearshift.mlps.gated import GatedMLPSpec
from gearshift.plan import Constant, Initialiser, Normal


class GatedMLP(nn.Module):
    """down_proj(activation(gate_proj(x)) * up_proj(x)), [..., hidden] -> [..., hidden]."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}_proj.{kind}": "column" for name in ("gate", "up") for kind in ("weight", "bias")},
        "down_proj.weight": "row",
        "down_proj.bias": "replicated",
    }

    def __init__(self, spec: GatedMLPSpec, hidden_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, spec.intermediate_size, bias=spec.bias)
        self.up_proj = nn.Linear(hidden_size, spec.intermediate_size, bias=spec.bias)
        self.down_proj = nn.Linear(spec.intermediate_size, hidden_size, bias=spec.bias)
        self.activation = activation(spec.activation)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))

    @classmethod
    def initialisers(cls, spec: GatedMLPSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Normal weights of standard deviation 0.02, zero biases."""
        names = ("gate_proj", "up_proj", "down_proj")
        weights: dict[str, Initialiser] = {f"{name}.weight": Normal(std=0.02) for name in names}
        return weights | ({f"{name}.bias": Constant(0.0) for name in names} if spec.bias else {})
