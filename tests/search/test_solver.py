"""The solver against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.search import Budget, ScoreTable, Solver, non_dominated
from gearshift.search.budget import total
from gearshift.search.scores import BROKEN
from gearshift.spec import CostTable, Placement

NAMES = "abc"
SMALL = st.integers(0, 4).map(float)
ANY = st.floats(-10, 10, allow_nan=False)


@st.composite
def problems(draw):
    """A cost table and a loss table over a few layers that offer different mixers."""
    numbers = draw(st.sampled_from([SMALL, ANY]))
    offered = draw(st.lists(st.lists(st.sampled_from(NAMES), min_size=1, unique=True), min_size=1, max_size=5))
    costs = tuple({name: abs(draw(numbers)) for name in layer} for layer in offered)
    losses = tuple({name: draw(numbers) for name in layer} for layer in offered)
    main = Placement(layer[0] for layer in offered)
    return CostTable(1.5, costs, main, "units"), ScoreTable(0.25, losses)


def every(losses: ScoreTable) -> list[Placement]:
    return [Placement(mixers) for mixers in product(*losses.layers)]


@given(problems(), st.sampled_from([0.0, 0.3, 0.5, 0.99, 1.0]), st.integers(1, 4))
def test_the_best_of_a_share_are_those_of_brute_force(problem, share, keep) -> None:
    cost, losses = problem
    budget = Budget(share=share)
    allowed = sorted(losses.of(placement) for placement in every(losses) if budget.allows(placement, cost))
    found = Solver(cost, losses, keep).best(budget)
    assert [one.loss for one in found] == allowed[:keep]
    assert [losses.of(one.placement) for one in found] == allowed[:keep]
    assert all(budget.allows(one.placement, cost) for one in found)
    assert len({one.placement for one in found}) == len(found)


@given(problems(), st.data(), st.integers(1, 4))
def test_the_best_of_counts_are_those_of_brute_force(problem, data, keep) -> None:
    cost, losses = problem
    like = data.draw(st.sampled_from(every(losses)))
    named = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
    budget = Budget(counts=tuple((name, like.counts().get(name, 0)) for name in named))
    allowed = sorted(losses.of(placement) for placement in every(losses) if budget.allows(placement, cost))
    found = Solver(cost, losses, keep).best(budget)
    assert [one.loss for one in found] == allowed[:keep]
    assert all(budget.allows(one.placement, cost) for one in found)
    assert len({one.placement for one in found}) == len(found)


@given(problems(), st.integers(1, 3))
def test_the_front_is_that_of_brute_force(problem, keep) -> None:
    cost, losses = problem
    points = [(total(cost, placement), losses.of(placement)) for placement in every(losses)]
    expected = non_dominated(points, lambda point: point[0], lambda point: point[1])
    found = Solver(cost, losses, keep).front()
    assert [(total(cost, one.placement), one.loss) for one in found] == expected


def test_ties_go_to_the_mixers_named_first() -> None:
    cost = CostTable(0.0, ({"a": 1.0, "b": 1.0},) * 4, Placement("aaaa"), "units")
    losses = ScoreTable(0.0, ({"a": 0.0, "b": 0.0},) * 4)
    assert str(Solver(cost, losses).best(Budget(share=1.0))[0].placement) == "a*4"
    assert str(Solver(cost, losses).best(Budget.parse("b=2"))[0].placement) == "a*2,b*2"


def test_a_broken_mixer_is_used_only_where_it_must_be() -> None:
    cost = CostTable(0.0, ({"a": 2.0, "b": 1.0, "c": 0.0},) * 3, Placement("aaa"), "units")
    losses = ScoreTable(0.0, tuple({"a": 0.0, "b": 0.1 * layer, "c": BROKEN} for layer in range(1, 4)))
    solver = Solver(cost, losses)
    assert str(solver.best(Budget(share=0.5))[0].placement) == "b*3"
    assert solver.best(Budget(share=0.34))[0].placement.counts()["c"] == 1
    assert losses.without("b").of(Placement("abb")) == 2 * BROKEN


@pytest.mark.parametrize("whole", [True, False])
def test_forty_eight_uneven_layers(whole: bool) -> None:
    random = np.random.default_rng(0)
    draw = (lambda: float(random.integers(1, 10**6))) if whole else (lambda: float(random.random()))
    cost = CostTable(0.0, tuple({name: draw() for name in "abcd"} for _ in range(48)), Placement("a" * 48), "units")
    losses = ScoreTable(0.0, tuple({name: random.random() for name in "abcd"} for _ in range(48)))
    solver = Solver(cost, losses, keep=3)
    found = solver.best(Budget(share=0.5)) + solver.best(Budget.parse("a=12,b=12,c=12"))
    assert len(found) == 6
    assert len(solver.front()) > 100
