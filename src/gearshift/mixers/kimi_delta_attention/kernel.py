"""Kimi Delta Attention's core on CUDA: flash-linear-attention's kernels, which also apply the gates and L2 norms."""

import torch
from torch import Tensor

from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.kernels import kernel


def kimi_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    context: MixContext,
    state: MixerState | None,
) -> Tensor:
    """The outputs, shaped and typed as `value` [batch, tokens, heads, head_dim].

    query, key and decay (before its activation) are shaped as `value`; beta [batch, tokens, heads], before the sigmoid;
    a_log [heads]; dt_bias [heads * head_dim]. Reads and writes `state["recurrent"]`, in float32.
    ImportError without flash-linear-attention.
    """
    # The kernel for single steps has no backward.
    decoding = value.shape[1] == 1 and not torch.is_grad_enabled()
    name = "fused_recurrent_kda" if decoding else "chunk_kda"
    output, final = kernel(f"fla.ops.kda:{name}")(
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
        cu_seqlens=context.cu_seqlens,
    )
    if state is not None:
        state["recurrent"] = final
    return output
