from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gearshift.spec import Placement
from gearshift.train import (
    AllocationSampling,
    PresetSampling,
    SamplingStrategy,
    SandwichSampling,
    UniformSampling,
    WeightedSampling,
)

ABC = ("a", "b", "c")
PRESETS = {"fast": Placement("cccc"), "slow": Placement("aaab")}
STRATEGIES: list[SamplingStrategy] = [
    UniformSampling(),
    WeightedSampling(weights={"a": 1, "b": 2, "c": 0.5}),
    AllocationSampling(),
    PresetSampling(probabilities={"c": 0.25}),
    SandwichSampling(cheapest="c", random=3, between=PresetSampling(probabilities={"c": 0.25}), largest="c"),
]


@given(
    st.sampled_from(STRATEGIES),
    st.lists(st.sets(st.sampled_from(ABC), min_size=1).map(lambda names: (*sorted(names - {"c"}), "c")), min_size=1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**40),
)
@settings(deadline=None)
def test_a_placement_is_a_pure_function_and_fits_the_model(strategy, choices, seed, step) -> None:
    choices = [*choices, ABC]
    drawn = strategy.sample(choices, {}, seed, step)
    assert drawn.validate(choices) == strategy.sample(choices, {}, seed, step)


@pytest.mark.parametrize(
    "strategy",
    [
        *STRATEGIES,
        WeightedSampling(weights={"a": 1, "b": 0}),
        PresetSampling(probabilities={"slow": 0.9, "fast": 0}, otherwise=WeightedSampling(weights={"b": 1})),
        PresetSampling(probabilities={"fast": 0.5, "a,c,b,a": 0.5}),
        SandwichSampling(cheapest="slow", between=PresetSampling(probabilities={"fast": 1}), largest="b,c*3"),
    ],
)
def test_what_may_be_drawn_is_what_is_drawn(strategy: SamplingStrategy) -> None:
    drawn = [strategy.sample([ABC] * 4, PRESETS, 7, step) for step in range(300)]
    assert strategy.possible([ABC] * 4, PRESETS) == [set(names) for names in zip(*drawn, strict=True)]
    lone = WeightedSampling(weights={"a": 1, "b": 0}).possible([("c",), ABC], {})
    assert lone == [{"c"}, {"a"}]


def shares(strategy: SamplingStrategy, layers: int = 4, draws: int = 4000, choices=None) -> Counter[Placement]:
    choices = choices or [ABC] * layers
    return Counter(strategy.sample(choices, PRESETS, 7, step) for step in range(draws))


def test_steps_and_seeds_draw_anew() -> None:
    draws = {UniformSampling().sample([ABC] * 30, {}, seed, step) for seed in range(20) for step in range(20)}
    assert len(draws) == 400


def test_uniform_gives_each_mixer_its_share_of_every_layer() -> None:
    drawn = shares(UniformSampling())
    for layer in range(4):
        for name in ABC:
            share = sum(count for placement, count in drawn.items() if placement[layer] == name) / 4000
            assert share == pytest.approx(1 / 3, abs=0.03)


def test_weights_are_normalised_over_what_a_layer_offers() -> None:
    choices = [ABC, ("a", "b"), ("c",)]
    drawn = shares(WeightedSampling(weights={"a": 6, "b": 2}), choices=choices)
    for layer in (0, 1):
        share = sum(count for placement, count in drawn.items() if placement[layer] == "a") / 4000
        assert share == pytest.approx(0.75, abs=0.03)
    assert all(placement[2] == "c" for placement in drawn)


def test_allocation_is_uniform_over_splits_and_over_arrangements() -> None:
    drawn = shares(AllocationSampling(), draws=6000)
    splits: Counter[tuple[int, ...]] = Counter()
    for placement, count in drawn.items():
        splits[tuple(placement.counts().get(name, 0) for name in ABC)] += count
    assert len(splits) == 15
    assert all(count == pytest.approx(400, rel=0.25) for count in splits.values())
    arrangements = [count for placement, count in drawn.items() if placement.counts() == {"a": 3, "b": 1}]
    assert len(arrangements) == 4
    assert all(count == pytest.approx(100, rel=0.4) for count in arrangements)


