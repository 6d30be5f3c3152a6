"""What both delta-rule mixers take from attention: its queries, keys, values and output, a head for a head."""

import math
from collections.abc import Mapping

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Start
from gearshift.plan import Constant, LastTap, Reference, Repeat, Reshape


def check_heads(source: AttentionSpec, target: str, sizes: Mapping[str, int | None]) -> None:
    """ValueError unless every size of the target, by its name, is the one of the attention that it starts from.

    A delta rule has a state for each head of queries and reads it into the columns of that head in `o_proj`, so both
    the number and the width of the heads are fixed by the weights.
    """
    for name, size in sizes.items():
        given = "head_dim" if name.endswith("dim") else "heads"
        if size != getattr(source, given):
            raise ValueError(
                f"a {target} with {name} {size} cannot start from attention with {given} {getattr(source, given)}: "
                f"leave {name} out or use init: random"
            )


def repeated_heads(name: str, source: AttentionSpec, hidden_size: int, heads: int) -> Start:
    """The attention's key or value projection `name`, each head repeated in place so that there are `heads` of them.

    In place, the query, key, value and output channels of a head stay together: query head h of grouped-query attention
    reads KV head h // (heads / kv_heads). `heads` is a multiple of the attention's kv_heads.
    """
    assert source.kv_heads is not None, "a transfer needs a resolved spec"
    assert source.head_dim is not None, "a transfer needs a resolved spec"
    if heads == source.kv_heads:
        return Reference(name)
    kept = Reshape(Reference(name), (source.kv_heads, source.head_dim, hidden_size))
    return Reshape(Repeat(kept, 0, heads // source.kv_heads), (heads * source.head_dim, hidden_size))


def head_for_head(source: AttentionSpec, hidden_size: int) -> dict[str, Start]:
    """The projections, with shared keys and values repeated in place; the convolutions; the decay.

    A convolution starts as half the identity. The decay starts at exp(-0.1 softplus(0)) = 0.93 a token: measured on
    SmolLM2, slower and faster starts both learn less from the same steps (`docs/benchmarks.md`). The source's biases
    stay behind: the mixer has none.
    """
    made: dict[str, Start] = {name: Reference(name) for name in ("q_proj.weight", "o_proj.weight")}
    for name in ("k_proj.weight", "v_proj.weight"):
        made[name] = repeated_heads(name, source, hidden_size, source.heads)
    for name in "qkv":
        made[f"{name}_conv.weight"] = LastTap(0.5)
    return made | {"A_log": Constant(math.log(0.1)), "dt_bias": Constant(0.0)}
