"""The whole model on CUDA against the same weights on the CPU: prefill, decoding, padding, beams."""

from itertools import pairwise

import pytest
import torch
from tests.models import supernet, tokens

from gearshift.model import GearshiftCache

HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
MIXERS = {
    "attention": {"type": "attention", **HEADS},
    "window": {"type": "attention", **HEADS, "window": 6},
    "gdn": {"type": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 32, "value_dim": 32},
    "kda": {"type": "kimi_delta_attention", "heads": 4, "head_dim": 32},
}
PLACEMENTS = [*MIXERS, list(MIXERS)]

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def models():
    """On CUDA and on the CPU, with the same weights: small ones, for large ones make attention a choice of one token,
    which bfloat16 alone (on the CPU too) changes by 12 %."""
    there = supernet(mixers=MIXERS, hidden_size=128)
    with torch.no_grad():
        for parameter in there.parameters():
            if parameter.ndim == 2:
                parameter.div_(4)
    there = there.bfloat16().float()
    here = supernet(mixers=MIXERS, hidden_size=128)
    here.load_state_dict(there.state_dict())
    return here.bfloat16().cuda().eval(), there.eval()


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_logits_and_cache(models, placement) -> None:
    here, there = models
    ids = tokens(3, 90)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :40] = 0, 0
    with torch.no_grad():
        expected = there(ids, attention_mask=mask, placement=placement).logits
        whole = here(ids.cuda(), attention_mask=mask.cuda(), placement=placement).logits
        cache = GearshiftCache(here.spec, here.placement(placement))
        parts = [
            here(
                ids[:, start:stop].cuda(),
                attention_mask=mask[:, :stop].cuda(),
                past_key_values=cache,
                placement=placement,
            ).logits
            for start, stop in pairwise([0, 70, 71, 72, 90])
        ]
    seen = mask.bool()
    for found in (whole, torch.cat(parts, 1)):
        error = (found.cpu().float() - expected)[seen].norm() / expected[seen].norm()
        assert error <= 2e-2, f"relative error {error:.2e}"


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=str)
def test_generation(models, placement, settings) -> None:
    """Where the CPU is sure of a token, CUDA writes the same one."""
    here, there = models
    ids = tokens(2, 40)
    settings = {"do_sample": False, "max_new_tokens": 12, **settings}
    made = here.generate(ids.cuda(), attention_mask=torch.ones_like(ids).cuda(), placement=placement, **settings).cpu()
    assert made.shape == (2, 52)
    if "num_beams" not in settings:
        with torch.no_grad():
            scores = there(made, placement=placement).logits[:, 39:-1]
        best, second = scores.topk(2).values.unbind(-1)
        sure = best - second > 0.1 * scores.std()
        assert sure.any()
        assert torch.equal(scores.argmax(-1)[sure], made[:, 40:][sure])
