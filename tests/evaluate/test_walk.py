"""Walking a trie of placements gives the very bits of plain forwards, and runs each shared prefix once."""

import pytest
import torch
from tests.models import supernet, supernet_spec, tokens

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.evaluate import Stop, route, walk
from gearshift.search import single_changes
from gearshift.spec import Placement


def test_route_is_depth_first_and_starts_at_main() -> None:
    spec = supernet(layers=3).spec
    texts = ["gdn*3", "attention,window,gdn", "attention*3", "gdn,attention,kda", "attention,window,kda", "gdn*3"]
    stops = route(spec, map(Placement.parse, texts))
    assert [(str(stop.placement), stop.first_layer) for stop in stops] == [
        ("attention*3", 0),
        ("attention,window,gdn", 1),
        ("attention,window,kda", 2),
        ("gdn,attention,kda", 0),
        ("gdn*3", 1),
    ]
    assert route(spec, []) == []


def test_route_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="layer 1 has no mixer 'mamba'"):
        route(supernet(layers=2).spec, [Placement(["gdn", "mamba"])])


@pytest.mark.parametrize("batch", [1, 3])
def test_every_stop_equals_a_plain_forward_bit_for_bit(batch: int) -> None:
    model = supernet()
    ids = tokens(batch, 21)
    placements = [*single_changes(model.spec), Placement.parse("kda,gdn,window,attention"), model.spec.main]
    stops = route(model.spec, placements)
    with torch.inference_mode():
        visits = zip(stops, walk(model.model, ids, stops), strict=True)
        walked = {stop.placement: model.model.norm(hidden) for stop, hidden in visits}
    for placement in placements:
        with torch.no_grad():
            plain = model.model(ids, placement=placement).last_hidden_state
        assert torch.equal(walked[placement], plain), placement


def test_blocks_run_as_often_as_the_route_says() -> None:
    model = supernet(layers=5)
    stops = route(model.spec, [model.spec.main, *single_changes(model.spec)])
    runs = []
    for block in model.model.blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    with torch.inference_mode():
        for _ in walk(model.model, tokens(1, 8), stops):
            pass
    layers, mixers = 5, 4
    assert len(runs) == sum(stop.layer_evaluations for stop in stops)
    assert len(runs) == layers + (mixers - 1) * layers * (layers + 1) // 2


def test_single_changes_of_thirty_layers_need_half_of_the_layer_evaluations() -> None:
    """The figures of docs/search.md."""
    spec = supernet_spec(layers=30)
    stops = route(spec, [spec.main, *single_changes(spec)])
    assert 30 * len(stops) == 2730
    assert sum(stop.layer_evaluations for stop in stops) == 1425


def test_shared_weights_walk_too() -> None:
    model = supernet()
    spec = model.spec.model_dump()
    spec["decoder"]["blocks"]["block"]["shared_weights"] = True
    shared = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(spec))).eval()
    placement = Placement.parse("gdn*2,window,attention")
    with torch.inference_mode():
        *_, hidden = walk(shared.model, tokens(2, 9), [Stop(shared.spec.main, 0), Stop(placement, 0)])
        assert torch.equal(shared.model.norm(hidden), shared.model(tokens(2, 9), placement=placement).last_hidden_state)
