"""The gated delta rule on CUDA: flash-linear-attention's kernels, which also apply the gates and the L2 norms."""

from typing import Any

import torch
from torch import Tensor

from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.footprint import CHUNK, Footprint, declares
from gearshift.mixers.kernels import kernel

DECAY_PER_HEAD = "fla.ops.gated_delta_rule:{}_gated_delta_rule"
DECAY_PER_CHANNEL = "fla.ops.kda:{}_kda"


def fused_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    context: MixContext,
    state: MixerState | None,
    negative_eigenvalues: bool = False,
) -> Tensor:
    """The outputs, shaped and typed as `value` [batch, tokens, value_heads, value_dim].

    query and key [batch, tokens, key_heads, key_dim]; decay, before its activation, [batch, tokens, value_heads] (one a
    head, Gated DeltaNet) or [batch, tokens, value_heads, key_dim] (one a channel, Kimi Delta Attention); beta [batch,
    tokens, value_heads], before the sigmoid; a_log [value_heads]; dt_bias, one number for each of a token's decays.
    Reads and writes `state["recurrent"]`, in float32. ImportError without flash-linear-attention.
    """
    rule = DECAY_PER_HEAD if decay.ndim == 3 else DECAY_PER_CHANNEL
    # The kernel for single steps has no backward.
    decoding = value.shape[1] == 1 and not torch.is_grad_enabled()
    choice = {"disable_recompute": not context.recompute} if rule == DECAY_PER_CHANNEL and not decoding else {}
    output, final = kernel(rule.format("fused_recurrent" if decoding else "chunk"))(
        q=query,
        k=key,
        v=value,
        g=decay,
        beta=beta,
        A_log=a_log,
        dt_bias=dt_bias,
        initial_state=None if state is None else state.get("recurrent"),
        output_final_state=state is not None,
        use_qk_l2norm_in_kernel=True,
        use_gate_in_kernel=True,
        use_beta_sigmoid_in_kernel=True,
        allow_neg_eigval=negative_eigenvalues,
        cu_seqlens=context.cu_seqlens,
        **choice,
    )
    if state is not None:
        state["recurrent"] = final
    return output


@declares(DECAY_PER_HEAD.format("chunk"))
def _footprint_per_head(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **rest: Any) -> Footprint:
    """Of flash-linear-attention 0.6.0. Its backward pass makes the written rows and the chunks' states again.

    Kept: unit queries and keys, the activated gates in float32, the inverse of each chunk's coupling matrix.
    """
    size, keys, values, states = _sizes(q, v)
    heads = v.shape[2]
    shared = 2 * q[0, 0].numel()
    written = keys + 2 * values + states  # w, u and v_new, and the state of each chunk
    return Footprint(
        outputs=(torch.empty_like(v), None),
        keeps=(v, g, beta, rest["A_log"], rest["dt_bias"]),
        kept=_whole(q, size * (shared + CHUNK * heads) + 4 * (2 * q.shape[2] + 2 * heads)),
        forward=_whole(q, size * written),
        # The gradients of: outputs' values twice, states, queries, keys and w, keys and values once more; gates.
        backward=_whole(q, size * (written + 3 * values + states + 4 * keys) + 16 * heads),
        flops=_whole(q, _operations(keys, values, states)),
    )


@declares(DECAY_PER_CHANNEL.format("chunk"))
def _footprint_per_channel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **rest: Any) -> Footprint:
    """Of flash-linear-attention 0.6.0. Its backward pass makes the decays, written rows and states again.

    Kept: unit queries and keys, beta in float32, two matrices of a chunk's scores; without recomputation also the
    decays, written rows and states. Decays and the gradients of queries, keys and decays are in float32.
    """
    size, keys, values, states = _sizes(q, v)
    heads = v.shape[2]
    shared = 2 * q[0, 0].numel()
    scores = CHUNK * heads
    made = size * (2 * keys + 2 * values + states) + 4 * keys  # w and kg, u and v_new, each chunk's state; decays
    queries = size * keys  # with their decays, wanted in the backward pass only
    keeps_all = bool(rest.get("disable_recompute"))
    return Footprint(
        outputs=(torch.empty_like(v), None),
        keeps=(v, g, beta, rest["A_log"], rest["dt_bias"]),
        kept=_whole(q, size * (shared + 2 * scores) + 4 * (2 * q.shape[2] + heads) + keeps_all * (made + queries)),
        forward=_whole(q, (not keeps_all) * made + scores),  # scores of a quarter of a chunk, in float32
        # Beyond those: three gradients of values, the states'; gradients of queries, keys and decays twice; and those
        # of both score matrices.
        backward=_whole(
            q,
            (not keeps_all) * (made + queries) + size * (3 * values + states) + 4 * (6 * keys + 2 * scores),
        ),
        flops=_whole(q, _operations(keys, values, states)),
    )


def _sizes(query: Tensor, value: Tensor) -> tuple[int, int, int, int]:
    """Bytes of a number; numbers a token of all value heads' keys, of their values, and of a chunk's states."""
    heads, width = value.shape[2], query.shape[-1]
    return value.element_size(), heads * width, heads * value.shape[-1], heads * width * value.shape[-1] // CHUNK


def _operations(keys: int, values: int, states: int) -> int:
    """Operations a token: within a chunk three products of scores and three with rows; four with the states."""
    return 2 * CHUNK * 3 * (keys + values) // 2 + 2 * 4 * states * CHUNK


def _whole(query: Tensor, a_token: int) -> int:
    return query.shape[0] * query.shape[1] * a_token
