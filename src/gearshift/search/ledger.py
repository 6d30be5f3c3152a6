"""What was evaluated so far: no placement is measured twice."""

import math
from collections.abc import Iterable

from gearshift.evaluate import Metric, evaluate_many
from gearshift.model import GearshiftForCausalLM
from gearshift.progress import Advance, silent
from gearshift.search.scores import ScoreTable, single_changes
from gearshift.spec import ModelSpec, Placement


class Ledger:
    """The scores of a metric on one model. No placement is measured twice; those asked for together are so measured."""

    def __init__(self, model: GearshiftForCausalLM, metric: Metric):
        self.model = model
        self.metric = metric
        self.scores: dict[Placement, float] = {}
        """Everything measured so far, in order. In the metric's own direction."""

    def losses(self, placements: Iterable[Placement], advance: Advance = silent) -> list[float]:
        """The losses of placements, in their order; those not known yet are measured.

        A loss is the score, negated if higher is better, so that lower is always better; NaN counts as infinite.
        `advance` is told of shares of the work that add up to 1.
        """
        asked = list(placements)
        new = list(dict.fromkeys(placement for placement in asked if placement not in self.scores))
        if new:
            self.scores.update(zip(new, evaluate_many(self.metric, self.model, new, advance), strict=True))
        else:
            advance(1.0)
        return [self.loss(placement) for placement in asked]

    def table(self, spec: ModelSpec) -> ScoreTable:
        """The single-layer losses, measured where they are not known. ValueError if all-main has no finite loss."""
        known = [spec.main, *single_changes(spec)]
        return ScoreTable.from_losses(spec, dict(zip(known, self.losses(known), strict=True)))

    def loss(self, placement: Placement) -> float:
        """The loss of a placement that was measured already."""
        score = self.scores[placement]
        if math.isnan(score):
            return math.inf
        return -score if self.metric.higher_is_better else score
