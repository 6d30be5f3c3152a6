"""Discrete Mamba-2 from attention, head for head."""

from collections.abc import Mapping
from typing import Any

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Start, Transfer
from gearshift.mixers.discrete_mamba2 import DiscreteMamba2Spec
from gearshift.mixers.from_attention import check_heads
from gearshift.mixers.to_state_space import check_state, convolution, projections
from gearshift.plan import Constant
from gearshift.spec import MixerSpec

OPEN = 1.2784645
"""SiLU of this is one: a gate that lets everything through."""


def infer(source: MixerSpec, hidden_size: int, given: Mapping[str, Any]) -> DiscreteMamba2Spec:
    """As many heads, and as wide ones, as the attention has query heads, changed by what is given."""
    assert isinstance(source, AttentionSpec)
    source = source.resolved(hidden_size)
    sizes = {
        "value_heads": source.heads,
        "key_heads": source.heads,
        "head_dim": source.head_dim,
        "state_size": source.head_dim,
    }
    return DiscreteMamba2Spec.model_validate({**sizes, **given}).resolved(hidden_size)


def plan(source: MixerSpec, target: MixerSpec, hidden_size: int) -> Mapping[str, Start]:
    """C, B, x and output from the attention; the gate starts open; decays and skip start from the initialisers.

    Queries are not shared, so neither can C be: `key_heads` is the number of heads. ValueError if the target's heads
    are not the attention's in number and width. Biases are left behind.
    """
    assert isinstance(source, AttentionSpec)
    assert isinstance(target, DiscreteMamba2Spec)
    source, target = source.resolved(hidden_size), target.resolved(hidden_size)
    sizes = {"value_heads": target.value_heads, "key_heads": target.key_heads, "head_dim": target.head_dim}
    check_heads(source, target.type, sizes)
    check_state(source, target.type, target.state_size)
    made = projections(source, hidden_size, source.heads)
    for name in ("x", "b", "c"):
        made |= convolution(f"{name}_conv", target.activation, target.conv_bias)
    return made | {"gate_proj.bias": Constant(OPEN)}


FROM_ATTENTION = Transfer(infer, plan)
