"""Mamba-2 from attention, head for head."""

from collections.abc import Mapping
from typing import Any

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Start, Transfer
from gearshift.mixers.from_attention import check_heads
from gearshift.mixers.mamba2 import Mamba2Spec
from gearshift.mixers.to_state_space import check_state, convolution, projections
from gearshift.spec import MixerSpec


def infer(source: MixerSpec, hidden_size: int, given: Mapping[str, Any]) -> Mamba2Spec:
    """As many heads and groups, and as wide ones, as the attention has query heads, changed by what is given."""
    assert isinstance(source, AttentionSpec)
    source = source.resolved(hidden_size)
    sizes = {
        "heads": source.heads,
        "groups": source.heads,
        "head_dim": source.head_dim,
        "state_size": source.head_dim,
    }
    return Mamba2Spec.model_validate({**sizes, **given}).resolved(hidden_size)


def plan(source: MixerSpec, target: MixerSpec, hidden_size: int) -> Mapping[str, Start]:
    """C, B, x and output from the attention; steps, decays, skip, gate and norm start from the initialisers.

    Queries are not shared, so neither can C be: `groups` is the number of heads. ValueError if the target's heads are
    not the attention's in number and width. Biases are left behind.
    """
    assert isinstance(source, AttentionSpec)
    assert isinstance(target, Mamba2Spec)
    source, target = source.resolved(hidden_size), target.resolved(hidden_size)
    sizes = {"heads": target.heads, "groups": target.groups, "head_dim": target.head_dim}
    check_heads(source, target.type, sizes)
    check_state(source, target.type, target.state_size)
    made = projections(source, hidden_size, source.heads)
    for name in ("x", "b", "c"):
        made |= convolution(f"{name}_conv", target.activation, target.conv_bias)
    return made


FROM_ATTENTION = Transfer(infer, plan)
