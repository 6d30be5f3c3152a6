"""The search: score every single change, solve each budget exactly on their sum, verify the winners by evaluation."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from gearshift.data import TokenSequences
from gearshift.evaluate import HeldOut, HeldOutMetric, Metric, find_metric
from gearshift.model import GearshiftForCausalLM
from gearshift.progress import Advance, silent
from gearshift.search.beam import BeamSearch
from gearshift.search.budget import Budget
from gearshift.search.dominance import dominated
from gearshift.search.ledger import Ledger
from gearshift.search.pareto import non_dominated
from gearshift.search.result import Candidate, Chosen, Kind, SearchResult
from gearshift.search.scores import BROKEN, ScoreTable, pure_placements, single_changes
from gearshift.search.settings import SearchSettings
from gearshift.search.solver import Solver
from gearshift.spec import CostTable, ModelSpec, Placement
from gearshift.spec.placement import NAME


def search(
    model: GearshiftForCausalLM,
    sequences: TokenSequences,
    budgets: Mapping[str, Budget],
    cost: CostTable,
    settings: SearchSettings | None = None,
    *,
    metric: Metric | None = None,
    teacher: GearshiftForCausalLM | None = None,
    advance: Advance = silent,
) -> SearchResult:
    """Find the best placement of a supernet for each budget.

    Args:
        model: the supernet.
        sequences: held-out text to judge on.
        budgets: name -> budget. The names become presets and files.
        cost: what placements cost (`gearshift.model.cost_table`, or measured).
        settings: method, metric and effort; `length`, `sequences` and `context` are for whoever makes the arguments.
        metric: what to optimise, instead of the metric that the settings name.
        teacher: a separate reference model; None for the model itself under its main placement.
        advance: told of progress in shares that add up to 1.

    ValueError if the model offers no choice, or if a budget is impossible: before anything is evaluated.
    """
    settings = settings or SearchSettings()
    check_budgets(model.spec, budgets, cost)
    if settings.method == "beam":
        settings.beam.validate_for(model.spec, cost)
    metric = metric or find_metric(settings.metric).make(HeldOut(sequences, settings, teacher))
    return _Search(model, budgets, cost, settings, Ledger(model, metric)).run(_Progress(advance))


def check_budgets(spec: ModelSpec, budgets: Mapping[str, Budget], cost: CostTable) -> None:
    """ValueError if there is nothing to search, or if a budget cannot be met or cannot be called what it is called."""
    if not spec.is_supernet:
        raise ValueError("there is nothing to search: every layer of this model has one mixer only")
    if not budgets:
        raise ValueError(f"a search needs a budget, such as 0.5 of the cost span: {cost.describe_span()}")
    for name, budget in budgets.items():
        if not NAME.fullmatch(name) or name == "search":
            raise ValueError(
                f"a budget cannot be called {name!r}: use letters, digits, '_' and '-', a letter first; not 'search'"
            )
        budget.validate(spec, cost)


class _Progress:
    """Shares of shares: what is left of the whole is handed out part by part."""

    def __init__(self, advance: Advance):
        self.advance = advance
        self.left = 1.0

    def part(self, share: float) -> Advance:
        """Progress of a part that makes up `share` of what is left."""
        whole = share * self.left
        self.left -= whole
        return lambda done: self.advance(done * whole)


@dataclass
class _Search:
    """One search: what it was asked for, and the ledger of what it evaluated."""

    model: GearshiftForCausalLM
    budgets: Mapping[str, Budget]
    cost: CostTable
    settings: SearchSettings
    ledger: Ledger

    def run(self, progress: _Progress) -> SearchResult:
        spec = self.model.spec
        singles, pures = single_changes(spec), pure_placements(spec)
        scoring = (len(singles) + len(pures)) / 2  # reuse halves it
        verifying = len(self.budgets) * (self.settings.top + (len(pures) - 1) * self.settings.alternatives)
        advance = progress.part(0.5 if self.settings.method == "beam" else scoring / (scoring + verifying))
        self.ledger.losses([spec.main, *singles, *pures.values()], advance)
        table = self.ledger.table(spec)

        solver = Solver(self.cost, table, keep=self.settings.top)
        proposed = {name: solver.best(budget) for name, budget in self.budgets.items()}
        verified = [found.placement for best in proposed.values() for found in best]
        if self.settings.alternatives:
            verified += self._alternatives(table)
        self.ledger.losses(verified, progress.part(0.5 if self.settings.method == "beam" else 1.0))
        if self.settings.method == "beam":
            self._beam(table, progress)

        winners = {name: self._winner(budget) for name, budget in self.budgets.items()}
        kinds: dict[Placement, Kind] = dict.fromkeys(self.ledger.scores, "verified")
        kinds |= dict.fromkeys(singles, "single change")
        kinds |= dict.fromkeys([spec.main, *pures.values()], "pure")
        kinds |= dict.fromkeys(winners.values(), "preset")
        candidates = {
            placement: self._candidate(placement, kinds[placement], table) for placement in self.ledger.scores
        }
        chosen = [
            Chosen(name, budget, budget.limit(self.cost), candidates[winners[name]], proposed[name][0].placement)
            for name, budget in self.budgets.items()
        ]
        return self._result(table, candidates, chosen, [(p.cost, self._score(p.loss)) for p in solver.front()])

    def _alternatives(self, table: ScoreTable) -> Iterator[Placement]:
        """For each budget and each mixer that is not a main one, the best placement that does without this mixer.

        The solver's runners-up differ from its best in a layer or two. Where a mixer does harm that single changes do
        not show, all of them share the mistake; these do not.
        """
        names = dict.fromkeys(name for offered in self.model.spec.choices for name in offered)
        for mixer in names:
            if mixer in self.model.spec.main:
                continue
            solver = Solver(self.cost, table.without(mixer))
            for budget in self.budgets.values():
                found = solver.best(budget)[0]
                if found.loss < BROKEN / 2:
                    yield found.placement

    def _beam(self, table: ScoreTable, progress: _Progress) -> None:
        """Let the beam search add to the ledger: all shares in one descent, each budget of counts in one of its own."""
        levels = [Budget.parse(text) for text in self.settings.beam.levels]
        asked = list(self.budgets.values())
        shares = [budget for budget in (*levels, *asked) if budget.share is not None]
        descents = [sorted(shares, key=lambda budget: budget.share or 0.0, reverse=True)]
        if all(budget.share is None for budget in asked):
            descents = []
        above = [level for level in levels if level.counts is not None]
        descents += [[*above, budget] for budget in asked if budget.counts is not None]
        beam = BeamSearch(self.model.spec, self.cost, self.ledger, self.settings.beam, table)
        for number, descent in enumerate(descents):
            beam.run(descent, advance=progress.part(1 / (len(descents) - number)))

    def _winner(self, budget: Budget) -> Placement:
        """The best of all that was evaluated and keeps to the budget; of equally good ones the cheapest."""
        allowed = [placement for placement in self.ledger.scores if budget.allows(placement, self.cost)]
        return min(allowed, key=lambda placement: (self.ledger.loss(placement), self.cost.of(placement)))

    def _score(self, loss: float) -> float:
        """A loss in the metric's own direction."""
        return -loss if self.ledger.metric.higher_is_better else loss

    def _candidate(self, placement: Placement, kind: Kind, table: ScoreTable) -> Candidate:
        metric, score, predicted = self.ledger.metric, self.ledger.scores[placement], table.of(placement)
        numbers = {self._metric_name: score}
        if isinstance(metric, HeldOutMetric):
            measured = metric.measured[placement]
            numbers = {name: getattr(measured, name) for name in ("divergence", "perplexity", "agreement")}
        told = self._score(predicted) if predicted < BROKEN / 2 else None
        return Candidate(placement, kind, self.cost.of(placement), score, told, numbers)

    @property
    def _metric_name(self) -> str:
        return getattr(self.ledger.metric, "name", self.settings.metric)

    def _result(
        self,
        table: ScoreTable,
        candidates: Mapping[Placement, Candidate],
        chosen: Iterable[Chosen],
        predicted_front: Iterable[tuple[float, float]],
    ) -> SearchResult:
        metric, spec, chosen = self.ledger.metric, self.model.spec, tuple(chosen)
        judge = metric.judge(self.model) if isinstance(metric, HeldOutMetric) else None
        front = non_dominated(
            candidates.values(), lambda found: found.cost, lambda found: self.ledger.loss(found.placement)
        )
        return SearchResult(
            method=self.settings.method,
            metric=self._metric_name,
            higher_is_better=metric.higher_is_better,
            cost_unit=self.cost.unit,
            span=self.cost.span,
            main=spec.main,
            main_score=self.ledger.scores[spec.main],
            layer_scores=tuple(
                {name: self.ledger.scores[spec.main.replace(layer, name)] for name in offered}
                for layer, offered in enumerate(spec.choices)
            ),
            candidates=tuple(candidates.values()),
            front=tuple(front),
            predicted_front=tuple((spent, score) for spent, score in predicted_front if abs(score) < BROKEN / 2),
            chosen=chosen,
            dominated=dominated(self.cost, table, (found.candidate.placement for found in chosen)),
            layer_evaluations=judge.layer_evaluations if judge else 0,
            layer_evaluations_saved=judge.layer_evaluations_saved if judge else 0,
        )
