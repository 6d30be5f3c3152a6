"""Heads for tokens further ahead: what they read, and that they follow a model through surgery and saving."""

import pytest
import torch
from tests.models import ATTENTION, supernet, supernet_spec, tokens

from gearshift import GearshiftForCausalLM
from gearshift.conversion import convert, export
from gearshift.model.schema import parameter_counts

HEAD = {"block": {"mixer": ATTENTION, "mlp": {"type": "gated", "intermediate_size": 30}}, "norm": {"epsilon": 1e-3}}


@pytest.fixture(scope="module")
def model():
    return supernet(prediction_heads=[HEAD, HEAD])


@torch.no_grad()
def test_heads_read_what_the_last_layer_reads(model) -> None:
    ids = tokens(2, 11)
    placement = ["gdn", "attention", "window", "kda"]
    output = model(ids, placement=placement, prediction_heads=True)
    hidden = model.model.embed(ids)
    context = model.model.context(hidden)
    for block, name in zip(model.model.blocks[:3], placement, strict=False):
        hidden = block(hidden, context, name)
    assert len(output.prediction_logits) == 2
    for head, logits in zip(model.model.prediction_heads, output.prediction_logits, strict=True):
        torch.testing.assert_close(logits, model.lm_head(head.norm(head.block(hidden, context, "attention"))))
    assert not torch.equal(*output.prediction_logits)
    assert torch.equal(output.logits, model(ids, placement=placement).logits)
    assert model(ids).prediction_logits is None


def test_they_have_no_cache_and_no_choice(model) -> None:
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(1, 5), prediction_heads=True, use_cache=True)
    mixer = {"type": "stochastic", "main": "a", "mixers": {"a": ATTENTION}}
    with pytest.raises(ValueError, match="not a stochastic one"):
        supernet_spec(prediction_heads=[{"block": {**HEAD["block"], "mixer": mixer}}])


def test_decoding_does_not_read_them(model) -> None:
    assert parameter_counts(model.spec) == parameter_counts(supernet_spec())


def test_they_are_kept(model, tmp_path) -> None:
    model.save_pretrained(tmp_path / "model")
    convert(tmp_path / "model").write(tmp_path / "copy")
    export(tmp_path / "copy", "gdn").write(tmp_path / "pruned")
    pruned = GearshiftForCausalLM.from_pretrained(tmp_path / "pruned").eval()
    ids = tokens(1, 9)
    with torch.no_grad():
        ours = pruned(ids, prediction_heads=True).prediction_logits
        theirs = model(ids, placement="gdn", prediction_heads=True).prediction_logits
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))
    with pytest.raises(ValueError, match="prediction_heads"):
        export(tmp_path / "copy", "attention", "llama")
