"""Budgets: reading them, what they allow, and what impossible ones are told."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.models import supernet_spec

from gearshift.model import cost_table
from gearshift.search import Budget
from gearshift.search.budget import _check_counts
from gearshift.spec import CostTable, Placement

SPEC = supernet_spec(layers=6)
COST = cost_table(SPEC, "float32", context=256)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget(share=0.5)),
        ("1", Budget(share=1.0)),
        (" .25 ", Budget(share=0.25)),
        ("attention=3", Budget(counts=(("attention", 3),))),
        ("attention = 3, window=0", Budget(counts=(("attention", 3), ("window", 0)))),
    ],
)
def test_reading(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("half", "cannot read 'half' in the budget 'half': a budget is a share of the cost span, such as 0.5"),
        ("attention=x", "cannot read 'attention=x'"),
        ("attention=3,", "cannot read ''"),
        ("attention=-3", "cannot read 'attention=-3'"),
        ("attention=3,attention=2", "names 'attention' twice"),
        ("", "cannot read ''"),
    ],
)
def test_unreadable(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "1.5",
            r"a budget of 1.5 lies outside the cost span: 0 is [\d,]+ bytes a token .* 1 is [\d,]+ \(attention\*6\)",
        ),
        ("-0.1", "a budget of -0.1 lies outside the cost span: 0 is"),
        ("nan", "a budget of nan lies outside the cost span"),
        ("atention=2", "counts an unknown mixer 'atention': did you mean attention"),
        ("zzz=2", "counts an unknown mixer 'zzz': there are attention, window, gdn, kda"),
        ("attention=7", "asks for 7 layers, but the model has 6"),
        ("attention=4,gdn=3", "asks for 7 layers, but the model has 6"),
        (
            "attention=2,window=1,gdn=1,kda=1",
            "of the 6 layers 6 offer nothing else and 6 offer one of them, so the number must be 6",
        ),
    ],
)
def test_impossible(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget.parse(text).validate(SPEC, COST)


@pytest.mark.parametrize("text", ["0", "1", "0.3", "attention=6", "attention=0", "attention=2,window=1,gdn=1,kda=2"])
def test_possible(text: str) -> None:
    assert Budget.parse(text).validate(SPEC, COST) == Budget.parse(text)


def test_counts_say_what_uneven_layers_allow() -> None:
    choices = (("a", "b"), ("a",), ("b", "c"), ("c",))
    with pytest.raises(ValueError, match="gives 0 layers to a: of the 4 layers 1 offer nothing else and 2 offer it"):
        _check_counts("a=0", {"a": 0}, choices)
    with pytest.raises(ValueError, match=r"gives 4 layers to a and b: .* must lie from 2 to 3"):
        _check_counts("a=2,b=2", {"a": 2, "b": 2}, choices)


LAYER = st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True).map(tuple)


@given(st.lists(LAYER, min_size=1, max_size=5).map(tuple), st.data())
def test_counts_are_refused_exactly_when_no_placement_meets_them(choices, data) -> None:
    known = sorted({name for layer in choices for name in layer})
    counts = data.draw(st.dictionaries(st.sampled_from(known), st.integers(0, 4), min_size=1))
    possible = any(all(mixers.count(name) == n for name, n in counts.items()) for mixers in product(*choices))
    try:
        _check_counts("...", counts, choices)
        refused = False
    except ValueError:
        refused = True
    assert refused != possible


def test_what_a_budget_allows() -> None:
    share = Budget(share=0.5)
    assert share.limit(COST) == COST.at(0.5)
    assert share.allows(COST.cheapest, COST)
    assert not share.allows(COST.main, COST)
    assert Budget(share=1.0).allows(COST.main, COST)
    counts = Budget.parse("attention=2,gdn=0")
    assert counts.limit(COST) is None
    assert counts.allows(Placement.parse("attention*2,window*3,kda"), COST)
    assert not counts.allows(Placement.parse("attention*2,window*3,gdn"), COST)


@given(st.lists(st.floats(0, 1e3), min_size=2, max_size=9))
def test_the_ends_of_the_span_are_allowed_whatever_the_rounding(costs) -> None:
    layers = tuple({"main": cost, "other": cost / 3} for cost in costs)
    cost = CostTable(0.1, layers, Placement(["main"] * len(layers)), "ms")
    assert Budget(share=1.0).allows(cost.main, cost)
    assert Budget(share=0.0).allows(cost.cheapest, cost)
