"""The search as a whole, on small supernets."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from tests.models import ATTENTION, supernet, supernet_spec, tokens

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.data import TokenSequences
from gearshift.evaluate import Judge
from gearshift.model import cost_table
from gearshift.search import BeamSettings, Budget, SearchResult, SearchSettings, search, single_changes, write_result
from gearshift.spec import CostTable, Placement

WINDOWS = {"attention": ATTENTION, "window": {**ATTENTION, "window": 6}, "narrow": {**ATTENTION, "window": 2}}
SEQUENCES = TokenSequences(tokens(2, 24))
SETTINGS = SearchSettings(skip=6, stride=1)


@pytest.fixture(scope="module")
def model() -> GearshiftForCausalLM:
    """Four layers whose mixers share the pretrained projections, as after a transfer."""
    made = supernet(mixers=WINDOWS)
    for block in made.model.blocks:
        for name in ("window", "narrow"):
            block.mixer_named(name).load_state_dict(block.mixer_named("attention").state_dict())
    return made


@pytest.fixture(scope="module")
def cost(model) -> CostTable:
    return cost_table(model.spec, "float32", context=1024)


def budgets(*texts: str) -> dict[str, Budget]:
    return {f"gear-{number}": Budget.parse(text) for number, text in enumerate(texts)}


def run(model, asked, cost, **settings) -> SearchResult:
    shares: list[float] = []
    result = search(model, SEQUENCES, asked, cost, SETTINGS.model_copy(update=settings), advance=shares.append)
    assert sum(shares) == pytest.approx(1)
    return result


@pytest.fixture(scope="module")
def every(model) -> dict[Placement, float]:
    """The divergence of each of the 81 placements."""
    placements = [Placement(mixers) for mixers in product(*model.spec.choices)]
    scores = Judge(model, SEQUENCES, SETTINGS).score(placements)
    return {score.placement: score.divergence for score in scores}


@pytest.mark.parametrize("method", ["additive", "beam"])
def test_winners_are_near_the_best_there_is(model, cost, every, method) -> None:
    asked = budgets("0.75", "0.5", "0.25", "attention=2", "attention=1,narrow=2")
    beam = BeamSettings(width=6, branch=None, refine=2)
    result = run(model, asked, cost, method=method, beam=beam)
    for chosen, budget in zip(result.chosen, asked.values(), strict=True):
        placement = chosen.candidate.placement
        assert budget.allows(placement, cost)
        ranked = sorted(value for other, value in every.items() if budget.allows(other, cost))
        assert chosen.candidate.score == every[placement]
        assert chosen.candidate.score <= ranked[min(2, len(ranked) - 1)]
    assert {found.placement: found.score for found in result.candidates}.items() <= every.items()


def test_the_result_is_whole(model, cost) -> None:
    result = run(model, budgets("0.75", "0"), cost)
    spec = model.spec
    kinds = {kind: [f for f in result.candidates if f.kind == kind] for kind in ("pure", "single change", "preset")}
    assert len(result.candidates) == len({found.placement for found in result.candidates})
    assert next(str(found.placement) for found in kinds["pure"]) == "attention*4"
    assert result.main_score == 0.0
    assert result.placements["gear-1"] == cost.cheapest
    assert result.span == cost.span
    for layer, scores in enumerate(result.layer_scores):
        assert list(scores) == list(WINDOWS)
        assert scores["attention"] == 0.0
        found = next(f for f in result.candidates if f.placement == spec.main.replace(layer, "window"))
        assert scores["window"] == found.score == found.numbers["divergence"]
    assert [found.cost for found in result.front] == sorted(found.cost for found in result.front)
    assert result.front[-1].placement == spec.main
    plain = 4 * len(result.candidates)
    assert result.layer_evaluations + result.layer_evaluations_saved == plain
    assert result.layer_evaluations_saved > plain / 4


def test_reuse_halves_the_single_changes(model, cost) -> None:
    """The formula of docs/search.md: L + (M - 1) L (L + 1) / 2 of L + (M - 1) L^2."""
    judge = Judge(model, SEQUENCES)
    judge.score([model.spec.main, *single_changes(model.spec)])
    layers, mixers = 4, 3
    assert judge.layer_evaluations == layers + (mixers - 1) * layers * (layers + 1) // 2 == 24
    assert judge.layer_evaluations_saved == (mixers - 1) * layers * (layers - 1) // 2 == 12


@pytest.mark.parametrize(("metric", "better"), [("perplexity", min), ("agreement", max)])
def test_other_metrics_in_their_own_direction(model, cost, metric, better) -> None:
    result = run(model, budgets("0.5"), cost, metric=metric)
    assert result.higher_is_better == (better is max)
    allowed = [found for found in result.candidates if Budget(share=0.5).allows(found.placement, cost)]
    assert result.chosen[0].candidate.score == better(found.score for found in allowed)
    assert all(found.score == found.numbers[metric] for found in result.candidates)


def test_any_callable_is_a_metric(model, cost) -> None:
    class FewWindows:
        higher_is_better = True
        name = "few windows"

        def __call__(self, model, placement) -> float:
            return -float(placement.counts().get("window", 0))

    result = search(model, SEQUENCES, budgets("0", "attention=0"), cost, metric=FewWindows())
    assert result.metric == "few windows"
    assert [str(chosen.candidate.placement) for chosen in result.chosen] == ["narrow*4", "narrow*4"]
    assert result.layer_evaluations == 0
    assert {dominated.mixer for dominated in result.dominated} == {"attention", "window"}


def test_dominated_mixers_say_why(model, cost) -> None:
    # The same mixer at a higher price: nothing speaks for it.
    dear = CostTable(cost.base, tuple({**c, "window": c["attention"] + 1} for c in cost.layers), cost.main, cost.unit)
    (found,) = run(model, budgets("0.5", "0.25"), dear).dominated
    assert (found.mixer, found.in_no_preset, found.everywhere) == ("window", True, True)
    assert found.reason == "in each of the 4 layers attention is no dearer and scores no worse"


def test_equal_costs_make_every_share_all_main(model, cost) -> None:
    flat = CostTable(0.0, tuple(dict.fromkeys(layer, 1.0) for layer in cost.layers), cost.main, "layers")
    result = run(model, budgets("0", "1"), flat)
    assert set(map(str, result.placements.values())) == {"attention*4"}
    assert len(result.front) == 1


def test_one_layer() -> None:
    model = supernet(layers=1, mixers=WINDOWS)
    result = run(model, budgets("0.5", "attention=1", "window=1"), cost_table(model.spec, "float32", 1024))
    assert list(map(str, result.placements.values()))[1:] == ["attention", "window"]
    assert len(result.candidates) == 3


def test_a_broken_mixer_is_not_chosen(cost) -> None:
    model = supernet(mixers=WINDOWS)
    with torch.no_grad():
        for block in model.model.blocks:
            block.mixer_named("narrow").o_proj.weight.fill_(math.nan)
    result = run(model, budgets("0.5", "narrow=1"), cost)
    assert "narrow" not in result.placements["gear-0"].counts()
    assert result.placements["gear-1"].counts()["narrow"] == 1
    written = json.loads(json.dumps(result.to_json_dict(), allow_nan=False))
    assert written["chosen"]["gear-1"]["score"] is None


def test_writing(model, cost, tmp_path: Path) -> None:
    result = run(model, {"balanced": Budget(share=0.5), "few": Budget.parse("attention=1")}, cost)
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in write_result(result, folder)) == ["balanced.json", "few.json", "search.json"]
    assert Placement.from_json((folder / "few.json").read_text()) == result.placements["few"]
    assert model.placement(f"@{folder}/balanced.json") == result.placements["balanced"]
    assert json.loads((folder / "search.json").read_text()) == result.to_json_dict()
    with pytest.raises(ValueError, match=r"out exists: choose another, or pass --overwrite"):
        write_result(result, folder)
    (folder / "note.txt").write_text("mine")
    write_result(result, folder, overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["balanced.json", "few.json", "note.txt", "search.json"]
    with pytest.raises(ValueError, match="is a file, not a folder"):
        write_result(result, folder / "note.txt")


def test_bad_input_is_refused_before_anything_runs(model, cost) -> None:
    def refused(message: str, asked=None, chosen=model, **settings) -> None:
        with pytest.raises(ValueError, match=message):
            search(chosen, SEQUENCES, asked or budgets("0.5"), cost, SearchSettings.model_validate(settings))

    model.model.blocks[0].register_forward_hook(lambda *_: pytest.fail("a layer ran"))
    refused("outside the cost span", budgets("0.5", "1.5"))
    refused("unknown mixer 'windoww': did you mean window", budgets("windoww=1"))
    refused("cannot be called 'search'", {"search": Budget(share=0.5)})
    refused("cannot be called '../x'", {"../x": Budget(share=0.5)})
    refused("unknown metric 'kl'", metric="kl")
    refused("counts an unknown mixer 'x'", method="beam", beam={"levels": ["x=1"]})
    refused("no position is left to judge", skip=24)
    refused("Extra inputs are not permitted", budget=3)
    with pytest.raises(ValueError, match="a search needs a budget"):
        search(model, SEQUENCES, {}, cost)
    model.model.blocks[0]._forward_hooks.clear()
    plain = supernet_spec().model_dump()
    plain["decoder"]["blocks"]["block"]["mixer"] = ATTENTION
    fixed = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(plain)))
    refused("there is nothing to search: every layer of this model has one mixer only", chosen=fixed)


def test_a_length_beyond_the_model_is_refused_where_somebody_asked_for_it() -> None:
    spec = supernet_spec()
    assert SearchSettings().length > spec.max_positions
    assert SearchSettings().length_for(spec) == spec.max_positions
    assert SearchSettings(length=7).length_for(spec) == 7
    beyond = SearchSettings(length=spec.max_positions + 1)
    with pytest.raises(ValueError, match=f"length is {spec.max_positions + 1}, but .* {spec.max_positions} positions"):
        beyond.length_for(spec)
