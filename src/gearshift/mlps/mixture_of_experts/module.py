"""The mixture of experts as a module, on transformers' experts interface."""

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import use_experts_implementation

from gearshift.mixers.activations import activation
from gearshift.mlps.gated.module import GatedMLP
from gearshift.mlps.mixture_of_experts import MixtureOfExpertsSpec
from gearshift.plan import Constant, Initialiser, Normal


class Router(nn.Module):
    """Chooses experts for each token and weighs them."""

    keep_in_float32: ClassVar[tuple[str, ...]] = ("correction_bias",)
    """Parameters that a model keeps in float32 whatever dtype it is loaded in: rounded, they change who is chosen."""

    def __init__(self, spec: MixtureOfExpertsSpec, hidden_size: int):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(0.02 * torch.randn(spec.experts, hidden_size))
        if spec.correction_bias:
            self.correction_bias = nn.Parameter(torch.zeros(spec.experts), requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [tokens, hidden] -> experts (their numbers) and weights (float32), [tokens, experts_per_token]."""
        if self.spec.scoring == "softmax":
            scores = F.linear(hidden, self.weight).softmax(-1, dtype=torch.float32)
        else:
            # Families with this scoring compute the logits in float32, the others in the model's dtype.
            scores = F.linear(hidden.float(), self.weight.float()).sigmoid()
        chosen = self._choose(scores.detach())
        weights = scores.gather(-1, chosen)
        if self.spec.normalise:
            # Sigmoids can all be zero; softmax's highest scores are far larger than what is added.
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.spec.scaling

    def _choose(self, scores: Tensor) -> Tensor:
        """scores [tokens, experts] -> [tokens, experts_per_token], the experts with the highest corrected scores."""
        if self.spec.correction_bias:
            scores = scores + self.correction_bias.float()
        if self.spec.chooses_groups:
            grouped = scores.unflatten(-1, (self.spec.groups, -1))
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.spec.groups_per_token, dim=-1).indices
            allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
            scores = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
        return scores.topk(self.spec.experts_per_token, dim=-1).indices


@use_experts_implementation
class Experts(nn.Module):
    """The experts, their weights stacked. Attributes are named as transformers' functions for experts read them.

    `config._experts_implementation` selects one of those functions, or "eager", the loop below.
    """

    def __init__(self, config: Any, spec: MixtureOfExpertsSpec, hidden_size: int):
        super().__init__()
        self.config = config
        self.num_experts = spec.experts
        self.gate_up_proj = nn.Parameter(0.02 * torch.randn(spec.experts, 2 * spec.intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(0.02 * torch.randn(spec.experts, hidden_size, spec.intermediate_size))
        self.act_fn = activation(spec.activation)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """hidden [tokens, hidden], experts and their weights [tokens, experts_per_token] -> [tokens, hidden]."""
        output = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = F.linear(hidden[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output.index_add_(0, token, (result * weights[token, place, None]).to(output.dtype))
        return output


class MixtureOfExperts(nn.Module):
    """The weighted sum of each token's experts, and the shared MLP, [..., hidden] -> [..., hidden]."""

    recordable = False
    """See `Mixer`: how many tokens an expert gets is read back."""

    def __init__(self, spec: MixtureOfExpertsSpec, hidden_size: int):
        super().__init__()
        self.router = Router(spec, hidden_size)
        self.experts = Experts(SimpleNamespace(_experts_implementation="eager"), spec, hidden_size)
        self.shared = None if spec.shared is None else GatedMLP(spec.shared, hidden_size)
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False) if spec.shared_gate else None

    def configure(self, config: Any) -> None:
        """Follow `config`, a model's, from now on: its `_experts_implementation` says what the experts run on."""
        self.experts.config = config

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        output = self.experts(tokens, *self.router(tokens)).view_as(hidden)
        if self.shared is None:
            return output
        shared = self.shared(hidden)
        return output + (shared if self.shared_gate is None else self.shared_gate(hidden).sigmoid() * shared)

    @classmethod
    def initialisers(cls, spec: MixtureOfExpertsSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Normal weights of standard deviation 0.02, zero biases."""
        names = ["router.weight", "experts.gate_up_proj", "experts.down_proj"]
        if spec.shared_gate:
            names.append("shared_gate.weight")
        started: dict[str, Initialiser] = {name: Normal(std=0.02) for name in names}
        if spec.correction_bias:
            started["router.correction_bias"] = Constant(0.0)
        if spec.shared is not None:
            shared = GatedMLP.initialisers(spec.shared, hidden_size)
            started |= {f"shared.{name}": initialiser for name, initialiser in shared.items()}
        return started
