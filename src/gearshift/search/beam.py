"""Beam search over placements: one layer moves at a time, and evaluation, not prediction, decides what is kept.

A search descends through *levels*, each with a budget, and each begins with the placements that the level before ended
with: `attention=24`, then `attention=16`, then `attention=8`, say; or shares of the cost span, 0.75, 0.5, 0.25. Within
a level every step changes one layer of each kept placement so that it comes closer to the budget.

At a step each kept placement branches into its most promising moves by single-layer losses (which seed the search: the
first step's candidates are the single changes themselves); all of them are evaluated, and the best are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from pydantic import Field, field_validator

from gearshift.progress import Advance, silent
from gearshift.search.budget import Budget, total
from gearshift.search.ledger import Ledger
from gearshift.search.scores import ScoreTable, pure_placements
from gearshift.search.solver import Solver
from gearshift.spec import CostTable, ModelSpec, Placement, Spec


class BeamSettings(Spec):
    """How a beam search goes about it."""

    width: int = Field(default=4, ge=1)
    """Placements kept after every step."""
    seeds: int | None = Field(default=None, ge=1)
    """Placements kept after the very first step, whose candidates are single changes; `width` if left out."""
    branch: int | None = Field(default=8, ge=1)
    """Moves of each kept placement that are evaluated, the most promising by single-layer scores; null for all."""
    levels: tuple[str, ...] = ()
    """Budgets in text to meet on the way, loosest first, before the budgets that the search is for."""
    start: str | None = None
    """The mixer that every layer offering it starts with; the main mixers if left out. A search may so grow the number
    of main mixers instead of lowering it."""
    refine: int = Field(default=0, ge=0)
    """Most rounds of exchanges within a level's budget once it is met."""
    min_gain: float = Field(default=0.0, ge=0)
    """Refinement stops early once a round improves the best score by no more than this, in the metric's unit."""
    stop_beyond: float | None = None
    """The descent stops early once the best score of a level is worse than this: tighter levels will not be better."""

    @field_validator("levels")
    @classmethod
    def _parse(cls, levels: tuple[str, ...]) -> tuple[str, ...]:
        for text in levels:
            Budget.parse(text)
        return levels

    def validate_for(self, spec: ModelSpec, cost: CostTable) -> "BeamSettings":
        """Check against a model; returns itself. ValueError if a level cannot be met or no layer offers `start`."""
        for text in self.levels:
            Budget.parse(text).validate(spec, cost)
        if self.start is not None and not any(self.start in offered for offered in spec.choices):
            raise ValueError(f"the beam search cannot start from {self.start!r}: no layer offers such a mixer")
        return self


@dataclass(frozen=True)
class Level:
    """What a beam search found for one budget."""

    budget: Budget
    beam: tuple[Placement, ...]
    """The placements kept, best first. All of them meet the budget."""
    steps: int
    """Steps it took to meet the budget."""
    rounds: int
    """Rounds of refinement."""


@dataclass(frozen=True)
class _Goal:
    """A level's budget as a distance to be closed."""

    excess: Callable[[Placement], float]
    """How far a placement is from meeting the budget; 0 if it does."""
    price: float
    """What closing one unit of distance is predicted to add to the loss.

    It makes placements comparable that are not equally far: without it, the one that saved least would look best.
    """


