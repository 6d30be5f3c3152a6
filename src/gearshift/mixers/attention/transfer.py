"""Attention from attention: the same heads, with another window or with fewer or more key and value heads."""

from collections.abc import Mapping
from typing import Any

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Transfer
from gearshift.plan import Expression, Reference, Repeat, Reshape
from gearshift.spec import MixerSpec


def infer(source: MixerSpec, hidden_size: int, given: Mapping[str, Any]) -> AttentionSpec:
    """The source's settings, changed by what is given."""
    return AttentionSpec.model_validate({**source.model_dump(), **given}).resolved(hidden_size)


def plan(source: MixerSpec, target: MixerSpec, hidden_size: int) -> Mapping[str, Expression]:
    """Every tensor as it is; keys and values repeated in place where the target has more of them."""
    assert isinstance(source, AttentionSpec)
    assert isinstance(target, AttentionSpec)
    assert source.kv_heads is not None
    assert target.kv_heads is not None
    assert source.head_dim is not None
    for name in ("heads", "head_dim"):
        if getattr(source, name) != getattr(target, name):
            there, here = getattr(target, name), getattr(source, name)
            raise ValueError(
                f"attention with {name} {there} cannot start from attention with {name} {here}: use init: random"
            )
    if target.kv_heads % source.kv_heads:
        raise ValueError(
            f"{target.kv_heads} kv_heads cannot start from {source.kv_heads}: only whole multiples can, or init: random"
        )
    times = target.kv_heads // source.kv_heads
    made: dict[str, Expression] = {
        "q_proj.weight": Reference("q_proj.weight"),
        "o_proj.weight": Reference("o_proj.weight"),
    }
    for name in "kv":
        made[f"{name}_proj.weight"] = _repeated(f"{name}_proj.weight", source, times, (hidden_size,))
    if source.qk_norm is not None and target.qk_norm is not None:
        made |= _norms(source, target)
    if source.qkv_bias and target.qkv_bias:
        made["q_proj.bias"] = Reference("q_proj.bias")
        made |= {f"{name}_proj.bias": _repeated(f"{name}_proj.bias", source, times, ()) for name in "kv"}
    if source.output_bias and target.output_bias:
        made["o_proj.bias"] = Reference("o_proj.bias")
    return made


def _norms(source: AttentionSpec, target: AttentionSpec) -> Mapping[str, Expression]:
    """The norms of queries and keys. ValueError where theirs are over other channels."""
    if source.qk_norm_across_heads != target.qk_norm_across_heads:
        raise ValueError("qk_norm_across_heads must be that of the attention it starts from, or use init: random")
    across = source.qk_norm_across_heads and source.kv_heads != target.kv_heads
    assert target.kv_heads is not None
    assert source.kv_heads is not None
    times = target.kv_heads // source.kv_heads if across else 1
    return {
        "q_norm.weight": Reference("q_norm.weight"),
        "k_norm.weight": _repeated("k_norm.weight", source, times, ()),
    }


def _repeated(name: str, source: AttentionSpec, times: int, rest: tuple[int, ...]) -> Expression:
    """A key or value tensor with each head repeated `times` times in place."""
    if times == 1:
        return Reference(name)
    assert source.kv_heads is not None
    assert source.head_dim is not None
    heads = Reshape(Reference(name), (source.kv_heads, source.head_dim, *rest))
    return Reshape(Repeat(heads, 0, times), (source.kv_heads * times * source.head_dim, *rest))


FROM_ATTENTION = Transfer(infer, plan)
