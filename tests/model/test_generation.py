"""Cached generation equals recomputation, packed documents equal separate ones: every mixer, mixed placements."""

from itertools import pairwise

import pytest
import torch
from tests.models import MIXERS, supernet, tokens

from gearshift.model import GearshiftCache

MIXED = ["attention", "gdn", "window", "kda"]
PLACEMENTS = [*MIXERS, MIXED]


@pytest.fixture(scope="module")
def model():
    return supernet()


@torch.no_grad()
def logits(model, ids, **kwargs):
    return model(ids, **kwargs).logits


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "do_sample": True}], ids=str
)
def test_cached_generation_equals_recomputation(model, placement, settings) -> None:
    ids = tokens(2, 9)
    made = []
    for cached in (True, False):
        torch.manual_seed(0)
        settings = {"do_sample": False, "max_new_tokens": 14, "use_cache": cached, **settings}
        made.append(model.generate(ids, attention_mask=torch.ones_like(ids), placement=placement, **settings))
    assert torch.equal(*made)


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_prefill_decode_prefill(model, placement) -> None:
    ids = tokens(2, 30)
    cache = GearshiftCache(model.spec, model.placement(placement))
    pieces = [0, 11, 12, 13, 22, 23, 30]
    parts = [
        logits(model, ids[:, start:stop], past_key_values=cache, placement=placement)
        for start, stop in pairwise(pieces)
    ]
    whole = logits(model, ids, placement=placement)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.bytes == 2 * model.spec.state_bytes(cache.placement, 30, "float32")


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_left_padding_changes_nothing(model, placement) -> None:
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    mask[2, :16] = 0
    padded = logits(model, ids, attention_mask=mask, placement=placement)
    for row, start in enumerate((0, 7, 16)):
        alone = logits(model, ids[row : row + 1, start:], placement=placement)
        torch.testing.assert_close(padded[row : row + 1, start:], alone, rtol=1e-4, atol=1e-4)
    made = model.generate(ids, attention_mask=mask, placement=placement, max_new_tokens=8, do_sample=False)
    for row, start in enumerate((0, 7, 16)):
        alone = ids[row : row + 1, start:]
        alone = model.generate(
            alone, attention_mask=torch.ones_like(alone), placement=placement, max_new_tokens=8, do_sample=False
        )
        assert torch.equal(made[row, 20:], alone[0, 20 - start :])


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_equal_separate_ones(model, placement, implementation) -> None:
    model.set_attn_implementation(implementation)
    try:
        ids = tokens(1, 41)
        bounds = [0, 1, 4, 20, 41]
        packed = logits(model, ids, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), placement=placement)
        for start, stop in pairwise(bounds):
            alone = logits(model, ids[:, start:stop], placement=placement)
            torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-4, atol=1e-4)
    finally:
        model.set_attn_implementation("sdpa")


def test_beams_and_batches_move_the_state(model) -> None:
    ids = tokens(2, 10)
    cache = GearshiftCache(model.spec, model.placement(MIXED))
    logits(model, ids, past_key_values=cache, placement=MIXED)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    expected = ids[[1, 0, 0]]
    step = tokens(3, 1, seed=1)
    after = logits(model, step, past_key_values=cache, placement=MIXED)
    whole = logits(model, torch.cat([expected, step], 1), placement=MIXED)[:, -1:]
    torch.testing.assert_close(after, whole, rtol=1e-4, atol=1e-4)


def test_cropping_is_refused_where_it_cannot_be_done(model) -> None:
    ids = tokens(1, 10)
    cache = GearshiftCache(model.spec, model.placement("attention"))
    logits(model, ids, past_key_values=cache, placement="attention")
    cache.crop(4)
    again = logits(model, ids[:, 6:], past_key_values=cache, placement="attention")
    torch.testing.assert_close(again, logits(model, ids, placement="attention")[:, 6:], rtol=1e-4, atol=1e-4)
    for placement in ("gdn", "window"):
        cache = GearshiftCache(model.spec, model.placement(placement))
        logits(model, ids, past_key_values=cache, placement=placement)
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(1)


def test_misuse_is_explained(model) -> None:
    ids = tokens(2, 6)
    cache = GearshiftCache(model.spec, model.placement("gdn"))
    with pytest.raises(ValueError, match="filled under the placement gdn"):
        model(ids, past_key_values=cache, placement="kda")
    with pytest.raises(ValueError, match="cannot be used with a cache"):
        model(ids[:1], past_key_values=cache, placement="gdn", cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="batch of one"):
        model(ids, cu_seqlens=torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="must rise from 0"):
        model(ids[:1], cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="pad on the left"):
        model(ids, attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0]] * 2))
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        model()
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)


def test_the_placement_of_a_call(model) -> None:
    ids = tokens(1, 8)
    main = logits(model, ids)
    assert torch.equal(main, logits(model, ids, placement="attention"))
    model.set_placement("gdn")
    assert torch.equal(logits(model, ids), logits(model, ids, placement=["gdn"] * 4))
    assert torch.equal(logits(model, ids, placement="attention"), main)
    model.set_placement(None)
    assert torch.equal(logits(model, ids), main)
    model.config.presets = {"fast": "kda*4"}
    model.config.default_preset = "fast"
    try:
        assert model.presets["fast"].mixers == ("kda",) * 4
        assert torch.equal(logits(model.train(), ids), logits(model, ids, placement="kda"))
    finally:
        model.eval()
        model.config.presets, model.config.default_preset = {}, None
