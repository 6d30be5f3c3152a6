"""Beam search on losses that are known by formula, so that the best placements are known too."""

from itertools import pairwise, product

import pytest
from tests.models import MIXERS, supernet_spec

from gearshift import ModelSpec
from gearshift.search import BeamSearch, BeamSettings, Budget, Ledger, ScoreTable, non_dominated
from gearshift.spec import CostTable, Placement

LAYERS = 5
SPEC = supernet_spec(layers=LAYERS)
COST = CostTable(10.0, ({"attention": 8.0, "window": 2.0, "gdn": 3.0, "kda": 4.0},) * LAYERS, SPEC.main, "units")
EVERY = [Placement(mixers) for mixers in product(MIXERS, repeat=LAYERS)]


class Formula:
    """Harm by layer and mixer, and more of it where two neighbours both leave attention: not additive."""

    def __init__(self, coupling: float = 0.0, higher_is_better: bool = False):
        self.coupling = coupling
        self.higher_is_better = higher_is_better
        self.calls = 0

    def __call__(self, model, placement: Placement) -> float:
        self.calls += 1
        harm = {"attention": 0.0, "window": 0.9, "gdn": 1.0, "kda": 0.8}
        weights = (3, 1, 4, 1.5, 2.5)
        loss = sum(weight * harm[name] for weight, name in zip(weights, placement, strict=False))
        away = [name != "attention" for name in placement]
        loss += self.coupling * sum(a and b for a, b in pairwise(away))
        return -loss if self.higher_is_better else loss


def beam(metric: Formula, settings: BeamSettings) -> BeamSearch:
    return BeamSearch(SPEC, COST, Ledger(None, metric), settings)  # type: ignore[arg-type]


def best(metric: Formula, budget: Budget) -> float:
    allowed = [placement for placement in EVERY if budget.allows(placement, COST)]
    return min(metric(None, placement) * (-1 if metric.higher_is_better else 1) for placement in allowed)


@pytest.mark.parametrize("coupling", [0.0, 2.0])
@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize(
    "texts", [["attention=4", "attention=3", "attention=1"], ["attention=3,gdn=1"], ["0.7", "0.4"]]
)
def test_a_wide_beam_finds_the_best(texts, coupling, higher_is_better) -> None:
    metric = Formula(coupling, higher_is_better)
    search = beam(metric, BeamSettings(width=12, branch=None, refine=3))
    budgets = [Budget.parse(text) for text in texts]
    for budget, level in zip(budgets, search.run(budgets), strict=True):
        assert all(budget.allows(placement, COST) for placement in level.beam)
        assert search.ledger.loss(level.beam[0]) == pytest.approx(best(metric, budget))


def test_narrow_beams_evaluate_little_and_nothing_twice() -> None:
    metric = Formula(2.0)
    search = beam(metric, BeamSettings(width=1, branch=2))
    seeded = metric.calls
    (level,) = search.run([Budget.parse("attention=1")])
    assert level.steps == 4
    assert metric.calls - seeded <= 3 * 2  # the first step's candidates are single changes, known already
    assert metric.calls == len(search.ledger.scores)


def test_levels_build_on_each_other() -> None:
    search = beam(Formula(), BeamSettings(width=1))
    first, second = search.run([Budget.parse("attention=3"), Budget.parse("attention=3,gdn=1")])
    kept = [layer for layer in range(LAYERS) if first.beam[0][layer] == "attention"]
    assert [layer for layer in range(LAYERS) if second.beam[0][layer] == "attention"] == kept
    assert second.steps <= 1


def test_seeds_widen_the_first_step_only() -> None:
    kept: list[int] = []

    class Watched(BeamSearch):
        def _keep(self, *args, **kwargs):
            found = super()._keep(*args, **kwargs)
            kept.append(len(found))
            return found

    search = beam(Formula(), BeamSettings(width=2, seeds=7, branch=None))
    Watched(SPEC, COST, search.ledger, search.settings).run([Budget.parse("attention=3")])
    assert kept == [7, 2]


def test_growing_from_the_cheap_end() -> None:
    metric = Formula(2.0)
    search = beam(metric, BeamSettings(width=12, branch=None, start="window"))
    (level,) = search.run([Budget.parse("attention=2,window=3")])
    assert level.steps == 2
    assert search.ledger.loss(level.beam[0]) == best(metric, Budget.parse("attention=2,window=3"))


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_descent_stops_where_scores_are_beyond_use(higher_is_better) -> None:
    bound = -3.0 if higher_is_better else 3.0
    search = beam(Formula(higher_is_better=higher_is_better), BeamSettings(stop_beyond=bound))
    levels = search.run([Budget(share=share) for share in (1.0, 0.8, 0.5, 0.2, 0.0)])
    assert [search.ledger.loss(level.beam[0]) > 3.0 for level in levels] == [False] * (len(levels) - 1) + [True]
    assert len(levels) < 5


def test_refinement_stops_when_a_round_gains_too_little() -> None:
    budget = Budget.parse("attention=2")
    rounds = [
        beam(Formula(2.0), BeamSettings(width=2, branch=3, refine=9, min_gain=gain)).run([budget])[0].rounds
        for gain in (0.0, 1e9)
    ]
    assert 1 == rounds[1] <= rounds[0] < 9


def test_a_dead_end_is_left_through_the_exact_solver() -> None:
    def block(*names: str) -> dict:
        choices = {name: MIXERS[name] for name in names}
        mixer = {"type": "stochastic", "main": names[0], "mixers": choices}
        return {"mixer": mixer, "mlp": {"type": "gated", "intermediate_size": 8}}

    # The second layer must take gdn and the first give up window; either change alone comes no closer.
    blocks = {"any": block("attention", "window"), "two": block("attention", "gdn")}
    decoder = {"num_layers": 2, "pattern": ["any", "two"], "blocks": blocks}
    spec = ModelSpec.model_validate({"vocab_size": 9, "hidden_size": 24, "max_positions": 9, "decoder": decoder})
    cost = CostTable(0.0, ({"attention": 2.0, "window": 1.0}, {"attention": 2.0, "gdn": 1.0}), spec.main, "units")
    losses = ({"attention": 0.0, "window": 1.0}, {"attention": 0.0, "gdn": 1.0})
    ledger = Ledger(None, Formula())  # type: ignore[arg-type]
    start = Placement(["window", "attention"])
    budget = Budget.parse("attention=1,gdn=1")
    (level,) = BeamSearch(spec, cost, ledger, table=ScoreTable(0.0, losses)).run([budget], start=start)
    assert list(map(str, level.beam)) == ["attention,gdn"]


def test_impossible_levels_are_refused_first() -> None:
    metric = Formula()
    with pytest.raises(ValueError, match="asks for 9 layers, but the model has 5"):
        beam(metric, BeamSettings()).run([Budget.parse("0.5"), Budget.parse("attention=9")])
    with pytest.raises(ValueError, match="cannot start from 'mamba': no layer offers"):
        beam(metric, BeamSettings(start="mamba"))
    with pytest.raises(ValueError, match="cannot read 'most'"):
        BeamSettings(levels=("most",))
    with pytest.raises(ValueError, match="Extra inputs"):
        BeamSettings(breadth=3)  # type: ignore[call-arg]


def test_the_ledger_is_a_front_to_be_read() -> None:
    search = beam(Formula(), BeamSettings(width=8, branch=None))
    search.run([Budget(share=share) for share in (0.75, 0.5, 0.25, 0.0)])
    front = non_dominated(search.ledger.scores, COST.of, search.ledger.loss)
    assert front[0] == COST.cheapest
    assert front[-1] == SPEC.main
