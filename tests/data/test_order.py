"""Orders: permutations that nobody stores, and sources that take turns."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.data.order import interleaved, shares, shuffled


@given(size=st.integers(1, 400), key=st.tuples(st.integers(0, 2**64), st.integers(0, 9)))
def test_every_place_comes_once(size: int, key: tuple[int, int]) -> None:
    assert sorted(shuffled(position, size, *key) for position in range(size)) == list(range(size))


def test_a_key_decides_the_order() -> None:
    orders = {
        tuple(shuffled(position, 50, seed, epoch) for position in range(50)) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 4
    assert tuple(shuffled(position, 50, 0, 0) for position in range(50)) in orders


def test_the_first_place_goes_everywhere_alike() -> None:
    seen = Counter(shuffled(0, 10, seed) for seed in range(5000))
    assert all(400 < seen[place] < 600 for place in range(10))


def test_neighbours_do_not_stay_neighbours() -> None:
    order = [shuffled(position, 10_000, 3) for position in range(10_000)]
    near = sum(abs(a - b) < 100 for a, b in pairwise(order))
    assert near < 300  # of 10,000: 2 % is chance


def test_a_place_in_a_huge_order_costs_nothing() -> None:
    size = 10**15
    assert len({shuffled(position, size, 0) for position in range(100)}) == 100


weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)


@given(weights=weights, first=st.integers(0, 10**12))
def test_sources_count_their_own_draws_without_a_gap(weights: list[float], first: int) -> None:
    drawn = [interleaved(number, shares(weights)) for number in range(first, first + 200)]
    for source in range(len(weights)):
        indices = [index for chosen, index in drawn if chosen == source]
        assert indices == list(range(indices[0], indices[0] + len(indices))) if indices else True


@given(weights=weights, draws=st.integers(1, 2000))
def test_each_source_has_its_share_at_any_time(weights: list[float], draws: int) -> None:
    exact = shares(weights)
    counts = Counter(interleaved(number, exact)[0] for number in range(draws))
    for source, weight in enumerate(weights):
        assert abs(counts[source] - draws * weight / sum(weights)) <= 1 + source


@pytest.mark.parametrize("values", [[1], [1, 1], [0.1, 0.2, 0.7], [3, 1e-9]])
def test_shares_are_exact(values: list[float]) -> None:
    assert sum(shares(values)) == 1
