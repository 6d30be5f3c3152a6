"""A mixture of experts: a router sends each token to a few of many gated MLPs (arXiv 1701.06538, 2401.04088)."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gearshift.mlps.gated import GatedMLPSpec
from gearshift.spec import Kind, MLPSpec


class MixtureOfExpertsSpec(MLPSpec):
    """A mixture of experts, with or without an MLP beside them that every token goes through."""

    type: Literal["mixture_of_experts"] = "mixture_of_experts"
    """Always `mixture_of_experts`."""
    experts: int = Field(ge=1)
    """The number of experts that the router chooses from."""
    experts_per_token: int = Field(ge=1)
    """How many of them each token goes through."""
    intermediate_size: int = Field(ge=1)
    """The width of each expert's gate and of what it gates."""
    activation: str = "silu"
    """The gates' activation, by transformers' name."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """How the router's logits become scores: over all experts together, or each by itself, in float32."""
    normalise: bool = True
    """Whether the scores of a token's experts are divided by their sum."""
    scaling: float = Field(default=1.0, gt=0)
    """A factor on the scores of the chosen experts, normalised or not."""
    groups: int = Field(default=1, ge=1)
    """Neighbouring experts form this many groups of equal size. A token first chooses groups, by the sum of the two
    highest scores in each (arXiv 2412.19437, section 2.1.2)."""
    groups_per_token: int = Field(default=1, ge=1)
    """How many groups a token's experts may come from."""
    correction_bias: bool = False
    """Whether each expert has a number that is added to its score for the choice, but not for its weight (arXiv
    2408.15664). No gradient reaches it."""
    shared: GatedMLPSpec | None = None
    """A gated MLP that every token goes through, added to the chosen experts. Several shared experts are one MLP of
    their total width."""
    shared_gate: bool = False
    """Whether the shared MLP's output is multiplied by the sigmoid of a linear function of the token."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(f"a token cannot go through {self.experts_per_token} of {self.experts} experts")
        if self.groups_per_token > self.groups:
            raise ValueError(f"a token cannot choose {self.groups_per_token} of {self.groups} groups of experts")
        if self.experts % self.groups:
            raise ValueError(f"{self.experts} experts do not divide into {self.groups} groups")
        size = self.experts // self.groups
        if self.chooses_groups and size < 2:
            raise ValueError(f"{self.groups} groups of one expert each: a group is chosen by its two best experts")
        if self.experts_per_token > self.groups_per_token * size:
            raise ValueError(
                f"{self.experts_per_token} experts a token do not fit into {self.groups_per_token} groups of {size}"
            )
        if self.shared_gate and self.shared is None:
            raise ValueError("shared_gate needs a shared MLP: set shared, or leave shared_gate out")
        return self

    def splits(self) -> dict[str, int]:
        raise ValueError("its experts are not split")

    @property
    def chooses_groups(self) -> bool:
        """Whether the choice of groups rules any expert out."""
        return self.groups_per_token < self.groups

    def idle_parameters(self, hidden_size: int, tokens: int = 1) -> int:
        """Parameters that a step over `tokens` tokens does not read: those of the experts that none of them chose.

        For several tokens the expectation if every choice is equally likely and tokens choose independently.
        """
        unread = self.experts * (1 - self.experts_per_token / self.experts) ** tokens
        return round(unread * 3 * hidden_size * self.intermediate_size)


KIND = Kind(MixtureOfExpertsSpec, "gearshift.mlps.mixture_of_experts.module:MixtureOfExperts")