def test_allocation_reaches_the_extremes_where_independent_draws_do_not() -> None:
    pure = {Placement([name] * 30) for name in ABC}
    assert pure <= set(shares(AllocationSampling(), layers=30))
    assert not pure & set(shares(UniformSampling(), layers=30))


def test_allocation_splits_layers_with_the_same_offer() -> None:
    choices = [("a", "b"), ("c",), ("b", "a"), ("b", "c")]
    drawn = shares(AllocationSampling(), choices=choices)
    splits = Counter()
    for placement, count in drawn.items():
        splits[[placement[0], placement[2]].count("a")] += count
    assert all(splits[count] == pytest.approx(4000 / 3, rel=0.1) for count in (0, 1, 2))


def test_presets_fall_through() -> None:
    strategy = PresetSampling(probabilities={"fast": 0.3, "a*2,b*2": 0.2}, otherwise=WeightedSampling(weights={"b": 1}))
    drawn = shares(strategy)
    assert set(drawn) == {Placement("cccc"), Placement("aabb"), Placement("bbbb")}
    assert drawn[Placement("cccc")] / 4000 == pytest.approx(0.3, abs=0.03)
    assert drawn[Placement("aabb")] / 4000 == pytest.approx(0.2, abs=0.03)
    certain = shares(PresetSampling(probabilities={"slow": 0.1 + 0.2, "fast": 0.7}))
    assert set(certain) == set(PRESETS.values())


def test_a_sandwich_turns_over_the_steps_and_wastes_none_on_main() -> None:
    def turns(strategy: SamplingStrategy) -> list[Placement]:
        return [strategy.sample([ABC] * 4, PRESETS, 7, step) for step in range(12)]

    drawn, between = turns(SandwichSampling(cheapest="fast", random=3)), turns(AllocationSampling())
    assert drawn == [PRESETS["fast"] if step % 4 == 0 else between[step] for step in range(12)]
    both = turns(SandwichSampling(cheapest="c*3,b", random=1, between=UniformSampling(), largest="slow"))
    uniform = turns(UniformSampling())
    assert both == [(Placement("cccb"), uniform[step], PRESETS["slow"])[step % 3] for step in range(12)]


def test_a_sandwich_without_a_filling_or_with_unknown_ends_is_refused() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SandwichSampling(cheapest="c", random=0)
    for ends in ({"cheapest": "fost"}, {"cheapest": "c", "largest": "fost"}):
        with pytest.raises(ValueError, match="'fost' is no preset"):
            SandwichSampling(**ends).check([ABC] * 4, PRESETS)
    with pytest.raises(ValueError, match="a mixer 'd', but the model has a, b, c"):
        SandwichSampling(cheapest="c", between=WeightedSampling(weights={"d": 1})).check([ABC] * 4, PRESETS)


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"a": -1.0, "b": 1.0}, "'a' has -1"),
        ({"a": 0.0}, "at least one of them must be positive"),
        ({}, "at least one of them must be positive"),
        ({"a": float("nan")}, "'a' has nan"),
        ({"a": float("inf")}, "'a' has inf"),
    ],
)
def test_senseless_weights_are_refused(weights, sentence) -> None:
    with pytest.raises(ValidationError, match=sentence):
        WeightedSampling(weights=weights)
    with pytest.raises(ValidationError, match=sentence):
        PresetSampling(probabilities=weights)


def test_what_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="'d', but the model has a, b, c"):
        WeightedSampling(weights={"d": 1}).sample([ABC], {}, 0, 0)
    with pytest.raises(ValueError, match="leave layer 1 nothing to draw: it offers a, b"):
        WeightedSampling(weights={"c": 1}).sample([ABC, ("a", "b")], {}, 0, 0)
    with pytest.raises(ValueError, match="'fost' is no preset"):
        PresetSampling(probabilities={"fost": 1}).sample([ABC] * 4, PRESETS, 0, 0)
    with pytest.raises(ValidationError, match=r"sum to 1\.2, more than 1"):
        PresetSampling(probabilities={"fast": 0.6, "slow": 0.6})
