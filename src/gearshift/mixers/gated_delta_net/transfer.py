"""Gated DeltaNet from attention, head for head."""

from collections.abc import Mapping
from typing import Any

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Start, Transfer
from gearshift.mixers.from_attention import check_heads, head_for_head
from gearshift.mixers.gated_delta_net import GatedDeltaNetSpec
from gearshift.spec import MixerSpec


def infer(source: MixerSpec, hidden_size: int, given: Mapping[str, Any]) -> GatedDeltaNetSpec:
    """As many heads, and as wide ones, as the attention has, changed by what is given.

    The output gate becomes a sigmoid unless given: it starts half open, where SiLU starts at zero with random signs and
    hides what the attention's weights would give (measured in `docs/benchmarks.md`).
    """
    assert isinstance(source, AttentionSpec)
    source = source.resolved(hidden_size)
    defaults = {
        "key_heads": source.heads,
        "value_heads": source.heads,
        "key_dim": source.head_dim,
        "value_dim": source.head_dim,
        "activation": "sigmoid",
    }
    return GatedDeltaNetSpec.model_validate({**defaults, **given}).resolved(hidden_size)


def plan(source: MixerSpec, target: MixerSpec, hidden_size: int) -> Mapping[str, Start]:
    """Queries, keys, values and output from the attention; the gates start from the initialisers.

    ValueError if the target's heads are not the attention's in number and width. Biases are left behind.
    """
    assert isinstance(source, AttentionSpec)
    assert isinstance(target, GatedDeltaNetSpec)
    source, target = source.resolved(hidden_size), target.resolved(hidden_size)
    sizes = {name: getattr(target, name) for name in ("key_heads", "value_heads", "key_dim", "value_dim")}
    check_heads(source, target.type, sizes)
    return head_for_head(source, hidden_size)


FROM_ATTENTION = Transfer(infer, plan)
