"""Mamba from attention: with a grouped projection as published (arXiv 2408.15237), with a classic one in part."""

from collections.abc import Mapping
from typing import Any

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Start, Transfer
from gearshift.mixers.mamba import MambaSpec
from gearshift.mixers.to_state_space import check_state, convolution, projections
from gearshift.spec import MixerSpec


def infer(source: MixerSpec, hidden_size: int, given: Mapping[str, Any]) -> MambaSpec:
    """The attention's heads, query heads to C and KV heads to x and B, changed by what is given.

    The projection becomes grouped unless given: only that one has a place for the queries and the keys.
    """
    assert isinstance(source, AttentionSpec)
    source = source.resolved(hidden_size)
    assert source.kv_heads is not None
    assert source.head_dim is not None
    sizes: dict[str, Any] = {"projection": "grouped", "inner_size": source.heads * source.head_dim}
    if given.get("projection", "grouped") == "grouped":
        sizes |= {"state_size": source.head_dim, "xb_size": source.kv_heads * source.head_dim}
    return MambaSpec.model_validate({**sizes, **given}).resolved(hidden_size)


def plan(source: MixerSpec, target: MixerSpec, hidden_size: int) -> Mapping[str, Start]:
    """C, B, x and output from the attention; dt, rates, skip and gate start from the initialisers.

    In a classic projection B and C come from the convolved x and are shared by all channels, which no attention does:
    x takes the values, repeated in place, the output projection the output, and the rest starts from the initialisers.
    ValueError if the target's heads are not the attention's in number and width. Biases are left behind.
    """
    assert isinstance(source, AttentionSpec)
    assert isinstance(target, MambaSpec)
    source, target = source.resolved(hidden_size), target.resolved(hidden_size)
    assert source.kv_heads is not None
    assert source.head_dim is not None
    inner = source.heads * source.head_dim
    if target.inner_size != inner:
        raise ValueError(
            f"a {target.type} with inner_size {target.inner_size} cannot start from attention with {inner} channels, "
            f"heads * head_dim: leave inner_size out or use init: random"
        )
    made = convolution("conv", target.activation, target.conv_bias)
    if target.projection == "classic":
        made |= projections(source, hidden_size, source.heads)
        return {name: made[name] for name in made if name not in ("b_proj.weight", "c_proj.weight")}
    check_state(source, target.type, target.state_size)
    assert target.xb_size is not None
    heads = target.xb_size // source.head_dim
    if heads % source.kv_heads:
        raise ValueError(
            f"a {target.type} with {heads} heads of x and B, xb_size / state_size, cannot start from attention with "
            f"{source.kv_heads} kv_heads: leave xb_size out or give a multiple"
        )
    return made | projections(source, hidden_size, heads)


FROM_ATTENTION = Transfer(infer, plan)
