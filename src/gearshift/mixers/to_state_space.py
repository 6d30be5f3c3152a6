"""What the Mamba mixers take from attention: C from its queries, B from its keys, x from its values, and its output."""

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.base import Start
from gearshift.mixers.from_attention import repeated_heads
from gearshift.plan import Constant, LastTap, Reference


def projections(source: AttentionSpec, hidden_size: int, heads: int) -> dict[str, Start]:
    """The four projections, with the keys and values of the attention repeated in place for `heads` heads of B and x.

    Linear attention without its softmax is this recurrence (arXiv 2408.15237, 2408.10189), a head
    for a head. `heads` is a multiple of the attention's kv_heads and divides its heads. Its biases stay behind.
    """
    return {
        "c_proj.weight": Reference("q_proj.weight"),
        "o_proj.weight": Reference("o_proj.weight"),
        "b_proj.weight": repeated_heads("k_proj.weight", source, hidden_size, heads),
        "x_proj.weight": repeated_heads("v_proj.weight", source, hidden_size, heads),
    }


def convolution(name: str, activation: str, bias: bool) -> dict[str, Start]:
    """A convolution that starts as the identity; as half of it, like a delta rule's, if an activation follows."""
    made: dict[str, Start] = {f"{name}.weight": LastTap(1.0 if activation == "linear" else 0.5)}
    return made | {f"{name}.bias": Constant(0.0)} if bias else made


def check_state(source: AttentionSpec, target: str, state_size: int) -> None:
    """ValueError unless the state is as wide as a head of the attention's queries and keys."""
    if state_size != source.head_dim:
        raise ValueError(
            f"a {target} with state_size {state_size} cannot start from attention with head_dim {source.head_dim}: "
            f"leave state_size out or use init: random"
        )
