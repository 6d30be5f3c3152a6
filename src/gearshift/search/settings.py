"""Settings of a search, as recipes hold them."""

from typing import Literal

from pydantic import Field

from gearshift.evaluate import JudgeSettings
from gearshift.search.beam import BeamSettings
from gearshift.spec import ModelSpec


class SearchSettings(JudgeSettings):
    """How placements are searched for, and how they are judged: the judge's settings and more."""

    method: Literal["additive", "beam"] = "additive"
    """`additive` verifies what the exact solver proposes; `beam` also searches by evaluation, at a higher price."""
    metric: str = "divergence"
    """What is optimised: `divergence`, `perplexity`, `agreement`, or another package's metric."""
    length: int = Field(default=512, ge=2)
    """Tokens of a judged sequence. Several times the window of any mixer, so that what lies beyond it counts."""
    sequences: int = Field(default=2, ge=1)
    """Held-out sequences to judge on."""
    stride: int = Field(default=4, ge=1)
    """Only every `stride`-th position is judged. A large vocabulary makes the head as dear as many layers."""
    context: int = Field(default=8192, ge=1)
    """Tokens before the decoded one, for the default cost: bytes moved to decode one token."""
    top: int = Field(default=3, ge=1)
    """How many of the solver's best placements are verified by evaluation for each budget."""
    alternatives: bool = True
    """Whether to verify, for each budget and mixer, the best placement that does without this mixer as well."""
    beam: BeamSettings = BeamSettings()
    """How the beam search goes about it."""

    def length_for(self, spec: ModelSpec) -> int:
        """Tokens of a judged sequence of a model. ValueError if more are asked for than the model was made for.

        The default, which nobody asked for, is cut to that.
        """
        if "length" in self.model_fields_set and self.length > spec.max_positions:
            raise ValueError(
                f"length is {self.length}, but the model was made for {spec.max_positions} positions: give no more"
            )
        return min(self.length, spec.max_positions)
