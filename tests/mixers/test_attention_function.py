"""Flex attention as it is called here gives what the other attention functions give."""

import pytest
import torch
from contract_cases import context

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.attention.module import Attention
from gearshift.mixers.attention_function import FLEX


@pytest.mark.parametrize("window", [None, 20])
def test_heads_that_are_no_power_of_two_share_keys_and_values(window: int | None) -> None:
    spec = AttentionSpec(heads=6, kv_heads=2, head_dim=16, window=window).resolved(96)
    torch.manual_seed(0)
    module, hidden = Attention(spec, 96).eval(), torch.randn(2, 140, 96)
    made = {}
    with torch.no_grad():
        for name in ("sdpa", FLEX):
            about = context(140, batch=2)
            about.attn_implementation = name
            made[name] = module(hidden, about)
    torch.testing.assert_close(made[FLEX], made["sdpa"])


def test_dropout_is_refused() -> None:
    module = Attention(AttentionSpec(heads=2, head_dim=16, dropout=0.1).resolved(32), 32)
    about = context(140)
    about.attn_implementation = FLEX
    with pytest.raises(ValueError, match="flex_attention has no dropout"):
        module(torch.randn(1, 140, 32), about)
