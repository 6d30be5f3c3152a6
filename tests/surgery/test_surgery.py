"""Each edit on its own and in company: what it makes of the spec and of the weights, and what it refuses."""

import pytest
import torch
from pydantic import ValidationError
from tests.models import ATTENTION, supernet, tokens

from gearshift.model import GearshiftConfig, GearshiftForCausalLM, schema
from gearshift.plan.execute import MappingSource, materialise
from gearshift.spec import ModelSpec, Placement
from gearshift.surgery import Surgery, operate, prune

MLP = {"type": "gated", "intermediate_size": 40}


def plain(**decoder) -> ModelSpec:
    block = {"mixer": ATTENTION, "mlp": MLP}
    decoder = {"num_layers": 4, "pattern": ["block"], "blocks": {"block": block}, **decoder}
    return ModelSpec.model_validate({"vocab_size": 61, "hidden_size": 24, "max_positions": 128, "decoder": decoder})


def started(spec: ModelSpec, seed: int = 0) -> GearshiftForCausalLM:
    torch.manual_seed(seed)
    model = GearshiftForCausalLM(GearshiftConfig(spec)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def operated(model: GearshiftForCausalLM, *edits: dict) -> GearshiftForCausalLM:
    source = MappingSource(dict(model.state_dict()))
    spec, plan = operate(model.spec, source.schema, [Surgery.model_validate({"edits": list(edits)})])
    return loaded(spec, materialise(plan, source))


def loaded(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> GearshiftForCausalLM:
    model = GearshiftForCausalLM(GearshiftConfig(spec)).eval()
    model.load_state_dict(weights)
    return model


@torch.no_grad()
def logits(model: GearshiftForCausalLM, placement=None) -> torch.Tensor:
    return model(tokens(2, 17), placement=placement).logits


WRAP = {"wrap": {"main": "full"}}
WINDOW = {"add": {"name": "window", "mixer": {"type": "attention", "window": 5}}}
GDN = {"add": {"name": "gdn", "mixer": {"type": "gated_delta_net", "conv_kernel": 3}}}


def test_wrap_and_add_leave_the_main_placement_alone() -> None:
    before = started(plain())
    after = operated(before, WRAP, WINDOW, GDN)
    assert after.spec.choices == (("full", "window", "gdn"),) * 4
    assert torch.equal(logits(after, "full"), logits(before))
    # The window has attention's own weights, so that a window over everything changes nothing.
    wide = operated(before, WRAP, {"add": {"name": "window", "mixer": {"type": "attention", "window": 99}}})
    torch.testing.assert_close(logits(wide, "window"), logits(before))
    assert not torch.allclose(logits(after, "window"), logits(before))


def test_added_keys_and_values_are_repeated_in_place() -> None:
    before = started(plain())
    after = operated(before, WRAP, {"add": {"name": "mha", "mixer": {"type": "attention", "kv_heads": 4}}})
    torch.testing.assert_close(logits(after, "mha"), logits(before))


def test_surgery_then_surgery_equals_both_at_once() -> None:
    before = started(plain())
    once = operated(before, WRAP, WINDOW, GDN).state_dict()
    source = MappingSource(dict(before.state_dict()))
    parts = [Surgery.model_validate({"edits": edits}) for edits in ([WRAP], [WINDOW, GDN])]
    _, plan = operate(before.spec, source.schema, parts)
    twice = materialise(plan, source)
    assert all(torch.equal(once[name], twice[name]) for name in once)


def test_drop_and_replace() -> None:
    before = operated(started(plain()), WRAP, WINDOW, GDN)
    after = operated(before, {"drop": {"name": "window"}})
    assert after.spec.choices == (("full", "gdn"),) * 4
    assert torch.equal(logits(after, "gdn"), logits(before, "gdn"))
    kda = {"type": "kimi_delta_attention", "heads": 3, "head_dim": 8}
    random = operated(before, {"replace": {"name": "window", "mixer": kda, "init": "random"}})
    assert random.spec.decoder.blocks["block"].mixers["window"].heads == 3
    assert torch.equal(logits(random, "full"), logits(before, "full"))
    moved = operated(started(plain()), {"replace": {"mixer": {"type": "attention", "window": 5}}})
    assert torch.equal(logits(moved), logits(before, "window"))


def test_change_keeps_the_weights() -> None:
    before = operated(started(plain()), WRAP, WINDOW)
    after = operated(before, {"change": {"name": "window", "mixer": {"window": 99}, "norm": {"epsilon": 1e-6}}})
    torch.testing.assert_close(logits(after, "window"), logits(before, "full"))


def test_layout_copies_blocks_and_cuts_layers() -> None:
    before = started(plain())
    laid = {"layout": {"pattern": ["global", "local"], "copies": {"global": "block", "local": "block"}}}
    after = operated(before, laid, {"change": {"blocks": ["local"], "mixer": {"window": 5}}})
    assert after.spec.decoder.layout == ("global", "local", "global", "local")
    windows = [block.mixer.window for block in after.spec.decoder.layers]
    assert windows == [None, 5, None, 5]
    mixed = operated(before, WRAP, WINDOW)
    assert torch.equal(logits(after), logits(mixed, ["full", "window"] * 2))
    short = operated(before, {"layout": {"pattern": ["block"], "num_layers": 2}})
    assert len(short.spec.choices) == 2


def test_prune_in_a_surgery_equals_prune() -> None:
    before = supernet()
    placement = Placement(["gdn", "attention", "attention", "kda"])
    pruned = operated(before, {"prune": {"placement": str(placement)}})
    assert torch.equal(logits(pruned), logits(before, placement))
    source = MappingSource(dict(before.state_dict()))
    spec, plan = prune(before.spec, source.schema, placement)
    assert spec == pruned.spec
    assert spec.decoder.pattern == ("gdn", "attention", "attention", "kda")
    assert all("placement does not use it" in discard.reason for discard in plan.discards)


def test_pruning_makes_the_shortest_pattern() -> None:
    before = supernet()
    spec, _ = prune(before.spec, MappingSource(dict(before.state_dict())).schema, Placement(["gdn", "kda"] * 2))
    assert spec.decoder.pattern == ("gdn", "kda")


def test_shared_blocks_are_edited_once_and_pruned_by_layer() -> None:
    shared = {"mixer": ATTENTION, "mlp": MLP, "shared_weights": True}
    own = {"mixer": ATTENTION, "mlp": MLP}
    before = started(plain(pattern=["own", "shared"], blocks={"own": own, "shared": shared}))
    after = operated(before, WRAP, WINDOW)
    names = [name for name in after.state_dict() if ".mixers.window.q_proj" in name]
    assert [name.split(".")[2] for name in names] == ["0", "shared", "2"]
    placement = ["full", "window", "window", "full"]
    pruned = operated(after, {"prune": {"placement": str(Placement(placement))}})
    assert torch.equal(logits(pruned), logits(after, placement))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([WRAP, WRAP], "edit 1 .*has a stochastic mixer already"),
        ([WINDOW], "edit 0 .*no block has a stochastic mixer"),
        ([WRAP, WINDOW, WINDOW], "edit 2 .*has a mixer 'window' already"),
        ([WRAP, {"add": {"name": "x", "mixer": {"window": 3}}}], "has no 'type'"),
        ([WRAP, {"add": {"name": "x", "mixer": {"type": "gated_delta"}}}], "did you mean gated_delta_net"),
        ([WRAP, {"add": {"name": "x", "mixer": {"type": "attention", "windw": 3}}}], "windw"),
        ([WRAP, {"add": {"name": "x.y", "mixer": {"type": "attention"}}}], "cannot be called 'x.y'"),
        ([WRAP, {"add": {"name": "x", "mixer": {"type": "attention", "heads": 8}}}], "use init: random"),
        ([WRAP, {"add": {"name": "x", "mixer": {"type": "attention"}, "source": "nope"}}], "no mixer 'nope'"),
        ([WRAP, {"drop": {"name": "full"}}], "is the main mixer"),
        ([WRAP, {"drop": {"name": "x"}}], "has no mixer 'x'"),
        ([{"change": {"mixer": {"heads": 2}}}], "use replace"),
        ([{"change": {"mlp": {"bias": True}}}], "shapes of the MLP's weights"),
        ([{"change": {"mlp": {"intermediate_size": 8}}}], "shapes of the MLP's weights"),
        ([{"layout": {"pattern": ["block"], "copies": {"spare": "block"}}}], "does not use the copy 'spare'"),
        ([{"change": {"blocks": ["b"], "mixer": {"window": 2}}}], "there is no block 'b'"),
        ([{"replace": {"name": "full", "mixer": {"type": "attention"}}}], "plain mixer"),
        ([{"layout": {"pattern": ["block", "other"]}}], "'other'"),
        ([{"layout": {"pattern": ["block"], "num_layers": 5}}], "weights that nothing gives"),
        ([WRAP, {"prune": {"placement": "full*3"}}], "names 3 layers, but the model has 4"),
        ([WRAP, {"prune": {"placement": "nope*4"}}], "has no mixer 'nope'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_read(edits: list[dict], message: str) -> None:
    spec = plain()
    with pytest.raises(ValueError, match=message):
        operate(spec, schema(spec, "float32"), [Surgery.model_validate({"edits": edits})])


@pytest.mark.parametrize(
    "edits",
    [
        [{**WRAP, **WINDOW}],
        [{}],
        [{"change": {}}],
        [],
        [{"wrapp": {"main": "x"}}],
        [{"wrap": {"main": "x", "blocks": []}}],
    ],
)
def test_an_entry_holds_exactly_one_edit_that_does_something(edits: list[dict]) -> None:
    with pytest.raises(ValidationError):
        Surgery.model_validate({"edits": edits})


def test_an_unknown_activation_is_refused_before_anything_is_made() -> None:
    before = started(plain())
    with pytest.raises(ValueError, match="unknown activation 'swishh': did you mean 'swish'"):
        operated(before, {"change": {"mlp": {"activation": "swishh"}}})
    for mixer in ({"type": "mamba", "activation": "swishh"}, {"type": "gated_delta_net", "activation": "swishh"}):
        with pytest.raises(ValueError, match="unknown activation 'swishh'"):
            operated(before, WRAP, {"add": {"name": "new", "mixer": mixer}})


@pytest.mark.parametrize("init", ["transfer", "random"])
@pytest.mark.parametrize("kind", ["gated_delta_net", "kimi_delta_attention", "mamba2"])
def test_a_new_mixers_norm_has_the_epsilon_of_its_block(kind: str, init: str) -> None:
    block = {"mixer": ATTENTION, "mlp": MLP, "norm": {"epsilon": 3e-4}}
    before = started(plain(blocks={"block": block}))
    given = operated(before, {"replace": {"mixer": {"type": kind, "norm_epsilon": 2e-3}, "init": init}})
    assert given.spec.decoder.blocks["block"].mixer.norm_epsilon == 2e-3
    add = {"add": {"name": "new", "mixer": {"type": kind}, "init": init}}
    assert operated(before, WRAP, add).spec.decoder.blocks["block"].mixers["new"].norm_epsilon == 3e-4
