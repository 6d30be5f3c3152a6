import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gearshift.spec import Placement, resolve_placement

NAMES = st.sampled_from(["attention", "window", "gdn", "kda"])
CHOICES = (("attention", "gdn"),) * 3


@given(st.lists(NAMES, min_size=1, max_size=60))
def test_text_and_json_give_the_placement_back(mixers: list[str]) -> None:
    placement = Placement(mixers)
    assert Placement.parse(str(placement)) == placement
    assert Placement.from_json(placement.to_json()) == placement
    assert Placement.from_json(json.dumps(str(placement))) == placement
    assert sum(placement.counts().values()) == len(placement) == len(mixers)


def test_run_length_form() -> None:
    assert Placement.parse("attention*3, gdn*2,attention").mixers == ("attention",) * 3 + ("gdn",) * 2 + ("attention",)
    assert str(Placement(["a", "a", "b"])) == "a*2,b"
    assert Placement.parse("a*2,b").replace(1, "c") == Placement(["a", "c", "b"])


@pytest.mark.parametrize("text", ["", "a,,b", "a*0", "a*x", "a**2", "2*a", "a;b"])
def test_malformed_text_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="neither 'mixer' nor"):
        Placement.parse(text)


def test_wrong_length_and_unknown_mixer() -> None:
    with pytest.raises(ValueError, match="names 2 layers, but the model has 3"):
        Placement(["gdn", "gdn"]).validate(CHOICES)
    with pytest.raises(ValueError, match=r"layer 1 has no mixer 'kda': it offers attention, gdn"):
        Placement(["gdn", "kda", "gdn"]).validate(CHOICES)


def test_every_way_to_name_a_placement(tmp_path) -> None:
    fast = Placement(["gdn"] * 3)
    presets = {"fast": fast}
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"placement": "gdn*3"}))
    for value in ("fast", fast, ["gdn"] * 3, "gdn*3", "gdn,gdn,gdn", "gdn", f"@{file}"):
        assert resolve_placement(value, presets, CHOICES) == fast
    with pytest.raises(ValueError, match="did you mean fast"):
        resolve_placement("fats", presets, CHOICES)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        resolve_placement(f"@{file}", presets, CHOICES)
    with pytest.raises(FileNotFoundError):
        resolve_placement("@nowhere.json", presets, CHOICES)


def test_one_name_fills_layers_without_a_choice() -> None:
    choices = (("attention",), ("attention", "gdn"))
    assert resolve_placement("gdn", {}, choices) == Placement(["attention", "gdn"])
