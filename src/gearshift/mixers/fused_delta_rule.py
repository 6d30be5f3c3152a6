"""The gated delta rule on CUDA: flash-linear-attention's kernels, which also apply the gates and the L2 norms."""

import torch
from torch import Tensor

from gearshift.mixers.base import MixContext, MixerState
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
    )
    if state is not None:
        state["recurrent"] = final
    return output
