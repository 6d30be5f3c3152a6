"""Single changes, pure placements, their sums, and the Pareto front."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models import MIXERS, supernet_spec

from gearshift import ModelSpec
from gearshift.search import ScoreTable, non_dominated, pure_placements, single_changes
from gearshift.search.scores import BROKEN
from gearshift.spec import Placement

SPEC = supernet_spec(layers=3)


def uneven() -> ModelSpec:
    """A layer without a choice between layers of two kinds."""
    mlp = {"type": "gated", "intermediate_size": 8}

    def block(*names: str) -> dict:
        return {"mixer": {"type": "stochastic", "main": names[0], "mixers": {n: MIXERS[n] for n in names}}, "mlp": mlp}

    blocks = {
        "one": block("attention", "gdn"),
        "fixed": {"mixer": MIXERS["window"], "mlp": mlp},
        "two": block("gdn", "kda"),
    }
    decoder = {"num_layers": 3, "pattern": list(blocks), "blocks": blocks}
    return ModelSpec.model_validate({"vocab_size": 9, "hidden_size": 24, "max_positions": 9, "decoder": decoder})


def test_single_changes() -> None:
    changes = single_changes(SPEC)
    assert len(changes) == len(set(changes)) == 9
    assert all(sum(a != b for a, b in zip(change, SPEC.main, strict=True)) == 1 for change in changes)
    assert list(map(str, single_changes(uneven()))) == ["gdn,attention,gdn", "attention*2,kda"]


def test_pure_placements() -> None:
    assert {name: str(placement) for name, placement in pure_placements(SPEC).items()} == {n: f"{n}*3" for n in MIXERS}
    assert {name: str(placement) for name, placement in pure_placements(uneven()).items()} == {
        "attention": "attention*2,gdn",
        "gdn": "gdn,attention,gdn",
        "kda": "attention*2,kda",
    }


def test_sums_are_exact_where_losses_add_up() -> None:
    def loss(placement: Placement) -> float:
        return 0.5 + sum(2.0**-layer * list(MIXERS).index(name) for layer, name in enumerate(placement))

    table = ScoreTable.from_losses(SPEC, {p: loss(p) for p in [SPEC.main, *single_changes(SPEC)]})
    for mixers in product(MIXERS, repeat=3):
        assert table.of(Placement(mixers)) == loss(Placement(mixers))


def test_losses_that_are_not_finite() -> None:
    losses = dict.fromkeys([SPEC.main, *single_changes(SPEC)], 1.0)
    losses[SPEC.main.replace(1, "kda")] = math.nan
    losses[SPEC.main.replace(2, "gdn")] = math.inf
    table = ScoreTable.from_losses(SPEC, losses)
    assert table.layers[1]["kda"] == table.layers[2]["gdn"] == BROKEN
    losses[SPEC.main] = math.nan
    with pytest.raises(ValueError, match=r"the all-main placement attention\*3 scores nan"):
        ScoreTable.from_losses(SPEC, losses)


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)))


@given(POINTS)
def test_the_front_is_what_nothing_beats(points) -> None:
    front = non_dominated(points, lambda point: point[0], lambda point: point[1])
    beaten = {p for p in points if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    assert front == sorted(set(points) - beaten)


def test_the_front_leaves_out_what_is_not_a_number() -> None:
    points = [(1.0, math.nan), (2.0, 3.0), (3.0, math.inf)]
    assert non_dominated(points, lambda point: point[0], lambda point: point[1]) == [(2.0, 3.0)]