class BeamSearch:
    """A beam search over the placements of one model."""

    def __init__(
        self,
        spec: ModelSpec,
        cost: CostTable,
        ledger: Ledger,
        settings: BeamSettings | None = None,
        table: ScoreTable | None = None,
    ):
        """
        Args:
            spec: the model.
            cost: what placements cost.
            ledger: where placements are evaluated, by any metric.
            settings: how to search.
            table: the single-layer losses, for seeding and branching; measured if left out.

        ValueError if the settings do not fit the model.
        """
        self.spec = spec
        self.cost = cost
        self.ledger = ledger
        self.settings = (settings or BeamSettings()).validate_for(spec, cost)
        self.table = table or ledger.table(spec)
        self.solver = Solver(cost, self.table, keep=self.settings.width)

    def run(self, levels: Sequence[Budget], start: Placement | None = None, advance: Advance = silent) -> list[Level]:
        """Search level by level. There are fewer results than levels if the descent stopped early.

        Args:
            levels: budgets, each to be reached from what met the one before.
            start: where to start; None for what the settings say.
            advance: told of progress in shares that add up to 1.

        ValueError if a budget cannot be met.
        """
        for budget in levels:
            budget.validate(self.spec, self.cost)
        beam = [start or self._start()]
        found: list[Level] = []
        for budget in levels:
            level = self._descend(beam, budget, first=not found)
            found.append(level)
            beam = list(level.beam)
            advance(1 / len(levels))
            if self._too_bad(beam[0]):
                advance(1 - len(found) / len(levels))
                break
        return found

    def _start(self) -> Placement:
        name = self.settings.start
        return self.spec.main if name is None else pure_placements(self.spec)[name]

    def _too_bad(self, best: Placement) -> bool:
        bound = self.settings.stop_beyond
        if bound is None:
            return False
        return self.ledger.loss(best) > (-bound if self.ledger.metric.higher_is_better else bound)

    def _descend(self, beam: list[Placement], budget: Budget, first: bool) -> Level:
        """Move the beam until all of it meets the budget, then refine it."""
        goal = self._goal(budget, beam)
        self.ledger.losses(beam)
        steps = 0
        while any(goal.excess(placement) > 0 for placement in beam):
            candidates = dict.fromkeys(moved for placement in beam for moved in self._moves(placement, goal))
            width = self.settings.seeds if first and steps == 0 else None
            beam = self._keep(candidates, goal, width)
            steps += 1
        if not beam:
            # With layers that offer different mixers, single moves can lead into a dead end; the exact solver cannot.
            beam = self._keep((found.placement for found in self.solver.best(budget)), goal)
        beam, rounds = self._refine(beam, goal)
        return Level(budget, tuple(beam), steps, rounds)

    def _keep(self, candidates: Iterable[Placement], goal: _Goal, width: int | None = None) -> list[Placement]:
        """The best of the candidates by evaluated loss and the price of what they still have to go."""
        candidates = list(candidates)
        outlook = {
            placement: loss + goal.price * goal.excess(placement)
            for placement, loss in zip(candidates, self.ledger.losses(candidates), strict=True)
        }
        return sorted(candidates, key=lambda placement: outlook[placement])[: width or self.settings.width]

    def _moves(self, placement: Placement, goal: _Goal) -> list[Placement]:
        """The placement itself if it meets the budget, else the changes of one layer that bring it closest."""
        before = goal.excess(placement)
        if before == 0:
            return [placement]
        closer = [moved for moved in _changes(placement, self.spec) if goal.excess(moved) < before]
        closer.sort(key=lambda moved: self.table.of(moved) + goal.price * goal.excess(moved))
        return closer[: self.settings.branch]

    def _refine(self, beam: list[Placement], goal: _Goal) -> tuple[list[Placement], int]:
        """Change or exchange mixers within the budget, for as long as that improves the best placement enough."""
        for done in range(self.settings.refine):
            candidates = dict.fromkeys(beam)
            for placement in beam:
                near = [*_changes(placement, self.spec), *_exchanges(placement, self.spec)]
                inside = sorted((moved for moved in near if goal.excess(moved) == 0), key=self.table.of)
                candidates |= dict.fromkeys(inside[: self.settings.branch])
            better = self._keep(candidates, goal)
            gain = self.ledger.loss(beam[0]) - self.ledger.loss(better[0])
            beam = better
            if gain <= self.settings.min_gain:
                return beam, done + 1
        return beam, self.settings.refine

    def _goal(self, budget: Budget, beam: list[Placement]) -> _Goal:
        if budget.counts is not None:
            # Every move closes the distance by one layer, so all candidates of a step are equally far: no price.
            counts = dict(budget.counts)
            return _Goal(lambda placement: _layers_to_change(placement, counts), 0.0)
        limit = budget.limit(self.cost)
        assert limit is not None
        saving = max(total(self.cost, placement) for placement in beam) - limit
        price = 0.0
        if saving > 0:
            harm = self.solver.best(budget)[0].loss - min(self.table.of(placement) for placement in beam)
            price = max(0.0, harm / saving)
        return _Goal(lambda placement: max(0.0, total(self.cost, placement) - limit), price)


def _layers_to_change(placement: Placement, counts: dict[str, int]) -> float:
    """How many layers at least must change for the counts to hold; mixers that are not counted are as one."""
    there = placement.counts()
    others = len(placement) - sum(counts.values()) - sum(n for name, n in there.items() if name not in counts)
    lacking = [count - there.get(name, 0) for name, count in counts.items()]
    return float(sum(max(0, number) for number in (*lacking, others)))


def _changes(placement: Placement, spec: ModelSpec) -> Iterator[Placement]:
    """Every change of one layer."""
    for layer, offered in enumerate(spec.choices):
        for name in offered:
            if name != placement[layer]:
                yield placement.replace(layer, name)


def _exchanges(placement: Placement, spec: ModelSpec) -> Iterator[Placement]:
    """Every exchange of mixers between two layers."""
    for one, other in combinations(range(len(placement)), 2):
        here, there = placement[one], placement[other]
        if here != there and there in spec.choices[one] and here in spec.choices[other]:
            yield placement.replace(one, there).replace(other, here)
