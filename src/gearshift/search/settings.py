"""Settings of a search, as recipes hold them."""

from typing import Literal

from pydantic import Field

from gearshift.evaluate import JudgeSettings
from gearshift.search.beam import BeamSettings
from gearshift.spec import Spec


class SearchSettings(Spec):
    """How placements are searched for, and on what they are judged."""

    method: Literal["additive", "beam"] = "additive"
    """`additive` verifies what the exact solver proposes; `beam` also searches by evaluation alone, at a higher price."""
    metric: str = "divergence"
    """What is optimised: `divergence`, `perplexity`, `agreement`, or another package's metric."""
    length: int = Field(default=512, ge=2)
    """Tokens of a judged sequence. Several times the window of any mixer, so that what lies beyond it counts."""
    sequences: int = Field(default=2, ge=1)
    """Held-out sequences to judge on."""
    judge: JudgeSettings = JudgeSettings(stride=4)
    """How they are judged."""
    context: int = Field(default=8192, ge=1)
    """Tokens before the decoded one, for the default cost: bytes moved to decode one token."""
    top: int = Field(default=3, ge=1)
    """How many of the solver's best placements are verified by evaluation for each budget."""
    beam: BeamSettings = BeamSettings()
    """How the beam search goes about it."""
